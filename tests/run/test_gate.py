"""A stage that breaks a limit is kept as a candidate: it is taken, or trained again."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killed import at_call, killed
from pydantic import ValidationError
from rich.console import Console
from toy_runs import adapter

from cit_fast import ContinualTrainer, cli, learn
from cit_fast.data import TaskStream
from cit_fast.errors import ConfigError, GateError, RunError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.evaluation.records import StageRecord
from cit_fast.report.status import status
from cit_fast.run import candidates, stage_evaluation
from cit_fast.run.forget import drop
from cit_fast.run.gate import GateConfig, judge
from cit_fast.run.rollback import rollback, undo_rollback
from cit_fast.run.run_folder import RunFolder

METHOD = {"preset": "random-replay", "replay": {"fraction": 0.2}}


def run(settings, stream, gate, **more) -> Path:
    config = {**settings, "methods": [METHOD], "gate": gate, "memory": "all", **more}
    (folder,) = ContinualTrainer(config, stream=stream, console=Console(quiet=True)).run()
    return folder


@pytest.fixture
def folder(settings) -> Path:
    settings["training"] |= {"max_steps": 2}
    return Path(settings["output"]) / "random-replay"


def test_a_stage_within_its_limits_is_one_without_a_gate(settings, stream, folder, tmp_path):
    gated = run(settings, stream, {"forgetting": 100, "task_fall": 100, "new_task": 0})
    plain = run(settings, stream, None, output=str(tmp_path / "plain"))
    for stage in read_stages(gated)[1:]:
        assert stage.gate.scores == {task: stage.scores[task] for task in stream.names[: stage.index]}
        assert not stage.gate.broken
        assert set(stage.gate.falls) == set(stream.names[: stage.index - 1])
    mine, right = adapter(gated, 3), adapter(plain, 3)
    assert all(torch.equal(mine[name], right[name]) for name in right)
    assert [stage.scores for stage in read_stages(gated)] == [stage.scores for stage in read_stages(plain)]


def test_a_stage_that_breaks_a_limit_is_not_the_current_one(settings, stream, folder):
    with pytest.raises(GateError, match=r"stage 1 \(alpha\) is kept as a candidate.*alpha scores .* \(at least 100\)"):
        run(settings, stream, {"new_task": 100})
    assert [stage.index for stage in read_stages(folder)] == [0]
    assert (folder / "candidates" / "01" / "stage.json").exists()
    with pytest.raises(GateError, match="--accept takes it"):  # and the same call says so again
        run(settings, stream, {"new_task": 100})
    # Taken as it is: the run that has no gate.
    for index in (1, 2, 3):
        assert candidates.accept(folder) == index
        if index < 3:
            with pytest.raises(GateError, match=rf"stage {index + 1} \("):
                run(settings, stream, {"new_task": 100})
    run(settings, stream, {"new_task": 100})
    assert read_run(folder).status == "finished"
    assert all(stage.gate.broken for stage in read_stages(folder)[1:])
    assert not (folder / "candidates").exists()
    with pytest.raises(RunError, match="no stage is a candidate"):
        candidates.accept(folder)


def test_trained_again_with_another_setting(settings, stream, folder, tmp_path):
    """The result is that of a run that had the setting from that stage on."""
    gate = {"new_task": 100}
    for index in (1, 2):
        with pytest.raises(GateError):
            run(settings, TaskStream(stream[:2]), gate)
        if index == 1:
            candidates.accept(folder)
    first = (folder / "candidates" / "02" / "adapters" / "shared" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(GateError, match=r"stage 2 \(beta\)"):
        learn(folder, retry=["training.learning_rate=1e-4", "replay.fraction=0.5"], console=Console(quiet=True))
    again = (folder / "candidates" / "02" / "adapters" / "shared" / "adapter_model.safetensors").read_bytes()
    assert again != first
    learn(folder, accept=True, console=Console(quiet=True))
    assert read_run(folder).status == "finished"
    changed = {"from": 2, "training": {"learning_rate": 1e-4}, "replay": {"fraction": 0.5}}
    assert [stage.settings for stage in read_stages(folder)] == [[], [], [changed]]
    assert read_stages(folder)[2].replayed == {"alpha": 8}
    other = run(settings, TaskStream(stream[:2]), None, output=str(tmp_path / "other"), stages=[changed])
    assert read_stages(folder)[2].losses == read_stages(other)[2].losses
    assert (folder / "stages/02/adapters/shared/adapter_model.safetensors").read_bytes() == (
        other / "stages/02/adapters/shared/adapter_model.safetensors"
    ).read_bytes()


def test_a_retry_that_cannot_be_loses_nothing_and_one_that_was_killed_goes_on(settings, folder):
    settings["data"] |= {"tasks": ["units", "records"], "train": 8, "test": 2, "max_length": 256}
    quiet = Console(quiet=True)
    with pytest.raises(GateError, match="stage 1"):
        run(settings, None, {"new_task": 100})
    before = read_run(folder)
    with pytest.raises(ConfigError, match="fractoin"):
        learn(folder, retry=["replay.fractoin=1"], console=quiet)
    with pytest.raises(GateError, match="stage 1"):  # what is refused changes nothing
        learn(folder, ["dates"], quiet, settings=["training.learning_rate=1e-5"])
    assert read_run(folder) == before
    again = ["training.learning_rate=1e-4"]
    assert killed(lambda: learn(folder, retry=again, console=quiet), at_call(1, stage_evaluation, "evaluate"))
    with pytest.raises(GateError, match="stage 1"):
        learn(folder, retry=again, console=quiet)
    with pytest.raises(GateError, match="stage 2"):
        learn(folder, accept=True, settings=["training.learning_rate=1e-5"], console=quiet)
    with pytest.raises(GateError, match="stage 3"):
        learn(folder, ["dates"], accept=True, console=quiet)
    rates = [[entry["training"]["learning_rate"] for entry in stage.settings] for stage in read_stages(folder)]
    assert rates == [[], [1e-4], [1e-4, 1e-5]]


def test_a_run_whose_tasks_only_python_has_is_accepted(settings, stream, folder):
    with pytest.raises(GateError, match="stage 1"):
        run(settings, stream, {"new_task": 100}, memory=None)
    assert learn(folder, accept=True) == folder
    with pytest.raises(GateError, match="stage 2"):
        run(settings, stream, {"new_task": 100}, memory=None)


def test_the_dev_split_judges(settings, stream, folder):
    given = TaskStream(tuple(replace(task, dev=task.test[:2]) for task in stream))
    run(settings, given, {"task_fall": 100, "on": "dev"})
    for stage in read_stages(folder)[1:]:
        assert stage.gate.split == "dev"
        assert set(stage.gate.scores) == set(stream.names[: stage.index])
    with pytest.raises(ConfigError, match=r"gate.on: task 'alpha' has no dev examples"):
        run(settings, stream, {"task_fall": 100, "on": "dev"}, output=str(folder / "other"))
    assert not (folder / "other").exists()


def test_killed_while_a_candidate_is_made_or_taken(settings, stream, folder):
    two, gate = TaskStream(stream[:2]), {"new_task": 100}
    assert killed(lambda: run(settings, two, gate), at_call(2, RunFolder, "commit"))
    with pytest.raises(GateError, match="stage 1"):
        run(settings, two, gate)
    assert killed(lambda: candidates.accept(folder), at_call(1, candidates.shutil, "rmtree"))
    with pytest.raises(GateError, match="stage 2"):  # it was taken, and the run goes on
        run(settings, two, gate)


def test_a_candidates_task_cannot_be_dropped(settings, stream, folder):
    with pytest.raises(GateError):
        run(settings, stream, {"new_task": 100})
    with pytest.raises(RunError, match="'alpha' is a candidate's task; accept the stage first"):
        drop(folder, "alpha")


def test_a_rollback_takes_the_candidate_along(settings, stream, folder):
    with pytest.raises(GateError):
        run(settings, stream, {"new_task": 100})
    candidates.accept(folder)
    with pytest.raises(GateError):
        run(settings, stream, {"new_task": 100})
    assert rollback(folder, 1) == ["beta", "gamma"]
    assert status(folder)["planned"] == 1
    run(settings, TaskStream(stream[:1]), {"new_task": 100})
    undo_rollback(folder)
    with pytest.raises(GateError, match="stage 2"):
        run(settings, stream, {"new_task": 100})


def test_exit_code_3_and_a_table(settings, folder, monkeypatch, capsys):
    settings["data"] |= {"tasks": ["units", "records"], "train": 8, "test": 2, "max_length": 256}
    with pytest.raises(GateError):
        run(settings, None, {"new_task": 100, "forgetting": 0})
    monkeypatch.setattr(sys, "argv", ["cit-fast", "learn", str(folder), "--accept"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert "new_task 100" in said
    assert "error: " in said
    assert "stage 2 (records)" in said


def test_what_learn_refuses(settings, stream, folder):
    run(settings, TaskStream(stream[:1]), None)
    with pytest.raises(RunError, match="no stage is a candidate"):
        learn(folder, accept=True)
    with pytest.raises(RunError, match="no stage is a candidate"):
        learn(folder, retry=["training.learning_rate=1e-4"])
    with pytest.raises(ConfigError, match="accept the candidate, or train it again"):
        learn(folder, accept=True, retry=["training.learning_rate=1e-4"])
    for setting, message in (
        ("training.learning_rat=1", "unknown key"),
        ("adapter.r=8", "adapter: unknown key"),
        ("replay=on-polcy", "unknown name 'on-polcy'"),
        ("nonsense", "write it as key.path=value"),
    ):
        with pytest.raises(ConfigError, match=message):
            learn(folder, ["units"], settings=[setting])
    assert len(read_stages(folder)) == 2


# -- what is judged ------------------------------------------------------------------------------------------------


def stage(index: int, trained: str, **scores: float) -> StageRecord:
    return StageRecord(index=index, trained=[trained], scores=scores)


def test_falls_are_from_the_best_since_a_task_was_trained():
    before = [stage(1, "a", a=80.0, b=99.0), stage(2, "b", a=90.0, b=60.0)]
    now = {"a": 70.0, "b": 61.0, "c": 50.0}
    config = GateConfig(forgetting=9.0, task_fall=15.0, new_task=60.0)
    found = judge(config, "test", now, ["c"], before)
    assert found.falls == {"a": 20.0, "b": -1.0}
    assert [(one.limit, one.task, one.found) for one in found.broken] == [
        ("forgetting", None, 9.5),
        ("task_fall", "a", 20.0),
        ("new_task", "c", 50.0),
    ]
    kept = judge(GateConfig(forgetting=9.5, task_fall=20.0, new_task=50.0), "test", now, ["c"], before)
    assert kept.broken == []
    first = judge(config, "test", {"a": 80.0}, ["a"], [])
    assert (first.falls, first.broken) == ({}, [])


def test_a_gate_needs_a_limit():
    with pytest.raises(ValueError, match="give a limit"):
        GateConfig()
    for wrong in ({"forgetting": -1}, {"new_task": 101}, {"task_fall": 5, "on": "train"}):
        with pytest.raises(ValidationError):
            GateConfig(**wrong)
