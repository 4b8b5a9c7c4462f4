"""Answers chosen among labels: the likeliest by the definition, in every layout, by every set, and in a run."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from growth import predictions
from peft import LoraConfig, get_peft_model
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.errors import DataError
from cit_fast.evaluation import read_stages
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run.label_choice import most_likely

BEGINNING = list(range(30, 60))
PROMPTS = [[*BEGINNING, *range(100 + 3 * k, 104 + 5 * k)] for k in range(6)] + [[7], [3, 9, 11]]
_GENERATOR = random.Random(0)


def _choices(count: int) -> list[list[int]]:
    """Some begin alike, and the first is the beginning of the second: only its end tells how likely it is."""
    first, second, *others = _GENERATOR.sample(range(60, 300), count + 1)
    return [[*one, 2] for one in ([first], [first, second], *([one] for one in others))][:count]


CHOICES = [_choices(count) for count in (3, 3, 5, 3, 4, 1, 4, 2)]


def by_definition(model, prompts, choices):
    """One choice at a time, its log-probability summed in float64."""

    def log_probability(prompt, choice):
        tokens = torch.tensor([[*prompt, *choice]])
        each = model(tokens).logits[0].double().log_softmax(1)[len(prompt) - 1 : -1]
        return each.gather(1, torch.tensor(choice)[:, None]).sum().item()

    with torch.no_grad():
        scores = [[log_probability(p, c) for c in own] for p, own in zip(prompts, choices, strict=True)]
    return [own.index(max(own)) for own in scores]


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Granite", "Mamba", "OPT"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_likeliest_is_chosen(make_model, kind, batch_size):
    model = make_model(kind)
    expected = by_definition(model, PROMPTS, CHOICES)
    assert len(set(expected)) > 1
    seen = []
    assert most_likely(model, PROMPTS, CHOICES, pad_token_id=0, batch_size=batch_size, progress=seen.append) == expected
    assert sum(seen) == len(PROMPTS)


def test_labels_stand_beside_each_other(make_model, monkeypatch):
    model = make_model("Llama")
    prompts, choices = PROMPTS[:5], CHOICES[:5]
    expected, places = by_definition(model, prompts, choices), []
    monkeypatch.setattr(
        model, "forward", lambda *a, f=model.forward, **k: (places.append(k["input_ids"].numel()), f(*a, **k))[1]
    )
    assert most_likely(model, prompts, choices, pad_token_id=0) == expected
    rows = sum(len(p) + len(c) for p, own in zip(prompts, choices, strict=True) for c in own)
    assert sum(n for n in places if n > 100) < rows / 2  # what is smaller: the trials of a new model


def test_every_prompt_by_its_own_set(make_model):
    model = get_peft_model(make_model("Llama"), LoraConfig(r=4, target_modules="all-linear"), adapter_name="one")
    model.add_adapter("two", model.peft_config["one"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    names = ["one", "two", BASE, "one", "two", BASE, "two", "one"]
    trained = [p.requires_grad for p in model.parameters()]
    expected = []
    for index, name in enumerate(names):
        model.set_adapter("one" if name == BASE else name)
        one = [PROMPTS[index]], [CHOICES[index]]
        if name == BASE:
            with model.disable_adapter():
                expected += by_definition(model, *one)
        else:
            expected += by_definition(model, *one)
    model.set_adapter("one")
    assert most_likely(model, PROMPTS, CHOICES, pad_token_id=0, adapters=names) == expected
    assert [p.requires_grad for p in model.parameters()] == trained
    assert most_likely(model, PROMPTS, CHOICES, pad_token_id=0) == by_definition(model, PROMPTS, CHOICES)


@pytest.mark.parametrize(
    ("prompts", "choices", "adapters"),
    [
        (PROMPTS[:2], CHOICES[:1], None),
        (PROMPTS[:2], CHOICES[:2], ["one"]),
        ([[]], CHOICES[:1], None),
        (PROMPTS[:1], [[]], None),
        (PROMPTS[:1], [[[1], []]], None),
    ],
)
def test_nothing_to_choose_from(make_model, prompts, choices, adapters):
    with pytest.raises(DataError, match="most_likely"):
        most_likely(make_model("Llama"), prompts, choices, pad_token_id=0, adapters=adapters)


def test_an_answer_has_the_tokens_that_training_has(tiny_tokenizer):
    encoder = PromptEncoder(tiny_tokenizer)
    example = Example("Answer positive or negative.", "It was fun.", ("positive",), "t")
    whole, prompt = encoder.example(example), encoder.prompt(example)
    assert [*prompt, *encoder.answer(example, "positive")] == whole.input_ids
    other = dataclasses.replace(example, references=("negative",))
    assert encoder.answer(example, "negative") == encoder.example(other).input_ids[len(prompt) :]


def _moods(labels: tuple[str, ...]) -> Task:
    def examples(start, count):
        return tuple(
            Example("Is it good or bad?", f"number {k}", (labels[k % 2],), "mood") for k in range(start, start + count)
        )

    return Task("mood", examples(0, 16), (), examples(100, 5), metric="accuracy", labels=labels)


@pytest.mark.parametrize("preset", ["sequential", "oracle"])
def test_a_run_chooses_where_there_are_labels(settings, stream, preset):
    tasks = TaskStream((_moods(("good", "bad")), stream[0]))
    settings = {**settings, "methods": [preset], "evaluation": {**settings["evaluation"], "decode": "labels"}}
    folder = ContinualTrainer(settings, stream=tasks, console=Console(quiet=True)).run()[0]
    stages = read_stages(folder)
    # Of a set of its own the first task's answers are taken over after the second stage.
    assert [stage.chosen for stage in stages] == [5, 5, 0 if preset == "oracle" else 5]
    for stage in stages:
        answers = [one.prediction for one in predictions(folder, stage.index, "mood")]
        assert set(answers) <= {"good", "bad"}
        assert stage.violations["mood"]["OOS"] == 0
    others = [one.prediction for one in predictions(folder, 0, "alpha")]
    assert not set(others) & {"good", "bad"}
