"""One block of threads of a pretended GPU, and how instructions read and write its registers (ptx_machine.py)."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from ptx_memory import Memory, Values

WARP = 32
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
KIND = {"s": "i", "u": "u", "b": "u", "f": "f"}
_NEVER = 0xA5A5  # in a register that was never written: what is masked may be read from it
_WIDTHS = {"%p": 1, "%rs": 16, "%r": 32, "%rd": 64}


class Program:
    """One block of threads: registers, shared memory, and the interval between barriers that it is in."""

    def __init__(self, place: Sequence[int], grid: Sequence[int], threads: int, shared: int, memory: Memory) -> None:
        self.threads, self.memory = threads, memory
        self.shared = Memory("shared memory", [(0, np.full(shared, 0xA5, np.uint8))])
        self.warps = np.arange(threads, dtype=np.int32) // WARP
        self.now = self.since = 0
        self.all = np.ones(threads, bool)
        tid = np.arange(threads, dtype=np.uint32)
        self.registers: dict[str, Values] = {"%tid.x": tid, "%laneid": tid % WARP}
        for axis, at, count in zip("xyz", place, grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.uint32(at)
            self.registers[f"%nctaid.{axis}"] = np.uint32(count)
        self.active: NDArray[np.bool_] | None = None  # the threads that go on; None: all
        self.copies: deque[list[Callable[[], None]]] = deque([[]])


Run = Callable[[Program], None]


class Line(NamedTuple):
    """An instruction as it is written: ``add.s32``, its operands, and the register that says which threads take it."""

    parts: list[str]
    operands: list[str]
    predicate: tuple[str, bool] | None

    def mask(self, program: Program) -> Values | None:
        """Which threads take part; ``None``: all."""
        if self.predicate is None:
            return program.active
        mask = np.asarray(program.registers[self.predicate[0]]) != self.predicate[1]
        return mask if program.active is None else mask & program.active


def of_number(value: Any, kind: str, bits: int) -> Any:
    """The bits of a number of a type."""
    if kind == "f":
        return np.array(value, f"f{bits // 8}").view(UNSIGNED[bits])[()]
    return UNSIGNED[bits](int(value) & (1 << bits) - 1)


def split(text: str) -> list[str]:
    """Operands; what is in braces or brackets stays together."""
    return [each.strip() for each in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def inner(text: str) -> list[str]:
    """What is in the braces, or the operand alone."""
    return [each.strip() for each in text.strip("{} ").split(",")]


def width_of(register: str) -> int:
    """Bits."""
    return _WIDTHS.get(register.rstrip("0123456789"), 32)


def source(text: str, bits: int = 32) -> Callable[[Program], Values]:
    """How an operand is read, as unsigned numbers of a width."""
    if text.startswith("%"):
        never: Values = np.bool_(True) if text.startswith("%p") else UNSIGNED[width_of(text)](_NEVER)
        return lambda program: program.registers.get(text, never)
    if text == "global_smem":
        value = 0
    elif text[:2] in ("0f", "0d"):
        value = int(text[2:], 16)
    else:
        value = int(text.rstrip("U"), 0)
    constant: Values = UNSIGNED[bits](value & (1 << bits) - 1)
    return lambda program: constant


def address(text: str) -> Callable[[Program], NDArray[np.int64]]:
    """``[ %rd1 + 16 ]``, of every thread."""
    base, _, offset = text.strip("[] ").partition("+")
    read, more = source(base.strip(), 64), int(offset or 0)

    def of(program: Program) -> NDArray[np.int64]:
        at = np.asarray(read(program)).astype(np.int64) + more
        return at if at.ndim else np.broadcast_to(at, program.threads)

    return of


def as_type(values: Values, kind: str, bits: int) -> Values:
    """Bits taken for numbers: signed, unsigned, or of floating point."""
    values = np.asarray(values)
    if values.dtype == bool:
        return values
    if values.dtype.itemsize * 8 > bits:
        values = values.astype(UNSIGNED[bits])
    return values.view(f"{KIND[kind]}{bits // 8}") if values.dtype.itemsize * 8 == bits else values


def kept(program: Program, name: str, values: Values, mask: Values | None) -> None:
    """Into a register, of the threads that take part."""
    if not name.startswith("%"):  # nobody reads it
        return
    values = np.asarray(values)
    if values.dtype != bool:
        bits = width_of(name)
        values = values.view(UNSIGNED[values.dtype.itemsize * 8])
        values = values if values.dtype.itemsize * 8 == bits else values.astype(UNSIGNED[bits])
    if mask is not None:
        values = np.where(mask, values, program.registers.get(name, np.zeros((), values.dtype)))
    program.registers[name] = values


def lanes(values: Values, program: Program) -> NDArray[Any]:
    """[warps, 32] of a register."""
    values = np.asarray(values)
    return (values if values.ndim else np.broadcast_to(values, program.threads)).reshape(-1, WARP)
