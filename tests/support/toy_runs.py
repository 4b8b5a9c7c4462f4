"""A stream and a configuration small enough to train on in a second."""

from __future__ import annotations

import copy
import gc
import importlib
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, TaskStream

# transformers and peft disagree about a name that is on its way out; nothing a user of ours can do.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")


def make_task(name: str, train: int = 16, test: int = 4) -> Task:
    def examples(count, start):
        return tuple(
            Example(f"Say {name}, then the number.", str(k), (f"{name} {k}",), task=name)
            for k in range(start, start + count)
        )

    return Task(name, examples(train, 0), (), examples(test, 100), metric="token_f1")


def adapter(folder: Path, stage: int, name: str = "shared") -> dict[str, torch.Tensor]:
    """The weights of an adapter set as a stage kept it."""
    return load_file(folder / "stages" / f"{stage:02d}" / "adapters" / name / "adapter_model.safetensors")


def start(settings, stream) -> list[Path]:
    """Run a configuration that is a mapping, without a word."""
    return ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()


@pytest.fixture(scope="session")
def stream() -> TaskStream:
    return TaskStream(tuple(make_task(name) for name in ("alpha", "beta", "gamma")))


@pytest.fixture(scope="session")
def quick_collections() -> None:
    """Every stage collects garbage; what a run imports, a million objects, is not looked through each time."""
    importlib.import_module("cit_fast.run.method_run")
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def toy_settings(tiny_model_folder, quick_collections):
    """A configuration as a mapping, without an output folder."""
    return {
        "name": "tiny",
        "model": {"name": str(tiny_model_folder)},
        "adapter": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1},
        "data": {"max_length": 96},
        "training": {
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "logging_steps": 2,
            "use_cpu": True,
        },
        "evaluation": {"max_new_tokens": 6},
    }


@pytest.fixture
def settings(toy_settings, tmp_path, monkeypatch):
    """That configuration with an output folder; it and the cache are the test's own."""
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    return {**copy.deepcopy(toy_settings), "output": str(tmp_path / "runs")}


@pytest.fixture(scope="session")
def finished_run(toy_settings, stream, tmp_path_factory) -> Path:
    """The folder of a finished ``sequential`` run over the stream: copy it before changing anything in it."""
    made = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIT_FAST_CACHE", str(made / "cache"))
        settings = {**toy_settings, "output": str(made / "runs"), "methods": ["sequential"]}
        return ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()[0]


@pytest.fixture
def sequential(finished_run, settings) -> Path:
    """That run as one of this test's own, where ``settings`` would put it."""
    return Path(shutil.copytree(finished_run, Path(settings["output"]) / "sequential"))
