"""Arithmetic of a pretended GPU: instructions that read registers and write one (ptx_machine.py)."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from ptx_memory import Unknown, Values
from ptx_program import KIND, UNSIGNED, Line, Program, Run, as_type, inner, kept, source


def _fma(a: Values, b: Values, c: Values) -> Values:
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


def _flushed(x: Values) -> Values:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def _shifted(left: bool) -> Callable[[Values, Values], Values]:
    def shift(x: Values, by: Values) -> Values:
        bits = x.dtype.itemsize * 8
        by = np.asarray(by).astype(np.int64)
        most = np.minimum(by, bits - 1).astype(x.dtype)
        moved = x << most if left else x >> most
        emptied = np.zeros_like(moved) if left or x.dtype.kind == "u" else moved
        return np.where(by >= bits, emptied, moved)

    return shift


def _quotient(a: Values, b: Values) -> Values:
    if a.dtype.kind == "f":
        return a / b
    exact = a.astype(np.int64) // b if a.dtype.kind == "u" else np.trunc(a.astype(np.float64) / b)  # of 32 bits
    return exact.astype(a.dtype)


def _field(x: Values, begin: Values, length: Values) -> Values:
    begin, length = int(np.asarray(begin)), int(np.asarray(length))
    bits = 8 * x.dtype.itemsize
    top = np.left_shift(x, x.dtype.type(bits - begin - length))
    return np.right_shift(top, x.dtype.type(bits - length))


_COMPARED: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[..., Values]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _quotient, "rem": np.fmod, "fma": _fma,
    "mad": lambda a, b, c: a * b + c,
    "mulhi": lambda a, b: (a.astype(np.int64 if a.dtype.kind == "i" else np.uint64) * b >> 32).astype(a.dtype),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": _shifted(left=True), "shr": _shifted(left=False), "bfe": _field,
    "abs": np.abs, "neg": np.negative, "sqrt": np.sqrt, "rcp": np.reciprocal, "lg2": np.log2, "ex2": np.exp2,
    "mov": lambda x: x,
}  # fmt: skip


def plain(line: Line) -> Run:
    """An instruction that reads registers and writes one."""
    name, of = line.parts[0], line.parts[-1]
    if "hi" in line.parts:
        name += "hi"
    if of in ("f16x2", "bf16x2", "bf16"):
        return _halves(name, of, line)
    kind, bits = ("b", 1) if of == "pred" else (of[0], int(of[1:]))
    destination, reads = line.operands[0], [source(each, max(bits, 8)) for each in line.operands[1:]]
    if name not in ("min", "max") and name not in _ARITHMETIC:
        raise Unknown(".".join(line.parts))
    operation = _ARITHMETIC.get(name) or _extreme(name, kind, "NaN" in line.parts)
    flush = "ftz" in line.parts
    wide = "wide" in line.parts

    def run(program: Program) -> None:
        values = [read(program) for read in reads]
        if bits == 1:
            values = [np.asarray(v).astype(bool) for v in values]
        elif name in ("shl", "shr", "bfe"):  # by unsigned 32 bits
            values[0] = as_type(values[0], kind, bits)
        else:
            values = [as_type(v, kind, 64 if wide and k == 2 else bits) for k, v in enumerate(values)]
            values = [v.astype(f"{KIND[kind]}8") for v in values] if wide else values
        result = np.asarray(operation(*values))
        if result.dtype.kind == "f":
            nan = np.isnan(result)
            if nan.any():  # one kind of it, whichever operand it came from
                result = np.where(nan, result.dtype.type(np.nan), result)
            result = _flushed(result) if flush else result
        kept(program, destination, result, line.mask(program))

    if wide and len(reads) == 3:
        reads[2] = source(line.operands[3], 64)
    return run


def _halves(name: str, of: str, line: Line) -> Run:
    """An instruction of numbers of 16 bits, two in a register or one of bfloat16."""
    reads, operation = [source(each) for each in line.operands[1:]], _ARITHMETIC[name]

    def run(program: Program) -> None:
        values = [np.asarray(read(program)).astype(np.uint32) for read in reads]
        if of[0] == "b":
            low = operation(*((v << np.uint32(16)).view(np.float32) for v in values))
            high = operation(*((v & np.uint32(0xFFFF0000)).view(np.float32) for v in values))
            result = bfloat16(low) | bfloat16(high) << np.uint32(16)
        else:
            halves = [np.ascontiguousarray(v)[..., None].view(np.float16) for v in values]
            result = np.ascontiguousarray(operation(*halves)).view(np.uint32)[..., 0]
        kept(program, line.operands[0], result, line.mask(program))

    return run


def _extreme(name: str, kind: str, keeps_nan: bool) -> Callable[[Values, Values], Values]:
    if kind == "f" and not keeps_nan:
        return np.fmin if name == "min" else np.fmax
    return np.minimum if name == "min" else np.maximum


def compared(line: Line) -> Run:
    """``setp``."""
    how, kind, bits = line.parts[1], line.parts[-1][0], int(line.parts[-1][1:])
    left, right = (source(each, bits) for each in line.operands[1:3])
    unordered = kind == "f" and len(how) == 3 and how.endswith("u")

    def run(program: Program) -> None:
        a, b = (as_type(read(program), kind, bits) for read in (left, right))
        nan = np.isnan(a) | np.isnan(b) if kind == "f" else False
        if how in ("num", "nan"):
            result = nan if how == "nan" else ~np.asarray(nan)
        elif how == "ne" and kind == "f":
            result = (a != b) & ~np.asarray(nan)
        else:
            result = _COMPARED[how[:2]](a, b) | (nan if unordered else False)
        kept(program, line.operands[0], result, line.mask(program))

    return run


def selected(line: Line) -> Run:
    """``selp``."""
    bits = int(line.parts[-1][1:])
    yes, no = (source(each, bits) for each in line.operands[1:3])

    def run(program: Program) -> None:
        chosen = np.where(program.registers[line.operands[3]], yes(program), no(program))
        kept(program, line.operands[0], chosen, line.mask(program))

    return run


def moved(line: Line) -> Run:
    """``mov``, of a register into its parts or of parts into one, too."""
    if not any(each.startswith("{") for each in line.operands):
        return plain(line)
    bits = int(line.parts[-1][1:])
    pieces = inner(line.operands[0] if line.operands[0].startswith("{") else line.operands[1])
    each_bits = bits // len(pieces)

    def run(program: Program) -> None:
        mask = line.mask(program)
        if line.operands[0].startswith("{"):
            whole = np.asarray(program.registers[line.operands[1]])
            for k, piece in enumerate(pieces):
                kept(program, piece, (whole >> UNSIGNED[bits](k * each_bits)).astype(UNSIGNED[each_bits]), mask)
        else:
            joined: Values = UNSIGNED[bits](0)
            for k, piece in enumerate(pieces):
                joined = joined | np.asarray(source(piece, each_bits)(program)).astype(UNSIGNED[bits]) << UNSIGNED[
                    bits
                ](k * each_bits)
            kept(program, line.operands[0], joined, mask)

    return run


def bfloat16(x: Values) -> NDArray[np.uint32]:
    """The 16 bits of float32 numbers, rounded to the nearest, ties to even."""
    raw = np.asarray(x).view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + (raw >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def converted(line: Line) -> Run:
    """``cvt``."""
    to, of = (part for part in line.parts if re.fullmatch(r"(?:[usfb]\d+|bf16|tf32)(?:x2)?", part))
    bits = 16 if of == "bf16" else int(of[1:])
    reads = [source(each, bits) for each in line.operands[1:]]

    def run(program: Program) -> None:
        values = [as_type(read(program), of[0] if of != "bf16" else "b", bits) for read in reads]
        if to in ("bf16x2", "f16x2"):  # the first operand in the upper half
            high, low = (
                bfloat16(v) if to[0] == "b" else v.astype(np.float16).view(np.uint16).astype(np.uint32) for v in values
            )
            result = high << np.uint32(16) | low
        elif to == "tf32":  # 10 bits after the point, ties away from 0
            result = np.asarray(values[0]).view(np.uint32) + np.uint32(0x1000) & np.uint32(0xFFFFE000)
        elif to == "bf16":
            result = bfloat16(values[0]).astype(np.uint16)
        elif of == "bf16":
            result = (np.asarray(values[0]).astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            kind, target = f"{KIND[to[0]]}{int(to[1:]) // 8}", values[0]
            if of[0] == "f" and to[0] != "f":
                target = np.trunc(target) if "rzi" in line.parts else np.rint(target)
                most = np.iinfo(kind)
                target = np.clip(np.nan_to_num(target, nan=0.0), most.min, most.max)
            result = np.asarray(target).astype(kind)
        if to in ("s64", "s32", "s16") and of[0] == "u":
            result = np.asarray(values[0]).astype(UNSIGNED[int(to[1:])])
        kept(program, line.operands[0], result, line.mask(program))

    return run


def permuted(line: Line) -> Run:
    """``prmt``: any four of the eight bytes of two registers."""
    left, right = (source(each) for each in line.operands[1:3])
    selector = int(line.operands[3].rstrip("U"), 0)

    def run(program: Program) -> None:
        low, high = (np.asarray(read(program)).astype(np.uint64) for read in (left, right))
        both = low | high << np.uint64(32)
        result = np.uint32(0)
        for k in range(4):
            which = selector >> 4 * k & 15
            byte = (both >> np.uint64(8 * (which & 7)) & np.uint64(255)).astype(np.uint32)
            if which & 8:
                byte = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | byte << np.uint32(8 * k)
        kept(program, line.operands[0], result, line.mask(program))

    return run
