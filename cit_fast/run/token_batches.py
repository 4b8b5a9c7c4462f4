"""Batches of a number of tokens instead of a number of examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

_WINDOW = 16
"""Batches' worth of tokens among which examples are put together by length."""


class TokenBatches(Sampler[list[int]]):
    """Batches that hold no more than so many tokens, each example in one of them.

    An example that is longer is alone. Which examples share a batch is drawn once, so every epoch has as many batches;
    their order is drawn anew in every epoch. Where batches are padded, examples of like length come together. The same
    seed gives the same batches, whichever of them a resumed training begins with.

    Every process gets as many batches: some are cut in two for that, and where each holds one example, the first of
    them come twice.

    Args:
        lengths: tokens of each example; of one of several rows (a pair of KPIG), of its longest row if they are padded,
            of all together if not. ``rows``: how many rows each has; ``None``: one.
        budget: tokens of a batch, padding counted.
        padded: the length to which a batch is padded whose longest row has so many tokens; ``None``: batches are packed
            without padding.
        seed: of the draws.
        processes: how many there are. ``process``: this one.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        budget: int,
        *,
        rows: Sequence[int] | None = None,
        padded: Callable[[int], int] | None = None,
        seed: int = 0,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        self._seed, self._processes, self._process, self._epoch = seed, processes, process, 0
        draw = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
        order = draw if padded is None else _by_length(draw, lengths, _WINDOW * budget)
        self.batches: list[list[int]] = []
        width = count = total = 0
        for number in order:
            length, own = lengths[number], 1 if rows is None else rows[number]
            width, count, total = max(width, length), count + own, total + length
            size = total if padded is None else count * padded(width)
            if not self.batches or size > budget:
                self.batches.append([])
                width, count, total = length, own, length
            self.batches[-1].append(number)
        while len(self.batches) % processes:
            largest = max(self.batches, key=len)
            half = math.ceil(len(largest) / 2)
            if len(largest) == 1:
                missing = -len(self.batches) % processes
                self.batches += itertools.islice(itertools.cycle(list(self.batches)), missing)
            else:
                self.batches.append(largest[half:])
                del largest[half:]

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next, from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self.batches), generator=generator).tolist()
        return (self.batches[k] for k in order[self._process :: self._processes])

    def __len__(self) -> int:
        return len(self.batches) // self._processes


def _by_length(order: Sequence[int], lengths: Sequence[int], window: int) -> list[int]:
    """The order, sorted by length within stretches of ``window`` tokens."""
    found: list[int] = []
    stretch: list[int] = []
    held = 0
    for number in order:
        stretch.append(number)
        held += lengths[number]
        if held >= window:
            found += sorted(stretch, key=lambda k: lengths[k])
            stretch, held = [], 0
    return found + sorted(stretch, key=lambda k: lengths[k])
