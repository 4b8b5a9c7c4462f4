"""InsCL inside ``ContinualTrainer``: budgets, records, resuming, the presets at one budget."""

from __future__ import annotations

import pytest
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.evaluation import read_stages

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
def settings(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    return {
        "output": str(tmp_path / "runs"),
        "model": {"name": str(tiny_model_folder)},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"max_length": 96},
        "training": {"per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1, "use_cpu": True},
        "evaluation": {"max_new_tokens": 2, "untrained": False},
    }


def run(settings, stream, **more) -> dict[str, list]:
    folders = ContinualTrainer({**settings, **more}, stream=stream, console=Console(quiet=True)).run()
    return {folder.name: read_stages(folder) for folder in folders}


def test_every_preset_replays_as_much_as_random_replay(settings, stream):
    runs = run(settings, stream, methods=METHODS)
    totals = {name: [sum(stage.replayed.values()) for stage in stages] for name, stages in runs.items()}
    assert totals == {name: [0, 0, 2, 4] for name in METHODS}
    for name in ("inscl", "inscl-uniform", "inscl-no-insinfo"):
        for stage in runs[name][2:]:
            assert stage.replayed == stage.replay["budgets"]
            assert set(stage.replay["distances"]) == set(stage.replayed)
            assert all(distance > 0 for distance in stage.replay["distances"].values())
        assert runs[name][1].replay == {}
    assert runs["inscl"][3].replay["instruction_count"] == 4
    assert "instructions" not in runs["inscl-no-insinfo"][3].replay
    ranked = runs["inscl"][3].replay["instructions"]
    assert [entry["insinfo"] for entry in ranked] == sorted((entry["insinfo"] for entry in ranked), reverse=True)
    assert sum(entry["drawn"] for entry in ranked) == 4
