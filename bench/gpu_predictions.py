"""What the Triton kernels should take on an H100 and an H200, reckoned from their machine code. Nothing is timed.

    python -m bench.gpu_predictions [--results bench/results/gpu_predictions.json]

A kernel takes as long as what it waits for longest: device memory, the instructions that its warps issue, the special
function units, the tensor cores, or the second-level cache that feeds these. The floor beside it moves every byte once,
at what memory gives in use, and has the products at the rate of the best public kernels. Programs that wait for each
other, launches and the host are not in it: a time measured above the prediction says that one of those matters.
``make gpu`` measures.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from cit_fast.kernels import information_gain
from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine_code import SHARED, MachineCode, count, of_balance_ema, of_gain, of_losses
from cit_fast.files import write_file


class GPU(NamedTuple):
    """Rates that are reached in use."""

    processors: int
    clock: float
    """Hz."""
    memory: float
    """Bytes a second, of 3.35e12 and 4.8e12 in the data sheets."""
    cache: float
    """Bytes a second that the second-level cache gives to all processors."""
    cache_size: int
    products: float
    """FLOP a second of the best public kernels in 16 bits, of 989e12 in the data sheet."""


GPUS = {
    "H100": GPU(132, 1.755e9, 3.0e12, 6.8e12, 50 << 20, 700e12),
    "H200": GPU(132, 1.755e9, 4.2e12, 6.8e12, 50 << 20, 700e12),
}
ISSUE, SPECIAL, TENSOR = 4 * 32, 16, 4096
"""Of a processor and clock: operations, those of special functions, and FLOP of products in 16 bits."""
TOKENS, VOCABULARY = 4096, 131_072
PARAMETERS = 10**9


class Prediction(NamedTuple):
    """A kernel's times in milliseconds on each GPU, and what they follow from."""

    kernel: str
    work: str
    code: MachineCode
    operations: float
    """Of a thread for each element, or for each pair of elements."""
    gigabytes: float
    waits: dict[str, dict[str, float]]
    floor: dict[str, float]

    def time(self, gpu: str) -> float:
        """Milliseconds."""
        return max(self.waits[gpu].values())


def averages(name: str, dtypes: tuple[int, ...], size: int) -> Prediction:
    """The sweep of AdamW with its average over many parameters, with so many bytes for each."""
    code = of_balance_ema("sweep_kernel", 90, DTYPES=dtypes, ADAMW=True, STORE_GRADS=True)
    loop = _loops(code, "LDG.E.128")[0]
    elements = PARAMETERS / 8  # a thread takes eight neighbours at a time
    return _streamed(f"AdamW and average, {name}", "10^9 parameters", code, [loop], elements, 8, PARAMETERS * size)


def losses(name: str, said: str) -> Prediction:
    """A loss of rows of logits and its gradient in bfloat16, of logits that a product has left in memory."""
    code = of_losses(name, "*bf16", 90)
    sides = 1 if name == "cross_entropy" else 2
    sweeps = _loops(code, "LDG")
    entries = TOKENS * VOCABULARY
    moved = entries * (4 * sides + 2)
    each = 8 // sides
    again = {}
    for gpu, of in GPUS.items():
        kept = min(1.0, of.cache_size / (of.processors * VOCABULARY * 4 * sides))
        again[gpu] = (len(sweeps) - 1) * (1 - kept) * entries * 4 * sides
    work = f"{TOKENS} rows of {VOCABULARY}"
    return _streamed(said, work, code, sweeps, entries / each, each, moved, again)


def gain(width: int) -> Prediction:
    """The gain of two contexts in bfloat16."""
    code = of_gain("sm_90", 90, "*bf16", "*bf16")
    tiling = information_gain._TILINGS["sm_90", 16]
    around, inner = code.loops()[:2]
    assert count(inner, "HGMMA") > 0 == count(around, "HGMMA")
    tiles = TOKENS // tiling.BLOCK_M * (VOCABULARY // tiling.BLOCK_N)
    steps = -(-width // tiling.BLOCK_K)
    flop = 4 * tiling.BLOCK_M * tiling.BLOCK_N * tiling.BLOCK_K
    bytes_of_step = 2 * (2 * tiling.BLOCK_M + tiling.BLOCK_N) * tiling.BLOCK_K
    work = f"{TOKENS} tokens, {VOCABULARY} entries, width {width}"
    waits, floor = {}, {}
    for gpu, of in GPUS.items():
        fed = of.cache / of.processors / of.clock
        step = {"tensor cores": flop / TENSOR, "cache": bytes_of_step / fed, "issue": _issued(inner, code)}
        # Tiles come one after the other: what follows the products of a tile is not hidden by those of the next.
        turns = tiles / of.processors / of.clock * 1e3
        after = _issued(around, code)
        waits[gpu] = {what: turns * (steps * clocks + after) for what, clocks in step.items()}
        floor[gpu] = 4 * TOKENS * VOCABULARY * width / of.products * 1e3
    pairs = tiling.BLOCK_M * tiling.BLOCK_N / (32 * code.warps)
    moved = 2 * width * (2 * TOKENS + VOCABULARY)
    return Prediction("information gain", work, code, around.total() / pairs, moved / 1e9, waits, floor)


def _loops(code: MachineCode, load: str) -> list[Counter[str]]:
    return [loop for loop in code.loops() if count(loop, load)]


def _issued(loop: Counter[str], code: MachineCode) -> float:
    return loop.total() * code.warps * 32 / ISSUE


def _streamed(
    kernel: str,
    work: str,
    code: MachineCode,
    loops: Sequence[Counter[str]],
    turns: float,
    each: int,
    moved: float,
    again: dict[str, float] | None = None,
) -> Prediction:
    """Of loops in which a thread takes ``each`` elements at a time, ``turns`` of all threads together.

    Args:
        moved: bytes, each once. ``again``: those that the cache does not keep from one sweep to the next.
    """
    operations = sum(loop.total() for loop in loops)
    special = sum(count(loop, "MUFU") for loop in loops)
    waits, floor = {}, {}
    for gpu, of in GPUS.items():
        clocks = of.processors * of.clock / 1e3
        waits[gpu] = {
            "memory": (moved + (again or {}).get(gpu, 0)) / of.memory * 1e3,
            "issue": turns * operations / ISSUE / clocks,
            "special functions": turns * special / SPECIAL / clocks,
        }
        floor[gpu] = moved / of.memory * 1e3
    return Prediction(kernel, work, code, operations / each, moved / 1e9, waits, floor)


def predictions() -> list[Prediction]:
    """Of all kernels that a fixed number of steps describes; a distance takes as many as its points need."""
    float32, bfloat16 = 0, 1
    return [
        averages("float32", (float32,) * 6, 44),
        averages("bfloat16, float32 state", (bfloat16, float32, bfloat16, bfloat16, float32, float32), 32),
        *(gain(width) for width in (576, 1536, 4096)),
        losses("cross_entropy", "cross-entropy"),
        losses("jsd", "Jensen-Shannon divergence"),
        losses("kl", "Kullback-Leibler divergence"),
    ]


def recorded(made: Sequence[Prediction]) -> dict[str, Any]:
    """For JSON."""
    rows = [
        {
            "kernel": each.kernel,
            "work": each.work,
            "registers": each.code.registers,
            "stack": each.code.stack,
            "shared": each.code.shared,
            "threads of a processor": 32 * each.code.warps * each.code.programs(SHARED),
            "operations an element": round(each.operations, 1),
            "GB": round(each.gigabytes, 2),
            "milliseconds": {gpu: {what: round(ms, 2) for what, ms in of.items()} for gpu, of in each.waits.items()},
            "floor": {gpu: round(ms, 2) for gpu, ms in each.floor.items()},
        }
        for each in made
    ]
    return {"predicted": "nothing here was measured", "triton": triton.__version__, "for": "sm_90", "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    table = Table(title="predicted milliseconds (floor), and what is waited for", box=box.SIMPLE_HEAD)
    table.add_column("kernel")
    for column in ("registers", "threads", "operations", *GPUS):
        table.add_column(column, justify="right")
    made = predictions()
    for each in made:
        times = [f"{each.time(gpu):.1f} ({each.floor[gpu]:.1f})" for gpu in GPUS]
        longest = max(each.waits["H200"], key=each.waits["H200"].__getitem__)
        threads = 32 * each.code.warps * each.code.programs(SHARED)
        cells = (str(each.code.registers), str(threads), f"{each.operations:.0f}")
        table.add_row(f"{each.kernel}: {each.work}", *cells, times[0], f"{times[1]} {longest}")
    Console(width=170).print(table)
    if options.results is not None:
        write_file(options.results, json.dumps(recorded(made), indent=1) + "\n")


if __name__ == "__main__":
    main()
