"""A stream and a configuration small enough to train on in a second."""

from __future__ import annotations

import warnings

import pytest

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


@pytest.fixture(scope="session")
def stream() -> TaskStream:
    return TaskStream(tuple(make_task(name) for name in ("alpha", "beta", "gamma")))


@pytest.fixture
def settings(tiny_model_folder, tmp_path, monkeypatch):
    """A configuration as a mapping; the cache is the test's own."""
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    return {
        "name": "tiny",
        "output": str(tmp_path / "runs"),
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
