"""Compiled kernels on the host: what they compute, and that a wrong one is found (ptx_machine.py).

Not collected by itself: test_ptx.py runs it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from ptx_machine import Fault


@triton.jit
def reverse_kernel(x, N: tl.constexpr, BARRIER: tl.constexpr):
    """In place: elements change places between warps."""
    offs = tl.arange(0, N)
    values = tl.load(x + offs)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + N - 1 - offs, values)


@triton.jit
def copy_kernel(x, out, N: tl.constexpr):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + offs, tl.load(x + offs))


@triton.jit
def shift_kernel(x, N: tl.constexpr):
    """Each program writes what the one before it reads."""
    offs = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + N + offs, tl.load(x + offs))


@triton.jit
def round_kernel(x, out, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out + offs, tl.load(x + offs).to(out.dtype.element_ty))


@triton.jit
def product_kernel(a, b, out, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows, depth = tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + rows[:, None] * K + depth[None, :])
    right = tl.load(b + depth[:, None] * N + rows[None, :])
    tl.store(out + rows[:, None] * N + rows[None, :], tl.dot(left, right, input_precision=PRECISION))


@triton.jit
def functions_kernel(x, out, N: tl.constexpr):
    offs = tl.arange(0, N)
    values = tl.load(x + offs)
    tl.store(out + offs, tl.exp2(values))
    tl.store(out + N + offs, tl.log2(tl.abs(values)))
    tl.store(out + 2 * N + offs, tl.sqrt(tl.abs(values)))
    tl.store(out + 3 * N + offs, 1 / values)
    tl.store(out + 4 * N + offs, tl.where(values > 0, tl.sum(values), tl.max(values)))


def test_a_missing_barrier_is_found() -> None:
    x = torch.arange(128.0)
    reverse_kernel[(1,)](x, N=128, BARRIER=True)
    assert x.tolist() == list(range(127, -1, -1))
    with pytest.raises(Fault, match=r"ptx_cases.py:\d+.*wrote what another warp reads, with no barrier"):
        reverse_kernel[(1,)](x, N=128, BARRIER=False)
    one_warp = torch.arange(32.0)
    reverse_kernel[(1,)](one_warp, N=32, BARRIER=False, num_warps=1)
    assert one_warp.tolist() == list(range(31, -1, -1))


def test_programs_that_meddle_with_each_other_are_found() -> None:
    with pytest.raises(Fault, match="read what another warp wrote, with no barrier"):
        shift_kernel[(3,)](torch.arange(512.0), N=128)


def test_accesses_beyond_the_end_are_found() -> None:
    x = torch.arange(300.0)
    out = torch.zeros(300)
    copy_kernel[(1,)](x, out, N=256)
    assert torch.equal(out[:256], x[:256])
    assert not out[256:].any()
    with pytest.raises(Fault, match="outside of what the kernel was given"):
        copy_kernel[(2,)](x, out, N=256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roundings(dtype: torch.dtype) -> None:
    special = [
        0.0,
        -0.0,
        float("inf"),
        float("-inf"),
        float("nan"),
        1e-40,
        3e38,
        65519.9,
        65520.0,
        1 + 2**-8,
        1 + 3 * 2**-8,
    ]
    x = torch.cat([torch.tensor(special), torch.randn(1013, generator=torch.Generator().manual_seed(0))])
    out = torch.empty(1024, dtype=dtype)
    round_kernel[(1,)](x, out, N=1024)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[~x.isnan()], x.signbit()[~x.isnan()])


@pytest.mark.parametrize(
    ("dtype", "precision", "error"),
    [
        (torch.bfloat16, "ieee", 2e-6), (torch.float16, "ieee", 2e-6),
        (torch.float32, "tf32", 2e-3), (torch.float32, "tf32x3", 3e-6),
    ],
)  # fmt: skip
@pytest.mark.parametrize("warps", [1, 4])
def test_products(dtype: torch.dtype, precision: str, error: float, warps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((32, 64), (64, 32)))
    out = torch.empty(32, 32)
    product_kernel[(1,)](a, b, out, N=32, K=64, PRECISION=precision, num_warps=warps)
    exact = a.double() @ b.double()
    assert (out - exact).abs().max() <= error * exact.abs().max()
    if precision == "tf32":
        assert (out - exact).abs().max() > 1e-5 * exact.abs().max()


def test_functions() -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    out = torch.empty(5, 256)
    functions_kernel[(1,)](x, out, N=256)
    wide = x.double()
    exact = torch.stack([wide.exp2(), wide.abs().log2(), wide.abs().sqrt(), 1 / wide])
    torch.testing.assert_close(out[:4].double(), exact, rtol=2**-22, atol=0)
    # A sum of 256 numbers, added pairwise: eight roundings.
    assert (out[4][x > 0] - wide.sum()).abs().max() <= 8 * 2**-24 * wide.abs().sum()
    assert (out[4][x <= 0] == x.max()).all()
