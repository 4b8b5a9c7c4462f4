"""What the product is for: a model that replays remembers what it forgets otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console
from toy_folders import bpe_tokenizer, llama_folder

from cit_fast import ContinualTrainer
from cit_fast.data import Task, TaskStream
from cit_fast.data.builtin import builtin_task
from cit_fast.evaluation import continual_metrics, read_run, read_stages

WORDS = {"now": "now", "week": "week", "later": "later"}
LIGHTS = {"now": "red", "week": "yellow", "later": "green"}


def task(name: str, instruction: str, answers: dict[str, str], seed: int) -> Task:
    """The built-in task ``priority`` with these answers for its own, in one wording, which is learned faster."""
    priority = builtin_task("priority", seed=seed, train=480, dev=0, test=32)

    def reworded(examples):
        return tuple(
            replace(each, instruction=instruction, references=(answers[each.references[0]],), task=name, key_parts=())
            for each in examples
        )

    labels = tuple(answers.values())
    splits = {"train": reworded(priority.train), "test": reworded(priority.test)}
    return replace(priority, name=name, labels=labels, answer_pattern="|".join(labels), **splits)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])  # 0 to 3 were tried: sequential forgot 84 to 91 points, random-replay none
def test_random_replay_forgets_less_than_sequential(tmp_path, monkeypatch, seed):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    how_soon = task("priority", "How soon is an answer needed: now, week or later?", WORDS, seed)
    light = task("lights", "Which light does this get: red, yellow or green?", LIGHTS, seed + 1000)
    texts = [text for each in (*how_soon.train, *light.train) for text in (each.instruction, each.input)]
    tokenizer = bpe_tokenizer([*texts, *LIGHTS.values(), "user system assistant"], 800)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "initializer_range": 0.08}
    settings = {
        "seed": seed,
        "output": str(tmp_path / "runs"),
        "methods": ["sequential", "random-replay"],
        "model": {"name": str(llama_folder(tmp_path / "model", tokenizer, seed, **sizes))},
        "adapter": None,
        "data": {"max_length": 128},
        "training": {
            "per_device_train_batch_size": 16,
            "learning_rate": 1.5e-3,
            "num_train_epochs": 3,
            "lr_scheduler_type": "linear",
            "save_strategy": "no",
            "use_cpu": True,
        },
        "evaluation": {"max_new_tokens": 4, "batch_size": 64, "untrained": False},
    }
    stream = TaskStream((how_soon, light))
    folders = ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()
    stages = {folder.name: read_stages(folder) for folder in folders}
    found = {folder.name: continual_metrics(read_run(folder), stages[folder.name]) for folder in folders}
    sequential, replay = found["sequential"], found["random-replay"]
    assert stages["sequential"][1].losses == stages["random-replay"][1].losses  # nothing to replay yet: the same bits
    for trained in stages.values():
        assert trained[1].scores["priority"] > 70
        assert trained[2].scores["lights"] > 70
    assert sequential.forgetting > 60
    assert replay.forgetting < 15
    assert replay.average_performance > sequential.average_performance + 25
