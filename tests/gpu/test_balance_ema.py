"""The CUDA kernels of the balance-weight EMA against the definition, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from cit_fast import available_backends, backend, reference
from cit_fast.errors import BackendError
from cit_fast.ops import BALANCE_RULES, adamw_balance_ema_, balance_ema_, flush_balance_ema_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not available_backends()["cuda"].available, reason=available_backends()["cuda"].reason),
]

# A thread adds 64 floats, then come 13 levels of a tree, all positive: a norm is off by 80 * 2^-24 at most, relatively.
WEIGHT_RTOL = 3 * 80 * 2**-24
AVERAGE_RTOL = WEIGHT_RTOL + 4 * 2**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (0,), (3, 5), (7,), (8,), (2047,), (2049,), (4, 4, 17), (16384,), (16385,), (0, 7), (300, 500)]


@dataclass
class Lists:
    """The tensors of one call."""

    params: list[Tensor]
    averages: list[Tensor]
    grads: list[Tensor]
    previous_grads: list[Tensor]

    def copy(self, dtype: torch.dtype | None = None) -> Lists:
        return Lists(*([t.to(dtype or t.dtype, copy=True) for t in getattr(self, f.name)] for f in fields(self)))

    def run(self, rule: str = "released", decay: float = 0.99):
        with backend("cuda"):
            return balance_ema_(
                self.params, self.averages, self.grads, self.previous_grads, rule=rule, decay=decay, fallback=0.01
            )


def make(shapes, dtype=torch.float32, grad_dtype=None, previous_dtype=None, seed: int = 0) -> Lists:
    """Random tensors whose distance gives every rule a usable weight: with a = 6 (1 + b) / c, 1/3 and 5/6."""
    generator = torch.Generator("cuda").manual_seed(seed)
    lists = Lists([], [], [], [])
    for shape in shapes:
        param, grad, before, offset = (torch.randn(shape, generator=generator, device="cuda") for _ in range(4))
        param, grad = param.to(dtype), grad.to(grad_dtype or dtype)
        previous = (grad + before).to(previous_dtype or grad.dtype)
        offset = offset.sign()
        if param.numel():
            b, c = grad.double().abs().sum(), (grad.double() - previous.double()).abs().sum()
            offset *= (6 * (1 + b) / c / param.numel()).item()
        for each, tensor in zip(fields(lists), (param, param.float() + offset, grad, previous), strict=True):
            getattr(lists, each.name).append(tensor)
    return lists


def assert_matches(lists: Lists, rule: str) -> None:
    exact = lists.copy(torch.float64)
    exact_weights = reference.balance_ema_(
        exact.params, exact.averages, exact.grads, exact.previous_grads, rule, 0.99, 0.01
    )
    weights = lists.run(rule)
    assert weights.alphas.is_cuda
    torch.testing.assert_close(weights.alphas.double(), exact_weights.alphas, rtol=WEIGHT_RTOL, atol=0)
    assert torch.equal(weights.fallbacks, exact_weights.fallbacks)
    for e, expected, p in zip(lists.averages, exact.averages, lists.params, strict=True):
        if e.numel():
            error = (e.double() - expected).abs() / (expected.abs() + p.double().abs())
            assert error.max().item() <= AVERAGE_RTOL
    for previous, grad in zip(lists.previous_grads, lists.grads, strict=True):
        assert torch.equal(previous, grad.to(previous.dtype))


@pytest.mark.parametrize("rule", BALANCE_RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype, rule: str) -> None:
    assert_matches(make(SHAPES, dtype), rule)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("previous_dtype", DTYPES, ids=str)
def test_mixed_dtypes(grad_dtype: torch.dtype, previous_dtype: torch.dtype) -> None:
    assert_matches(make(SHAPES, torch.bfloat16, grad_dtype, previous_dtype, seed=1), "paper")


def test_many_tensors() -> None:
    assert_matches(make([(1 + 997 * i % 40_009,) for i in range(224)], torch.bfloat16, seed=2), "released")


def test_a_large_tensor() -> None:
    assert_matches(make([(8192, 8193)], torch.bfloat16, seed=3), "released")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_are_not_aligned_give_the_same_bits(dtype: torch.dtype) -> None:
    aligned = make([(30_001,)], dtype, seed=4)
    shifted = aligned.copy()
    for each in fields(shifted):
        tensor = getattr(shifted, each.name)[0]
        getattr(shifted, each.name)[0] = torch.cat([tensor.new_zeros(1), tensor])[1:]
    assert torch.equal(aligned.run().alphas, shifted.run().alphas)
    assert torch.equal(aligned.averages[0], shifted.averages[0])


def test_same_bits_every_time_and_in_any_company() -> None:
    lists = make([(300_001,), (5,), (16_384,)], seed=5)
    once, again = lists.copy(), lists.copy()
    alone = Lists(*([getattr(lists, f.name)[0].clone()] for f in fields(lists)))
    # More tensors are another grid and other blocks for the same chunks.
    company = make([(100_000,)] * 64, seed=6)
    crowd = Lists(*(getattr(company, f.name) + getattr(lists.copy(), f.name) for f in fields(lists)))
    alphas = once.run().alphas
    assert torch.equal(alphas, again.run().alphas)
    assert torch.equal(alphas[:1], alone.run().alphas)
    assert torch.equal(alphas, crowd.run().alphas[-3:])
    for x, y, z in zip(once.averages, again.averages, crowd.averages[-3:], strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("where", ["params", "grads"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", BALANCE_RULES)
def test_values_that_are_not_finite_never_reach_the_average(where: str, value: float, rule: str) -> None:
    lists = make([(40,), (200_000,), (7,)], seed=7)
    for tensor in getattr(lists, where)[:2]:
        tensor[-1] = value
    before = lists.copy()
    weights = lists.run(rule)
    assert weights.alphas[:2].tolist() == [0.0, 0.0]
    assert weights.alphas[2].item() > 0
    assert not weights.fallbacks.any().item()
    assert all(torch.equal(e, old) for e, old in zip(lists.averages[:2], before.averages[:2], strict=True))
    assert not torch.equal(lists.averages[2], before.averages[2])


def test_fixed_needs_no_previous_gradients() -> None:
    lists = make([(50,), (200_000,)])
    expected = [e.lerp(p, 0.1) for p, e in zip(lists.params, lists.averages, strict=True)]
    lists.previous_grads = []
    lists.run("fixed", decay=0.9)
    torch.testing.assert_close(lists.averages, expected)


def test_only_empty_tensors_fall_back() -> None:
    assert make([(0,), (0, 3)]).run().fallbacks.all().item()


def test_flush() -> None:
    lists = make([(33,), (20_000,)], torch.bfloat16)
    alphas = torch.tensor([0.25, 0.0], device="cuda")
    expected = lists.averages[0] + 0.25 * (lists.params[0].float() - lists.averages[0])
    untouched = lists.averages[1].clone()
    with backend("cuda"):
        flush_balance_ema_(lists.params, lists.averages, alphas)
    assert torch.equal(lists.averages[0], expected)
    assert torch.equal(lists.averages[1], untouched)
    assert not alphas.any().item()


def test_runs_on_the_current_stream_and_never_waits() -> None:
    lists = make([(100_000,)] * 20)
    expected = lists.copy()
    expected.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            lists.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(lists.averages, expected.averages, strict=True))


def test_without_force_the_reference_serves() -> None:
    lists = make([(100,)])
    expected = lists.copy()
    balance_ema_(lists.params, lists.averages, lists.grads, lists.previous_grads)
    with backend("reference"):
        balance_ema_(expected.params, expected.averages, expected.grads, expected.previous_grads)
    assert torch.equal(lists.averages[0], expected.averages[0])


def test_adamw_is_not_served() -> None:
    lists = make([(10,)])
    moments = [torch.zeros(10, device="cuda")]
    with backend("cuda"), pytest.raises(BackendError, match="no implementation of 'adamw_balance_ema_'"):
        adamw_balance_ema_(
            lists.params,
            lists.grads,
            moments,
            moments,
            lists.averages,
            lists.previous_grads,
            torch.zeros(1, device="cuda"),
            step=1,
            lr=0.1,
        )
