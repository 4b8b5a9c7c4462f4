"""RMSNorm: every backend against float64, gradients, bits, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cit_fast.errors import ConfigError, DataError
from cit_fast.ops import rms_norm
from cit_fast.ops.backends import backend

BACKENDS = ["native", "reference"]
# One rounding, relative to the largest of a row; in float32 the sum's as well.
ERROR = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def right_norm(x, weight, eps, from_one):
    x, weight = x.double(), weight.double() + from_one
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def values(*shape, dtype=torch.float32, seed=0, scale=2.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def near(found, right, dtype, axis=-1):
    size = right.abs().amax(axis, keepdim=True).clamp(min=1e-30)
    assert found.dtype == dtype
    assert ((found.double() - right).abs() <= ERROR[dtype] * size).all()


def results(op, right, inputs):
    """Result and gradients of an op, and those that float64 gives."""
    grad = values(*inputs[0].shape, dtype=inputs[0].dtype, seed=9)
    found, wanted = [], []
    for function, given_inputs, out in ((op, inputs, found), (right, [each.double() for each in inputs], wanted)):
        leaves = [each.detach().clone().requires_grad_() for each in given_inputs]
        y = function(*leaves)
        y.backward(grad.to(y.dtype))
        out += [y.detach(), *(leaf.grad for leaf in leaves)]
    return found, wanted


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("from_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (3, 17), (2, 5, 64), (40, 576), (2, 9000)], ids=str)
def test_rms_norm_and_its_gradients(which, dtype, from_one, shape):
    x, weight = values(*shape, dtype=dtype), values(shape[-1], dtype=dtype, seed=1)
    with backend(which):
        found, right = results(
            lambda x, w: rms_norm(x, w, 1e-5, from_one=from_one),
            lambda x, w: right_norm(x, w, 1e-5, from_one),
            [x, weight],
        )
    for one, other in zip(found, right, strict=True):
        near(one, other, dtype)


@pytest.mark.parametrize("width", [32, 576, 4096])
def test_errs_no_more_than_transformers_own(width):
    own = LlamaRMSNorm(width)
    own.weight.data = values(width, seed=1)
    x, grad = values(200, width), values(200, width, seed=2)
    errors = []
    for norm in (lambda x: rms_norm(x, own.weight, 1e-6), own):
        found, right = (leaf.clone().requires_grad_() for leaf in (x, x.double()))
        y, exact = norm(found), right_norm(right, own.weight, 1e-6, False)
        y.backward(grad)
        exact.backward(grad.double())
        errors.append([(y - exact).norm() / exact.norm(), (found.grad - right.grad).norm() / right.grad.norm()])
    assert all(ours <= theirs <= 1e-7 for ours, theirs in zip(*errors, strict=True))


def test_gradients_by_gradcheck():
    x, weight = values(3, 7).double().requires_grad_(), values(7, seed=1).double().requires_grad_()
    for from_one in (False, True):
        assert torch.autograd.gradcheck(lambda x, w, one=from_one: rms_norm(x, w, 1e-3, from_one=one), (x, weight))


def test_compiles_to_one_graph():
    x, weight = values(3, 8).requires_grad_(), values(8, seed=1)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")(x, weight, 1e-5)
    torch.testing.assert_close(compiled, rms_norm(x, weight, 1e-5))
    compiled.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
def test_the_same_bits_with_any_number_of_threads(dtype):
    x, weight = values(70, 576, dtype=dtype).requires_grad_(), values(576, dtype=dtype, seed=1)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with backend("native"):
                y = rms_norm(x, weight, 1e-6)
                seen.append((y, *torch.autograd.grad(y, x, values(70, 576, dtype=dtype, seed=2))))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))


@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 70),
    scale=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 80.0, 1e15]),
    seed=st.integers(0, 99),
)
def test_any_rows_of_any_size(rows, width, scale, seed):
    x, weight = values(rows, width, seed=seed, scale=scale), values(width, seed=seed + 1)
    with backend("native"):
        near(rms_norm(x, weight, 1e-6), right_norm(x, weight, 1e-6, False), torch.float32)


@pytest.mark.parametrize("which", BACKENDS)
def test_nan_and_infinity_stay_in_their_row(which):
    x = values(4, 20)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    weight = values(20, seed=1)
    with backend(which):
        y = rms_norm(x, weight, 1e-6)
    assert y[1].isnan().all()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("which", BACKENDS)
def test_strided_inputs(which):
    x, weight = values(6, 5, 32).transpose(0, 1), values(64, seed=1)[::2]
    with backend(which):
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm(x.contiguous(), weight.contiguous(), 1e-6))


def test_what_it_refuses():
    x = values(2, 8)
    for bad, message in [
        (lambda: rms_norm(x, values(7), 1e-6), r"x \[2, 8\], weight \[7\]; expected \[\.\.\., d\] and \[d\]"),
        (lambda: rms_norm(x, values(8).half(), 1e-6), "weight is torch.float16 on cpu, x torch.float32 on cpu"),
        (lambda: rms_norm(x.long(), values(8), 1e-6), "x is torch.int64; expected float16"),
        (lambda: rms_norm(torch.tensor(1.0), values(1), 1e-6), r"x \[\], weight \[1\]"),
    ]:
        with pytest.raises(DataError, match=message):
            bad()
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"rms_norm: eps is {eps}"):
            rms_norm(x, values(8), eps)
