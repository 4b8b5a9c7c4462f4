"""The merge at a stage's end: what is merged with what, by how much, and in a resumed run."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from killed import at_call, killed
from peft import LoraConfig, get_peft_model
from rich.console import Console
from toy_runs import adapter

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.errors import CitFastError, ConfigError
from cit_fast.evaluation import read_stages
from cit_fast.key_parts.gain import answer_surprise
from cit_fast.methods.stage import Stage
from cit_fast.methods.updates import MergeUpdate, merge
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run import stage_evaluation, stage_trainer

SGD = None  # an optimizer is not looked at


def task(name: str, dev: int = 0) -> Task:
    examples = [Example(f"Say {name}.", f"{k}", (f"{name} {k}",), name) for k in range(8 + dev)]
    return Task(name, tuple(examples[:8]), tuple(examples[8:]))


OLD, NEW = task("seven"), task("positive", dev=4)


@pytest.fixture
def tuned(make_model):
    """A LoRA model whose factors are all random, and its head beside them trained as well."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", modules_to_save=["lm_head"])
    model = get_peft_model(make_model("Llama"), config)
    return shaken(model, 0)


def shaken(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def trained_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def products(weights):
    """B A of every layer, and what is no factor, in float64."""
    found = {}
    for name, value in weights.items():
        if "lora_A" in name:
            found[name] = weights[name.replace("lora_A", "lora_B")].double() @ value.double()
        elif "lora_B" not in name:
            found[name] = value.double()
    return found


def at(model, tokenizer, replayed: int = 4) -> Stage:
    examples = (*NEW.train, *OLD.train[:replayed])
    return Stage(model, PromptEncoder(tokenizer), index=2, tasks=(NEW,), seen=(OLD,), examples=examples, seed="0/2")


def merged(update, model, tokenizer, after=1):
    """Weights before, after training and after the merge; and what ``finish`` returned."""
    stage = at(model, tokenizer)
    update.begin(stage)
    before = trained_of(model)
    trained = trained_of(shaken(model, after))
    finished = update.finish(SGD, stage)
    return before, trained, trained_of(model), finished


@pytest.mark.parametrize("coefficient", [0.3, 0.5])
def test_of_a_product_the_best_of_its_rank_is_kept(tuned, tiny_tokenizer, coefficient):
    """The error is that of the truncated singular value decomposition of the whole matrix (Eckart and Young)."""
    before, after, now, _ = merged(MergeUpdate(coefficient), tuned, tiny_tokenizer)
    before, after, now = map(products, (before, after, now))
    for name in now:
        wanted = (1 - coefficient) * before[name] + coefficient * after[name]
        error = torch.linalg.matrix_norm(now[name] - wanted)
        least = torch.linalg.svdvals(wanted)[3:].norm() if "lora_A" in name else torch.tensor(0.0)
        assert error <= least * (1 + 1e-4) + 1e-5 * torch.linalg.matrix_norm(wanted), name
    assert any("lm_head" in name for name in now)


def test_factors_are_merged_apart(tuned, tiny_tokenizer):
    before, after, now, _ = merged(MergeUpdate(0.3, of="factors"), tuned, tiny_tokenizer)
    for name in now:
        torch.testing.assert_close(now[name], 0.7 * before[name] + 0.3 * after[name])


@pytest.mark.parametrize("of", ["product", "factors"])
def test_the_ends_are_the_weights_themselves(tuned, tiny_tokenizer, of):
    for coefficient, end in ((0.0, 0), (1, 1)):
        found = merged(MergeUpdate(coefficient, of=of), copy.deepcopy(tuned), tiny_tokenizer)
        assert all(torch.equal(found[2][name], found[end][name]) for name in found[2])


def test_a_product_that_did_not_change_stays(tuned, tiny_tokenizer):
    """Before and after the same: the product is the same to rounding."""
    stage, update = at(tuned, tiny_tokenizer), MergeUpdate(0.4)
    update.begin(stage)
    before = products(trained_of(tuned))
    update.finish(SGD, stage)
    for name, value in products(trained_of(tuned)).items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-4)


def test_a_new_set_without_a_product_yet(make_model, tiny_tokenizer):
    """B is 0 before: the merged product is that share of the trained one."""
    model = get_peft_model(make_model("Llama"), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    _, after, now, _ = merged(MergeUpdate(0.25), model, tiny_tokenizer)
    after, now = products(after), products(now)
    for name in now:
        torch.testing.assert_close(now[name], 0.25 * after[name], atol=1e-6, rtol=1e-4)


def test_full_fine_tuning_is_merged_weight_by_weight(make_model, tiny_tokenizer):
    before, after, now, _ = merged(MergeUpdate(0.3), make_model("Llama").requires_grad_(), tiny_tokenizer)
    for name in now:
        torch.testing.assert_close(now[name], 0.7 * before[name] + 0.3 * after[name])


def test_the_search_takes_the_coefficient_of_the_smallest_loss(tuned, tiny_tokenizer):
    """Every loss that is recorded is that of the model at that point, every task counting the same."""
    before = copy.deepcopy(tuned)
    _, _, now, finished = merged(MergeUpdate(examples=8), tuned, tiny_tokenizer, after=3)
    losses = dict(finished.record.losses)
    chosen = finished.record.coefficient
    assert {0.25, 0.5, 0.75, 1.0} < set(losses)
    assert chosen == min(losses, key=losses.get)
    assert len({round(value, 6) for value in losses.values()}) == len(losses)
    stage = at(tuned, tiny_tokenizer)
    drawn = merge._drawn(stage, 8)
    assert {name: len(own) for name, own in drawn.items()} == {"seven": 4, "positive": 4}
    assert set(drawn["positive"]) == set(NEW.dev)
    for coefficient, loss in losses.items():
        model = copy.deepcopy(before)
        update, own = MergeUpdate(coefficient), at(model, tiny_tokenizer)
        update.begin(own)
        shaken(model, 3)
        update.finish(SGD, own)
        by_task = [
            [value for _, value in answer_surprise(model, stage.encoder, examples)] for examples in drawn.values()
        ]
        assert math.fsum(sum(each) / len(each) for each in by_task) / 2 == pytest.approx(loss, rel=1e-5)
        if coefficient == chosen:
            weights = trained_of(model)
            assert all(torch.equal(weights[name], now[name]) for name in now)


def test_the_search_needs_earlier_examples(tuned, tiny_tokenizer):
    with pytest.raises(ConfigError, match="add a replay, or give a number"):
        MergeUpdate().begin(at(tuned, tiny_tokenizer, replayed=0))


@pytest.mark.parametrize(
    "options",
    [
        {"coefficient": 1.5},
        {"coefficient": -0.1},
        {"coefficient": float("nan")},
        {"coefficient": "best"},
        {"coefficient": True},
        {"of": "sum"},
        {"examples": 1},
        {"batch_size": 0},
        {"when": "never"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        MergeUpdate(**options)


def run(settings, stream, output: Path, **update) -> Path:
    method = {"preset": "merge", "name": "merged", "update": {"examples": 8, **update}}
    own = {**settings, "methods": [method], "output": str(output)}
    return ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()[0]


def test_killed_and_resumed_with_the_same_bits(settings, stream, tmp_path):
    stream = TaskStream(stream[:2])
    settings["training"] |= {"learning_rate": 3e-2}
    whole = run(settings, stream, tmp_path / "whole")
    record = read_stages(whole)[2].update
    assert record.coefficient in {each for each, _ in record.losses}
    assert record.notes[0].startswith("Merged: ")
    assert [stage.update for stage in read_stages(whole)[:2]] == [None, None]
    output = tmp_path / "killed"
    assert killed(lambda: run(settings, stream, output), at_call(2, stage_trainer, "mark_complete"))
    assert killed(lambda: run(settings, stream, output), at_call(3, merge, "answer_surprise"))
    assert killed(lambda: run(settings, stream, output), at_call(1, stage_evaluation, "evaluate"))
    folder = run(settings, stream, output)
    assert read_stages(folder)[2].update == record
    ours, theirs = adapter(folder, 2), adapter(whole, 2)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_coefficient_of_0_leaves_the_stage_before(settings, stream, tmp_path):
    folder = run(settings, TaskStream(stream[:2]), tmp_path / "none", coefficient=0)
    first, second = adapter(folder, 1), adapter(folder, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_replay_the_run_says_what_is_missing(settings, stream, tmp_path):
    method = {"preset": "sequential", "name": "merged", "update": {"name": "merge"}}
    own = {**settings, "methods": [method], "output": str(tmp_path / "none")}
    with pytest.raises(CitFastError, match="add a replay, or give a number"):
        ContinualTrainer(own, stream=TaskStream(stream[:2]), console=Console(quiet=True)).run()
