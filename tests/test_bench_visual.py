"""LCIA's ablation on pictures: its settings run, and its table is made from what is recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cit_fast.run.config import RunConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are no package of the wheel
from bench import visual


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Calls ``main`` with arguments, and a model that is pretrained already."""
    monkeypatch.setattr(visual, "resolve_model", lambda config: Path("pretrained"))

    def call(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["bench.visual", "--output", str(tmp_path / "runs"), *arguments])
        visual.main()

    return call


def recorded(tmp_path, method, order, seed, **values):
    file = visual.file_of(visual.Job(method, order, seed), tmp_path / "runs")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"AP": 50.0, "forgetting": 10.0, "New.ACC": 60.0, **values}))


def test_a_table_is_made_of_what_is_there_and_runs_are_not_run_again(called, tmp_path, capsys):
    for order in (1, 3):
        for seed in (0, 1):
            recorded(tmp_path, "lora", order, seed)
            recorded(tmp_path, "lcia, paper", order, seed, AP=55.0 + order, forgetting=2.0)
            recorded(tmp_path, "joint", order, seed, forgetting=None)
    arguments = ("--methods", "lora", "lcia, paper", "joint", "--orders", "1", "3", "--seeds", "2")
    arguments += ("--results", str(tmp_path / "results.json"))
    called(*arguments)
    printed = capsys.readouterr().out
    assert "+7.0 [6.0, 8.0]" in printed
    assert "-8.0 [-8.0, -8.0]" in printed
    for file in (tmp_path / "runs/figures").iterdir():
        file.unlink()
    called(*arguments)  # from the record alone
    assert capsys.readouterr().out == printed
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["runs"].keys() == {
        f"{name}, order {order}, seed {seed}"
        for name in ("lora", "lcia, paper", "joint")
        for order in (1, 3)
        for seed in (0, 1)
    }


def test_what_failed_is_said_and_what_is_there_is_recorded(called, tmp_path, monkeypatch):
    monkeypatch.setattr(visual, "in_processes", lambda *_: None)
    recorded(tmp_path, "lora", 1, 0)
    results = tmp_path / "results.json"
    with pytest.raises(SystemExit, match="1 runs have no figures, the first joint, order 1, seed 0"):
        called("--methods", "lora", "joint", "--orders", "1", "--seeds", "1", "--results", str(results))
    assert list(json.loads(results.read_text())["runs"]) == ["lora, order 1, seed 0"]
    monkeypatch.setitem(visual.DATA, "train", 7)
    with pytest.raises(SystemExit, match="of another model or setting"):
        called("--methods", "lora", "--orders", "1", "--seeds", "1", "--results", str(results))


def test_every_method_is_one_that_runs(tmp_path):
    for job in (visual.Job(method, 1, 0) for method in visual.METHODS):
        RunConfig.model_validate(visual.settings(job, tmp_path))
