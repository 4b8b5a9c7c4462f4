"""Replay of what the model finds least likely: by the definition, within the budget, the same in a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killed import at_call, killed
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task
from cit_fast.errors import ConfigError
from cit_fast.evaluation import read_stages
from cit_fast.key_parts.gain import answer_surprise
from cit_fast.methods.replay import InsCLReplay, SurpriseReplay
from cit_fast.methods.replay.surprise import most_surprising
from cit_fast.methods.stage import Stage
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run import stage_evaluation


def task(name: str, size: int) -> Task:
    words = ("seven", "positive", "count to ten", "the e-mail address", "no")
    return Task(
        name,
        tuple(Example(f"Say {name}.", f"{k} {'and ' * (k % 3)}", (f"{words[k % 5]} {k}",), name) for k in range(size)),
    )


NEW = task("new", 1)


def by_definition(model, encoder, example) -> float:
    """The mean over the answer's own tokens, without the end of the turn, in float64."""
    encoded = encoder.example(example)
    log_probabilities = model(torch.tensor([encoded.input_ids])).logits[0].double().log_softmax(1)
    answer = range(encoded.prompt_length, len(encoded) - 1)
    return -torch.stack([log_probabilities[k - 1, encoded.input_ids[k]] for k in answer]).mean().item()


def test_distances_say_how_much_and_surprise_which(make_model, tiny_tokenizer):
    """InsCL's shares, filled with what the model finds least likely."""
    model, encoder = make_model("Llama"), PromptEncoder(tiny_tokenizer)
    seen = (task("alpha", 20), task("beta", 10))
    stage = Stage(model, encoder, tasks=(NEW,), seen=seen)
    plain = InsCLReplay(0.3, within="random").select(stage)
    both = InsCLReplay(0.3, within="surprise").select(stage)
    assert both.record.budgets == plain.record.budgets
    assert both.record.distances == plain.record.distances
    shares = list(both.record.budgets.values())
    places, _ = most_surprising(stage, shares, stage.rng())
    assert both.examples == [one.train[k] for one, own in zip(seen, places, strict=True) for k in own]
    means = both.record.details
    assert all(
        means["surprise of replayed"][name] > means["surprise of candidates"][name] for name in ("alpha", "beta")
    )
    assert both.record.scored == {"alpha": min(20, 4 * shares[0]), "beta": min(10, 4 * shares[1])}


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Granite", "OPT"])
def test_surprise_is_the_mean_negative_log_likelihood(make_model, tiny_tokenizer, kind):
    model, encoder = make_model(kind), PromptEncoder(tiny_tokenizer)
    examples = task("alpha", 9).train
    found = answer_surprise(model, encoder, examples, batch_size=4)
    assert [number for number, _ in found] == list(range(9))
    with torch.no_grad():
        expected = [by_definition(model, encoder, example) for example in examples]
    assert [value for _, value in found] == pytest.approx(expected, rel=1e-4)


def test_the_most_surprising_of_the_candidates_come_back(make_model, tiny_tokenizer):
    model, encoder = make_model("Llama"), PromptEncoder(tiny_tokenizer)
    seen = (task("alpha", 20), task("beta", 10))
    stage = Stage(model, encoder, tasks=(NEW,), seen=seen)
    whole = SurpriseReplay(0.2, candidates=None).select(stage)
    surprise: dict[Example, float] = {}
    for one in seen:
        surprise |= dict(zip(one.train, (v for _, v in answer_surprise(model, encoder, one.train)), strict=True))
    for one, count in zip(seen, (4, 2), strict=True):
        own = {example for example in whole.examples if example.task == one.name}
        assert own == set(sorted(one.train, key=lambda example: -surprise[example])[:count])
    some = SurpriseReplay(0.2, candidates=2).select(stage)
    assert some.record.budgets == {"alpha": 4, "beta": 2}
    assert some.record.scored == {"alpha": 8, "beta": 4}
    details = some.record.details
    assert all(details["surprise of replayed"][n] > details["surprise of candidates"][n] for n in ("alpha", "beta"))
    assert some == SurpriseReplay(0.2, candidates=2).select(stage)
    # One candidate each is random replay of as many.
    assert len(SurpriseReplay(0.2, candidates=1).select(stage).examples) == 6
    assert SurpriseReplay().select(Stage(model, encoder, tasks=(NEW,))).examples == []


def test_what_does_not_fit_comes_last(make_model, tiny_tokenizer):
    encoder = PromptEncoder(tiny_tokenizer, max_length=60, on_overflow="skip")
    long = Example("Say it. " * 40, "", ("seven",), "alpha")
    seen = (Task("alpha", (long, *task("alpha", 3).train)),)
    stage = Stage(make_model("Llama"), encoder, tasks=(NEW,), seen=seen)
    chosen = SurpriseReplay(per_task=3, candidates=None).select(stage).examples
    assert len(chosen) == 3
    assert long not in chosen


@pytest.mark.parametrize("options", [{"fraction": 0}, {"per_task": 0}, {"candidates": 0}, {"batch_size": 0}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError):
        SurpriseReplay(**options)


def test_a_run_goes_on_with_the_same_examples(settings, stream, tmp_path):
    def run(output: Path) -> list:
        own = {**settings, "methods": ["surprise"], "output": str(output)}
        (folder,) = ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()
        return [(stage.replayed, stage.replay, stage.losses, stage.scores) for stage in read_stages(folder)]

    whole = run(tmp_path / "whole")
    assert [sum(replayed.values()) for replayed, *_ in whole] == [0, 0, 2, 4]
    assert killed(lambda: run(tmp_path / "killed"), at_call(3, stage_evaluation, "evaluate"))
    assert run(tmp_path / "killed") == whole
