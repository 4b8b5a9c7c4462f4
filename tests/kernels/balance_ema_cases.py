"""The Triton kernels of the balance-weight EMA against the reference: in the interpreter, or on a GPU if there is one.

Not collected by itself: TRITON_INTERPRET is read when triton is imported, so test_balance_ema.py here and in tests/gpu
run this file in a process of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

import cit_fast
from cit_fast import available_backends, backend
from cit_fast.errors import BackendError
from cit_fast.ops import BALANCE_RULES, adamw_balance_ema_, balance_ema_, balance_norms_, flush_balance_ema_

# The interpreter is numpy, which warns of arithmetic with infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
PTX = bool(os.environ.get("CIT_FAST_PTX"))  # compiled, and run on the host
DEVICE = "cpu" if INTERPRETED or PTX else "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# A term is rounded to float32 (twice where it is a difference), then 16 terms of a lane and 2^10 lanes are added, one
# by one and pairwise: 28 roundings at most. The weight has three norms, one of them twice.
NORM_RTOL = 28 * 2**-24
WEIGHT_RTOL = 4 * NORM_RTOL
# sqrt and division are up to 3 last places off (interpreted: none); the step is then a small part of the parameter.
PARAM_RTOL = {F32: 2**-21, BF16: 2**-7, F16: 2**-10}
# Tails of 1 and 15 elements, a whole group, several tiles; no elements at all; two chunks.
SHAPES = [(1,), (0,), (3, 5), (4, 2), (1031,), (2, 3, 8), (0, 7), (3, 0), (16384 + 40,)]


@dataclass
class Lists:
    """The tensors of one call."""

    params: list[Tensor]
    averages: list[Tensor]
    grads: list[Tensor]
    previous_grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]

    def __post_init__(self) -> None:
        self.remaining = torch.full((len(self.params),), 2.0, device=DEVICE)

    def copy(self) -> Lists:
        lists = Lists(*([tensor.clone() for tensor in getattr(self, field.name)] for field in fields(self)))
        lists.remaining = self.remaining.clone()
        return lists

    def ema(self, which: str = "triton", **options: object):
        lists = (self.params, self.averages, self.grads, self.previous_grads)
        if options.get("rule") == "paper":
            options["remaining"] = self.remaining
        with backend(which):
            return balance_ema_(*lists, **options)

    def adamw(self, alphas: Tensor, which: str = "triton", **options: object):
        x = self
        with backend(which):
            return adamw_balance_ema_(
                x.params, x.grads, x.exp_avgs, x.exp_avg_sqs, x.averages, x.previous_grads, alphas,
                step=3, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, **options,
            )  # fmt: skip

    def flush(self, alphas: Tensor, which: str = "triton", **options: object) -> None:
        with backend(which):
            flush_balance_ema_(self.params, self.averages, alphas.clone(), **options)


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype = F32, state: torch.dtype = F32, seed: int = 0) -> Lists:
    generator = torch.Generator().manual_seed(seed)

    def random(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]

    squares = [tensor.abs() for tensor in random(state)]
    return Lists(random(dtype), random(state), random(dtype), random(dtype), random(state), squares)


def assert_same(got: Lists, expected: Lists, *names: str) -> None:
    for name in names or [field.name for field in fields(got)]:
        for i, (x, y) in enumerate(zip(getattr(got, name), getattr(expected, name), strict=True)):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), f"{name}[{i}]"


def assert_same_weights(got, expected) -> None:
    torch.testing.assert_close(got.norms, expected.norms, rtol=NORM_RTOL, atol=0, equal_nan=True)
    torch.testing.assert_close(got.alphas, expected.alphas, rtol=WEIGHT_RTOL, atol=0)
    assert torch.equal(got.fallbacks, expected.fallbacks)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_ema_is_the_reference(dtype: torch.dtype) -> None:
    lists = make(SHAPES, dtype)
    for param, average in zip(lists.params, lists.averages, strict=True):
        average.mul_(1e-3).add_(param)  # so that most weights are usable
    expected = lists.copy()
    weights = lists.ema()
    expected_weights = expected.ema("reference")
    assert_same_weights(weights, expected_weights)
    assert not weights.fallbacks.all()
    assert_same(lists, expected, "params", "grads", "previous_grads")
    for e, right, p in zip(lists.averages, expected.averages, lists.params, strict=True):
        assert ((e - right).abs() <= 2**-22 * (right.abs() + p.float().abs())).all()


@pytest.mark.parametrize("rule", BALANCE_RULES)
def test_rules(rule: str) -> None:
    # One gives a weight, one none, one is left out; the fourth has a weight too small for float32, under "released".
    lists = make([(40,), (40,), (40,), (1,)])
    lists.averages[0] = lists.params[0] + 6 / 40
    lists.averages[1] = lists.params[1].clone()
    lists.grads[2][3] = float("nan")
    for name, value in (("params", 1e35), ("averages", 0.0), ("grads", 1e30), ("previous_grads", 1e35)):
        getattr(lists, name)[3].fill_(value)
    expected = lists.copy()
    weights = lists.ema(rule=rule, decay=0.9, fallback=0.3)
    assert_same_weights(weights, expected.ema("reference", rule=rule, decay=0.9, fallback=0.3))
    assert weights.fallbacks.tolist()[:3] == [False, rule != "fixed", False]
    assert weights.alphas[2] == 0
    assert weights.alphas[3] > 0
    assert torch.equal(lists.averages[2], expected.averages[2])
    torch.testing.assert_close(lists.remaining, expected.remaining, rtol=WEIGHT_RTOL, atol=0, equal_nan=True)


def test_scale_and_the_distance_left() -> None:
    lists = make([(40,), (1031,), (0,)])
    expected = lists.copy()
    for which, each in (("triton", lists), ("reference", expected)):
        for step in range(3):
            each.grads = make([(40,), (1031,), (0,)], seed=20 + step).grads
            each.ema(which, rule="paper")
    assert (lists.remaining[:2] > 0).all()
    torch.testing.assert_close(lists.remaining, expected.remaining, rtol=8 * WEIGHT_RTOL, atol=0)
    for e, right in zip(lists.averages, expected.averages, strict=True):
        torch.testing.assert_close(e, right, rtol=1e-5, atol=1e-6)
    assert_same_weights(lists.ema(scale=0.01, fallback=0.001), expected.ema("reference", scale=0.01, fallback=0.001))


@pytest.mark.parametrize("fused", [False, True])
def test_averages_rounded_to_the_nearest(fused: bool) -> None:
    shapes = [(1031,), (40, 16)]
    lists = make(shapes, state=BF16)
    alphas = torch.rand(2, device=DEVICE)
    expected, expected_alphas = lists.copy(), alphas.clone()
    for which, each, its in (("triton", lists, alphas), ("reference", expected, expected_alphas)):
        if fused:
            each.adamw(its, which, rounding="nearest")
        else:
            each.flush(its, which, rounding="nearest")
    assert_same(lists, expected, "averages", "exp_avgs", "exp_avg_sqs")


@pytest.mark.parametrize(("dtype", "state"), [(F32, F32), (BF16, F32), (F16, BF16), (BF16, BF16)], ids=str)
def test_adamw_is_the_reference(dtype: torch.dtype, state: torch.dtype) -> None:
    lists = make([(1,), (3, 5), (1031,), (40, 16), (0, 3)], dtype, state)
    lists.grads[1].view(-1)[2] = float("inf")
    lists.grads[3].view(-1)[-1] = float("nan")
    alphas = torch.rand(5, device=DEVICE)
    alphas[2] = 0
    expected, expected_alphas = lists.copy(), alphas.clone()
    weights = lists.adamw(alphas, seed=2**32 - 5)
    expected_weights = expected.adamw(expected_alphas, "reference", seed=2**32 - 5)
    assert weights.alphas is alphas or torch.equal(weights.alphas, alphas)
    assert_same(lists, expected, "averages", "grads", "previous_grads", "exp_avgs", "exp_avg_sqs")
    for p, right in zip(lists.params, expected.params, strict=True):
        torch.testing.assert_close(p, right, rtol=PARAM_RTOL[dtype], atol=PARAM_RTOL[dtype] * 0.01)
        assert p.isfinite().all()
    # The parameters' last places are in a.
    torch.testing.assert_close(
        weights.norms[:, 1:], expected_weights.norms[:, 1:], rtol=NORM_RTOL, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        weights.norms[:, 0], expected_weights.norms[:, 0], rtol=1e-2 if dtype != F32 else 1e-5, atol=0
    )
    assert torch.equal(weights.fallbacks, expected_weights.fallbacks)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_gradients_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    halves = torch.arange(0, 2**15 - 1, 7, dtype=torch.int32)
    values = [(halves + i).to(torch.int16).view(dtype) for i in (0, 1)]
    values = [each[values[1].isfinite()].float() for each in values]
    ties = (values[0] + values[1]) / 2
    grads = torch.cat([ties, -ties, values[0], torch.tensor([float("inf"), float("nan"), 3e38, -1e-40, 0.1])]).to(
        DEVICE
    )
    lists = make([tuple(grads.shape)])
    lists.grads[0], lists.previous_grads[0] = grads, torch.zeros_like(grads, dtype=dtype)
    lists.ema()
    torch.testing.assert_close(lists.previous_grads[0], grads.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_stochastic_rounding_of_every_kind_of_number() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    special = torch.tensor([0, -(2**31), 0x7F7FFFFF, 0x7F800000, -0x800000, 0x7FFFFFFF, -1, 0x7F800001, 1, 0x3F808000])
    params = torch.cat([bits, special.to(torch.int32)]).view(F32).to(DEVICE)
    lists = make([(8,), tuple(params.shape)], state=BF16)
    lists.params[1] = params
    lists.averages[1].zero_()
    expected = lists.copy()
    alphas = torch.ones(2, device=DEVICE)
    lists.flush(alphas, seed=11)
    expected.flush(alphas, "reference", seed=11)
    got, right = lists.averages[1], expected.averages[1]
    assert torch.equal(got.isnan(), params.isnan())
    assert torch.equal(got.isinf(), params.isinf())
    numbers = ~params.isnan()
    assert torch.equal(got[numbers], right[numbers])
    assert not torch.equal(got[numbers], params.to(BF16)[numbers])
    other = expected.copy()
    other.averages[1].zero_()
    other.flush(alphas, seed=12)
    assert not torch.equal(other.averages[1][numbers], got[numbers])


def test_a_small_weight_moves_a_bfloat16_average() -> None:
    lists = make([(4096,)], state=BF16)
    lists.averages[0].fill_(1)
    lists.params[0].fill_(2)
    lists.flush(torch.full((1,), 2**-12, device=DEVICE))  # a thirty-second of a last place
    moved = (lists.averages[0] != 1).float().mean().item()
    assert 0.5 / 32 < moved < 2 / 32


def test_one_call_takes_any_mix_of_dtypes_and_changes_nothing_for_any_tensor() -> None:
    dtypes = [(F32, F32), (BF16, BF16), (F16, F32), (BF16, F32), (F16, BF16)]
    alone = [make([(50 + i, 24)], dtype, state, seed=i) for i, (dtype, state) in enumerate(dtypes)]
    alone[0].previous_grads[0] = alone[0].previous_grads[0].to(BF16)
    alone[3].grads[0] = alone[3].grads[0].to(F16)
    alone[4].exp_avgs[0] = alone[4].exp_avgs[0].float()
    together = Lists(*([getattr(lists, field.name)[0] for lists in alone] for field in fields(Lists)))
    together, expected = together.copy(), together.copy()
    alphas = torch.rand(5, device=DEVICE)
    weights, expected_weights = together.adamw(alphas.clone()), expected.adamw(alphas.clone(), "reference")
    assert_same(together, expected, "averages", "previous_grads", "exp_avgs", "exp_avg_sqs")
    torch.testing.assert_close(weights.norms, expected_weights.norms, rtol=1e-2, atol=0)
    # The first of the list has the same random bits alone.
    first_weights = alone[0].adamw(alphas[:1].clone())
    assert torch.equal(weights.norms[:1], first_weights.norms)
    for field in fields(Lists):
        assert torch.equal(getattr(alone[0], field.name)[0], getattr(together, field.name)[0])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_alignment_changes_no_bit(dtype: torch.dtype) -> None:
    aligned = make([(17, 72), (2050,)], dtype, dtype)
    shifted = aligned.copy()
    for i, field in enumerate(fields(shifted)):
        tensors = getattr(shifted, field.name)
        for j, tensor in enumerate(tensors):
            tensors[j] = torch.cat([tensor.new_zeros(i), tensor.flatten()])[i:].view(tensor.shape)
    alphas = torch.rand(2, device=DEVICE)
    weights = aligned.adamw(alphas.clone(), seed=3)
    shifted_weights = shifted.adamw(alphas.clone(), seed=3)
    assert torch.equal(weights.norms, shifted_weights.norms)
    assert_same(shifted, aligned)
    aligned.flush(alphas, seed=4)
    shifted.flush(alphas, seed=4)
    assert_same(shifted, aligned)


def test_the_list_and_the_grid_change_no_bit() -> None:
    lists = make([(2100,), (5,)])
    crowd = make([(300,)] * 9 + [(4, 8)])
    crowd = Lists(*(getattr(crowd, f.name) + getattr(lists.copy(), f.name) for f in fields(lists)))
    weights, crowd_weights = lists.ema(), crowd.ema()
    assert torch.equal(weights.norms, crowd_weights.norms[-2:])
    assert torch.equal(lists.averages[0], crowd.averages[-2])


def test_the_first_call_updates_once() -> None:
    """Tuning by trial would apply an update several times: in the first call with new shapes and no other."""
    first = make([(1040,)], BF16)
    second = first.copy()
    alphas = torch.full((1,), 0.25, device=DEVICE)
    first.adamw(alphas.clone())
    second.adamw(alphas.clone())
    assert_same(first, second)
    expected = make([(1040,)], BF16)
    expected.adamw(alphas.clone(), "reference")
    assert_same(first, expected, "averages", "exp_avgs", "exp_avg_sqs", "previous_grads")


def test_norms_alone_and_gradients_that_are_kept() -> None:
    lists = make([(3, 16), (1031,)], BF16)
    expected = lists.copy()
    with backend("triton"):
        norms = balance_norms_(*(getattr(lists, f.name) for f in fields(lists)[:4]), store_grads=False)
    assert_same(lists, expected)
    with backend("reference"):
        right = balance_norms_(*(getattr(expected, f.name) for f in fields(lists)[:4]))
    torch.testing.assert_close(norms, right, rtol=NORM_RTOL, atol=0, equal_nan=True)
    lists.adamw(torch.zeros(2, device=DEVICE), store_grads=False)
    assert_same(lists, make([(3, 16), (1031,)], BF16), "grads", "previous_grads", "averages")
    lists.previous_grads = []
    lists.ema(rule="fixed", decay=0.5)


def test_values_that_are_not_finite_stay_out_of_the_average() -> None:
    lists = make([(40,), (1031,), (7,)])
    lists.params[0][5] = float("inf")
    lists.grads[1][1030] = float("nan")
    before = lists.copy()
    weights = lists.ema()
    assert weights.alphas[:2].tolist() == [0, 0]
    assert_same(Lists(*([t] for t in (lists.averages[1],)), *([],) * 5), Lists([before.averages[1]], *([],) * 5))
    assert torch.equal(lists.averages[0], before.averages[0])
    assert not torch.equal(lists.averages[2], before.averages[2])
    assert lists.previous_grads[1][1030].isnan()
    assert lists.ema().fallbacks.tolist() == [False, False, True]


@pytest.mark.skipif(PTX, reason="it keeps account of every byte")
def test_offsets_beyond_2_31() -> None:
    """The last chunk of a tensor of more than 2^31 elements, alone: the rest of its memory is never touched."""
    from cit_fast.kernels import balance_ema as kernels
    from cit_fast.kernels import balance_ema_tables as tables

    chunk = 1 << 17
    numel = chunk * tables.CHUNK + 24
    p, e = (torch.empty(numel, dtype=BF16, device=DEVICE) for _ in range(2))
    start, alphas = torch.arange(24, dtype=BF16, device=DEVICE), torch.full((1,), 0.5, device=DEVICE)
    p[-24:], e[-24:] = start, start * 3
    call = kernels._Call([[p], [e], [], [], [], []])
    sizes = call.layout.sizes.clone()
    assert sizes[0, 1] == 0
    sizes[0, 1] = -chunk  # now the first program takes the last chunk
    call.layout = call.layout._replace(sizes=sizes, chunks=call.layout.chunks[-1:])
    call.apply(alphas, "stochastic", 0)
    assert torch.equal(e[-24:], start * 2)


def test_what_it_does_not_take() -> None:
    assert available_backends()["triton"].available
    with cit_fast.backend("triton"), pytest.raises(BackendError, match="float64"):
        balance_ema_([torch.zeros(3, device=DEVICE).double()], *([torch.zeros(3, device=DEVICE)],) * 3)
