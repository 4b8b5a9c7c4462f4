"""What prompts begin with, read once: its keys and values are those of every prompt that begins so.

The prompts of a task begin with the same template, instruction and demonstrations. In a batch, neighbours that begin
alike form groups, and the columns are::

    [ padding | beginning of group g | padding | rest of prompt i ]     the left half comes from the cache

The attention mask leaves padding out and positions do not count it. One beginning goes on from what it has in common
with the one read before it, across batches too.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, GenerationConfig
from transformers.generation.utils import ALL_CACHE_NAMES

from cit_fast.models.forward import head_input, unwrap

CACHE = ALL_CACHE_NAMES[0]
"""What this transformers calls the argument: ``cache``, before ``past_key_values``."""
_PASS = 200
"""What a pass costs beside its tokens, in tokens: 0.15 s, at 1,400 tokens a second, of SmolLM2-135M on two cores."""
_STEPS = 8
"""Tokens of an answer, a pass each; how many is not known before."""


class Layout(NamedTuple):
    """How the prompts of a batch are read, in their order."""

    groups: tuple[tuple[int, int], ...]
    """Of each group its prompts, and the tokens of the beginning that is read for them; 0 where none is."""
    rest: int
    """Columns for what is left of the longest prompt."""
    work: int
    """What the batch costs, in tokens read."""


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    return next((k for k in range(shorter) if one[k] != other[k]), shorter)


def layout(prompts: Sequence[Sequence[int]], share: bool) -> Layout:
    """The layout of least work, of prompts whose neighbours begin alike; without ``share`` that of padded rows."""
    rows, lengths = len(prompts), [len(prompt) for prompt in prompts]
    steps = (1 + _STEPS) * _PASS
    best = Layout(((rows, 0),), max(lengths), rows * max(lengths) + steps)
    if not share or rows == 1:
        return best
    alike = [common_beginning(*pair) for pair in pairwise(prompts)]
    # For a given width of the rests a group need not read more than its longest prompt has beyond it, and to have few
    # groups is best. The widths at which groups become possible are differences of a length and what can be shared.
    sharable = {*alike, *(length - 1 for length in lengths)}
    for rest in sorted({length - common for length in set(lengths) for common in sharable if length > common}):
        if rows * rest + steps >= best.work:
            break
        groups = _groups(lengths, alike, rest)
        work = sum(read + _PASS for _, read in groups if read) + rows * rest + steps
        if work < best.work:
            best = Layout(groups, rest, work)
    return best


def _groups(lengths: Sequence[int], alike: Sequence[int], rest: int) -> tuple[tuple[int, int], ...]:
    """The fewest groups of neighbours such that no prompt has more than ``rest`` tokens beside its group's beginning.

    Every prompt keeps a token of its own, from which its answer starts.
    """
    groups: list[tuple[int, int]] = []
    count, longest, common = 0, 0, 0
    for index, length in enumerate(lengths):
        joined = min(common, alike[index - 1], length - 1) if count else length - 1
        if count and max(longest, length) - rest > joined:
            groups.append((count, max(0, longest - rest)))
            count, longest, joined = 0, 0, length - 1
        count, longest, common = count + 1, max(longest, length), joined
    return (*groups, (count, max(0, longest - rest)))


def batches_of_least_work(
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    size: int,
    kinds: Sequence[Hashable] | None = None,
    share: bool = False,
) -> list[list[int]]:
    """Batches of at most ``size`` indices, cut where padding would cost more than another batch; the largest first.

    Args:
        indices: of the prompts to batch.
        kinds: of every prompt; a batch then has one kind.
        share: prompts that begin alike can be read as :func:`layout` says. A batch then has prompts with rests of much
            the same length, and its neighbours begin alike.
    """
    batches: list[list[int]] = []
    by_kind: dict[Hashable, list[int]] = {}
    for index in indices:
        by_kind.setdefault(kinds[index] if kinds else None, []).append(index)
    for own in by_kind.values():
        order = sorted(own, key=lambda index: list(prompts[index]))
        shared = _shared([prompts[index] for index in order]) if share else [0] * len(order)
        rests = {index: len(prompts[index]) - alike for index, alike in zip(order, shared, strict=True)}
        by_rest = sorted(order, key=lambda index: -rests[index])  # stable: of equal rests those that begin alike
        for start, stop in _cuts([rests[index] for index in by_rest], size):
            batches.append(sorted(by_rest[start:stop], key=lambda index: list(prompts[index])))
    return sorted(batches, key=lambda batch: -len(batch) * max(len(prompts[index]) for index in batch))


_ALIKE = 4
"""Prompts that must begin alike for their beginning to count as shared."""


def _shared(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Of sorted prompts, how many tokens each begins with in common with three others or more; each keeps one."""
    alike = [common_beginning(*pair) for pair in pairwise(prompts)]
    shared = [0] * len(prompts)
    for start in range(len(prompts) - _ALIKE + 1):
        window = range(start, start + _ALIKE)
        common = min(*alike[start : start + _ALIKE - 1], *(len(prompts[index]) - 1 for index in window))
        for index in window:
            shared[index] = max(shared[index], common)
    return shared


def _cuts(widths: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Where to cut descending widths into batches of at most ``size``, each padded to its first, for the least work."""
    least, first = [0], [0]
    for stop in range(1, len(widths) + 1):
        work, start = min(
            (least[start] + (stop - start) * widths[start] + (1 + _STEPS) * _PASS, start)
            for start in range(max(0, stop - size), stop)
        )
        least.append(work)
        first.append(start)
    cuts, stop = [], len(widths)
    while stop:
        cuts.append((first[stop], stop))
        stop = first[stop]
    return cuts[::-1]


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

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but some."""
        filled = self.keys.shape[2]
        self._buffers = [buffer[rows] for buffer in self._buffers]
        self._show(filled)


class Beginnings:
    """Reads what prompts begin with, and keeps the one read last.

    Args:
        model: whose keys and values these are; neither it nor its active adapter set may change meanwhile.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._tokens: list[int] = []
        self._cache: DynamicCache | None = None

    def rows(
        self, prompts: Sequence[Sequence[int]], groups: Sequence[tuple[int, int]], room: int
    ) -> DynamicCache | None:
        """The keys and values of each prompt's beginning, padded on the left, with room for more tokens.

        ``None`` where the model keeps something else: sliding windows, states and whatever is no list of keys and
        values of all tokens cannot be continued with padding in between.
        """
        width = max(read for _, read in groups)
        cache = _empty(self.model)
        if not _whole(cache):
            return None
        cache.layers = [RoomyLayer(room) for _ in cache.layers]
        buffers: list[list[Tensor]] = []
        row = 0
        for count, read in groups:
            found = self._read(list(prompts[row][:read])) if read else []
            if found is None:
                return None
            if found and not buffers:
                buffers = [
                    layer.begin(*kv, rows=len(prompts), tokens=width)
                    for layer, kv in zip(cache.layers, found, strict=True)
                ]
                for into in [x for kv in buffers for x in kv]:
                    into[:, :, :width] = 0  # what is masked has to be finite: padding, and groups that read nothing
            for buffer, kv in zip(buffers, found, strict=False):
                for into, x in zip(buffer, kv, strict=True):
                    into[row : row + count, :, width - read : width] = x[:, :, :read]
            row += count
        return cache

    def _read(self, tokens: list[int]) -> list[tuple[Tensor, Tensor]] | None:
        """Of each layer the keys and values [1, heads, tokens or more, d] of ``tokens``."""
        known = common_beginning(self._tokens, tokens)
        if self._cache is None or known == 0:
            self._cache, known = _empty(self.model), 0
        if known < len(tokens):
            if known < self._cache.get_seq_length():
                self._cache = _start_of(self._cache, known, self.model)
            new = torch.tensor([tokens[known:]], device=self.model.device)
            with head_input(self.model, lambda hidden: hidden[:, :0]):  # no logits
                self.model(input_ids=new, use_cache=True, **{CACHE: self._cache})
            self._tokens = tokens
        if not _whole(self._cache) or self._cache.get_seq_length() != len(self._tokens):
            return None
        return [(layer.keys, layer.values) for layer in self._cache.layers]


def _empty(model: Any) -> DynamicCache:
    return DynamicCache(config=unwrap(model).config.get_text_config())  # type: ignore[union-attr,operator]


def _whole(cache: DynamicCache) -> bool:
    """Whether it keeps keys and values of all tokens, in every layer."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _start_of(cache: DynamicCache, tokens: int, model: Any) -> DynamicCache:
    start = _empty(model)
    for number, layer in enumerate(cache.layers):
        start.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], number)
    return start


def padded(
    prompts: Sequence[Sequence[int]], found: Layout, pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` [prompts, columns] of a batch in its layout."""
    width = max(read for _, read in found.groups)
    input_ids = torch.full((len(prompts), width + found.rest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    read = [tokens for count, tokens in found.groups for _ in range(count)]
    for row, (prompt, beginning) in enumerate(zip(prompts, read, strict=True)):
        for part, end in ((prompt[:beginning], width), (prompt[beginning:], width + found.rest)):
            input_ids[row, end - len(part) : end] = torch.tensor(list(part), dtype=torch.long)
            attention_mask[row, end - len(part) : end] = 1
    return input_ids.to(device), attention_mask.to(device)


def for_trial(pad_token_id: int) -> GenerationConfig:
    """Some tokens with their logits, for trying what a model can do."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=_NEW,
        pad_token_id=pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )


_can: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
_TRIED, _SHORTER, _MORE, _NEW = 16, 3, 2, 3  # tokens


def can_continue(model: Any, prompt: Sequence[int], pad_token_id: int) -> bool:
    """Whether the model goes on from cached beginnings, with padding on both sides, as if it had read all at once.

    Tried once per model, on the start of a prompt.
    """
    base = unwrap(model)
    if base not in _can:
        start = list(prompt[:_TRIED])
        if len(start) < 2:
            return False
        _can[base] = _try(model, start, pad_token_id)
    return _can[base]


def _try(model: Any, start: list[int], pad_token_id: int) -> bool:
    config = for_trial(pad_token_id)
    longer = (len(start) + 1) // 2
    # The same prompt twice, with beginnings of two lengths.
    tried = Layout(((1, max(1, longer - _SHORTER)), (1, longer)), len(start) + _MORE, 0)
    try:
        cache = Beginnings(model).rows([start, start], tried.groups, tried.rest + _NEW)
        if cache is None:
            return False
        input_ids, mask = padded([start, start], tried, pad_token_id, model.device)
        found = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config, **{CACHE: cache})
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return False  # a cache of another kind; the plain way is right, only slower
    plain = torch.tensor([start], device=model.device)
    expected = model.generate(input_ids=plain, attention_mask=torch.ones_like(plain), generation_config=config)
    return same_logits(model, torch.stack(list(expected.logits)), torch.stack(list(found.logits)))


def same_logits(model: Any, right: Tensor, ours: Tensor) -> bool:
    """Whether two ways through a model gave the same logits, but for the rounding of its dtype.

    Generation hands out logits in float32, whatever they were computed in.
    """
    tolerance = 1e-3 if unwrap(model).dtype in (torch.float32, torch.float64) else 5e-2
    return bool((ours - right).abs().amax() <= tolerance * right.abs().amax().clamp(min=1e-6))
