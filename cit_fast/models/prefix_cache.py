"""What the prompts of a batch begin with, read once: its keys and values are every row's.

The prompts of a task begin with the same template and the same instruction. A batch is then::

    [ common beginning | padding | rest of prompt i ]        the beginning's columns come from the cache

Padding stands between beginning and rest, where the attention mask leaves it out and positions do not count it.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.utils import ALL_CACHE_NAMES

from cit_fast.models.forward import head_input, unwrap

CACHE = ALL_CACHE_NAMES[0]
"""What this transformers calls the argument: ``cache``, before ``past_key_values``."""
SHORTEST = 16
"""Tokens of a beginning that are worth a pass of their own."""
# An answer's length is not known before. A step with fewer rows reads the same weights.
_STEPS, _ROWS = 8, 16


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with in common, each keeping one or more of its own."""
    # Of a sorted list the first and the last differ first.
    as_lists = [list(prompt) for prompt in prompts]
    first, last = min(as_lists), max(as_lists)
    most = min(map(len, prompts)) - 1
    return next((k for k, (one, other) in enumerate(zip(first, last, strict=False)) if one != other or k == most), most)


def work(prompts: Sequence[Sequence[int]], shared: bool) -> int:
    """What a batch costs, in tokens read: the prompts with their padding, and some steps of at least so many rows."""
    rows, width = len(prompts), max(map(len, prompts))
    common = common_beginning(prompts) if shared and rows > 1 else 0
    read = rows * width if common < SHORTEST else common + rows * (width - common)
    return read + _STEPS * max(rows, _ROWS)


def alike_together(
    prompts: Sequence[Sequence[int]], indices: Sequence[int], size: int, kinds: Sequence[Hashable] | None
) -> list[list[int]]:
    """Batches of at most ``size`` indices whose prompts begin alike, those of the longest prompts first.

    Args:
        indices: of the prompts to batch.
        kinds: of every prompt; a batch has one kind.
    """
    order = sorted(indices, key=lambda index: (str(kinds[index]) if kinds else "", list(prompts[index])))
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else None
        if last is None or len(last) == size or (kinds and kinds[last[0]] != kinds[index]):
            batches.append([])
        batches[-1].append(index)
    return sorted(batches, key=lambda batch: -max(len(prompts[index]) for index in batch))


def read_beginning(model: Any, tokens: Sequence[int], rows: int) -> DynamicCache | None:
    """The keys and values of a beginning, for ``rows`` rows; ``None`` where the model keeps something else.

    Sliding windows, states and whatever else is no list of keys and values of all tokens cannot be continued with
    padding in between.
    """
    config: Any = unwrap(model).config
    cache = DynamicCache(config=config.get_text_config())
    if any(type(layer).__name__ != "DynamicLayer" for layer in cache.layers):
        return None
    with head_input(model, lambda hidden: hidden[:, -1:]):
        model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=True, **{CACHE: cache})
    if cache.get_seq_length() != len(tokens) or any(type(layer).__name__ != "DynamicLayer" for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(rows)
    return cache


_can: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
_BEGINNING, _PADDING, _NEW = 8, 3, 3  # tokens


def can_continue(model: Any, prompt: Sequence[int], pad_token_id: int) -> bool:
    """Whether the model goes on from a cached beginning, with padding after it, as if it had read all at once.

    Tried once per model, on the start of a prompt.
    """
    base = unwrap(model)
    if base not in _can:
        start = list(prompt[: 2 * _BEGINNING])
        if len(start) < 2:
            return False
        _can[base] = _try(model, start, min(_BEGINNING, len(start) - 1), pad_token_id)
    return _can[base]


def _try(model: Any, start: list[int], cut: int, pad_token_id: int) -> bool:
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=_NEW,
        pad_token_id=pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    try:
        cache = read_beginning(model, start[:cut], 2)
        if cache is None:
            return False
        rows = torch.tensor([[*start[:cut], *[pad_token_id] * _PADDING, *start[cut:]]] * 2, device=model.device)
        mask = torch.ones_like(rows)
        mask[:, cut : cut + _PADDING] = 0
        found = model.generate(input_ids=rows, attention_mask=mask, generation_config=config, **{CACHE: cache})
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return False  # a cache of another kind; the plain way is right, only slower
    plain = torch.tensor([start], device=model.device)
    expected = model.generate(input_ids=plain, attention_mask=torch.ones_like(plain), generation_config=config)
    ours, right = (torch.stack([logits[-1] for logits in each.logits]) for each in (found, expected))
    tolerance = 1e-3 if right.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((ours - right).abs().amax() <= tolerance * right.abs().amax().clamp(min=1e-6))
