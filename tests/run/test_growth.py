"""A run that has begun takes more tasks: the result is that of a run that had all of them from the start."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from growth import run, same, weights
from killed import at_call, killed
from rich.console import Console

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.data import TaskStream
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation import read_run, read_stages, rescore
from cit_fast.evaluation.run_files import write_record
from cit_fast.inference.load_any import load_any_model
from cit_fast.run import stage_evaluation, stage_trainer
from cit_fast.run.identity import digest
from cit_fast.run.learn import learn

METHODS = [
    "sequential",
    {"preset": "random-replay", "replay": {"fraction": 0.2}},
    {"preset": "inscl", "replay": {"per_task": 3}},
    {"preset": "kpig", "replay": {"tasks": 1, "instances": 2}},
    {"preset": "lcia", "router": {"threshold": 0.1}},
    "switch-tokens",
    "oracle",
    {"preset": "cit-fast", "replay": {"fraction": 0.2}},
    {"preset": "lcia-ema", "name": "stream-wide", "update": {"scope": "stream", "when": "always"}},
    {"preset": "merge", "replay": {"fraction": 0.2}},
    {"preset": "on-policy", "replay": {"fraction": 0.2, "max_new_tokens": 4}},
    "ewc",
    "lwf",
    "o-lora",
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m if isinstance(m, str) else m.get("name", m["preset"]))
def test_more_tasks_give_the_same_bits_as_all_at_once(settings, stream, tmp_path, method):
    settings["training"] |= {"learning_rate": 1e-2, "max_steps": 2}
    (whole,) = run(settings, stream, tmp_path / "whole", method).values()
    (grown,) = run(settings, TaskStream(stream[:1]), tmp_path / "grown", method).values()
    assert read_run(grown).status == "finished"
    for count in (2, 3):
        assert run(settings, TaskStream(stream[:count]), tmp_path / "grown", method) == {grown.name: grown}
    record = read_run(grown)
    assert (record.status, record.tasks) == ("finished", list(stream.names))
    assert read_stages(grown)[0].scores == read_stages(whole)[0].scores
    assert read_stages(grown)[2].untrained.keys() == {stream.names[1]}
    assert all(entry.agrees for entry in rescore(grown))
    same(grown, whole)


def test_an_interrupted_run_takes_more_tasks_and_is_killed_again(settings, stream, tmp_path):
    settings["training"] |= {"learning_rate": 1e-2}
    method = {"preset": "random-replay", "replay": {"fraction": 0.2}}
    (whole,) = run(settings, stream, tmp_path / "whole", method).values()
    two = TaskStream(stream[:2])
    assert killed(lambda: run(settings, two, tmp_path / "grown", method), at_call(2, stage_trainer, "mark_complete"))
    assert killed(lambda: run(settings, stream, tmp_path / "grown", method), at_call(2, stage_evaluation, "evaluate"))
    (grown,) = run(settings, stream, tmp_path / "grown", method).values()
    same(grown, whole)


def test_experts_are_trained_for_the_new_tasks_alone(settings, stream, tmp_path):
    settings["evaluation"] |= {"experts": True}
    settings["training"] |= {"max_steps": 1}
    (grown,) = run(settings, TaskStream(stream[:1]), tmp_path, "sequential").values()
    before = read_run(grown).experts
    run(settings, TaskStream(stream[:2]), tmp_path, "sequential")
    after = read_run(grown).experts
    assert list(after) == list(stream.names[:2])
    assert after[stream.names[0]] == before[stream.names[0]]


def test_what_cannot_be_taken_up_is_named(settings, stream, tmp_path):
    settings["training"] |= {"max_steps": 1}
    alpha, beta, gamma = stream
    run(settings, TaskStream((alpha, beta)), tmp_path, "sequential", "joint")
    changed = replace(beta, train=beta.train[:-1])
    for tasks, message in (
        (
            (alpha, changed, gamma),
            r"task 'beta' \(number 2\) is no longer what this run has learned from: its training examples have changed "
            r"\(16 then, 15 now\); put",
        ),
        (
            (alpha, replace(beta, test=beta.test[::-1], metric="rouge_l"), gamma),
            r"its test examples have changed \(4, as before\) and its metric, its labels or its other constraints",
        ),
        ((alpha, gamma, beta), r"task 'gamma' \(number 2\) is another one than 'beta'"),
        ((alpha,), "has 2 tasks, of which this configuration names the first 1"),
    ):
        with pytest.raises(RunError, match=message):
            run(settings, TaskStream(tasks), tmp_path, "sequential")
    with pytest.raises(RunError, match=r"another configuration \(its tasks are others\)"):
        run(settings, stream, tmp_path, "joint")
    other = {**settings, "seed": 7}
    with pytest.raises(RunError, match=r"another configuration \(seed was 0, now 7\)"):
        run(other, stream, tmp_path, "sequential")
    assert len(read_stages(tmp_path / "sequential")) == 3  # nothing was lost


def test_learn_goes_on_with_the_runs_own_settings(settings, stream, tmp_path):
    settings["training"] |= {"max_steps": 2}
    folders = []
    for name in stream.names:
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            records = [
                {"instruction": each.instruction, "input": each.input, "output": each.references[0]}
                for each in getattr(stream[stream.names.index(name)], split)
            ]
            (folder / f"{split}.json").write_text(json.dumps(records))
        folders.append(str(folder))
    own = {**settings, "methods": ["switch-tokens", "cit-fast"], "output": str(tmp_path / "grown")}
    own["data"] = {**settings["data"], "dev": 0, "tasks": folders[:1]}
    for method in ("switch-tokens", "cit-fast"):
        ContinualTrainer({**own, "methods": [method]}, console=Console(quiet=True)).run()
        run_folder = tmp_path / "grown" / method
        quiet = Console(quiet=True)
        assert learn(run_folder, folders[1:2], quiet) == run_folder
        # Known tasks may be named again; one that is spelt out is the same task.
        assert learn(run_folder, [folders[0], {"path": folders[2]}], quiet) == run_folder
        whole = {**own, "methods": [method], "output": str(tmp_path / "whole")}
        whole["data"] = {**own["data"], "tasks": folders}
        ContinualTrainer(whole, console=Console(quiet=True)).run()
        mine, right = weights(run_folder), weights(tmp_path / "whole" / method)
        assert all(torch.equal(mine[name], right[name]) for name in right)


def test_a_model_learns_and_earlier_stages_are_scored(settings, tmp_path):
    settings["training"] |= {"max_steps": 1}
    settings["data"] |= {"tasks": ["units"], "train": 8, "test": 2, "max_length": 256}
    (folder,) = ContinualTrainer({**settings, "methods": ["sequential"]}, console=Console(quiet=True)).run()
    model = ContinualModel.from_run(folder, device="cpu")
    again = model.learn(["records"], console=Console(quiet=True))
    assert read_run(folder).tasks == ["units", "records"]
    assert again.generate(["Say it."]) == ContinualModel.from_run(folder, device="cpu").generate(["Say it."])
    model.run = None
    with pytest.raises(RunError, match="was not loaded from a run"):
        model.learn(["dates"])
    assert {entry.stage for entry in rescore(folder, stage=1)} == {1}
    with pytest.raises(RunError, match="has no stage 7; its stages are 0 to 2"):
        rescore(folder, stage=7)
    first, last = load_any_model(str(folder), stage=1), load_any_model(str(folder))
    assert first.identity != last.identity
    with pytest.raises(ConfigError, match="is no run"):
        load_any_model(settings["model"]["name"], stage=1)


def test_what_learn_refuses(settings, stream, tmp_path):
    settings["training"] |= {"max_steps": 1}
    (folder,) = run(settings, TaskStream(stream[:1]), tmp_path, "sequential").values()
    with pytest.raises(ConfigError, match="name at least one task"):
        learn(folder, [])
    with pytest.raises(RunError, match="its tasks were given from Python"):
        learn(folder, ["units"])
    folder.rename(tmp_path / "mine")
    with pytest.raises(RunError, match=r"its tasks were given from Python|give it that name back"):
        learn(tmp_path / "mine", ["units"])
    with pytest.raises(RunError, match="not there"):
        learn(tmp_path / "nowhere", ["units"])


def test_a_run_of_before_there_were_growing_streams_goes_on(settings, stream, tmp_path):
    """Its record has one digest of all tasks."""
    settings["training"] |= {"max_steps": 1}
    (folder,) = run(settings, TaskStream(stream[:2]), tmp_path, "sequential").values()
    record = read_run(folder)
    record.config["stream"] = digest(record.config["stream"])
    write_record(folder / "run.json", record)
    assert run(settings, TaskStream(stream[:2]), tmp_path, "sequential") == {"sequential": folder}
