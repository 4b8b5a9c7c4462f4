"""What a built-in task is made of: its wordings with marked key parts, a generator, and reproducible choices."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

Split = Literal["train", "dev", "test"]
_Item = TypeVar("_Item")

# Five of eight parts are for training, one for dev, two for test.
_SPLIT_OF_PART: tuple[Split, ...] = ("train", "test", "train", "dev", "train", "test", "train", "train")


def split_of(text: str) -> Split:
    """The one split that may hold this text: a function of the text alone, so no seed and no size mixes splits."""
    return _SPLIT_OF_PART[hashlib.sha256(text.encode()).digest()[0] % 8]


class Draw:
    """Random choices that are the same on every platform and Python version.

    Only ``Random.random`` is used, the one method whose sequence Python guarantees not to change.

    Args:
        key: text that names the sequence.
        split: the split that is drawn for.
    """

    def __init__(self, key: str, split: Split) -> None:
        self._random = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest(), "big"))  # noqa: S311
        self.split = split

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random.random() < probability

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, pool: Sequence[_Item]) -> _Item:
        """One item of the pool."""
        return pool[self.between(0, len(pool) - 1)]

    def distinct(self, pool: Sequence[_Item], count: int) -> list[_Item]:
        """``count`` different items of the pool, in random order."""
        rest = list(pool)
        return [rest.pop(self.between(0, len(rest) - 1)) for _ in range(count)]

    def pick_reserved(self, pool: Sequence[_Item]) -> _Item:
        """One item of the part of the pool (at least eight items) that only this split ever sees."""
        return self.pick([item for i, item in enumerate(pool) if _SPLIT_OF_PART[i % 8] == self.split])


class Sample(NamedTuple):
    """What a generator of a kind gives."""

    input: str
    answer: str
    identity: str = ""
    """What tells it from other examples and decides its split; empty: its input does."""
    image: Callable[[], str] | None = None
    """Draws its picture: gives an entry of ``Example.images``."""


@dataclass(frozen=True)
class Kind:
    """A generated task before anything is drawn.

    Args:
        name, metric, labels, answer_pattern, wordy_above: as in :class:`cit_fast.data.example.Task`.
        wordings: instructions, each with its key parts in braces: ``"Give the date {as YYYY-MM-DD}."``
        generate: draws one ``(input, answer)``, or a whole :class:`Sample`.
        drawn_as: the name that the drawing depends on instead of its own: kinds that share it differ in wordings alone.
    """

    name: str
    metric: str
    answer_pattern: str
    wordings: tuple[str, ...]
    generate: Callable[[Draw], tuple[str, str] | Sample]
    labels: tuple[str, ...] = ()
    wordy_above: float = 2.0  # every wording asks for the short answer alone
    drawn_as: str = ""


def parse_wording(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Take the braces out of a wording.

    Returns:
        The instruction, and its key parts as character spans.

    >>> parse_wording("Give the date {as YYYY-MM-DD}.")
    ('Give the date as YYYY-MM-DD.', ((14, 27),))
    """
    pieces = re.split(r"[{}]", marked)
    spans, position = [], 0
    for i, piece in enumerate(pieces):
        if i % 2:
            spans.append((position, position + len(piece)))
        position += len(piece)
    return "".join(pieces), tuple(spans)
