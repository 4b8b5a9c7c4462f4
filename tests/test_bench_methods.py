"""bench/methods.py: run by run into a record that a later call goes on with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are no package of the wheel
from bench import methods
from cit_fast.errors import DataError
from cit_fast.methods.config import presets

FIGURES = {"AP": 60.0, "New.ACC": 70.0, "forgetting": 10.0, "learned": 30.0, "tasks": 2}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Figures instead of runs; what was run is in ``runs``, and the third run fails once."""
    done: list[str] = []

    class Trainer:
        def __init__(self, settings, **_):
            self.name = f"{settings['methods'][0]['preset']}/{settings['seed']}"

        def run(self):
            if len(done) == 2 and "interrupted" not in done:
                done.append("interrupted")
                raise KeyboardInterrupt
            done.append(self.name)
            return [self.name]

    class Run:
        environment, tasks = {"torch": "2"}, ["a", "b"]

    low = {**FIGURES, "learned": 5.0, "AP": 20.0}
    monkeypatch.setattr(methods, "ContinualTrainer", Trainer)
    monkeypatch.setattr(methods, "read_run", lambda folder: Run)
    monkeypatch.setattr(methods, "figures", lambda folder: low if folder.startswith("sequential") else dict(FIGURES))
    monkeypatch.setattr(methods, "settings", lambda options, seed, chosen: {"methods": [chosen], "seed": seed})
    empty = dict.fromkeys(methods.COLUMNS)
    monkeypatch.setattr(methods, "cell", lambda values, digits=1: "–" if None in values else f"{values[0]}")
    FIGURES.update({key: FIGURES.get(key, value) for key, value in empty.items()})
    low.update({key: low.get(key, value) for key, value in empty.items()})
    return done


def call(monkeypatch, tmp_path, *more: str) -> dict:
    results = tmp_path / "record.json"
    argv = ["methods.py", str(tmp_path), "--no-joint", "--results", str(results), *more]
    monkeypatch.setattr(sys, "argv", argv)
    methods.main()
    return json.loads(results.read_text())


def test_a_comparison_goes_on_run_by_run(monkeypatch, tmp_path, runs, capsys):
    asked = ("--methods", "sequential", "random-replay", "--seeds", "0", "1")
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, tmp_path, *asked)
    record = call(monkeypatch, tmp_path, *asked)
    assert [name for name in runs if name != "interrupted"] == [
        f"{name}/{seed}" for seed in (0, 1) for name in ("sequential", "random-replay")
    ]
    assert set(record["runs"]) == set(runs) - {"interrupted"}
    shown = capsys.readouterr().out
    assert "sequential (not learned)" in shown
    assert "random-replay (not learned)" not in shown
    assert "random-replay: AP +40.0" in shown
    call(monkeypatch, tmp_path, "--methods", "sequential", "--seeds", "0", "1", "2")
    assert runs[-1] == "sequential/2"
    assert len(runs) == 6


def test_a_record_of_other_options_is_refused(monkeypatch, tmp_path, runs):
    call(monkeypatch, tmp_path, "--methods", "sequential", "--seeds", "0")
    with pytest.raises(DataError, match="holds runs of other options"):
        call(monkeypatch, tmp_path, "--methods", "sequential", "--seeds", "0", "--train", "9")


def test_every_preset_can_be_compared():
    assert all(methods.method(name, methods.argparse.Namespace(fraction=0.05, per_task=None)) for name in presets())
