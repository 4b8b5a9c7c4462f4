"""Tasks that are easy to tell apart, and a context with a tiny model."""

from __future__ import annotations

import random

import pytest

from cit_fast.data import Example, Task, TaskStream
from cit_fast.methods.stage import Stage
from cit_fast.models.prompts import PromptEncoder

WORDINGS = {
    "dates": "Write the date in the form year, month, day.",
    "mail": "Extract the e-mail address from the text.",
    "mood": "What is the sentiment of this review? Answer positive or negative.",
}
WORDS = {
    "dates": "March April Friday July noon 1999 2004 week",
    "mail": "ann@web.org bob@site.net box letter sent reply",
    "mood": "great awful boring lovely film actors plot tickets",
}


def make_task(name: str, train: int = 16, dev: int = 8, test: int = 4) -> Task:
    chance = random.Random(name)

    def examples(count):
        inputs = [" ".join(chance.sample(WORDS[name].split(), 4)) for _ in range(count)]
        return tuple(Example(WORDINGS[name], text, (text.split()[0],), task=name) for text in inputs)

    return Task(name, examples(train), examples(dev), examples(test), metric="token_f1")


@pytest.fixture(scope="session")
def tasks() -> TaskStream:
    return TaskStream(tuple(make_task(name) for name in WORDINGS))


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder)


@pytest.fixture
def stage(tiny_model, tiny_tokenizer):
    def fresh(seed: int = 0, task: Task | None = None) -> Stage:
        tasks = () if task is None else (task,)
        return Stage(tiny_model, PromptEncoder(tiny_tokenizer), tasks=tasks, seed=str(seed))

    return fresh
