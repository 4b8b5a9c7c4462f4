"""Outputs of fused LoRA layers in the hands of others: called one by one, changed in place, watched."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from toy_lora import adapted, logits_and_gradients

from cit_fast import fuse_lora


def projections(model):
    model = fuse_lora(model) and model
    return model.base_model.model.model.layers[0].self_attn


@pytest.mark.parametrize("what", ["input", "factor", "scale", "set", "inference"])
@torch.no_grad()
def test_layers_called_one_by_one_see_what_has_changed_between(what):
    """Query, key and value are computed together; what was computed counts only for what it was computed from."""
    model = adapted()
    torch.manual_seed(3)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    other = copy.deepcopy(model)
    attention, right = projections(model), other.base_model.model.model.layers[0].self_attn

    def change(module, x):
        if what == "input":
            x.mul_(2)
        elif what == "factor":
            module.k_proj.lora_B["default"].weight.zero_()
        elif what == "scale":
            module.k_proj.set_scale("default", 0.25)
        elif what == "set":
            module.k_proj.set_adapter("other")

    x, y = (torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(2, 32) for _ in range(2))
    with torch.inference_mode() if what == "inference" else nullcontext():
        torch.testing.assert_close(attention.q_proj(x), right.q_proj(y))
    change(attention, x)
    change(right, y)
    found = attention.k_proj(x)
    torch.testing.assert_close(found, right.k_proj(y))
    assert not found.is_inference()
    torch.testing.assert_close(attention.v_proj(x), right.v_proj(y))


def test_what_a_layer_gives_may_be_changed_in_place():
    """OLMo clamps queries, keys and values where they lie."""
    model, other = adapted(), adapted()
    attention, right = projections(model), other.base_model.model.model.layers[0].self_attn
    gradients = []
    for module in (attention, right):
        x = torch.linspace(-1, 1, 128, dtype=torch.float64).reshape(2, 2, 32).requires_grad_()
        outputs = [layer(x).clamp_(-0.5, 0.5) for layer in (module.q_proj, module.k_proj, module.v_proj, module.o_proj)]
        sum(each.square().sum() for each in outputs).backward()
        gradients.append([x.grad, module.k_proj.lora_A["default"].weight.grad])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("how", ["backward hook", "backward pre-hook", "forward replaced"])
def test_layers_whose_parts_somebody_watches_go_peft_s_way(how):
    model = adapted()
    part = projections(model).o_proj.lora_A["default"]
    calls = []
    if how == "backward hook":
        part.register_full_backward_hook(lambda *_: calls.append(1))
    elif how == "backward pre-hook":
        part.register_full_backward_pre_hook(lambda *_: calls.append(1))
    else:
        own = part.forward
        part.forward = lambda x: calls.append(1) or own(x)
    logits_and_gradients(model)
    assert calls
