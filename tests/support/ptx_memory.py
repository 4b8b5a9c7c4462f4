"""Memory of a pretended GPU, which finds accesses that are wrong (ptx_machine.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = Any  # a numpy array of a value for each thread, or one number for all


class Fault(Exception):  # noqa: N818
    """The kernel is wrong: a race, or an access that is not aligned or not allowed."""


class Unknown(Exception):  # noqa: N818
    """An instruction that the machine has to learn before the kernel can be tested on it."""


class Memory:
    """Bytes at addresses, and who accessed them last.

    Attributes:
        name: of the space, for messages.
        begins, ends: addresses of the parts that may be accessed, ascending.
        bytes: all of them, one after the other.
    """

    def __init__(self, name: str, parts: Iterable[tuple[int, NDArray[np.uint8]]]) -> None:
        self.name = name
        self.parts = sorted(parts, key=lambda part: part[0])
        self.begins = np.array([begin for begin, _ in self.parts], dtype=np.int64)
        self.sizes = np.array([len(part) for _, part in self.parts], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        self.bytes = np.concatenate([part for _, part in self.parts]) if self.parts else np.empty(0, np.uint8)
        # Of each byte: when it was written and read last, which warp wrote it, and a bit for each that read it then.
        self.written, self.read = (np.full(len(self.bytes), -1, np.int64) for _ in range(2))
        self.writer, self.readers = np.full(len(self.bytes), -1, np.int32), np.zeros(len(self.bytes), np.uint32)

    def write_back(self) -> None:
        """Put the bytes where they came from."""
        for (_, part), first in zip(self.parts, self.first, strict=False):
            part[:] = self.bytes[first : first + len(part)]

    def places(self, addresses: Values, size: int) -> NDArray[np.int64]:
        """[threads, size] places in ``bytes``."""
        addresses = np.asarray(addresses).astype(np.int64)
        if (addresses % size).any():
            raise Fault(f"{self.name}: an access of {size} bytes that is not aligned")
        part = np.searchsorted(self.begins, addresses, side="right") - 1
        inside = addresses - self.begins[part]
        if (part < 0).any() or (inside + size > self.sizes[part]).any():
            raise Fault(f"{self.name}: an access outside of what the kernel was given")
        return (self.first[part] + inside)[:, None] + np.arange(size)

    def load(self, addresses: Values, size: int, warps: NDArray[np.int32], now: int, since: int) -> NDArray[np.uint8]:
        """[threads, size]. ``now``: of this interval between barriers; ``since``: of the first of this program."""
        at = self.places(addresses, size)
        written = self.written[at]
        if ((written == now) & (self.writer[at] != warps[:, None]) | (written >= 0) & (written < since)).any():
            raise Fault(f"{self.name}: read what another warp wrote, with no barrier between")
        self.readers[at[self.read[at] != now]] = 0
        self.read[at] = now
        bits = np.broadcast_to(np.uint32(1) << warps.astype(np.uint32)[:, None], at.shape)
        self.readers[at] |= bits
        if ((self.readers[at] & bits) == 0).any():  # several warps read one place at once
            for warp in np.unique(warps):
                self.readers[at[warps == warp]] |= np.uint32(1 << warp)
        return self.bytes[at]

    def store(
        self, addresses: Values, values: NDArray[np.uint8], warps: NDArray[np.int32], now: int, since: int
    ) -> None:
        """``values``: [threads, size]. The same value again changes nothing, so it may come from several warps.

        Where a warp writes what it has read itself, other warps that have read it hold copies, which nobody uses.
        """
        at = self.places(addresses, values.shape[1])
        changed = self.bytes[at] != values
        written, read, readers = self.written[at], self.read[at], self.readers[at]
        if (
            ((written == now) & (self.writer[at] != warps[:, None]) | (written >= 0) & (written < since)) & changed
        ).any():
            raise Fault(f"{self.name}: two warps write one place, with no barrier between")
        bits = np.uint32(1) << warps.astype(np.uint32)[:, None]
        by_others = (read == now) & (readers & bits == 0) & (readers != 0)
        if ((by_others | (read >= 0) & (read < since)) & changed).any():
            raise Fault(f"{self.name}: wrote what another warp reads, with no barrier between")
        self.bytes[at] = values
        if (self.bytes[at] != values).any():
            raise Fault(f"{self.name}: threads write different values to one place")
        self.written[at], self.writer[at] = now, warps[:, None]
