"""The Triton kernels of the balance-weight EMA compiled ahead of time, with no GPU: what they use of one.

Not collected by itself: test_balance_ema.py runs it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import triton
from cit_fast.kernels import balance_ema as kernels
from cit_fast.kernels import balance_ema_tables as tables
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cit_fast.ops.balance_ema.native import RULES

ARCHITECTURES = (80, 90)
REGISTERS = 65536  # of a processor
STACK = 32  # bytes that another version of the compiler may keep there
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

F32, BF16, MIXED, ABSENT = 0, 1, 3, 4
STREAMS = {
    "float32": (F32,) * 6,
    "bfloat16": (BF16, F32, BF16, BF16, F32, F32),
    "bfloat16-state": (BF16,) * 6,
    "mixed": (MIXED,) * 6,
}
TYPES = {
    **dict.fromkeys(("sizes", "streams"), "*i64"),
    **dict.fromkeys(("slots", "alphas", "remaining"), "*fp32"),
    "chunks": "*i32",
    "norms": "*fp64",
    "fallbacks": "*u8",
    "seed": "i32",
}


@cache
def build(name: str, architecture: int, **options: object) -> tuple[str, str]:
    """PTX as it is at run time, and what the machine code made of it uses."""
    kernel = getattr(kernels, name)
    options["CHUNK"] = tables.CHUNK
    if name != "weights_kernel":
        options.setdefault("NEAREST", False)
        options["LOG_GROUPS"] = tables.LOG_GROUPS
    signature = {arg: "constexpr" if arg in options else TYPES.get(arg, "fp32") for arg in kernel.arg_names}
    # As the launcher does: memory that torch allocates is aligned.
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, options, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=kernels._OPTIONS)
    assert compiled.metadata.shared <= 8192
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, check=True)
    return compiled.asm["ptx"], done.stdout.decode()


def check(usage: str, programs: int) -> None:
    """Nothing spilled, and few enough registers for so many programs on a processor at a time."""
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    print(f"{registers} registers")  # noqa: T201 - pytest -rA shows it
    assert int(re.search(r"STACK:(\d+)", usage).group(1)) <= STACK
    assert "LOCAL:0 " in usage
    assert registers <= REGISTERS // (32 * kernels._OPTIONS["num_warps"]) // programs


def vectors(ptx: str, access: str) -> int:
    """How many accesses of 16 bytes."""
    return len(re.findall(rf"{access}\.global(?:\.\w+)*\.(?:v4\.[bfu]32|v2\.[bfu]64)", ptx))


def accesses(dtypes: tuple[int, ...], *, state: int) -> int:
    """16-byte accesses of 8 neighbours each: two for float32, one for 16 bits, for MIXED those of every dtype.

    ``state`` streams are stored as float32 or bfloat16 only.
    """
    of_dtype = {F32: 2, BF16: 1, MIXED: 4, ABSENT: 0}
    return sum(of_dtype[dtype] for dtype in dtypes) - (state if MIXED in dtypes else 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("streams", STREAMS)
class TestKernels:
    def test_adamw(self, streams: str, architecture: int) -> None:
        dtypes = STREAMS[streams]
        ptx, usage = build("sweep_kernel", architecture, DTYPES=dtypes, ADAMW=True, STORE_GRADS=True)
        # Four programs are 4096 elements in flight, 98 KB of float32; the rare cases have less.
        check(usage, 2 if streams == "mixed" else 4)
        assert vectors(ptx, "ld") == accesses(dtypes, state=0)
        assert vectors(ptx, "st") == accesses(dtypes[:2] + dtypes[3:], state=3)

    def test_norms(self, streams: str, architecture: int) -> None:
        dtypes = (*STREAMS[streams][:4], ABSENT, ABSENT)
        ptx, usage = build("sweep_kernel", architecture, DTYPES=dtypes, ADAMW=False, STORE_GRADS=True)
        check(usage, 4)
        assert vectors(ptx, "ld") == accesses(dtypes, state=0)
        assert vectors(ptx, "st") == accesses(dtypes[3:4], state=0)

    def test_apply(self, streams: str, architecture: int) -> None:
        dtypes = (*STREAMS[streams][:2], *(ABSENT,) * 4)
        ptx, usage = build("apply_kernel", architecture, DTYPES=dtypes)
        check(usage, 8)
        assert vectors(ptx, "ld") == accesses(dtypes, state=0)
        assert vectors(ptx, "st") == accesses(dtypes[1:2], state=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rule", [*RULES, None])
def test_weights(rule: str | None, architecture: int) -> None:
    options = {"RULE": ABSENT if rule is None else RULES[rule], "LOG_TILE": kernels._LOG_SLOTS}
    options["HAS_REMAINING"] = rule == "paper"
    _, usage = build("weights_kernel", architecture, **options)
    check(usage, 4)


def test_fused_multiply_add_is_off() -> None:
    ptx, _ = build("sweep_kernel", 90, DTYPES=STREAMS["float32"], ADAMW=True, STORE_GRADS=True)
    assert "fma.rn.f32" not in ptx
