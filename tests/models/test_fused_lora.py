"""Fused LoRA layers against PEFT's own, in float64, for every option that PEFT's LoRA has."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file
from toy_lora import IDS, adapted, base_model, compare, logits_and_gradients
from transformers import BartConfig, BartForConditionalGeneration

from cit_fast import fuse_lora, unfuse_lora
from cit_fast.models import fused_lora
from cit_fast.models.fused_lora import FusedLoraLinear, adapters_cast_once


@pytest.fixture
def calls(monkeypatch):
    """An item for each layer that went through the ops: with how many others at a time."""
    count = []

    def counting(*args, **kwargs):
        count.append(1)
        return one(*args, **kwargs)

    def counting_siblings(x, weights, *args, **kwargs):
        count.extend([len(weights)] * len(weights))
        return several(x, weights, *args, **kwargs)

    one, several = fused_lora.lora_linear, fused_lora.lora_linears
    monkeypatch.setattr(fused_lora, "lora_linear", counting)
    monkeypatch.setattr(fused_lora, "lora_linears", counting_siblings)
    return count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.3},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"rank_pattern": {"q_proj": 1, "down_proj": 9}, "alpha_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_every_option_of_lora_gives_what_peft_gives(options, calls):
    model = adapted(**options)
    other = copy.deepcopy(model)
    fused = fuse_lora(model)
    assert fused == sum(isinstance(module, Linear) for module in other.modules()) > 0
    compare(model, other)
    assert len(calls) == fused


def test_layers_that_read_the_same_input_are_computed_together(calls):
    model = adapted(rank_pattern={"k_proj": 5})
    other = copy.deepcopy(model)
    fuse_lora(model)
    compare(model, other)
    assert calls == [3, 3, 3, 1, 2, 2, 1] * 2
    calls.clear()
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        compare(twin, other)
        with torch.no_grad():
            twin.base_model.model.model.layers[0].self_attn.k_proj.lora_B["default"].weight.zero_()
        assert not torch.equal(twin(input_ids=IDS).logits, other(input_ids=IDS).logits)
    compare(model, other)
    assert set(calls) == {1, 2, 3}
    unfuse_lora(model)
    calls.clear()
    compare(model, other)
    assert not calls


def test_layers_that_turn_out_to_read_other_inputs_are_computed_apart(calls):
    """Named like siblings, called like those of cross-attention."""
    model = adapted()
    fuse_lora(model)
    layer, x = model.base_model.model.model.layers[0].self_attn, torch.randn(2, 5, 32, dtype=torch.float64)
    right = [unfused(x + k) for k, unfused in enumerate((layer.q_proj, layer.k_proj, layer.v_proj))]
    calls.clear()
    for _ in range(2):
        found = [each(x + k) for k, each in enumerate((layer.q_proj, layer.k_proj, layer.v_proj))]
        for one, two in zip(found, right, strict=True):
            torch.testing.assert_close(one, two)
    assert calls == [1] * 6
    other = model.base_model.model.model.layers[1].self_attn
    found = other.q_proj(x), other.k_proj(x)  # and the value is not asked for
    calls.clear()
    again = other.q_proj(x), other.k_proj(x), other.v_proj(x)
    assert calls == [3] * 3
    assert torch.equal(found[1], again[1])


def test_threads_do_not_share_what_is_not_asked_for_yet(calls):
    model = adapted()
    fuse_lora(model)
    layer = model.base_model.model.model.layers[0].self_attn
    one, two = torch.randn(2, 2, 5, 32, dtype=torch.float64)
    right = layer.k_proj(two)
    layer.q_proj(one)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(layer.q_proj, two).result()
        torch.testing.assert_close(pool.submit(layer.k_proj, two).result(), right)
    calls.clear()
    mine = layer.k_proj(one)
    assert not calls  # it was there
    torch.testing.assert_close(mine, layer.k_proj(one))
    with torch.no_grad():
        layer.q_proj(one)
    assert layer.k_proj(one).requires_grad


def test_a_model_is_freed_with_its_last_reference():
    model = adapted()
    fuse_lora(model)
    logits_and_gradients(model)
    found = weakref.ref(model.base_model.model.model.layers[0].self_attn.k_proj.base_layer.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert found() is None
    finally:
        gc.enable()


def test_an_encoder_and_a_decoder_compute_their_layers_apart(calls):
    """Cross-attention reads two inputs."""
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    options = LoraConfig(
        task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False
    )
    model = get_peft_model(BartForConditionalGeneration(config).double(), options, autocast_adapter_dtype=False).train()
    other = copy.deepcopy(model)
    fuse_lora(model)
    found = []
    for each in (model, other):
        each.gradient_checkpointing_enable({"use_reentrant": False})
        each.enable_input_require_grads()
        for _ in range(2):
            each.zero_grad()
            each(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in each.parameters() if p.grad is not None])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    assert set(calls) == {1}


@pytest.mark.parametrize("what", ["hook", "disabled", "dropout", "dtype"])
def test_a_layer_that_stands_apart_leaves_its_siblings_alone(calls, what):
    model = adapted()
    fuse_lora(model)
    other = copy.deepcopy(model)
    unfuse_lora(other)
    layers = [each.base_model.model.model.layers[0].self_attn.k_proj for each in (model, other)]
    seen = []
    for layer in layers:
        if what == "hook":
            layer.register_forward_pre_hook(lambda module, inputs: seen.append(1))
        elif what == "disabled":
            layer.enable_adapters(False)
        elif what == "dropout":
            layer.lora_dropout["default"] = torch.nn.Dropout(1e-12)
        else:
            layer.lora_A["default"].float()
            layer.lora_B["default"].float()
    compare(model, other, **({"rtol": 1e-3, "atol": 1e-5} if what == "dtype" else {}))
    assert calls == [1] * (3 if what != "disabled" else 2) + [1, 2, 2, 1] + [3, 3, 3, 1, 2, 2, 1]
    assert len(seen) == (2 if what == "hook" else 0)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head(calls):
    model = adapted(base_model(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    other = copy.deepcopy(model)
    assert fuse_lora(model) == 3
    compare(model, other)
    assert len(calls) == 3


def test_several_active_sets_add_up(calls):
    model = adapted()
    model.add_adapter(
        "second", LoraConfig(r=5, lora_alpha=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "second"])
    model.double()
    other = copy.deepcopy(model)
    fuse_lora(model)
    compare(model, other)
    assert len(calls) == 14


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_what_the_op_cannot_do_goes_pefts_way(options, calls, caplog):
    model = adapted(**options)
    if "lora_dropout" in options:  # two sets, each with a dropout of its own
        model.add_adapter(
            "second", LoraConfig(r=5, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False)
        )
        model.base_model.set_adapter(["default", "second"])
        model.double()
    other = copy.deepcopy(model)
    with caplog.at_level(logging.INFO):
        fused = fuse_lora(model)
    compare(model, other)
    assert not calls
    if "use_dora" in options:
        assert fused == 0
        assert "14 LoRA layers keep PEFT's path: DoraLinearVariant" in caplog.text


def test_disabled_merged_and_mixed_sets_go_pefts_way(calls):
    model = adapted().eval()
    other = copy.deepcopy(model)
    fuse_lora(model)
    with torch.no_grad(), model.disable_adapter(), other.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)
    with torch.no_grad():
        names = ["default", "__base__"]
        assert torch.equal(
            model(input_ids=IDS, adapter_names=names).logits, other(input_ids=IDS, adapter_names=names).logits
        )
        model.merge_adapter()
        other.merge_adapter()
        assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)
        assert not calls
        model.unmerge_adapter()
        other.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, other(input_ids=IDS).logits)
    assert len(calls) == 14
    merged = model.merge_and_unload()
    assert not any(isinstance(module, Linear) for module in merged.modules())
    torch.testing.assert_close(merged(input_ids=IDS).logits, other.merge_and_unload()(input_ids=IDS).logits)


def test_a_hook_on_a_part_is_called(calls):
    model = adapted(target_modules=["q_proj", "v_proj"])
    fuse_lora(model)
    seen = []
    layer = model.base_model.model.model.layers[0].self_attn
    handle = layer.q_proj.lora_A["default"].register_forward_hook(lambda *_: seen.append("A"))
    layer.v_proj.base_layer.register_forward_pre_hook(lambda *_: seen.append("base"))
    model(input_ids=IDS)
    assert seen == ["A", "base"]
    assert len(calls) == 2  # of the other layer
    handle.remove()
    model(input_ids=IDS)
    assert len(calls) == 5


def test_a_trained_base_and_a_frozen_set(calls):
    model = adapted(target_modules=["q_proj", "v_proj"])
    layers = model.base_model.model.model.layers
    layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    layers[1].self_attn.v_proj.lora_A["default"].weight.requires_grad_(False)
    other = copy.deepcopy(model)
    fuse_lora(model)
    compare(model, other)
    assert len(calls) == 3


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing(dropout, calls):
    model = adapted(lora_dropout=dropout)
    other = copy.deepcopy(model)
    fuse_lora(model)
    for each in (model, other):
        each.gradient_checkpointing_enable({"use_reentrant": False})
        each.enable_input_require_grads()
    compare(model, other)
    assert len(calls) == 28


def test_float32_sets_on_a_bfloat16_base_err_no_more_than_peft(calls):
    """Against the same weights in float64; both are noise of the base's own rounding."""
    ours, theirs = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        base = base_model(torch.bfloat16)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        assert next(p for p in model.parameters() if p.requires_grad).dtype == torch.float32
        other, exact = copy.deepcopy(model), copy.deepcopy(model).double()
        fuse_lora(model)
        right = logits_and_gradients(exact)
        for errors, each in ((ours, model), (theirs, other)):
            found = logits_and_gradients(each)
            gradients = [name for name in right if name != "logits"]
            error = sum(float((found[name].double() - right[name]).square().sum()) for name in gradients)
            errors.append((error / sum(float(right[name].square().sum()) for name in gradients)) ** 0.5)
    assert len(calls) == 4 * 14
    assert sum(ours) <= 1.25 * sum(theirs), (ours, theirs)


def test_autocast(calls):
    model = adapted(base_model(torch.float32))
    other = copy.deepcopy(model)
    fuse_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        compare(model, other, rtol=0, atol=0)
    assert not calls  # a base in float32 is cast by autocast, at every call
    half = adapted(base_model(torch.bfloat16))
    other = copy.deepcopy(half)
    fuse_lora(half)
    with torch.autocast("cpu", torch.bfloat16):
        found, right = logits_and_gradients(half), logits_and_gradients(other)
    ours, theirs = (torch.cat([each.double().flatten() for each in side.values()]) for side in (found, right))
    assert (ours - theirs).norm() <= 0.05 * theirs.norm()
    assert len(calls) == 14


def test_compiles_to_one_graph():
    model = adapted(base_model(torch.float32))
    other = copy.deepcopy(model)
    fuse_lora(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    right = other.base_model.model.model.layers[0].mlp.up_proj
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = compiled(one)
    torch.testing.assert_close(y, right(two))
    y.sum().backward()
    right(two).sum().backward()
    torch.testing.assert_close(one.grad, two.grad)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, right.lora_A["default"].weight.grad)


def test_files_names_copies_and_new_sets_stay_pefts(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "before")
    keys = list(model.state_dict())
    assert fuse_lora(model) == fuse_lora(model) == 14
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(p for p in twin.parameters() if p.requires_grad).zero_()
    assert not torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
    model.add_adapter("wider", LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert sum(type(module) is FusedLoraLinear for module in model.modules()) == 14
    assert fuse_lora(model) == 15
    assert unfuse_lora(model) == 15
    assert not any(type(module) is FusedLoraLinear for module in model.modules())
    assert unfuse_lora(model) == 0


def test_batches_of_one_token_and_of_any_shape(calls):
    model = adapted()
    other = copy.deepcopy(model)
    fuse_lora(model)
    for ids in (IDS[:1, :1], IDS[:, :2], IDS, IDS[:1, :5]):
        torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)
    assert len(calls) == 4 * 14


def test_adapters_cast_once_give_the_same_bits_and_are_forgotten_afterwards():
    model = adapted().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fuse_lora(model.eval())
    with torch.no_grad():
        right = model(input_ids=IDS).logits
        with adapters_cast_once(model):
            assert torch.equal(model(input_ids=IDS).logits, right)
            layer = next(module for module in model.modules() if isinstance(module, FusedLoraLinear))
            ((a, b),) = layer.cast.values()
            model(input_ids=IDS)
            assert a.dtype == b.dtype == torch.bfloat16
            assert next(iter(layer.cast.values()))[0] is a
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        with adapters_cast_once(model):
            changed = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert torch.equal(changed, model(input_ids=IDS).logits)
    assert layer.cast is None
