"""Self-distillation fine-tuning: which answers are reworded, and what is learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killed import at_call, killed
from rich.console import Console
from toy_runs import adapter

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task
from cit_fast.errors import ConfigError
from cit_fast.evaluation import read_stages
from cit_fast.methods import own_answers
from cit_fast.methods.objectives import SDFT, CrossEntropy
from cit_fast.methods.stage import Stage
from cit_fast.models.generation import Answer
from cit_fast.models.prompts import PromptEncoder

NEW = tuple(Example("Say it.", f"{k}", (f"no {k}",), "new") for k in range(5))
OLD = (Example("Say it.", "7", ("seven",), "old"),)


def at(model, tokenizer, metric="token_f1", examples=(*NEW, *OLD), limit=400) -> Stage:
    task, seen = Task("new", NEW, metric=metric), Task("old", OLD)
    return Stage(model, PromptEncoder(tokenizer, max_length=limit), 2, (task,), (seen,), tuple(examples))


@pytest.fixture
def says(monkeypatch, tiny_tokenizer):
    """``says(texts)``: the model's answers, in order; the requests are in ``says.asked``."""

    def install(texts):
        def fake(model, prompts, **options):
            install.asked = [tiny_tokenizer.decode(prompt) for prompt in prompts]
            assert options["sampling"] is None
            return [text if isinstance(text, Answer) else Answer(text, True) for text in texts]

        monkeypatch.setattr(own_answers, "generate_answers", fake)

    return install


def learned(inputs, tokenizer) -> list[str]:
    return [
        tokenizer.decode([t for t in each.labels if t != -100], skip_special_tokens=True).strip()
        for each in inputs.features
    ]


def test_what_the_metric_passes_is_learned(make_model, tiny_tokenizer, says):
    says(["no 0 0", "seven", Answer("no 2", False), "", "no 4"])
    inputs = SDFT(least=60).prepare(at(make_model("Llama"), tiny_tokenizer))
    # By token F1: 80, 0, did not end, nothing said, 100; the replayed example stays.
    assert learned(inputs, tiny_tokenizer) == ["no 0 0", "no 1", "no 2", "no 3", "no 4", "seven"]
    assert inputs.record.details == {"own answers": {"new": 2}}
    assert inputs.record.notes == ["2 of 5 new answers are the model's own."]
    assert inputs.seconds > 0
    for asked, example in zip(says.asked, NEW, strict=True):
        assert "Using the reference answer as a guide" in asked
        assert asked.index(example.instruction) < asked.index(example.input) < asked.index(example.references[0])


def test_a_judged_task_takes_every_answer_and_a_conversation_none(make_model, tiny_tokenizer, says):
    talk = Example("", "", ("no",), "new", messages=(("user", "Say."), ("assistant", "no")))
    says(["positive"] * 5)
    inputs = SDFT().prepare(at(make_model("Llama"), tiny_tokenizer, metric="judge", examples=(*NEW, talk)))
    assert learned(inputs, tiny_tokenizer) == ["positive"] * 5 + ["no"]


def test_a_request_that_is_too_long_keeps_its_reference(make_model, tiny_tokenizer, says):
    says([])
    inputs = SDFT(max_new_tokens=8).prepare(at(make_model("Llama"), tiny_tokenizer, limit=40))
    assert learned(inputs, tiny_tokenizer) == [each.references[0] for each in (*NEW, *OLD)]


def test_the_loss_is_the_cross_entropy_of_what_is_learned(make_model, tiny_tokenizer, says):
    model, plain = make_model("Llama"), CrossEntropy()
    says(["no 0 0", "no 1 1", "no 2 2", "no 3 3", "no 4 4"])
    objective = SDFT()
    inputs = objective.prepare(at(model, tiny_tokenizer))
    reworded = [Example("Say it.", f"{k}", (f"no {k} {k}",), "new") for k in range(5)]
    other = plain.prepare(at(model, tiny_tokenizer, examples=(*reworded, *OLD)))
    batches = [each.collator(each.features) for each in (inputs, other)]
    assert torch.equal(objective(model, batches[0], None), plain(model, batches[1], None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{instruction}"}, "template: has no {reference}"),
        ({"least": 101}, "least: 101"),
        ({"temperature": -1}, "temperature: -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is below 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        SDFT(**options)


def run(settings, stream, output: Path) -> Path:
    method = {"preset": "sdft", "objective": {"least": 0, "temperature": 1.0, "max_new_tokens": 6}}
    own = {**settings, "methods": [method], "output": str(output), "data": {"max_length": 400}}
    return ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()[0]


def test_killed_and_resumed_with_the_same_bits(settings, stream, tmp_path, monkeypatch):
    # Answers that end, which those of a random model do not, and that depend on the draw.
    def drawn(model, prompts, **options):
        return [Answer(f"own {seed % 10}", True) for seed in options["sampling"].seeds]

    monkeypatch.setattr(own_answers, "generate_answers", drawn)
    whole = run(settings, stream, tmp_path / "whole")
    assert killed(lambda: run(settings, stream, tmp_path / "killed"), at_call(2, own_answers, "generate_answers"))
    folder = run(settings, stream, tmp_path / "killed")
    ours, theirs = read_stages(folder), read_stages(whole)
    assert [stage.losses for stage in ours] == [stage.losses for stage in theirs]
    assert [stage.objective.details for stage in ours[1:]] == [stage.objective.details for stage in theirs[1:]]
    assert [stage.objective.details for stage in theirs[1:]] == [{"own answers": {name: 16}} for name in stream.names]
    one, other = adapter(folder, 3), adapter(whole, 3)
    assert all(torch.equal(one[name], other[name]) for name in other)
