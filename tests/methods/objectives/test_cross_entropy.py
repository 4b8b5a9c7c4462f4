from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cit_fast.errors import ConfigError
from cit_fast.methods.objectives import CrossEntropy
from cit_fast.models.collation import PaddingCollator
from cit_fast.models.forward import response_logits, unwrap


@pytest.fixture
def model(tiny_model_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder).train()


@pytest.fixture
def batch():
    rows = [([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9]), ([10, 11, 12], [-100, 11, 12])]
    return PaddingCollator(0)([{"input_ids": ids, "labels": labels} for ids, labels in rows])


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_equals_the_models_own_loss_and_gradients(model, batch):
    model(**batch).loss.backward()
    expected_loss, expected = model(**batch).loss, gradients(model)
    loss = CrossEntropy()(model, batch, None)
    loss.backward()
    ours = gradients(model)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient)


def test_two_micro_batches_normalised_together_equal_one(model, batch):
    together = CrossEntropy()(model, batch, None)
    halves = [{key: value[row : row + 1] for key, value in batch.items()} for row in (0, 1)]
    apart = sum(CrossEntropy()(model, half, 5) for half in halves)
    torch.testing.assert_close(apart, together)


def test_only_response_rows_reach_the_output_projection(model, batch):
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    logits, targets, _ = response_logits(model, batch)
    handle.remove()
    assert logits.shape == (5, model.config.vocab_size)
    assert targets.tolist() == [7, 8, 9, 11, 12]
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits[0], full[0, 1])
    torch.testing.assert_close(logits[4], full[1, 1])
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 0  # nothing is left behind


def test_a_batch_without_a_response_gives_a_zero_loss(model, batch):
    batch["labels"].fill_(-100)
    loss = CrossEntropy()(model, batch, None)
    assert loss.item() == 0
    loss.backward()


def test_a_head_whose_inputs_are_already_rows_is_left_alone(model, batch, monkeypatch):
    """A compiled model keeps its full logits; the rows are taken afterwards."""
    expected = response_logits(model, batch).logits
    monkeypatch.setattr(model, "_orig_mod", model, raising=False)
    with torch.no_grad():
        logits = response_logits(model, batch).logits
    torch.testing.assert_close(logits, expected)


def test_unwrap_goes_through_parallel_and_peft_wrappers(model):
    from peft import LoraConfig, get_peft_model

    wrapped = nn.Module()
    wrapped.module = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert unwrap(wrapped) is model


def test_label_smoothing_is_that_of_the_trainer(model, batch):
    from transformers.trainer_pt_utils import LabelSmoother

    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = LabelSmoother(epsilon=0.3)(output, batch["labels"], shift_labels=True)
    torch.testing.assert_close(CrossEntropy(label_smoothing=0.3)(model, batch, None), expected)
    with pytest.raises(ConfigError, match=r"label_smoothing: 1 is outside \[0, 1\)"):
        CrossEntropy(label_smoothing=1)
