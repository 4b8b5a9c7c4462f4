"""The Triton kernels of the balance-weight EMA compiled ahead of time, with no GPU: what they use of one.

Not collected by itself: test_balance_ema.py runs it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest
from cit_fast.kernels import balance_ema as kernels

from cit_fast.ops.balance_ema.native import RULES

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no package of the wheel
from bench.machine_code import check, of_balance_ema

ARCHITECTURES = (80, 90)

F32, BF16, MIXED, ABSENT = 0, 1, 3, 4
STREAMS = {
    "float32": (F32,) * 6,
    "bfloat16": (BF16, F32, BF16, BF16, F32, F32),
    "bfloat16-state": (BF16,) * 6,
    "mixed": (MIXED,) * 6,
}
build = cache(of_balance_ema)


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
        code = build("sweep_kernel", architecture, DTYPES=dtypes, ADAMW=True, STORE_GRADS=True)
        # Four programs are 4096 elements in flight, 98 KB of float32; the rare cases have less.
        check(code, 2 if streams == "mixed" else 4)
        assert vectors(code.ptx, "ld") == accesses(dtypes, state=0)
        assert vectors(code.ptx, "st") == accesses(dtypes[:2] + dtypes[3:], state=3)

    def test_norms(self, streams: str, architecture: int) -> None:
        dtypes = (*STREAMS[streams][:4], ABSENT, ABSENT)
        code = build("sweep_kernel", architecture, DTYPES=dtypes, ADAMW=False, STORE_GRADS=True)
        check(code, 4)
        assert vectors(code.ptx, "ld") == accesses(dtypes, state=0)
        assert vectors(code.ptx, "st") == accesses(dtypes[3:4], state=0)

    def test_apply(self, streams: str, architecture: int) -> None:
        dtypes = (*STREAMS[streams][:2], *(ABSENT,) * 4)
        code = build("apply_kernel", architecture, DTYPES=dtypes)
        check(code, 8)
        assert vectors(code.ptx, "ld") == accesses(dtypes, state=0)
        assert vectors(code.ptx, "st") == accesses(dtypes[1:2], state=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rule", [*RULES, None])
def test_weights(rule: str | None, architecture: int) -> None:
    options = {"RULE": ABSENT if rule is None else RULES[rule], "LOG_TILE": kernels._LOG_SLOTS}
    options["HAS_REMAINING"] = rule == "paper"
    code = build("weights_kernel", architecture, **options)
    check(code, 4)


def test_fused_multiply_add_is_off() -> None:
    code = build("sweep_kernel", 90, DTYPES=STREAMS["float32"], ADAMW=True, STORE_GRADS=True)
    assert "fma.rn.f32" not in code.ptx
