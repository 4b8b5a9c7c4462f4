"""Memory, barriers, shuffles and tensor cores of a pretended GPU (ptx_machine.py)."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray
from ptx_memory import Memory, Unknown
from ptx_program import UNSIGNED, WARP, Line, Program, Run, address, as_type, inner, kept, lanes, source, width_of


def shuffled(line: Line) -> Run:
    """``shfl``: what another lane of the warp has."""
    if line.parts[2] not in ("bfly", "idx") or line.operands[3] not in ("31", "0x1f"):
        raise Unknown(".".join(line.parts))
    value, by = source(line.operands[1]), source(line.operands[2])
    own = np.arange(WARP)

    def run(program: Program) -> None:
        named = lanes(by(program), program).astype(np.int64)
        where = named ^ own if line.parts[2] == "bfly" else named
        taken = np.take_along_axis(lanes(value(program), program), where, 1)
        kept(program, line.operands[0], taken.ravel(), line.mask(program))

    return run


def barrier(line: Line) -> Run:
    """``bar``: what was written before can be read after it."""
    if "warp" in line.parts:
        return lambda program: None

    def run(program: Program) -> None:
        program.now += 1

    return run


def _space(program: Program, line: Line) -> Memory:
    return program.shared if "shared" in line.parts else program.memory


def _vector(line: Line) -> tuple[int, int]:
    """Values of an access, and bytes of each."""
    count = next((int(part[1:]) for part in line.parts if re.fullmatch(r"v\d", part)), 1)
    return count, int(re.sub(r"\D", "", line.parts[-1])) // 8


def loaded(line: Line) -> Run:
    """``ld``, of arguments, too."""
    if line.parts[1] == "param":
        bits = int(line.parts[-1][1:])
        name = line.operands[1].strip("[]")

        def parameter(program: Program) -> None:
            value = as_type(program.registers[name], "s" if line.parts[-1][0] == "s" else "u", bits)
            to = width_of(line.operands[0])
            signed = value.astype(np.int64) if to == 64 else value
            kept(program, line.operands[0], np.asarray(signed), None)

        return parameter
    count, size = _vector(line)
    names, at = inner(line.operands[0]), address(line.operands[1])

    def run(program: Program) -> None:
        mask = line.mask(program)
        active = program.all if mask is None else np.broadcast_to(mask, program.threads)
        found = np.zeros((program.threads, count * size), np.uint8)
        if active.any():
            found[active] = _space(program, line).load(
                at(program)[active], count * size, program.warps[active], program.now, program.since
            )
        values = found.view(UNSIGNED[8 * size])
        for k, name in enumerate(names):
            kept(program, name, values[:, k].copy(), mask)

    return run


def stored(line: Line) -> Run:
    """``st``."""
    count, size = _vector(line)
    at, reads = address(line.operands[0]), [source(each, 8 * size) for each in inner(line.operands[1])]

    def run(program: Program) -> None:
        mask = line.mask(program)
        active = program.all if mask is None else np.broadcast_to(mask, program.threads)
        if not active.any():
            return
        values = np.empty((program.threads, count), UNSIGNED[8 * size])
        for k, read in enumerate(reads):
            values[:, k] = read(program)
        _space(program, line).store(
            at(program)[active], values[active].view(np.uint8), program.warps[active], program.now, program.since
        )

    return run


def copied(line: Line) -> Run:
    """``cp.async``: bytes arrive when they are waited for, as late as they may."""
    if line.parts[2] == "commit_group":
        return lambda program: program.copies.append([])
    if line.parts[2] == "wait_group":
        left = int(line.operands[0])

        def wait(program: Program) -> None:
            while len(program.copies) - 1 > left:
                for copy in program.copies.popleft():
                    copy()

        return wait
    to, of, size = address(line.operands[0]), address(line.operands[1]), int(line.operands[2], 0)
    given = source(line.operands[3]) if len(line.operands) > 3 else None

    def run(program: Program) -> None:
        mask = line.mask(program)
        active = program.all if mask is None else np.broadcast_to(mask, program.threads)
        whole = active if given is None else active & (np.broadcast_to(given(program), program.threads) > 0)
        where, source_at, warps = to(program), of(program), program.warps

        def copy() -> None:
            values = np.zeros((program.threads, size), np.uint8)
            if whole.any():
                values[whole] = program.memory.load(source_at[whole], size, warps[whole], program.now, program.since)
            if active.any():
                program.shared.store(where[active], values[active], warps[active], program.now, program.since)

        program.copies[-1].append(copy)

    return run


def matrices(line: Line) -> Run:
    """``ldmatrix``: 8 x 8 matrices of 16 bits, of which lane i names the row i % 8 of matrix i / 8."""
    names, at = inner(line.operands[0]), address(line.operands[1])
    transposed = "trans" in line.parts

    def run(program: Program) -> None:
        rows = lanes(at(program), program)[:, : 8 * len(names)]
        warps = np.repeat(program.warps[::WARP], 8 * len(names))
        raw = program.shared.load(rows.ravel(), 16, warps, program.now, program.since)
        matrices = raw.view(np.uint16).reshape(len(rows), len(names), 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(rows), len(names), WARP)
        for k, name in enumerate(names):
            kept(program, name, pairs[:, k].ravel(), None)

    return run


def product(line: Line) -> Run:
    """``mma.sync`` m16n8: a row of A is in a group of four lanes, as is a column of B."""
    out, a, b, c = (inner(each) for each in line.operands)
    kind = line.parts[-3]
    depth = int(re.fullmatch(r"m16n8k(\d+)", line.parts[3])[1])  # type: ignore[index]

    def unpacked(program: Program, names: list[str]) -> NDArray[np.float32]:
        """[warps, registers, group, lane of the group, values]."""
        raw = np.stack([lanes(program.registers[name], program) for name in names], 1)
        if kind == "tf32":
            values = (raw & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
        elif kind == "bf16":
            values = np.stack([raw << np.uint32(16), raw & np.uint32(0xFFFF0000)], -1).view(np.float32)
        else:
            values = np.ascontiguousarray(raw)[..., None].view(np.float16).astype(np.float32)
        return values.reshape(len(raw), len(names), 8, 4, values.shape[-1])

    def run(program: Program) -> None:
        left, right = unpacked(program, a), unpacked(program, b)
        warps, each = len(left), left.shape[-1]
        # Registers of A: rows + 8 first, then columns; of B: columns.
        left = left.reshape(warps, 2, 2, 8, 4, each).transpose(0, 2, 3, 1, 4, 5).reshape(warps, 16, depth)
        right = right.transpose(0, 2, 1, 3, 4).reshape(warps, 8, depth)
        made = left @ right.swapaxes(1, 2)  # [warps, 16, 8]
        made = made.reshape(warps, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3).reshape(warps, 4, WARP)
        for k, name in enumerate(out):
            total = made[:, k] + lanes(source(c[k])(program), program).view(np.float32)
            kept(program, name, total.ravel(), None)

    return run
