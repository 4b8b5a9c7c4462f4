"""An adapter set that grows: both parts are active, the earlier one stays, and together they are one plain set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killed import at_call, killed
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from toy_runs import adapter
from transformers import AutoModelForCausalLM

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.data import Example, Task
from cit_fast.errors import CitFastError, ConfigError
from cit_fast.evaluation import read_stages
from cit_fast.methods.objectives import CrossEntropy, OLoRA
from cit_fast.methods.stage import Stage
from cit_fast.models.adapters import train_adapter
from cit_fast.models.generation import one_set
from cit_fast.models.growing_adapter import keeping_active, trained_sets
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run import stage_evaluation, stage_trainer

ADAPTER = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "peft_type": "LORA"}
TASK = Task("words", tuple(Example("Say it.", f"{k}", (f"word {k}",), "words") for k in range(4)))
IDS = torch.tensor([[5, 9, 11, 30, 7]])


def randomised(model, seed: int) -> None:
    """Weights in what trains, as if it had trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def base(make_model):
    return make_model("Llama", torch.float64, attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    ],
    ids=["plain", "rslora", "bias", "patterns"],
)
def test_the_parts_add_up(base, more, fuse):
    plain = logits(base)
    config = {**ADAPTER, **more}
    model, _ = train_adapter(base, config, "shared", 0, fuse=fuse, grow=True)
    randomised(model, 1)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    for stage in (2, 3):
        before = logits(model)
        model, grown = train_adapter(model, config, "shared", stage, fuse=fuse, grow=True)
        torch.testing.assert_close(logits(model), before)  # B of the new part is zero
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all("shared-new-part" in name for name in trained)
        assert trained_sets(model) == ["shared-new-part"]
        randomised(model, stage)
        after = logits(model)
        assert not torch.allclose(after, before)
        for name, value in frozen.items():
            assert torch.equal(dict(model.named_parameters())[name], value)
        grown.undo(model, "shared")
        assert list(model.peft_config) == ["shared"]
        assert model.active_adapters == ["shared"]
        torch.testing.assert_close(logits(model), after, rtol=1e-6, atol=1e-9)
        assert model.peft_config["shared"].r == 2 * stage


def test_what_is_saved_is_a_plain_set(base, tmp_path, make_model):
    config = {**ADAPTER, "rank_pattern": {"q_proj": 3}}
    model, _ = train_adapter(base, config, "shared", 0, grow=True)
    randomised(model, 1)
    model, grown = train_adapter(model, config, "shared", 1, grow=True)
    randomised(model, 2)
    grown.undo(model, "shared")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    fresh = make_model("Llama", torch.float64, attention_bias=True, mlp_bias=True)
    again = PeftModel.from_pretrained(fresh, tmp_path / "shared")
    torch.testing.assert_close(logits(again), expected)
    assert {len(m.weight) for n, m in again.named_modules() if n.endswith("q_proj.lora_A.default")} == {6}


def test_activation_survives_what_makes_one_set_active(base):
    model, _ = train_adapter(base, ADAPTER, "shared", 0, grow=True)
    randomised(model, 1)
    model, _ = train_adapter(model, ADAPTER, "shared", 1, grow=True)
    randomised(model, 2)
    before = logits(model)
    with keeping_active(model):
        model.set_adapter("shared-new-part")
        assert not torch.allclose(logits(model), before)
    torch.testing.assert_close(logits(model), before)
    with one_set(model, "shared"):
        assert not torch.allclose(logits(model), before)
    torch.testing.assert_close(logits(model), before)
    assert trained_sets(model) == ["shared-new-part"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_dora": True}, "router: stacked grows plain LoRA sets"),
        ({"modules_to_save": ["lm_head"]}, "router: stacked grows plain LoRA sets"),
        ({"lora_alpha": 8}, "scaling of .* is 2 and its new part's 4"),
    ],
)
def test_what_cannot_grow(base, more, message):
    first = ADAPTER if "lora_alpha" in more else {**ADAPTER, **more}
    model, _ = train_adapter(base, first, "shared", 0, grow=True)
    with pytest.raises(ConfigError, match=message):
        train_adapter(model, {**ADAPTER, **more}, "shared", 1, grow=True)


# --- O-LoRA ---


def prepared(model, tokenizer, **options):
    objective, encoder = OLoRA(**options), PromptEncoder(tokenizer, max_length=64)
    stage = Stage(model, encoder, tasks=(TASK,), examples=TASK.train)
    inputs = objective.prepare(stage)
    objective.notes = inputs.record.notes
    plain = CrossEntropy()
    plain.prepare(stage)
    return objective, plain, inputs.collator(inputs.features)


@pytest.mark.parametrize("num_items", [None, 40])
def test_the_penalty_by_definition(base, tiny_tokenizer, num_items):
    model, _ = train_adapter(base, ADAPTER, "shared", 0, grow=True)
    randomised(model, 1)
    model, _ = train_adapter(model, ADAPTER, "shared", 1, grow=True)
    randomised(model, 2)
    objective, plain, batch = prepared(model, tiny_tokenizer, lambda_=0.3, l2=0.1)
    assert objective.notes == []
    weights = dict(model.named_parameters())
    overlap = norms = 0.0
    for name, new in weights.items():
        if "shared-new-part" not in name:
            continue
        norms = norms + new.square().sum().sqrt()
        if "lora_A" in name:
            old = weights[name.replace("shared-new-part", "shared")]
            overlap = overlap + sum(abs(a @ b) for a in old for b in new)
    share = 1 if num_items is None else int((batch["labels"][:, 1:] != -100).sum()) / num_items
    expected = plain(model, batch, num_items) + share * (0.3 * overlap + 0.1 * norms)
    loss = objective(model, batch, num_items)
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-6, atol=1e-7)
    trained = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-8)


def test_of_the_first_part_it_is_the_cross_entropy(base, tiny_tokenizer):
    model, _ = train_adapter(base, ADAPTER, "shared", 0, grow=True)
    objective, plain, batch = prepared(model, tiny_tokenizer)
    assert torch.equal(objective(model, batch, None), plain(model, batch, None))


def overlaps(model, tiny_tokenizer, first) -> None:
    """The penalty is the overlap of the trained set "second" with the factors ``first`` of the other."""
    objective, plain, batch = prepared(model, tiny_tokenizer, lambda_=2.0)
    own = {name: a for name, a in model.named_parameters() if "lora_A.second" in name}
    overlap = sum((first[name.replace("second", "first")] @ a.T).abs().sum() for name, a in own.items())
    assert overlap > 0.1
    expected = plain(model, batch, None) + 2 * overlap
    torch.testing.assert_close(objective(model, batch, None), expected.float(), rtol=1e-6, atol=0)
    (note,) = objective.notes
    assert note.startswith("The sets first are not active beside the one in training")


def test_other_sets_count_where_each_task_has_one(base, tiny_tokenizer):
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.set_adapter("second")
    randomised(model, 1)
    overlaps(model, tiny_tokenizer, dict(model.named_parameters()))


def test_other_sets_count_where_they_are_parked(base, tiny_tokenizer):
    """As they lie in a run: beside the model."""
    model, _ = train_adapter(base, ADAPTER, "first", 0)
    randomised(model, 1)
    first = {name: a.detach().clone() for name, a in model.named_parameters() if "lora_A.first" in name}
    model, _ = train_adapter(model, ADAPTER, "second", 1)
    assert list(model.peft_config) == ["second"]
    randomised(model, 2)
    overlaps(model, tiny_tokenizer, first)


def test_without_an_adapter(base, tiny_tokenizer):
    with pytest.raises(ConfigError, match="no LoRA factor trains"):
        prepared(base, tiny_tokenizer)


@pytest.mark.parametrize("options", [{"lambda_": -1}, {"l2": float("nan")}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        OLoRA(**options)


# --- in a run ---


def run(settings, stream, output: Path, **method) -> Path:
    own = {**settings, "methods": [{"preset": "o-lora", **method}], "output": str(output)}
    return ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()[0]


def test_killed_and_resumed_with_the_same_bits(settings, stream, tmp_path):
    settings["training"] |= {"learning_rate": 1e-2}
    whole = run(settings, stream, tmp_path / "whole")
    moments = [
        at_call(2, stage_trainer, "mark_complete"),
        at_call(1, stage_evaluation, "evaluate"),
        at_call(1, stage_trainer, "mark_complete"),
    ]
    for arm in moments:
        assert killed(lambda: run(settings, stream, tmp_path / "killed"), arm)
    folder = run(settings, stream, tmp_path / "killed")
    ours, theirs = read_stages(folder), read_stages(whole)
    assert [(stage.losses, stage.scores) for stage in ours] == [(stage.losses, stage.scores) for stage in theirs]
    for stage in (1, 2, 3):
        one, other = adapter(folder, stage), adapter(whole, stage)
        assert all(torch.equal(one[name], other[name]) for name in other)
        assert {len(a) for name, a in one.items() if "lora_A" in name} == {4 * stage}


def test_what_earlier_tasks_learned_stays_in_the_set(settings, stream, tmp_path):
    settings["training"] |= {"learning_rate": 1e-2}
    folder = run(settings, stream, tmp_path)
    before, after = adapter(folder, 1), adapter(folder, 3)
    for name, value in before.items():
        assert torch.equal(after[name][:4] if "lora_A" in name else after[name][:, :4], value)


def test_it_is_served_as_it_was_evaluated(settings, stream, tmp_path):
    from cit_fast.evaluation.predictions import read_predictions

    settings["training"] |= {"learning_rate": 1e-2}
    folder = run(settings, stream, tmp_path)
    test = list(stream[0].test)
    kept = read_predictions(folder / "stages/03/predictions/alpha.jsonl")
    model = ContinualModel.from_run(folder)
    assert model.generate(test, settings["evaluation"]["max_new_tokens"]) == [each.prediction for each in kept]
    base = AutoModelForCausalLM.from_pretrained(settings["model"]["name"])
    assert PeftModel.from_pretrained(base, folder / "stages/03/adapters/shared").peft_config["default"].r == 12


@pytest.mark.parametrize(
    "method",
    [
        {"replay": {"name": "random", "fraction": 0.5}, "objective": {"name": "distillation"}},
        {"replay": {"name": "random", "fraction": 0.5}, "update": {"name": "merge"}},
        {"replay": {"name": "on-policy", "fraction": 0.5, "max_new_tokens": 4}, "update": {"name": "balance-ema"}},
    ],
    ids=["distillation", "merge", "on-policy and an average"],
)
def test_it_goes_with_other_parts(settings, stream, tmp_path, method):
    settings["training"] |= {"learning_rate": 1e-2}
    folder = run(settings, stream, tmp_path, name="mixed", **{"objective": "cross-entropy", **method})
    assert {len(a) for name, a in adapter(folder, 3).items() if "lora_A" in name} == {12}


def test_an_average_of_the_whole_stream_is_refused(settings, stream, tmp_path):
    with pytest.raises(CitFastError, match="cannot go on with an adapter set that grows"):
        run(settings, stream, tmp_path, update={"name": "balance-ema", "scope": "stream"})
