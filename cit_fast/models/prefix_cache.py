"""Prompts read apart, answered together: what they begin with once, neighbours in one pass, all into one cache.

The prompts of a task begin with the same template, instruction and demonstrations. Neighbours in the order of their
tokens form pieces. A piece reads its common beginning once, and what is left of its prompts in one pass::

    [ beginning, once | rest of prompt i, without its last token | padding ]

Both end up in one cache for the whole batch, padded on the left, from which all prompts are answered together: there
the attention mask leaves padding out and positions do not count it. One beginning goes on from what it has in common
with the one read before it, across batches too.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, GenerationConfig
from transformers.generation.utils import ALL_CACHE_NAMES

from cit_fast.models.forward import head_input
from cit_fast.models.wrappers import unwrap

_log = logging.getLogger(__name__)

CACHE = ALL_CACHE_NAMES[0]
"""What this transformers calls the argument: ``cache``, before ``past_key_values``."""
PASS = 200
"""What a pass costs beside its tokens, in tokens: 0.1 s, at 2,000 tokens a second, of SmolLM2-135M on two cores."""

AtWork = Callable[[Sequence[str]], AbstractContextManager[None]]
"""Inside, row i of whatever goes through the model has the adapter set i; of one name any number of rows."""


class Piece(NamedTuple):
    """Prompts that are read together."""

    indices: tuple[int, ...]
    """Of the prompts, in the order of their tokens."""
    beginning: int
    """Tokens that all of them begin with and that are read once; 0 where that is not worth a pass."""


class BatchLimit(NamedTuple):
    """How much goes into a batch."""

    rows: int
    """Prompts at most."""
    tokens: int | None = None
    """Of all rows together, padding and answers counted; a prompt longer than that goes alone."""
    new: int = 0
    """Tokens of an answer at most."""

    def of(self, longest: int) -> int:
        """Rows of a batch whose longest prompt has so many tokens."""
        if self.tokens is None:
            return self.rows
        return max(1, min(self.rows, self.tokens // (longest + self.new)))


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    return next((k for k in range(shorter) if one[k] != other[k]), shorter)


def batches_of_pieces(
    prompts: Sequence[Sequence[int]], indices: Sequence[int], limit: BatchLimit, sets: Sequence[str] | None = None
) -> list[list[Piece]]:
    """Batches within ``limit``, in pieces of least work; the longest first.

    Args:
        indices: of the prompts to batch.
        sets: of every prompt its adapter set; prompts of several sets share no beginning.
    """
    pieces = _pieces(prompts, indices, limit, sets)
    # A batch's prompts are of much the same length; pieces with one beginning stay neighbours.
    pieces.sort(key=lambda piece: -max(len(prompts[index]) for index in piece.indices))
    batches: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        left = piece.indices
        while left:
            if not room:
                batches.append([])
                room = limit.of(max(len(prompts[index]) for index in left))
            some, left = left[:room], left[room:]
            batches[-1].append(Piece(some, piece.beginning))
            room -= len(some)
    return batches


def _pieces(
    prompts: Sequence[Sequence[int]], indices: Sequence[int], limit: BatchLimit, sets: Sequence[str] | None
) -> list[Piece]:
    """The prompts in pieces of neighbours, each within the limit, for the least work."""
    names = sets or [""] * len(prompts)
    order = sorted(indices, key=lambda index: (names[index], list(prompts[index])))
    alike = [common_beginning(prompts[a], prompts[b]) if names[a] == names[b] else 0 for a, b in pairwise(order)]
    tokens = [len(prompts[index]) - 1 for index in order]  # the last one is read with the answer
    least, best = [0], [(0, 0)]
    for stop in range(1, len(order) + 1):
        longest = shortest = common = tokens[stop - 1]
        choices = []
        for start in range(stop - 1, max(0, stop - limit.rows) - 1, -1):
            if start < stop - 1:
                common = min(common, alike[start])
            longest, shortest = max(longest, tokens[start]), min(shortest, tokens[start])
            if stop - start > limit.of(longest + 1):
                break
            shared = min(common, shortest)
            work, beginning = min(
                (_work(stop - start, longest, 0), 0), (shared + PASS + _work(stop - start, longest, shared), shared)
            )
            choices.append((least[start] + work, start, beginning))
        work, start, beginning = min(choices)
        least.append(work)
        best.append((start, beginning))
    pieces: list[Piece] = []
    stop = len(order)
    while stop:
        start, beginning = best[stop]
        pieces.append(Piece(tuple(order[start:stop]), beginning))
        stop = start
    return pieces[::-1]


def _work(rows: int, longest: int, beginning: int) -> int:
    """What it costs to read ``rows`` prompts, the longest of so many tokens, after their beginning."""
    return PASS + rows * (longest - beginning) if longest > beginning else 0


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in a buffer with room for the tokens to come.

    transformers' own layer is copied whole for every new token.

    Args:
        room: tokens to make room for.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: list[Tensor] = []

    def begin(self, keys: Tensor, values: Tensor, rows: int, tokens: int) -> list[Tensor]:
        """Say that ``tokens`` tokens of ``rows`` rows are there; returns the buffers that they have to be written to.

        Args:
            keys, values: [any, heads, any, d], of the dtypes and on the device of what will be written.
        """
        self.lazy_initialization(keys, values)
        width = tokens + self._room
        self._buffers = [x.new_empty(rows, x.shape[1], width, x.shape[3]) for x in (keys, values)]
        self._show(tokens)
        return self._buffers

    def _show(self, tokens: int) -> None:
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new ones behind those that are there."""
        if not self.is_initialized:
            self.begin(key_states, value_states, len(key_states), 0)
        start, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if stop > self._buffers[0].shape[2]:
            raise ValueError(f"{stop} tokens, but there is room for {self._buffers[0].shape[2]}")
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self._show(stop)
        return self.keys, self.values

    def keep(self, rows: Tensor, start: int = 0) -> None:
        """Forget all rows but some, and the tokens before ``start``."""
        if self.is_initialized:
            filled = self.keys.shape[2]
            self._buffers = [buffer[rows, :, start:] for buffer in self._buffers]
            self._show(filled - start)


_Cached = list[tuple[Tensor, Tensor]]
"""Of each layer keys and values [rows, heads, tokens, d]."""


class PromptReader:
    """Reads prompts into a cache, and keeps the beginning that was read last.

    Args:
        model: whose keys and values these are; neither it nor its adapter sets may change meanwhile.
        at_work: gives rows their adapter sets; without it the active set is at work.
    """

    def __init__(self, model: Any, at_work: AtWork | None = None) -> None:
        self.model = model
        self._at_work = at_work
        self._set: str | None = None
        self._tokens: list[int] = []
        self._cache: DynamicCache | None = None

    def having(self, sets: Sequence[str] | None) -> AbstractContextManager[None]:
        """Inside, row i of whatever goes through the model has the adapter set i; ``None``: the active one."""
        return nullcontext() if sets is None or self._at_work is None else self._at_work(sets)

    def read(
        self, prompts: Sequence[Sequence[int]], pieces: Sequence[Piece], room: int, sets: Sequence[str] | None = None
    ) -> DynamicCache:
        """The keys and values of all but the last token of the prompts of some pieces, padded on the left.

        Args:
            prompts: all that the pieces' indices count.
            room: further tokens to leave room for.
            sets: of every prompt its adapter set.

        Returns:
            A row for each prompt, in the order of the pieces.

        Raises:
            ValueError: the model keeps something else: sliding windows, states and whatever is no list of keys and
                values of all tokens.
        """
        cache = _empty(self.model)
        if not (cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers)):
            raise ValueError(f"{type(unwrap(self.model)).__name__}: does not keep all keys and values")
        cache.layers = [RoomyLayer(room) for _ in cache.layers]
        tokens = [len(prompts[index]) - 1 for piece in pieces for index in piece.indices]
        width = max(tokens)
        if not width:
            return cache
        buffers: list[list[Tensor]] = []
        row = 0
        for piece in pieces:
            own = [prompts[index] for index in piece.indices]
            names = None if sets is None else [sets[index] for index in piece.indices]
            with self.having(names):
                found = self._piece(own, piece.beginning, names[0] if names else None)
            if found and not buffers:
                buffers = [
                    layer.begin(*kv, rows=len(tokens), tokens=width)
                    for layer, kv in zip(cache.layers, found, strict=True)
                ]
                for into in [x for kv in buffers for x in kv]:
                    into[:, :, :width] = 0  # padding is masked, and has to be finite
            for number in range(len(own)):
                start = width - tokens[row]
                for buffer, kv in zip(buffers, found, strict=False):
                    for into, x in zip(buffer, kv, strict=True):
                        into[row, :, start:width] = x[number % len(x), :, : width - start]
                row += 1
        return cache

    def _piece(self, prompts: Sequence[Sequence[int]], beginning: int, name: str | None) -> _Cached:
        """Keys and values of the prompts, each followed by padding; of one row where all are the beginning alone."""
        found = self._beginning(list(prompts[0][:beginning]), name) if beginning else []
        longest = max(map(len, prompts)) - 1
        if longest <= beginning:
            return found
        cache = _empty(self.model)
        for layer, kv in enumerate(found):
            cache.update(*(x[:, :, :beginning].expand(len(prompts), -1, -1, -1) for x in kv), layer)
        # Nothing sees what comes after it: padding needs no mask here.
        rest = torch.zeros(len(prompts), longest - beginning, dtype=torch.long)
        for row, prompt in zip(rest, prompts, strict=True):
            own = torch.tensor(list(prompt[beginning:-1]), dtype=torch.long)
            row[: len(own)] = own
        self._forward(rest, cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _beginning(self, tokens: list[int], name: str | None) -> _Cached:
        """Keys and values [1, heads, tokens or more, d]."""
        known = common_beginning(self._tokens, tokens) if name == self._set else 0
        if self._cache is None or known == 0:
            self._cache, known = _empty(self.model), 0
        if known < len(tokens):
            if known < self._cache.get_seq_length():
                self._cache = _start_of(self._cache, known, self.model)
            self._tokens, self._set = [], None  # of a pass that fails nothing may be taken for read
            self._forward(torch.tensor([tokens[known:]]), self._cache)
            self._tokens, self._set = tokens, name
        return [(layer.keys, layer.values) for layer in self._cache.layers]

    def _forward(self, tokens: Tensor, cache: DynamicCache) -> None:
        with head_input(self.model, lambda hidden: hidden[:, :0]):  # no logits
            self.model(input_ids=tokens.to(self.model.device), use_cache=True, **{CACHE: cache})


class Beginnings:
    """Keys and values of prompts that were read before, for prompts that begin alike and have the same adapter set.

    Args:
        most: bytes that are kept; the oldest go first.
    """

    def __init__(self, most: int = 256 << 20) -> None:
        self._most = most
        self._kept: list[tuple[str | None, list[int], _Cached]] = []

    def find(self, name: str | None, tokens: Sequence[int]) -> tuple[int, _Cached]:
        """How many tokens are there at most, and keys and values [heads, tokens or more, d] of each layer."""
        own = ((common_beginning(tokens, known), cached) for set_, known, cached in self._kept if set_ == name)
        return max(own, key=lambda each: each[0], default=(0, []))

    def keep(self, name: str | None, tokens: Sequence[int], cached: _Cached) -> None:
        """Keep a prompt's, or what there is room for of its beginning, instead of those that it begins with."""
        a_token = sum(x.nbytes // max(x.shape[-2], 1) for kv in cached for x in kv)
        tokens = tokens[: self._most // max(a_token, 1)]
        cached = [(k[:, : len(tokens)], v[:, : len(tokens)]) for k, v in cached]
        self._kept = [
            (set_, known, old)
            for set_, known, old in self._kept
            if set_ != name or common_beginning(tokens, known) < len(known)
        ]
        self._kept.append((name, list(tokens), [(k.clone(), v.clone()) for k, v in cached]))
        sizes = [sum(k.nbytes + v.nbytes for k, v in cached) for *_, cached in self._kept]
        while sum(sizes) > self._most:
            self._kept.pop(0), sizes.pop(0)


def with_beginnings(model: Any, found: Sequence[_Cached], counts: Sequence[int], room: int) -> DynamicCache:
    """A cache in which each row begins with its first ``counts[row]`` keys and values, padded on the left.

    Args:
        found: of each row, as :meth:`Beginnings.find` gives them.
        room: further tokens to leave room for.
    """
    cache, width = _empty(model), max(counts)
    cache.layers = [RoomyLayer(room) for _ in cache.layers]
    there = next((each for each, count in zip(found, counts, strict=True) if count), [])
    for number, kv in enumerate(there):
        buffers = cache.layers[number].begin(*(x[None] for x in kv), rows=len(found), tokens=width)
        for side, into in enumerate(buffers):
            into[:, :, :width] = 0  # padding is masked, and has to be finite
            for row, count in enumerate(counts):
                if count:
                    into[row, :, width - count : width] = found[row][number][side][:, :count]
    return cache


def joined_caches(caches: Sequence[DynamicCache], masks: Sequence[Tensor], room: int) -> DynamicCache:
    """The rows of several caches of :meth:`PromptReader.read` in one, padded on the left.

    Args:
        masks: of each cache [rows, tokens], 0 where it is padding; columns that are padding in all rows are left out.
        room: further tokens to leave room for.
    """
    used = [used_columns(mask) for mask in masks]
    rows, width = [len(mask) for mask in masks], max(used)
    found = copy.copy(caches[0])
    found.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = RoomyLayer(room)
        found.layers.append(layer)
        there = next((each for each in layers if each.is_initialized), None)
        if there is None:
            continue
        buffers = layer.begin(there.keys, there.values, sum(rows), width)
        first = 0
        for one, count, tokens in zip(layers, rows, used, strict=True):
            own = slice(first, first + count)
            for into, x in zip(buffers, (one.keys, one.values), strict=True):
                into[own, :, : width - tokens] = 0  # padding is masked, and has to be finite
                if tokens:
                    into[own, :, width - tokens : width] = x[:, :, -tokens:]
            first += count
    return found


def _empty(model: Any) -> DynamicCache:
    return DynamicCache(config=unwrap(model).config.get_text_config())  # type: ignore[union-attr,operator]


def _start_of(cache: DynamicCache, tokens: int, model: Any) -> DynamicCache:
    start = _empty(model)
    for number, layer in enumerate(cache.layers):
        start.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], number)
    return start


def used_columns(mask: Tensor) -> int:
    """Columns of a mask [rows, columns] from the first one on that is not padding in all rows."""
    return mask.shape[1] - int(mask.any(0).int().argmax()) if mask.any() else 0


def padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device, *, left: bool = True
) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` [prompts, columns] of a batch, padded on the left, or on the right."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) if left else 0
        input_ids[row, start : start + len(prompt)] = torch.tensor(list(prompt), dtype=torch.long)
        attention_mask[row, start : start + len(prompt)] = 1
    return input_ids.to(device), attention_mask.to(device)


def for_trial(pad_token_id: int, decoder_start: int | None = None) -> GenerationConfig:
    """Some tokens with their logits, for trying what a model can do."""
    return GenerationConfig(
        do_sample=False,
        decoder_start_token_id=decoder_start,
        max_new_tokens=_NEW,
        pad_token_id=pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )


_can: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
_TRIED, _SHORTER, _NEW = 16, 3, 3  # tokens


class CacheLostError(Exception):
    """A model went on from another cache than the one that it was given; from then on :func:`can_continue` says no."""


def check_kept(model: Any, cache: DynamicCache, tokens: int) -> None:
    """Check that a cache holds what has gone through the model.

    Raises:
        CacheLostError: it does not.
    """
    if (found := cache.get_seq_length()) != tokens:
        _can[unwrap(model)] = False
        raise CacheLostError(f"{type(unwrap(model)).__name__}: {tokens} tokens were read, the cache holds {found}")


def turns_by_length(model: Any) -> bool:
    """Whether how far a token's position turns its keys depends on the length of the whole text.

    Then keys that were computed for a shorter text are not those of a longer one, and a row in a batch is as long as
    the longest.
    """
    config = unwrap(model).config.get_text_config()  # type: ignore[union-attr,operator]
    given = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    settings = [each for one in given if isinstance(one, Mapping) for each in (one, *one.values())]  # of layer types
    kinds = [str(each.get("rope_type") or each.get("type")) for each in settings if isinstance(each, Mapping)]
    return any(kind in ("longrope", "su") or "dynamic" in kind for kind in kinds)


def can_continue(model: Any, prompt: Sequence[int], pad_token_id: int) -> bool:
    """Whether the model answers from a cache that was read apart, with padding, as if it had read all at once.

    Tried once per model, on the start of a prompt.
    """
    base = unwrap(model)
    if base not in _can and turns_by_length(model):
        _can[base] = False  # the start of a prompt is too short to show it
    if base not in _can:
        start = list(prompt[:_TRIED])
        if len(start) < _SHORTER + 2:
            return False
        _can[base] = _try(model, start, pad_token_id)
    return _can[base]


def _try(model: Any, start: list[int], pad_token_id: int) -> bool:
    config = for_trial(pad_token_id)
    # A beginning with two rests, and a prompt of other length that is read as a whole.
    prompts = [start[:-_SHORTER], start, start[1:]]
    pieces = [Piece((0, 1), (len(start) - _SHORTER) // 2), Piece((2,), 0)]
    try:
        cache = PromptReader(model).read(prompts, pieces, 1 + _NEW)
        input_ids, mask = padded(prompts, pad_token_id, model.device)
        found = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config, **{CACHE: cache})
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        # A cache of another kind: to read every prompt as a whole is right, only slower.
        _log.info("%s: prompts are read whole (%s: %s)", type(unwrap(model)).__name__, type(error).__name__, error)
        return False
    ours = torch.stack(list(found.logits), 1)
    for row, prompt in zip(ours, prompts, strict=True):
        plain = torch.tensor([prompt], device=model.device)
        expected = model.generate(input_ids=plain, attention_mask=torch.ones_like(plain), generation_config=config)
        right = torch.cat(list(expected.logits))
        # After another first token the rest is another answer.
        first = slice(None) if torch.equal(row.argmax(1), right.argmax(1)) else slice(1)
        if not same_logits(model, right[first], row[first]):
            _log.info("%s: prompts are read whole (other logits from a cache)", type(unwrap(model)).__name__)
            return False
    return True


def same_logits(model: Any, right: Tensor, ours: Tensor) -> bool:
    """Whether two ways through a model gave the same logits, but for the rounding of its dtype.

    Generation hands out logits in float32, whatever they were computed in.
    """
    tolerance = 1e-3 if unwrap(model).dtype in (torch.float32, torch.float64) else 5e-2
    return bool((ours - right).abs().amax() <= tolerance * right.abs().amax().clamp(min=1e-6))
