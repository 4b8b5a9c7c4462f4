"""Tasks that are answered but never trained, and what runs record of violations."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from killed import at_call, killed
from rich.console import Console
from safetensors.torch import load_file

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.errors import CitFastError, ConfigError, DataError
from cit_fast.evaluation import read_predictions, read_run, read_stages, rescore
from cit_fast.report import comparison_table, write_report
from cit_fast.run import cached_scores, stage_evaluation


def spans(name: str) -> Task:
    examples = tuple(
        Example("Copy the second word.", f"word {k} and more", (f"{k}",), name, source=f"{name}:{k}") for k in range(3)
    )
    return Task(name, (), (), examples, metric="token_f1", extractive=True, wordy_above=2.0)


NOT_TRAINED = {"gamma", "spans"}


@pytest.fixture
def two(stream) -> TaskStream:
    """One task that declares constraints and one that declares none."""
    return TaskStream((dataclasses.replace(stream[0], answer_pattern=r"alpha \d+", wordy_above=1.5), stream[1]))


@pytest.fixture
def held_out(stream) -> list[Task]:
    return [dataclasses.replace(stream[2], train=()), spans("spans")]


def run(settings, stream, held_out=None, **evaluation) -> dict[str, Path]:
    settings = {**settings, "evaluation": {**settings["evaluation"], **evaluation}}
    console = Console(quiet=True)
    folders = ContinualTrainer(settings, stream=stream, held_out=held_out, console=console).run()
    return {folder.name: folder for folder in folders}


def test_held_out_tasks_are_answered_first_and_last_and_kept_apart(settings, two, held_out):
    folders = run({**settings, "methods": ["sequential", "joint"]}, two, held_out)
    record, stages = read_run(folders["sequential"]), read_stages(folders["sequential"])
    assert (record.tasks, record.held_out_tasks) == (["alpha", "beta"], ["gamma", "spans"])
    assert record.metrics == dict.fromkeys(["alpha", "beta", "gamma", "spans"], "token_f1")
    assert record.constraints == {
        "alpha": {"answer_pattern": r"alpha \d+", "wordy_above": 1.5},
        "beta": {},
        "gamma": {},
        "spans": {"extractive": True, "wordy_above": 2.0},
    }
    assert all({"alpha", "beta"} <= set(stage.scores) for stage in stages)
    assert [set(stage.scores) & {"gamma", "spans"} for stage in stages] == [
        {"gamma", "spans"},
        set(),
        {"gamma", "spans"},
    ]
    assert [{task: list(rates) for task, rates in stage.violations.items()} for stage in (stages[0], stages[2])] == [
        {"alpha": ["WFR", "WR"], "beta": [], "gamma": [], "spans": ["OOS", "WR"]}
    ] * 2
    assert set(stages[1].violations) == {"alpha", "beta"}
    assert all(stage.trained in ([], ["alpha"], ["beta"]) for stage in stages)
    stored = read_predictions(folders["sequential"] / "stages/02/predictions/spans.jsonl")
    assert [entry.input for entry in stored] == [f"word {k} and more" for k in range(3)]
    assert read_predictions(folders["sequential"] / "stages/02/predictions/alpha.jsonl")[0].input is None
    joint = read_stages(folders["joint"])
    assert set(joint[1].scores) > NOT_TRAINED
    assert joint[0].scores == stages[0].scores  # the untrained model answers once for all methods
    assert all(entry.agrees for entry in rescore(folders["sequential"]))
    assert len(rescore(folders["sequential"])) == 4 + 2 + 4


def test_holding_tasks_out_changes_nothing_of_the_run(settings, two, held_out):
    with_held_out = run({**settings, "methods": ["sequential"]}, two, held_out)["sequential"]
    other = {**settings, "methods": ["sequential"], "output": settings["output"] + "-without"}
    without = run(other, two)["sequential"]
    ours, theirs = read_stages(with_held_out), read_stages(without)
    seen = [{task: stage.scores[task] for task in ("alpha", "beta")} for stage in ours]
    assert seen == [stage.scores for stage in theirs]
    assert [stage.losses for stage in ours] == [stage.losses for stage in theirs]
    path = "stages/02/adapters/shared/adapter_model.safetensors"
    kept = load_file(with_held_out / path), load_file(without / path)
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert set(theirs[2].scores) == {"alpha", "beta"}
    assert read_run(without).held_out_tasks == []


def test_after_every_stage_when_asked(settings, two, held_out):
    settings["methods"] = ["sequential"]
    stages = read_stages(run(settings, two, held_out, held_out_after="all", untrained=False)["sequential"])
    assert [set(stage.scores) & {"gamma", "spans"} for stage in stages] == [
        set(),
        {"gamma", "spans"},
        {"gamma", "spans"},
    ]


def test_named_in_the_configuration(settings):
    settings["data"] |= {"tasks": ["units"], "train": 8, "test": 3}
    settings["methods"] = ["sequential"]
    where = [{"builtin": "intents", "name": "desks"}, "priority"]
    trainer = ContinualTrainer(
        {**settings, "evaluation": {**settings["evaluation"], "held_out": where}}, console=Console(quiet=True)
    )
    assert [(task.name, len(task.train), len(task.test)) for task in trainer.held_out] == [
        ("desks", 0, 3),
        ("priority", 0, 3),
    ]
    (folder,) = trainer.run()
    last = read_stages(folder)[-1]
    assert {task: list(rates) for task, rates in last.violations.items()} == {
        "units": ["WFR", "WR"],
        "desks": ["WFR", "OOS", "WR"],
        "priority": ["WFR", "OOS", "WR"],
    }


def test_killed_while_it_answers_and_resumed(settings, two, held_out, tmp_path, monkeypatch):
    settings["methods"] = ["sequential"]
    expected = read_stages(run({**settings, "output": settings["output"] + "-whole"}, two, held_out)["sequential"])
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "other-cache"))  # nothing answered there yet
    # The untrained model answers the stream, then the held-out tasks; the second time only those, then stages 1 and 2.
    for module in (cached_scores, stage_evaluation):
        assert killed(lambda: run(settings, two, held_out), at_call(2, module, "evaluate")), module.__name__
    resumed = read_stages(run(settings, two, held_out)["sequential"])
    for ours, theirs in zip(resumed, expected, strict=True):
        assert (ours.scores, ours.violations) == (theirs.scores, theirs.violations)


def test_other_held_out_tasks_are_another_run(settings, two, held_out):
    settings["methods"] = ["sequential"]
    run(settings, two, held_out)
    with pytest.raises(CitFastError, match="another configuration"):
        run(settings, two, held_out[:1])
    first, *others = held_out
    changed = [dataclasses.replace(first, test=first.test[:-1]), *others]
    message = rf"held-out task '{first.name}': its test examples have changed \({len(first.test)} then, "
    with pytest.raises(CitFastError, match=message):
        run(settings, two, changed)


def test_report_of_a_run_with_held_out_tasks(settings, two, held_out, tmp_path):
    folder = run({**settings, "methods": ["sequential"]}, two, held_out)["sequential"]
    page = write_report([folder], tmp_path / "page.html")
    text = page.read_text()
    assert "How well answers keep to their instructions" in text
    assert "2 held out" in text
    assert "V is over 1 of 2 seen tasks and 1 of 2 held-out tasks" in text
    values = json.loads((tmp_path / "page-values.json").read_text())["runs"][0]
    last = read_stages(folder)[-1]
    assert values["Held-out P"] == pytest.approx((last.scores["gamma"] + last.scores["spans"]) / 2)
    assert values["seen"]["v"] == pytest.approx(sum(last.violations["alpha"].values()) / 2)
    assert values["held_out"]["constrained"] == 1
    console = Console(file=io.StringIO(), width=120)
    console.print(comparison_table([folder]))
    assert "Held-out V" in console.file.getvalue()


def test_bad_held_out_tasks(settings, stream, held_out, tmp_path):
    def start(tasks=None, stream=stream, **config):
        merged = {**settings, "evaluation": {**settings["evaluation"], **config.pop("evaluation", {})}, **config}
        ContinualTrainer(merged, stream=stream, held_out=tasks)

    with pytest.raises(DataError, match=r"evaluation.held_out: task 'alpha' is trained as well"):
        start([stream[0]])
    with pytest.raises(DataError, match="two tasks are called 'spans'"):
        start([held_out[1], held_out[1]])
    with pytest.raises(ConfigError, match=r"evaluation.held_out: task 'gone' has no test examples"):
        start([dataclasses.replace(stream[2], name="gone", test=())], stream=TaskStream(stream.tasks[:2]))
    with pytest.raises(
        DataError, match=r"task 'late': answer_pattern 'delta' fits none of its answers, for example 'ga"
    ):
        start([dataclasses.replace(stream[2], name="late", answer_pattern="delta")])
    with pytest.raises(DataError, match=r"evaluation.held_out: 'units' is in data.tasks as well"):
        start(
            stream=None,
            data={"tasks": ["units", "dates"], "train": 2, "test": 2},
            evaluation={"held_out": [{"builtin": "units", "name": "other"}]},
        )
    path = tmp_path / "task.json"
    path.write_text(json.dumps([{"instruction": "Copy.", "output": "x"}] * 8))
    with pytest.raises(DataError, match=r"task.json: record \d: no input, but the task is extractive"):
        start(evaluation={"held_out": [{"path": str(path), "extractive": True}]})
    with pytest.raises(DataError, match="answer_pattern is no regular expression"):
        start(evaluation={"held_out": [{"path": str(path), "answer_pattern": "["}]})
    with pytest.raises(ConfigError, match=r"evaluation.held_out.0.extractiv: unknown key; did you mean 'extractive'"):
        start(evaluation={"held_out": [{"path": str(path), "extractiv": True}]})
