"""Rows of common beginnings: the same hidden states, fewer places, and never where a label would be shared."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from cit_fast.data import Example
from cit_fast.key_parts import layout as module
from cit_fast.key_parts.hidden import pair_hidden
from cit_fast.key_parts.layout import GroupingCollator, alike_together
from cit_fast.key_parts.pairs import EncodedPair, PairCollator, encode_pair, encode_pairs
from cit_fast.models.prompts import IGNORED, Encoded, PromptEncoder

# Of a model in float64 whose normalisation, and softmax where it is eager, compute in float32.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
LONG = "Read the text with care, then convert the number to words and answer with the words only, in lower case please."


def pairs_of(tokenizer, count=6):
    examples = [
        Example(LONG if k % 3 else "Say it in words.", f"{k} of {k * 7}", (f"{k} {k * 7}",), "t", ((4, 13),))
        for k in range(count)
    ]
    examples.append(replace(examples[1], key_parts=()))
    return encode_pairs(PromptEncoder(tokenizer, max_length=None), examples).pairs


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hidden_states_are_those_of_separate_rows(make_model, tiny_tokenizer, implementation):
    model = make_model("Llama", torch.float64, implementation)
    pairs = pairs_of(tiny_tokenizer)
    random.Random(0).shuffle(pairs)
    plain = PairCollator(0, True)
    expected, grouped = PairCollator(0, False)(pairs), GroupingCollator(plain)(pairs)
    assert grouped["input_ids"].numel() < 0.7 * plain(pairs)["input_ids"].numel()
    assert grouped.keys() == plain(pairs).keys()
    assert (grouped["labels"][:, 1:] != IGNORED).sum() == (expected["labels"] != IGNORED).sum()
    for ours, theirs in zip(pair_hidden(model, grouped), pair_hidden(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING)


def test_gradients_are_those_of_separate_rows(make_model, tiny_tokenizer):
    model = make_model("Llama", torch.float64, "sdpa")
    pairs = pairs_of(tiny_tokenizer, 4)

    def gradients(batch):
        hidden = pair_hidden(model, batch)
        (hidden.full.sin().sum() + hidden.masked.cos().sum()).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    expected = gradients(PairCollator(0, False)(pairs))
    for name, gradient in gradients(GroupingCollator(PairCollator(0, True))(pairs)).items():
        torch.testing.assert_close(gradient, expected[name], **ROUNDING)


def test_a_labelled_token_is_never_shared():
    """Two answers to one prompt, the prompt of one being the start of the other's; a label early on."""

    def pair(index, ids, first):
        labels = [IGNORED] * first + ids[first:]
        return EncodedPair(Encoded(ids, labels, first), None, index, (first, len(ids)))

    pairs = [pair(0, [5, 6, 7, 8, 9], 3), pair(1, [5, 6, 7, 8, 4, 4], 4), pair(2, [5, 6, 7, 8, 9], 1)]
    with_turns = Encoded([5, 6, 7, 8, 9], [IGNORED, 6, IGNORED, IGNORED, 9], 4)
    its_mask = Encoded([5, 6, 0, 0, 8, 9], [IGNORED, 6, IGNORED, IGNORED, IGNORED, 9], 5)
    pairs.append(EncodedPair(with_turns, its_mask, 3, (4, 5)))
    batch = GroupingCollator(PairCollator(0, True, lengths=(4, 8, 16)))(pairs)
    targets = batch["labels"].flatten()[batch["full_at"] + 1].tolist()
    assert targets == [8, 9, 4, 4, 6, 7, 8, 9, 6, 9]
    assert (batch["labels"] != IGNORED).sum() == 10
    ids = batch["input_ids"].flatten()
    assert ids[batch["full_at"]].tolist() == [7, 8, 8, 4, 5, 6, 7, 8, 5, 8]
    assert ids[batch["masked_at"]].tolist() == [7, 8, 8, 4, 5, 6, 7, 8, 5, 8]


@pytest.mark.parametrize("plain", [PairCollator(0, False), PairCollator(0, True, window=8)], ids=["separate", "window"])
def test_models_that_share_nothing_keep_their_rows(tiny_tokenizer, plain):
    pairs = pairs_of(tiny_tokenizer)
    assert torch.equal(GroupingCollator(plain)(pairs)["input_ids"], plain(pairs)["input_ids"])


def test_the_layout_with_less_work_is_taken(tiny_tokenizer, monkeypatch):
    pairs = pairs_of(tiny_tokenizer)
    plain = PairCollator(0, True)
    monkeypatch.setattr(module, "_ATTENTION", 1e-3)  # long rows cost more than anything
    ours = GroupingCollator(plain)(pairs)["input_ids"]
    assert ours.shape[1] <= plain(pairs)["input_ids"].shape[1]


def test_several_maskings_of_one_example_have_its_full_context_once(make_model, tiny_tokenizer):
    model = make_model("Llama", torch.float64, "sdpa")
    encoder = PromptEncoder(tiny_tokenizer, max_length=None)
    example = Example(LONG, "12", ("twelve",), "t")
    spans = [(0, 4), (9, 13), (25, 29), (60, 66)]
    pairs = [encode_pair(encoder, replace(example, key_parts=(span,)), k) for k, span in enumerate(spans)]
    pairs = [replace(pair, full=pairs[0].full) for pair in pairs]
    grouped = GroupingCollator(PairCollator(0, True))(pairs)
    labels = sum(label != IGNORED for label in pairs[0].full.labels)
    assert (grouped["labels"] != IGNORED).sum() == labels
    expected = pair_hidden(model, PairCollator(0)(pairs))
    for ours, theirs in zip(pair_hidden(model, grouped), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING)


def test_sequences_that_begin_differently_keep_rows_of_their_own():
    """No mask of four dimensions, and each sequence a row, where nothing would be saved."""

    def one(ids):
        return Encoded(ids, [IGNORED] * (len(ids) - 1) + ids[-1:], len(ids) - 1)

    pairs = [EncodedPair(one([k] * 30 + [9]), one([k + 4] * 30 + [9]), k, (30, 31)) for k in range(3)]
    batch = GroupingCollator(PairCollator(0, True))(pairs)
    assert batch["input_ids"].shape == (6, 32)
    assert "attention_mask" in batch


def test_batches_begin_with_the_longest_and_hold_what_begins_alike():
    pairs = [
        EncodedPair(Encoded(ids, ids, 0), None, k, (0, len(ids)))
        for k, ids in enumerate([[1, 2], [5, 5, 5], [1, 3], [5, 5, 5, 6], [1, 2, 2]])
    ]
    assert alike_together(pairs, 2, share_prefix=True) == [[3], [0, 4], [2, 1]]
    assert alike_together(pairs, 2, share_prefix=False) == [[3, 1], [4, 0], [2]]
