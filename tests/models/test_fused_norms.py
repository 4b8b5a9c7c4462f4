"""Fused RMSNorm against the models' own."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cit_fast import fuse_lora, fuse_norms, unfuse_norms
from cit_fast.models import fused_norms
from cit_fast.models.fused_norms import FusedNorm
from cit_fast.ops import rms_norm
from cit_fast.ops.backends import backend
from cit_fast.ops.rms_norm import reference

IDS = torch.tensor([[3, 7, 11, 2, 9, 30], [5, 1, 8, 60, 4, 2]])


@pytest.fixture
def calls(monkeypatch):
    """One for each time that the op ran."""
    made = []

    def counted(*args, **kwargs):
        made.append(1)
        return rms_norm(*args, **kwargs)

    monkeypatch.setattr(fused_norms, "rms_norm", counted)
    return made


def logits_and_gradients(model):
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exactly(model):
    """The model with norms in float64, which transformers' are not even in a float64 model."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            eps, from_one = fused_norms._eps(module), "Gemma" in type(module).__name__
            module.forward = partial(reference.rms_norm, weight=module.weight, eps=eps, from_one=from_one)
    return model


def errs_no_more(ours, own, exact):
    """Than three times the model's own float32: which roundings its weights amplify is chance. The op itself errs less
    than transformers' (tests/ops/test_rms_norm.py)."""
    assert (ours - exact).norm() <= max(3 * (own - exact).norm(), 1e-6 * exact.norm())


# Gemma's counts from one, Cohere's is no RMSNorm, Phi has none.
@pytest.mark.parametrize(
    ("name", "norms"),
    [("Llama", 5), ("Qwen3", 9), ("Mistral", 5), ("Gemma2", 9), ("Granite", 5), ("Cohere", 0), ("Phi", 0)],
)
def test_a_model_computes_what_it_did(make_model, name, norms, calls):
    options = {"num_key_value_heads": 4} if name == "Phi" else {}
    model = make_model(name, **options).train()
    right, right_gradients = logits_and_gradients(model)
    names = [key for key, _ in model.named_parameters()]
    assert fuse_norms(model) == norms
    assert fuse_norms(model) == 0
    calls.clear()
    found, gradients = logits_and_gradients(model)
    assert len(calls) == norms
    exact, exact_gradients = logits_and_gradients(exactly(make_model(name, torch.float64, **options).train()))
    assert gradients.keys() == right_gradients.keys() == exact_gradients.keys()
    errs_no_more(found, right, exact)
    for key, gradient in exact_gradients.items():
        errs_no_more(gradients[key], right_gradients[key], gradient)
    assert [key for key, _ in model.named_parameters()] == names
    assert unfuse_norms(model) == norms
    again, _ = logits_and_gradients(model)
    assert torch.equal(again, right)
    assert not any(isinstance(module, FusedNorm) for module in model.modules())


def test_bfloat16_errs_no_more_than_the_models_own_layers(make_model):
    exact, exact_gradients = logits_and_gradients(exactly(make_model("Llama", torch.float64).train()))
    model = make_model("Llama", torch.bfloat16).train()
    own, own_gradients = logits_and_gradients(model)
    fuse_norms(model)
    ours, gradients = logits_and_gradients(model)
    assert (ours - exact).norm() <= 1.1 * (own - exact).norm()
    ours, own = (
        sum((found[key].double() - right).square().sum() for key, right in exact_gradients.items())
        for found in (gradients, own_gradients)
    )
    assert ours <= 1.2 * own


def test_beside_lora_copies_and_files(make_model, tmp_path, calls):
    from peft import LoraConfig, get_peft_model

    model = make_model("Llama").train()
    fuse_norms(model)
    model.save_pretrained(tmp_path)
    again = type(make_model("Llama")).from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    right, right_gradients = logits_and_gradients(adapted)
    assert len(calls) >= 5
    fuse_lora(adapted)
    found, gradients = logits_and_gradients(copy.deepcopy(adapted))
    assert (found - right).norm() <= 2e-6 * right.norm()
    for key, gradient in right_gradients.items():
        assert (gradients[key] - gradient).norm() <= 5e-6 * gradient.norm(), key


@pytest.mark.parametrize("way", ["autocast", "another backend", "float64", "compiled"])
def test_elsewhere_the_layers_run_as_they_are(make_model, way, calls):
    model = make_model("Llama", torch.float64 if way == "float64" else torch.float32)
    if way == "float64":
        assert fuse_norms(model) == 0
        return
    fuse_norms(model)
    calls.clear()
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS)
    elif way == "another backend":
        with backend("reference"):
            model(input_ids=IDS)
    else:
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            compiled(input_ids=IDS)
    assert not calls


def test_a_layer_that_does_something_else_stays_as_it_is():
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return 3 * x

    class NamedRMSNorm(OddRMSNorm):
        def forward(self, x, residual):
            return x + residual

    model = nn.ModuleList([OddRMSNorm(), NamedRMSNorm(), nn.RMSNorm(8), nn.LayerNorm(8)])
    assert fuse_norms(model) == 0
    assert [type(module).__name__ for module in model] == ["OddRMSNorm", "NamedRMSNorm", "RMSNorm", "LayerNorm"]
    x = torch.randn(2, 8)
    assert torch.equal(model[0](x), 3 * x)


def test_a_run_fuses_by_itself_and_can_be_told_not_to(tiny_model_folder):
    from cit_fast.models.config import ModelConfig
    from cit_fast.models.pretrained import load_model

    for fuse in (True, False):
        model = load_model(tiny_model_folder, ModelConfig(name=str(tiny_model_folder), fuse_norms=fuse))
        assert any(isinstance(module, FusedNorm) for module in model.modules()) == fuse


@pytest.mark.parametrize("way", ["pickle", "torch.save", "copy"])
def test_a_model_goes_through_a_file(make_model, way, monkeypatch):
    """And is fused again where that can be."""
    model = make_model("Gemma2")  # whose norms count from one
    right = model(input_ids=IDS).logits
    count = fuse_norms(model)
    fused = model(input_ids=IDS).logits
    kept = through(model, way)
    for there in (True, False):
        if not there:
            monkeypatch.setattr(fused_norms, "available_backends", lambda: {"native": SimpleNamespace(available=False)})
        again = kept()
        assert sum(isinstance(module, FusedNorm) for module in again.modules()) == (count if there else 0)
        assert torch.equal(again(input_ids=IDS).logits, fused if there else right)
        assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert unfuse_norms(again) == (count if there else 0)


def through(model, way):
    """What reads the model again."""
    if way == "copy":
        return partial(copy.deepcopy, model)
    file = io.BytesIO()
    if way == "pickle":
        pickle.dump(model, file)
    else:
        torch.save(model, file)

    def read():
        file.seek(0)
        return pickle.load(file) if way == "pickle" else torch.load(file, weights_only=False)  # noqa: S301  # its own

    return read
