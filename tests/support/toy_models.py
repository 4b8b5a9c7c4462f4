"""Tiny random models of several architectures, and examples with key parts for them."""

from __future__ import annotations

import pytest
import torch

from cit_fast.data import Example
from cit_fast.models.prompts import PromptEncoder

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OWN = {
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "Gemma3": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 0.25, "embedding_multiplier": 2.0},
    "Cohere": {"logit_scale": 3.0},
    "Mamba": {"state_size": 8},
}


def decided_llama():
    """A Llama of 32 tokens, in evaluation mode, whose two likeliest tokens are never near each other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer):
    """``make_model("Llama", **configuration)``: a random model of the tiny tokenizer's vocabulary, float32, in
    evaluation mode; weights large enough that contexts matter."""
    import transformers

    def make(name: str, dtype=torch.float32, implementation="eager", **more):
        kind = {"Gemma3": "Gemma3Text"}.get(name, name)
        config = getattr(transformers, f"{kind}Config")(
            **{"vocab_size": len(tiny_tokenizer), **_COMMON, **_OWN.get(name, {}), **more}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation=implementation)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(std=0.3)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def encoder(tiny_tokenizer):
    return PromptEncoder(tiny_tokenizer)


def marked(instruction: str, *parts: str, input: str = "", answer: str = "seven", **fields) -> Example:  # noqa: A002
    spans = tuple(sorted((instruction.index(part), instruction.index(part) + len(part)) for part in parts))
    return Example(instruction, input, (answer,), key_parts=spans, **fields)


@pytest.fixture(name="marked")
def _marked():
    return marked


@pytest.fixture
def examples():
    return [
        marked("Convert the number to words and answer with the words only.", "the words only", input="7"),
        marked(
            "Write the date in the form year, month, day.",
            "the date",
            "year, month, day",
            input="9 May 1987, a long evening at the sea",
            answer="1987, 5, 9",
        ),
        marked("What is the sentiment of this review?", "sentiment", answer="positive"),
    ]
