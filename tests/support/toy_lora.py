"""A tiny Llama with PEFT's LoRA in float64, and how two of them are compared."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.tensor([[3, 7, 11, 2, 9, 30], [5, 1, 8, 60, 4, 2]])


def base_model(dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_bias=True,
        **options,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(base=None, **options):
    torch.manual_seed(1)
    options = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "init_lora_weights": False, **options}
    base = base if base is not None else base_model()
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options), autocast_adapter_dtype=False).train()


def logits_and_gradients(model):
    torch.manual_seed(2)
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def compare(model, other, **tolerance):
    found, right = logits_and_gradients(model), logits_and_gradients(other)
    assert found.keys() == right.keys()
    assert len(found) > 1
    for name in right:
        torch.testing.assert_close(found[name], right[name], **tolerance)
