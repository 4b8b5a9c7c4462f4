"""InsCL inside ``ContinualTrainer``: budgets, records, resuming, the presets at one budget."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from ablations import spelled
from killed import at_call, killed
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.errors import ConfigError, DataError
from cit_fast.evaluation import read_stages
from cit_fast.evaluation.records import ReplayRecord
from cit_fast.methods.replay import InsCLReplay, inscl
from cit_fast.methods.stage import Selection
from cit_fast.run import stage_evaluation

METHODS = [
    "random-replay",
    "inscl",
    "inscl-uniform",
    "inscl-no-insinfo",
    "prototype-data",
    "prototype-instruction",
    "diverse-instruction",
]
WORDINGS = {
    "alpha": ("Convert the number to words.", "Write the number in words and answer with the words only."),
    "beta": ("What is the sentiment of this review?", "Answer positive or negative."),
    "gamma": ("Write the date in the form year, month, day.",),
}


def make_task(name: str, size: int) -> Task:
    def examples(count, start):
        return tuple(
            Example(WORDINGS[name][k % len(WORDINGS[name])], str(k), (f"{name} {k}",), task=name)
            for k in range(start, start + count)
        )

    return Task(name, examples(size, 0), (), examples(2, 100), metric="token_f1")


@pytest.fixture(scope="module")
def stream() -> TaskStream:
    return TaskStream((make_task("alpha", 24), make_task("beta", 16), make_task("gamma", 8)))


@pytest.fixture
def settings(tiny_model_folder, tmp_path, monkeypatch, quick_collections):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    return {
        "output": str(tmp_path / "runs"),
        "model": {"name": str(tiny_model_folder)},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"max_length": 96},
        "training": {"per_device_train_batch_size": 32, "logging_steps": 1, "use_cpu": True},
        "evaluation": {"max_new_tokens": 2, "untrained": False},
    }


def run(settings, stream, **more) -> dict[str, list]:
    folders = ContinualTrainer({**settings, **more}, stream=stream, console=Console(quiet=True)).run()
    return {folder.name: read_stages(folder) for folder in folders}


def test_every_preset_replays_as_much_as_random_replay(settings, stream):
    runs = run(settings, stream, methods=spelled(METHODS, 0.1))
    totals = {name: [sum(stage.replayed.values()) for stage in stages] for name, stages in runs.items()}
    assert totals == {name: [0, 0, 2, 4] for name in METHODS}
    for name in ("inscl", "inscl-uniform", "inscl-no-insinfo"):
        for stage in runs[name][2:]:
            assert stage.replayed == {name: share for name, share in stage.replay.budgets.items() if share}
            assert set(stage.replay.distances) == set(stage.replay.budgets)
            assert all(distance > 0 for distance in stage.replay.distances.values())
        assert runs[name][1].replay is None
    assert runs["inscl"][3].replay.instruction_count == 4
    assert runs["inscl-no-insinfo"][3].replay.instructions == []
    ranked = runs["inscl"][3].replay.instructions
    assert [entry.insinfo for entry in ranked] == sorted((entry.insinfo for entry in ranked), reverse=True)
    assert sum(entry.drawn for entry in ranked) == 4


def decided(folder: Path) -> list:
    """What the stages say of their replay, and how they were trained on it."""
    return [(stage.replayed, stage.replay, stage.losses, stage.scores) for stage in read_stages(folder)]


# One run is killed at all of them, one after another: calls are counted from where it went on.
MOMENTS = {
    "the new row is not there yet": at_call(2, inscl, "wasserstein_matrix"),
    "the row is kept, the draw is half done": at_call(1, inscl, "draw_by_insinfo"),
    "the stage is trained on what was drawn, and not committed": at_call(1, stage_evaluation, "evaluate"),
}


def test_kill_and_go_on_with_the_same_examples(settings, stream, tmp_path):
    settings["methods"] = ["inscl"]
    run({**settings, "output": str(tmp_path / "whole")}, stream)
    folder = Path(settings["output"]) / "inscl"
    for moment, arm in MOMENTS.items():
        assert killed(lambda: run(settings, stream), arm), moment
        left_over = folder / "replay" / "distances" / ".row.json.1234.tmp"
        left_over.parent.mkdir(parents=True, exist_ok=True)
        left_over.write_text("half")
    run(settings, stream)
    assert decided(folder) == decided(tmp_path / "whole" / "inscl")
    kept = [path for path in (folder / "replay").rglob("*") if path.is_file()]
    assert [path.suffix for path in kept] == [".json", ".json"]  # a row for each later task, nothing else


def test_a_run_whose_chat_model_fails_goes_on_where_it_was(settings, stream, serve, monkeypatch):
    monkeypatch.setenv("CIT_FAST_TEST_KEY", "sk-secret")
    good = []

    def respond(prompt, attempt):
        tags = json.dumps([{"tag": word} for word in prompt.partition("<<<")[2].partition(">>>")[0].split()])
        usable = good or "review" not in prompt
        return 200, {"choices": [{"message": {"content": tags if usable else "Hello!"}}]}, {}

    with serve(respond) as server:
        tagger = {"base_url": server.url, "model": "stub", "key_variable": "CIT_FAST_TEST_KEY"}
        method = {"preset": "inscl", "replay": {"tagger": tagger}}
        with pytest.raises(DataError, match="1 of 4 instructions got no tags"):
            run(settings, stream, methods=[method])
        folder = Path(settings["output"]) / "inscl"
        assert len(read_stages(folder)) == 2  # the stage before is kept
        good.append(True)
        asked = len(server.requests)
        run(settings, stream, methods=[method])
        assert len(server.requests) == asked + 2  # that instruction, and the third task's
    assert read_stages(folder)[3].replay.instruction_count == 4
    everything = [path for path in folder.parents[1].rglob("*") if path.is_file()]
    assert len(everything) > 10
    assert not any(b"sk-secret" in path.read_bytes() for path in everything)


def test_what_cannot_be_recorded_is_refused_before_training(settings, stream):
    class Talkative:
        def select(self, stage):
            return Selection([], ReplayRecord(notes=["said"], details={"chosen": {"a set"}}))

    with pytest.raises(ConfigError, match=r"replay: Talkative.select\(\): its record must hold plain JSON values"):
        ContinualTrainer(
            {**settings, "methods": [{"preset": "sequential", "name": "own"}]},
            stream=stream,
            replay=Talkative(),
            console=Console(quiet=True),
        ).run()


def test_notes_are_said(settings, stream):
    said = io.StringIO()
    ContinualTrainer(
        {**settings, "methods": [{"preset": "sequential", "name": "own"}]},
        stream=stream,
        replay=InsCLReplay(per_task=50),
        console=Console(file=said, width=200),
    ).run()
    assert "  The budget of 50 is larger than the history of 24: all of it came back.\n" in said.getvalue()
