"""The Triton kernels of the information-gain family compiled ahead of time, with no GPU: what they use of one.

Not collected by itself: test_information_gain.py runs it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from cit_fast.kernels import information_gain, information_gain_losses, information_gain_rows

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no package of the wheel
from bench.machine_code import check, count, of_gain, of_information_gain, of_losses

SHARED = {"any": 99 << 10, "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # that a program may have
ARCHITECTURES = (80, 90)
OPERANDS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
RICH = "bias and cap"
HEADS = {"plain": {"bias": False, "cap": False}, RICH: {"bias": True, "cap": True}}
DTYPES = ("bfloat16", "float32")


# Kind of tiling, architecture, dtypes of hidden states and head, whether the width is whole tiles, and the head.
GAINS = [
    *((f"sm_{each}", each, "bfloat16", True, "plain") for each in ARCHITECTURES),
    *((f"sm_{each}", each, dtype, even, RICH) for each in ARCHITECTURES for dtype in DTYPES for even in (True, False)),
    *(("any", 80, dtype, even, RICH) for dtype in DTYPES for even in (True, False)),
    *(("unaligned", each, dtype, False, RICH) for each in ARCHITECTURES for dtype in DTYPES),
    ("sm_90", 90, "float16", True, RICH),
    ("sm_100", 100, "bfloat16", True, RICH),
    ("sm_100", 100, "bfloat16", False, RICH),
    ("sm_80", 80, "float32 by bfloat16", True, RICH),
    ("sm_90", 90, "float32 by bfloat16", False, RICH),
]


@pytest.mark.parametrize(("kind", "architecture", "dtype", "even", "head"), GAINS)
def test_gain(kind: str, architecture: int, dtype: str, even: bool, head: str) -> None:
    hidden, weight = (OPERANDS[each] for each in (dtype.split(" by ") * 2)[:2])
    aligned = kind != "unaligned"
    code = of_gain(kind, architecture, hidden, weight, even=even, **HEADS[head])
    check(code)
    assert code.shared <= SHARED.get(kind, SHARED["any"])
    # On tensor cores, sums in float32; 16 bytes at a time while they work on what came before.
    operand = {"*fp32": "tf32", "*bf16": "bf16", "*fp16": "f16"}[hidden]
    instruction = {
        "sm_90": rf"wgmma\.mma_async\S*\.f32\.{operand}\.{operand}",
        "sm_100": r"tcgen05\.mma\S*kind::f16",  # of both dtypes
    }.get(kind, rf"mma\.sync\S*\.f32\.{operand}\.{operand}")
    assert re.search(instruction, code.ptx)
    assert ("cp.async.cg.shared.global" in code.ptx) == aligned


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gain_of_one_column(architecture: int) -> None:
    """Triton makes a constant of an argument that is 1."""
    ones = dict.fromkeys(("width", "full_stride", "masked_stride", "weight_stride"), 1)
    code = of_gain("unaligned", architecture, "*bf16", "*bf16", even=False, **ones)
    check(code)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["gains_kernel", "statistics_kernel"])
def test_merge(name: str, architecture: int) -> None:
    kernel = getattr(information_gain, name)
    results = {arg: "*fp32" for arg in kernel.arg_names if arg not in ("tokens", "splits", "BLOCK")}
    code = of_information_gain(kernel, architecture, {**results, "statistics": "*fp64"}, **information_gain._MERGE)
    check(code)


LOSSES = [("*bf16", "plain"), ("*bf16", RICH), ("*fp16", RICH), ("*fp32", RICH), (None, RICH)]


@pytest.mark.parametrize(
    ("gradient", "head", "architecture"), [*((*each, 90) for each in LOSSES), ("*bf16", RICH, 80), ("*fp32", RICH, 80)]
)
@pytest.mark.parametrize("loss", ["cross_entropy", "jsd", "kl"])
def test_losses(loss: str, gradient: str | None, architecture: int, head: str) -> None:
    code = of_losses(loss, gradient, architecture, **HEADS[head], gate=head == RICH)
    check(code)
    assert re.search(r"ld\.global(?:\.\w+)*\.v4\.[bfu]32", code.ptx)
    if gradient is not None:
        assert re.search(r"st\.global(?:\.\w+)*\.v[24]\.[bfu]32", code.ptx)


# Operations of a sweep's loop for 4 entries of each of the two sides, or for 8 of the only one, as counted, and those
# that the special function units do, which take eight times as long.
SWEEPS = {"cross_entropy": [(86, 8), (89, 8)], "jsd": [(83, 8), (129, 12), (137, 8)], "kl": [(82, 8), (67, 8)]}


@pytest.mark.parametrize("loss", SWEEPS)
def test_a_sweep_is_short(loss: str) -> None:
    """So that memory is what it waits for."""
    code = of_losses(loss, "*bf16", 90)
    sweeps = [loop for loop in code.loops() if count(loop, "LDG")]
    assert [count(loop, "MUFU") for loop in sweeps] == [special for _, special in SWEEPS[loss]]
    assert [count(loop, "LDG.E.128", "LDG.E.EF.128") for loop in sweeps] == [2] * len(sweeps)
    for loop, (counted, _) in zip(sweeps, SWEEPS[loss], strict=True):
        assert loop.total() <= 1.1 * counted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("gradient", ["*bf16", "*fp32"])
def test_bias(gradient: str, architecture: int) -> None:
    types = {"gradient": gradient, "factors": "*fp32", "grad_bias": "*fp32", "stride": "i32:16"}
    code = of_information_gain(information_gain_rows.bias_kernel, architecture, types, **information_gain_losses._BIAS)
    check(code)
