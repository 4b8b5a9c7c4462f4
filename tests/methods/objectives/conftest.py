"""A tiny model as the stage before left it, and the same a little further on."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from cit_fast.models.prompts import PromptEncoder


@pytest.fixture
def encoder(tiny_tokenizer):
    return PromptEncoder(tiny_tokenizer, max_length=128)


@pytest.fixture
def previous(tiny_model_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, attn_implementation="sdpa").double().eval()


@pytest.fixture
def live(previous):
    """A little away from ``previous``."""
    model = copy.deepcopy(previous)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return model
