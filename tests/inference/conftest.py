"""A run with a set per task, for all that answers with one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console
from worded_run import WORDINGS, make_task

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.data import Task, TaskStream


@pytest.fixture(scope="session")
def stream():
    """Tasks whose answers are of many tokens: the input, twice."""
    return TaskStream(tuple(long_answers(make_task(name)) for name in WORDINGS))


def long_answers(task: Task) -> Task:
    def longer(examples):
        return tuple(replace(each, references=(f"{each.input} {each.input}",)) for each in examples)

    return replace(task, train=longer(task.train), test=longer(task.test))


@pytest.fixture(scope="session")
def finished(tiny_model_folder, stream, tmp_path_factory):
    """A run that groups by instructions; the tests copy it before they change anything in it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIT_FAST_CACHE", str(folder / "cache"))
        settings = {
            "output": str(folder),
            "model": {"name": str(tiny_model_folder)},
            "adapter": {"r": 4, "target_modules": "all-linear"},
            "data": {"max_length": 96},
            "training": {
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "num_train_epochs": 25,
                "use_cpu": True,
            },
            "evaluation": {"max_new_tokens": 6, "untrained": False, "tasks": "seen"},
            "methods": [{"preset": "grouping-ema", "name": "lcia", "router": {"reject": 0}}],
        }
        return ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()[0]


@pytest.fixture(scope="session")
def model(finished):
    return ContinualModel.from_run(finished, device="cpu")


@pytest.fixture(scope="session")
def examples(stream):
    return [example for task in stream for example in task.test]
