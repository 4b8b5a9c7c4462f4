"""The Triton kernels of wasserstein_matrix compiled ahead of time, with no GPU: what they use of one.

Not collected by itself: test_wasserstein.py runs it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton
from cit_fast.kernels import wasserstein as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)
REGISTERS = 65536  # of a processor
STACK = 32  # bytes that another version of the compiler may keep there
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {"order": "*i32", "table": "*i64", "costs": "*fp32", "kernels": "*fp32"}
SINGLE = [block for block in kernels._WIDTHS if block <= kernels._WIDE]
CHUNKS = sorted({kernels._options(block)["CHUNK"] for block in kernels._WIDTHS})


def build(name: str, architecture: int, options: dict[str, Any]) -> str:
    kernel = getattr(kernels, name)
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = {arg: "constexpr" if arg in constants else POINTERS.get(arg, "*fp64") for arg in kernel.arg_names}
    # As the launcher does: memory that torch allocates is aligned.
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constants, attributes)
    launch = {name: options[name] for name in ("num_warps", "maxnreg", "enable_fp_fusion")}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)
    assert compiled.metadata.shared <= 8192
    # What one thread writes to memory others read.
    assert compiled.asm["ptx"].count("bar.sync") > 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, check=True)
    return done.stdout.decode()


def check(usage: str, options: dict[str, Any]) -> None:
    """Nothing spilled, and at least 256 threads on a processor at a time."""
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    print(f"{registers} registers")  # noqa: T201 - pytest -rA shows it
    assert int(re.search(r"STACK:(\d+)", usage).group(1)) <= STACK
    assert "LOCAL:0 " in usage
    assert REGISTERS // registers >= max(256, 32 * options["num_warps"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block", SINGLE)
def test_solve(block: int, architecture: int) -> None:
    options = kernels._options(block)
    check(build("solve_kernel", architecture, options), options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block", list(kernels._WIDTHS))
def test_pass(block: int, architecture: int) -> None:
    options = kernels._options(block)
    check(build("pass_kernel", architecture, options), options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_combine(chunk: int, architecture: int) -> None:
    options = {"CHUNK": chunk, **kernels._COMBINE}
    check(build("combine_kernel", architecture, options), options)
