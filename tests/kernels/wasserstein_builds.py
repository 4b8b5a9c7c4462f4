"""The Triton kernels of wasserstein_matrix compiled ahead of time, with no GPU: what they use of one.

Not collected by itself: test_wasserstein.py runs it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from cit_fast.kernels import wasserstein as kernels

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no package of the wheel
from bench.machine_code import check, of_wasserstein

ARCHITECTURES = (80, 90)
SINGLE = [block for block in kernels._WIDTHS if block <= kernels._WIDE]
CHUNKS = sorted({kernels._options(block)["CHUNK"] for block in kernels._WIDTHS})


def build(name: str, architecture: int, options: dict[str, Any]) -> None:
    """Compile it: nothing spills, and at least 256 threads are on a processor at a time."""
    code = of_wasserstein(name, architecture, options)
    check(code, max(1, 256 // (32 * options["num_warps"])))
    assert code.shared <= 8192
    # What one thread writes to memory others read.
    assert code.ptx.count("bar.sync") > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block", SINGLE)
def test_solve(block: int, architecture: int) -> None:
    options = kernels._options(block)
    build("solve_kernel", architecture, options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block", list(kernels._WIDTHS))
def test_pass(block: int, architecture: int) -> None:
    options = kernels._options(block)
    build("pass_kernel", architecture, options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_combine(chunk: int, architecture: int) -> None:
    options = {"CHUNK": chunk, **kernels._COMBINE}
    build("combine_kernel", architecture, options)
