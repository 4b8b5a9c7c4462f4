"""How long a run takes: what is kept of a stage, what a plan makes of it, what the progress bar says."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import yaml
from rich.console import Console

from cit_fast.cli import main
from cit_fast.evaluation.records import StageRecord
from cit_fast.evaluation.run_files import read_stages
from cit_fast.run import stage_trainer
from cit_fast.run.config import load_config
from cit_fast.run.loop import ContinualTrainer
from cit_fast.run.pace import Pace, Paces, TimeLeft, duration
from cit_fast.run.plan import StagePlan


@pytest.fixture
def path(settings, tmp_path):
    data = {"tasks": ["units", "records"], "train": 8, "test": 3, "max_length": 256}
    training = {**settings["training"], "num_train_epochs": 1, "per_device_train_batch_size": 4}
    methods = ["sequential", {"preset": "random-replay", "replay": {"fraction": 0.5}}]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "data": data, "training": training, "methods": methods}))
    return path


def plan(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cit-fast", "run", str(path), "--plan"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().out


def test_a_plan_says_how_long_a_run_takes_once_one_stage_has_ended(path, monkeypatch, capsys):
    first = plan(path, monkeypatch, capsys)
    assert "How long it takes is not known" in first
    assert "?" in first
    config = load_config(path)
    folders = ContinualTrainer(config, console=Console(quiet=True)).run()
    text = plan(path, monkeypatch, capsys)
    assert "All of it takes about " in text
    assert "?" not in text
    stage = read_stages(folders[0])[-1]
    pace = Paces(config).of(config.methods[0])
    assert pace.step == stage.train_seconds / stage.steps
    assert pace.prompt == stage.evaluate_seconds / 6
    assert pace.memory > 1e8
    row = next(row for row in text.splitlines() if " records " in row).split()
    tokens = row[5]
    assert pace.example == int(tokens) / 8
    assert pace.seconds(StagePlan(("records",), 8, 0, stage.steps, int(tokens), 6)) == pytest.approx(
        stage.train_seconds + stage.evaluate_seconds
    )


def test_another_model_or_batch_has_a_pace_of_its_own(path):
    config = load_config(path)
    stage = dataclasses.replace(_record(), steps=4, train_seconds=8.0, evaluate_seconds=3.0, train_examples=10)
    Paces(config).keep(config.methods[0], stage, 50.0, 6)
    kept = Paces(config).of(config.methods[0])
    assert (kept.step, kept.example, kept.prompt) == (2.0, 50.0, 0.5)
    assert Paces(config).of(config.methods[1]) == kept  # until one of its own is known
    assert Paces(load_config(path, ["training.per_device_train_batch_size=2"])).of(config.methods[0]) is None
    assert Paces(load_config(path, ["training.learning_rate=1.0"])).of(config.methods[0]) is None
    Paces(config).keep(config.methods[1], dataclasses.replace(stage, train_seconds=40.0), 50.0, 6)
    assert Paces(config).of(config.methods[1]).step == 10
    assert Paces(config).of(config.methods[0]).step == 2


def _record():
    return StageRecord(index=1, trained=["units"], scores={})


def test_a_stage_that_answered_nothing_anew_is_no_measure(path):
    config = load_config(path)
    Paces(config).keep(config.methods[0], dataclasses.replace(_record(), steps=4, train_seconds=8.0), 50.0, 0)
    assert Paces(config).of(config.methods[0]) is None


def test_a_cache_that_cannot_be_written_stops_nothing(path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "file"))
    config = load_config(path)
    stage = dataclasses.replace(_record(), steps=4, train_seconds=8.0, evaluate_seconds=1.0)
    Paces(config).keep(config.methods[0], stage, 50.0, 6)
    assert Paces(config).of(config.methods[0]) is None


def test_longer_examples_take_longer():
    pace = Pace(step=2.0, example=50.0, prompt=0.5, memory=1)
    assert pace.seconds(StagePlan(("a",), 10, 0, 5, 500, 4)) == 12.0
    assert pace.seconds(StagePlan(("a",), 10, 0, 5, 1000, 4)) == 22.0
    assert pace.seconds(StagePlan(("a",))) is None


def test_the_time_left_counts_every_method():
    stages = [
        [StagePlan(("a",), 8, 0, 10, None, 4), StagePlan(("b",), 8, 2, 12, None, 8)],
        [StagePlan((), 8, 0, 20, None, 8)],
    ]
    clock = TimeLeft(stages, [None, None])
    assert clock.left(1, 6, 2.0) is None  # nobody knows yet how long answers take
    clock.answered(4.0, 8)
    assert clock.left(1, 6, 2.0) == 6 * 2 + 4 * 0.5 + 12 * 2 + 8 * 0.5 + 20 * 2 + 8 * 0.5
    assert clock.left(2, 0, 2.0) == 8 * 0.5 + 20 * 2 + 8 * 0.5
    clock.begin(1)
    assert clock.left(1, 5, 1.0) == 5 + 8 * 0.5
    assert TimeLeft(stages, [Pace(1.0, 0.0, 3.0, 1)] * 2).left(2, 1, 1.0) == 1 + 8 * 3 + 20 + 8 * 3
    assert TimeLeft([[StagePlan(("a",))], []], [Pace(1.0, 0.0, 3.0, 1)] * 2).left(1, 1, 1.0) is None


def test_the_bar_says_when_the_whole_run_is_over(path, capsys):
    ContinualTrainer(load_config(path), console=Console(quiet=True)).run()
    shown = capsys.readouterr().err
    assert "whole run=" in shown
    assert " left" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (7300, "2 h 02 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_run_whose_bars_are_switched_off(settings, stream, monkeypatch):
    """TQDM_DISABLE=1 makes bars without most of their attributes."""
    monkeypatch.setattr(stage_trainer, "tqdm", functools.partial(stage_trainer.tqdm, disable=True))
    (folder,) = ContinualTrainer(
        {**settings, "methods": ["sequential"]}, stream=stream, console=Console(quiet=True)
    ).run()
    assert len(read_stages(folder)) == 4
