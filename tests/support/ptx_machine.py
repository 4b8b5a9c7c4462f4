"""Compiled kernels on the host: the PTX that a GPU would get, instruction by instruction, in numpy.

Triton's interpreter runs a kernel's source, has no bfloat16, and knows nothing of layouts, barriers and asynchronous
copies, which the compiler makes. This runs what the compiler made, for sm_80. All threads of a block take each
instruction together, and programs go one after the other, so a missing barrier would change nothing; therefore every
access to memory is held against those before it: of two that no barrier orders, one of them a write, the kernel is
wrong. So is one that is not aligned, and one outside the tensors that the launch was given.

Approximate instructions (``ex2.approx``, ``div.full``) are exact here, and sums on tensor cores are those of float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from ptx_arithmetic import compared, converted, moved, permuted, plain, selected
from ptx_exchange import barrier, copied, loaded, matrices, product, shuffled, stored
from ptx_memory import Fault, Memory, Unknown, Values
from ptx_program import Line, Program, Run, of_number, source, split

__all__ = ["Fault", "Kernel", "Memory"]
_LINE = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);")
_SPECIAL: dict[str, Callable[[Line], Run]] = {
    "setp": compared, "selp": selected, "mov": moved, "cvt": converted, "prmt": permuted, "shfl": shuffled,
    "bar": barrier, "ld.": loaded, "st.": stored, "cp.async": copied, "ldmatrix": matrices, "mma": product,
}  # fmt: skip
_TOGETHER = ("shfl", "bar", "cp.async", "ldmatrix", "mma")


class Instruction(NamedTuple):
    """What it does, or where it goes; ``None``: to the end."""

    run: Run | None
    predicate: tuple[str, bool] | None
    target: Callable[[Program], Values] | None
    text: str
    exchange: bool = False
    """Whether all threads take it together."""


class Kernel:
    """A kernel's PTX, ready to run."""

    def __init__(self, ptx: str, threads: int, shared: int) -> None:
        self.threads, self.shared = threads, shared
        body = ptx[ptx.index(".entry") :]
        head, body = body.split("\n{\n", 1)
        self.parameters = re.findall(r"\.param \.(\w)(\d+)\s.*?(\w+_param_\d+)", head)
        lines: list[tuple[str, str]] = []
        labels: dict[str, int] = {}
        place = ""
        code = body.split("\n}\n", 1)[0]
        tables = {name: split(targets) for name, targets in re.findall(r"(\S+): \.branchtargets\s+([^;]*);", code)}
        for text in re.sub(r"\S+: \.branchtargets[^;]*;", "", code).splitlines():
            line, _, comment = map(str.strip, text.partition("//"))
            if line.startswith(".loc"):
                place = comment
            if line.endswith(":"):
                labels[line[:-1]] = len(lines)
            elif line.startswith("{ .reg"):  # a scope with names of its own
                lines += [(f"{each.strip()};", place) for each in line[1:-1].split(";")[1:] if each.strip()]
            elif line and not line.startswith(".") and line not in "{}":
                lines.append((line, place))
        places = {name: np.array([labels[each] for each in targets]) for name, targets in tables.items()}
        self.instructions = [decoded(line, {**labels, **places}) for line, _ in lines]
        self.places = [place for _, place in lines]

    def launch(self, grid: Sequence[int], arguments: Sequence[Any], memory: Memory) -> None:
        """Run all programs of a grid.

        Args:
            arguments: numbers, pointers as integers; what the compiler appends is 0.
        """
        given = {}
        for (kind, bits, name), value in zip(
            self.parameters, [*arguments, *[0] * (len(self.parameters) - len(arguments))], strict=True
        ):
            given[name] = of_number(value, kind, int(bits))
        now = 0
        with np.errstate(all="ignore"):
            for z in range(grid[2]):
                for y in range(grid[1]):
                    for x in range(grid[0]):
                        program = Program((x, y, z), grid, self.threads, self.shared, memory)
                        program.registers.update(given)
                        program.now = program.since = now
                        self.run(program)
                        now = program.now + 1
        memory.write_back()

    def run(self, program: Program) -> None:
        """One program, to its end. Threads that go different ways take turns: those go on that are furthest behind."""
        end = len(self.instructions)
        at: int = 0
        apart: NDArray[np.int64] | None = None  # where each thread is
        while at < end:
            run, predicate, target, text, _ = self.instructions[at]
            place = self.places[at]
            if run is not None:
                try:
                    run(program)
                except Fault as fault:
                    raise Fault(f"{place}: {fault}: {text}") from None
                following: NDArray[np.int64] | int = at + 1
            else:
                following = to = end if target is None else target(program)
                if predicate is not None:
                    taken = np.asarray(program.registers[predicate[0]]) != predicate[1]
                    following = np.where(taken, to, at + 1)
            if apart is None and type(following) is int:
                at = following
                continue
            if apart is None:
                if np.ndim(following) and np.ptp(following):
                    apart = np.broadcast_to(following, program.threads).copy()
            else:
                apart = np.where(program.active, following, apart)
            if apart is None:
                at = int(np.ravel(following)[0])
                continue
            places = [int(place) for place in np.unique(apart)]
            if len(places) == 1:
                at, apart, program.active = places[0], None, None
                continue
            # At an exchange they wait for the others.
            at = next((each for each in places if each < end and not self.instructions[each].exchange), -1)
            if at < 0:
                text = "; ".join(self.instructions[each].text for each in places if each < end)
                raise Fault(f"threads of a block wait for each other at different places: {text}")
            program.active = apart == at


def decoded(text: str, labels: dict[str, Any]) -> Instruction:
    """An instruction."""
    found = _LINE.fullmatch(text)
    if found is None:
        raise Unknown(text)
    negated, predicate, operation, operands = found.groups()
    line = Line(operation.split("."), split(operands), (predicate, negated == "!") if predicate else None)
    first = line.parts[0]
    if first == "ret":
        return Instruction(None, line.predicate, None, text)
    if first == "bra":
        return Instruction(None, line.predicate, lambda program: labels[line.operands[0]], text)
    if first == "brx":
        index, table = source(line.operands[0]), labels[line.operands[1]]
        return Instruction(None, line.predicate, lambda program: table[np.asarray(index(program)).astype(int)], text)
    for name, made in _SPECIAL.items():
        if operation.startswith(name):
            return Instruction(made(line), None, None, text, name in _TOGETHER)
    return Instruction(plain(line), None, None, text)
