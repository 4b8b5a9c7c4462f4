"""Batches of a number of tokens instead of a number of examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from cit_fast.errors import ConfigError

_WINDOW = 16
"""Batches' worth of tokens among which examples are put together by length."""


class TokenBatches(Sampler[list[int]]):
    """Batches that hold no more than so many tokens, each example in one of them.

    An example that is longer is alone (one of KPIG counts with both of its contexts). Which examples share a batch is
    drawn once, so every epoch has as many batches; their order is drawn anew in every epoch. Where batches are padded,
    examples of like length come together. The same seed gives the same batches, whichever of them a resumed training
    begins with.

    Args:
        lengths: tokens of each example. ``budget``: tokens of a batch, padding counted.
        padded: the length to which a batch is padded whose longest example has so many tokens; ``None``: batches are
            packed without padding.
        seed: of the draws.
        processes: each of which gets as many batches as the others, none of them twice. ``process``: this one.

    Raises:
        ConfigError: fewer examples than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        budget: int,
        *,
        padded: Callable[[int], int] | None = None,
        seed: int = 0,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        if len(lengths) < processes:
            raise ConfigError(
                f"training.tokens_per_batch: {len(lengths)} examples for {processes} processes; each needs one"
            )
        self._seed, self._processes, self._process, self._epoch = seed, processes, process, 0
        draw = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
        order = draw if padded is None else _by_length(draw, lengths, _WINDOW * budget)
        self.batches: list[list[int]] = []
        width = total = 0
        for number in order:
            length = lengths[number]
            width, total = max(width, length), total + length
            count = len(self.batches[-1]) + 1 if self.batches else 1
            size = total if padded is None else count * padded(width)
            if not self.batches or size > budget:
                self.batches.append([])
                width = total = length
            self.batches[-1].append(number)
        while len(self.batches) % processes:
            largest = max(range(len(self.batches)), key=lambda k: len(self.batches[k]))
            half = math.ceil(len(self.batches[largest]) / 2)
            self.batches.append(self.batches[largest][half:])
            self.batches[largest] = self.batches[largest][:half]

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
