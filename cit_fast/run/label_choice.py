"""Answers from a closed set: of all labels the one that the model finds most likely, by one pass over the prompt.

The labels stand beside each other after their prompt, in the row layout of :mod:`cit_fast.key_parts.layout`, where the
model can; prompts that begin alike share that as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from cit_fast.errors import DataError
from cit_fast.key_parts.head import head_of
from cit_fast.key_parts.hidden import hidden_of, pair_collator
from cit_fast.key_parts.layout import GroupingCollator
from cit_fast.key_parts.pairs import EncodedPair
from cit_fast.models.forward import evaluating
from cit_fast.models.fused_lora import adapters_cast_once
from cit_fast.models.generation import one_set
from cit_fast.models.prompts import IGNORED, Encoded

_PLACES = 4096
"""Tokens of a batch, prompts and labels, where rows are shared."""


def most_likely(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    pad_token_id: int,
    batch_size: int = 16,
    adapters: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[int]:
    """Which of its choices the model finds most likely after each prompt: the largest ``sum_t log p(token t)``.

    A choice has its end with it, so that one which begins with another is not below it for its length alone. In
    evaluation mode and without gradients.

    Args:
        model: a causal language model of transformers, in PEFT or not.
        prompts: N token sequences, each of one token or more.
        choices: for each prompt one or more token sequences, each of one token or more.
        pad_token_id: any token; padded places are masked.
        batch_size: rows of a batch, >= 1, where every choice needs a row of its own.
        adapters: N names of adapter sets, :data:`~cit_fast.models.adapter_bank.BASE` for none; without it the active
            set chooses.
        progress: called after each batch with the number of prompts it answered.

    Returns:
        N numbers, of each prompt's choices.

    Raises:
        DataError: a prompt or a choice without tokens, a prompt without choices, or numbers that differ.
        ConfigError: a model whose logits do not come from an output projection
            (:func:`cit_fast.key_parts.head.head_of`).
    """
    if len(choices) != len(prompts) or (adapters is not None and len(adapters) != len(prompts)):
        raise DataError(f"most_likely: {len(prompts)} prompts, {len(choices)} lists of choices; one each is needed")
    for index, (prompt, own) in enumerate(zip(prompts, choices, strict=True)):
        if not len(prompt) or not own or not all(map(len, own)):
            raise DataError(f"most_likely: prompt {index} or one of its {len(own)} choices has no tokens")
    if not prompts:
        return []
    found = [0] * len(prompts)
    kinds: list[str | None] = [None] if adapters is None else list(dict.fromkeys(adapters))
    for name in kinds:
        own_indices = [i for i in range(len(prompts)) if adapters is None or adapters[i] == name]
        own_set = nullcontext() if name is None else one_set(model, name)
        with evaluating(model), adapters_cast_once(model), torch.no_grad(), own_set:
            collate = pair_collator(model, pad_token_id)
            for batch in _batches(prompts, choices, own_indices, batch_size, collate.share_prefix):
                scores = _scores(model, GroupingCollator(collate), [(prompts[i], choices[i]) for i in batch])
                for index, own_scores in zip(batch, scores, strict=True):
                    found[index] = max(range(len(own_scores)), key=lambda k, s=own_scores: s[k])  # type: ignore[misc]
                if progress is not None:
                    progress(len(batch))
    return found


def _batches(
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    indices: Sequence[int],
    rows: int,
    share: bool,
) -> list[list[int]]:
    """Neighbours begin alike, or are alike in length where nothing is shared."""
    order = sorted(indices, key=lambda index: list(prompts[index]) if share else len(prompts[index]))
    batches: list[list[int]] = []
    room = 0
    for index in order:
        size = len(prompts[index]) + sum(map(len, choices[index])) if share else len(choices[index])
        if not batches or room < size:
            batches.append([])
            room = _PLACES if share else rows
        batches[-1].append(index)
        room -= size
    return batches


def _scores(
    model: Any, collate: GroupingCollator, asked: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
) -> list[list[float]]:
    """Of each prompt the log-probability of each choice, in nats."""
    pairs: list[EncodedPair] = []
    for prompt, choices in asked:
        for choice in choices:
            labels = [IGNORED] * len(prompt) + [*choice]
            one = Encoded([*prompt, *choice], labels, len(prompt), pictures=getattr(prompt, "pictures", None))
            pairs.append(EncodedPair(one, None, len(pairs), (len(prompt), len(one))))
    head = head_of(model)
    hidden = hidden_of(model, collate, pairs)
    tokens = head.target_log_probabilities(hidden.full, hidden.targets)
    each = iter([own.sum().item() for own in torch.split(tokens.double(), hidden.offsets.diff().tolist())])
    return [[next(each) for _ in choices] for _, choices in asked]
