from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cit_fast.errors import ConfigError
from cit_fast.models.collation import (
    LENGTHS,
    PackingCollator,
    PaddingCollator,
    choose_collator,
    padded_length,
    resolve_attention,
)
from cit_fast.models.prompts import Encoded


def encoded(prompt, response):
    return Encoded([*prompt, *response], [-100] * len(prompt) + list(response), len(prompt))


TOKENS = st.lists(st.integers(3, 399), min_size=1, max_size=30)
BATCHES = st.lists(st.builds(encoded, TOKENS, TOKENS), min_size=1, max_size=5)


@given(batch=BATCHES)
def test_padded(batch):
    padded = PaddingCollator(pad_token_id=0)(batch)
    longest = max(len(one.input_ids) for one in batch)
    assert set(padded) == {"input_ids", "attention_mask", "labels"}
    length = padded["input_ids"].shape[1]
    assert length in LENGTHS
    assert longest <= length
    for row, one in enumerate(batch):
        fill = length - len(one.input_ids)
        assert padded["input_ids"][row].tolist() == one.input_ids + [0] * fill
        assert padded["labels"][row].tolist() == one.labels + [-100] * fill
        assert padded["attention_mask"][row].tolist() == [1] * len(one.input_ids) + [0] * fill
    assert all(part.dtype == torch.int64 for part in padded.values())


@given(batch=BATCHES)
def test_packed_equals_padded(batch):
    packed = PackingCollator()(batch)
    padded = PaddingCollator(0)(batch)
    own = padded["attention_mask"].bool()
    assert packed["input_ids"].shape == packed["labels"].shape == packed["position_ids"].shape == (1, own.sum())
    assert torch.equal(packed["input_ids"][0], padded["input_ids"][own])
    assert torch.equal(packed["labels"][0], padded["labels"][own])
    assert torch.equal(packed["position_ids"][0], (own.cumsum(1) - 1)[own])
    bounds = [0, *own.sum(1).cumsum(0).tolist()]
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == bounds
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == packed["max_length_k"] == own.sum(1).max()


def test_packed_and_padded_give_one_loss(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    batch = [encoded(range(5, 15), range(20, 24)), encoded([7], [9, 2]), encoded(range(50, 90), [3])]
    with torch.no_grad():
        padded = model(**PaddingCollator(0)(batch), use_cache=False).loss
        # With a cache, transformers takes the row for one sequence.
        packed = model(**PackingCollator()(batch), use_cache=False).loss
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)


def test_mappings_are_collated_as_encoded_examples_are():
    one = encoded([4, 5], [6])
    mapping = {"input_ids": one.input_ids, "labels": one.labels}
    for collate in (PaddingCollator(0), PackingCollator()):
        for key, value in collate([one]).items():
            assert torch.equal(torch.as_tensor(collate([mapping])[key]), torch.as_tensor(value))


def test_lengths():
    assert [padded_length(length) for length in (1, 32, 33, 4096, 4097)] == [32, 32, 48, 4096, 8192]
    waste = max(1 - length / padded_length(length) for length in range(LENGTHS[0], LENGTHS[-1] + 1))
    assert waste <= 1 / 3
    batch = [encoded(range(40), range(10))]
    assert PaddingCollator(0, max_length=52)(batch)["input_ids"].shape == (1, 52)
    assert PaddingCollator(0, max_length=8)(batch)["input_ids"].shape == (1, 50)
    assert PaddingCollator(0, lengths=(20,))(batch)["input_ids"].shape == (1, 60)


@pytest.mark.parametrize("lengths", [(), (0, 2), (8, 8), (16, 8)])
def test_unusable_lengths(lengths):
    with pytest.raises(ConfigError, match="ascending positive"):
        PaddingCollator(0, lengths)


def test_choice_without_flash_attention():
    assert resolve_attention("auto", "cpu") == "sdpa"
    assert resolve_attention("eager", "cpu") == "eager"
    chosen = choose_collator("auto", "cpu", pad_token_id=7, lengths=[64], max_length=60)
    assert chosen == PaddingCollator(7, (64,), 60)
    assert isinstance(choose_collator("flash_attention_2", "cpu", pad_token_id=0), PaddingCollator)
    assert isinstance(choose_collator("sdpa", "cuda", pad_token_id=0), PaddingCollator)
    assert isinstance(choose_collator("flash_attention_2", "cuda", pad_token_id=0), PackingCollator)
    assert isinstance(choose_collator("kernels-community/flash-attn3", "cuda:0", pad_token_id=0), PackingCollator)


@pytest.mark.parametrize(
    ("major", "installed", "expected"),
    [
        (9, {2, 3, 4}, "flash_attention_4"),
        (9, {2, 3}, "flash_attention_3"),
        (10, {2, 3}, "flash_attention_2"),
        (8, {2, 3, 4}, "flash_attention_2"),
        (7, {2, 3, 4}, "sdpa"),
        (9, set(), "sdpa"),
    ],
)
def test_choice_of_flash_attention(monkeypatch, major, installed, expected):
    from transformers import utils

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    for version in (2, 3, 4):
        monkeypatch.setattr(utils, f"is_flash_attn_{version}_available", lambda version=version: version in installed)
    assert resolve_attention("auto", "cuda") == expected
    packs = isinstance(choose_collator("auto", "cuda", pad_token_id=0), PackingCollator)
    assert packs == expected.startswith("flash")
