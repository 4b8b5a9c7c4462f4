"""The shared fixtures do what the other tests take for granted."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_model_folder_loads_as_any_user_would(tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert len(tokenizer) == model.config.vocab_size == 400
    assert tokenizer.decode(tokenizer.eos_token_id) == "<|im_end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    ids = tokenizer("Write the date.", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], 400)
    assert torch.get_num_threads() == 1


@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_tokenizer_round_trip(tiny_tokenizer, text):
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tiny_tokenizer.decode(ids) == text
