"""The balance-weight EMA against its definition in float64: numbers, odd shapes, bad input."""

from __future__ import annotations

import copy
import doctest
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cit_fast import _native, backend, ops
from cit_fast.errors import BackendError, CitFastError
from cit_fast.ops import (
    BALANCE_RULES,
    adamw_balance_ema_,
    balance_ema_,
    balance_norms_,
    balance_weights,
    flush_balance_ema_,
)

# Sums run in float32 over at most 1024 values per lane, all positive: relative error of a norm below 1024 * 2^-24 at
# worst, of the weight below three times that. The average is then one multiply-add in float32 away from exact.
NORM_RTOL = 1024 * 2**-24
WEIGHT_RTOL = 3 * NORM_RTOL
AVERAGE_ULP = 4 * 2**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Make = Callable[..., Any]


def names(lists: Any) -> list[str]:
    return [field.name for field in fields(lists) if field.name != "remaining"]


def assert_close_to_exact(got: Any, weights: Any, exact: Any, exact_weights: Any, before: Any = None) -> None:
    """``before``: the lists as they were, where an average may be far larger than what it becomes: e + a (p - e) rounds
    in units of the old average.
    """
    old = [torch.zeros(())] * len(got.averages) if before is None else before.averages
    torch.testing.assert_close(weights.norms, exact_weights.norms, rtol=NORM_RTOL, atol=0)
    torch.testing.assert_close(
        weights.alphas.double(), exact_weights.alphas.double(), rtol=WEIGHT_RTOL, atol=0, equal_nan=False
    )
    assert torch.equal(weights.fallbacks, exact_weights.fallbacks)
    for e, expected, p, was in zip(got.averages, exact.averages, got.params, old, strict=True):
        if e.numel():
            scale = expected.abs() + p.double().abs() + was.double().abs()
            error = ((e.double() - expected).abs() / scale).max().item()
            assert error <= AVERAGE_ULP + WEIGHT_RTOL
    for previous, grad in zip(got.previous_grads, got.grads, strict=True):
        assert torch.equal(previous, grad.to(previous.dtype))


@pytest.mark.parametrize("rule", BALANCE_RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(make: Make, forced: str, dtype: torch.dtype, rule: str) -> None:
    lists = make(dtype=dtype)
    exact = lists.copy(torch.float64)
    exact_weights = exact.run_reference(rule=rule)
    weights = lists.run(rule=rule)
    assert weights.alphas.dtype == torch.float32
    assert weights.norms.dtype == torch.float64
    assert_close_to_exact(lists, weights, exact, exact_weights)
    has_elements = torch.tensor([param.numel() > 0 for param in lists.params])
    assert torch.equal(weights.fallbacks, torch.zeros_like(has_elements) if rule == "fixed" else ~has_elements)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_every_simd_level_gives_the_same_bits(
    make: Make, simd: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    lists = make(None, dtype, grad_dtype, seed=1)
    for previous in lists.previous_grads[::2]:
        previous.data = previous.float()  # a dtype of its own
    best, exact = lists.copy(), lists.copy(torch.float64)
    exact_weights = exact.run_reference(rule="paper")
    weights = lists.run(rule="paper")
    assert_close_to_exact(lists, weights, exact, exact_weights)
    _native.set_simd_level("")
    best_weights = best.run(rule="paper")
    assert torch.equal(weights.alphas, best_weights.alphas)
    assert torch.equal(weights.norms, best_weights.norms)
    for name in ("averages", "previous_grads"):
        for one, other in zip(getattr(lists, name), getattr(best, name), strict=True):
            assert torch.equal(one, other)


def test_half_conversions_are_exact_for_every_value(simd: str) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        params = every.view(dtype)
        params = params[params.isfinite()]
        average = torch.zeros(params.shape)
        # fixed with decay 0: the average becomes the parameter; 2^-24 keeps bfloat16 sums finite.
        for part, target in zip(params.split(64), average.split(64), strict=True):
            balance_ema_([part], [target], [part], [], rule="fixed", decay=0.0)
        finite = params.float().abs() < 1e36
        assert torch.equal(average[finite], params.float()[finite])


def test_float_to_half_rounds_as_torch_does(simd: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    ties = (torch.arange(2**16) << 16 | 0x8000).to(torch.int32)
    halves = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = (halves[:-1] + halves[1:]) / 2
    grads = torch.cat([bits.view(torch.float32), ties.view(torch.float32), between, -between])
    for dtype in (torch.float16, torch.bfloat16):
        previous = torch.zeros(grads.shape, dtype=dtype)
        balance_ema_([torch.zeros(grads.shape)], [torch.zeros(grads.shape)], [grads], [previous])
        expected = grads.to(dtype)
        nan = expected.isnan()
        assert torch.equal(previous.isnan(), nan)
        assert torch.equal(previous[~nan], expected[~nan])


@pytest.mark.parametrize("size", [100, 16385, 300_000])
def test_bits_do_not_depend_on_the_number_of_threads(
    make: Make, with_threads: Callable[[int], None], size: int
) -> None:
    results = []
    for threads in (1, 2, 3, 7):
        lists = make([(size,), (5,), (size // 2 + 1,), (2, size), (size // 50, 50)], seed=2)
        with_threads(threads)
        weights = lists.run()
        results.append((weights.alphas, weights.norms, *lists.averages))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_first_step_with_equal_gradients_falls_back(make: Make, forced: str) -> None:
    lists = make([(10,)] * 2)
    lists.previous_grads = [grad.clone() for grad in lists.grads]
    weights = lists.copy().run(rule="released", fallback=0.125)
    assert weights.alphas.tolist() == [0.125, 0.125]
    assert weights.fallbacks.all()
    weights = lists.run(rule="paper", fallback=0.25)
    assert weights.alphas.tolist() == [0.25, 0.25]


def test_rules_by_hand(forced: str) -> None:
    # a = 2, b = 3, c = 8: (1 + b) / (a c) = 1/4
    p, e, g, previous = ([torch.tensor([x, y])] for x, y in ((1.0, 1.0), (0.0, 0.0), (1.0, 2.0), (5.0, 6.0)))
    assert balance_norms_(p, e, g, previous, store_grads=False).tolist() == [[2.0, 3.0, 8.0]]

    def alpha(**options: object) -> float:
        lists = (p, copy.deepcopy(e), g, copy.deepcopy(previous))
        weights = balance_ema_(*lists, **options)
        assert lists[1][0].tolist() == [weights.alphas.item()] * 2
        return weights.alphas.item()

    assert alpha(rule="released") == 0.5
    assert alpha(rule="released", scale=1.0) == 0.25
    assert alpha(rule="released", scale=4.0, fallback=0.125) == 0.125  # 1 is outside
    assert alpha(rule="fixed", decay=0.875) == 0.125
    remaining = torch.tensor([3.0])
    assert alpha(rule="paper", remaining=remaining) == 0.75
    assert remaining.tolist() == [0.5]  # (1 - alpha) a
    assert alpha(rule="paper", remaining=remaining) == 0.125
    assert alpha(rule="paper", remaining=torch.zeros(1), fallback=0.25) == 0.25  # before the first update


def test_the_distance_that_remains_is_that_of_the_tensors(make: Make, forced: str) -> None:
    lists = make(dtype=torch.float32)
    for rule in BALANCE_RULES:
        lists.run(rule=rule, store_grads=False)
        left = torch.stack([(p - e).abs().sum() for p, e in zip(lists.params, lists.averages, strict=True)])
        rounding = torch.tensor([4.0 * 2**-24 * p.numel() for p in lists.params])  # of each element of an average
        assert ((lists.remaining - left).abs() <= rounding + 1e-5 * left).all()
    lists.grads[3][0] = torch.nan  # a tensor that is left out keeps its distance
    before = lists.remaining[3].item()
    assert lists.run(rule="paper").alphas[3] == 0
    assert lists.remaining[3].item() == pytest.approx(before, rel=1e-5)
    lists.params[3][0] = torch.nan  # one whose distance is not known falls back at its next step
    lists.run(rule="paper")
    lists.params[3][0], lists.grads[3][0], lists.previous_grads[3][0] = 1.0, 1.0, 2.0
    assert lists.run(rule="paper").fallbacks[3]


@pytest.mark.parametrize("threads", [1, 3])
def test_bfloat16_averages_to_the_nearest(make: Make, moments: Make, forced: str, threads: int) -> None:
    # half of the last place of 1 is 2^-8: what is less does not move an average that is rounded to the nearest
    for offset, expected in ((1.5 * 2**-8, 1 + 2**-7), (0.5 * 2**-8, 1.0)):
        average = torch.ones(1000, dtype=torch.bfloat16)
        param = [torch.ones(1000) + offset]
        balance_ema_(param, [average], param, [], rule="fixed", decay=0.0, rounding="nearest", seed=threads)
        assert average.float().unique().tolist() == [expected]
    lists = make([(5000,), (3, 7)])
    exact = [average.bfloat16() + 0.25 * (p - average.bfloat16().float()) for p, average in zip(
        lists.params, lists.averages, strict=True)]  # fmt: skip
    lists.averages = [average.bfloat16() for average in lists.averages]
    flushed = [average.clone() for average in lists.averages]
    lists.run(rule="fixed", decay=0.75, rounding="nearest", store_grads=False)
    flush_balance_ema_(lists.params, flushed, torch.full((2,), 0.25), rounding="nearest")
    state = moments(make([(5000,), (3, 7)]), torch.bfloat16)
    state.alphas.fill_(0.25)
    state.step(1, lr=0.0, weight_decay=0.0, rounding="nearest")
    for others in (lists.averages, flushed, state.lists.averages):
        assert all(torch.equal(x, y.bfloat16()) for x, y in zip(others, exact, strict=True))


def test_weight_too_small_for_float32_is_not_zero(forced: str) -> None:
    # 2 (1 + 1e30) / (1e35 * 1e35) is 2e-40: usable, but below the smallest normal float32
    lists = [torch.tensor([1e35])], [torch.zeros(1)], [torch.tensor([1e30])], [torch.tensor([1e35])]
    weights = balance_ema_(*lists)
    assert 0 < weights.alphas.item() < 1e-37
    assert not weights.fallbacks.item()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_magnitudes(make: Make, forced: str, scale: float) -> None:
    lists = make([(5000,), (40_000,)], seed=3, in_range=False)
    for name in names(lists):
        setattr(lists, name, [t * scale for t in getattr(lists, name)])
    exact_weights = lists.copy(torch.float64).run_reference()
    weights = lists.run()
    assert torch.isfinite(weights.alphas).all()
    assert torch.equal(weights.fallbacks, exact_weights.fallbacks)
    assert all(average.isfinite().all() for average in lists.averages)


@pytest.mark.parametrize("where", ["params", "grads"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", BALANCE_RULES)
def test_values_that_are_not_finite_never_reach_the_average(
    make: Make, forced: str, where: str, value: float, rule: str
) -> None:
    lists = make([(40,), (200_000,), (7,)], seed=4)
    for tensor in getattr(lists, where)[:2]:
        tensor[-1] = value
    before = lists.copy()
    weights = lists.run(rule=rule)
    assert weights.alphas[:2].tolist() == [0.0, 0.0]
    assert weights.alphas[2] > 0
    assert not weights.fallbacks.any()
    assert torch.equal(lists.averages[0], before.averages[0])
    assert torch.equal(lists.averages[1], before.averages[1])
    assert not torch.equal(lists.averages[2], before.averages[2])


def test_the_step_after_a_nan_gradient_falls_back(make: Make, forced: str) -> None:
    lists = make([(50,)])
    lists.previous_grads[0][3] = float("nan")
    weights = lists.run()
    assert weights.fallbacks.tolist() == [True]
    assert weights.alphas.tolist() == [torch.tensor(0.01).item()]
    assert lists.previous_grads[0].isfinite().all()


def test_fixed_needs_no_previous_gradients(make: Make, forced: str) -> None:
    lists = make([(50,), (200_000,)])
    e = [average.clone() for average in lists.averages]
    weights = balance_ema_(lists.params, lists.averages, lists.grads, [], rule="fixed", decay=0.9)
    assert not weights.norms[:, 2].any()
    for p, before, after in zip(lists.params, e, lists.averages, strict=True):
        torch.testing.assert_close(after, before.lerp(p, 0.1))


# Gradients kept by the caller, the parts of the whole


def test_gradients_that_the_caller_keeps_are_not_stored(make: Make, forced: str) -> None:
    lists = make()
    other, before = lists.copy(), lists.copy()
    weights, expected = lists.run(store_grads=False), other.run()
    assert torch.equal(weights.alphas, expected.alphas)
    for name, unchanged in (("averages", other), ("previous_grads", before)):
        assert all(torch.equal(x, y) for x, y in zip(getattr(lists, name), getattr(unchanged, name), strict=True))


@pytest.mark.parametrize("rule", BALANCE_RULES)
def test_norms_then_weights_then_flush_is_the_whole(make: Make, forced: str, rule: str) -> None:
    whole = make()
    whole.grads[3][1, 2] = float("nan")
    parts = whole.copy()
    expected = whole.run(rule=rule)
    norms = balance_norms_(parts.params, parts.averages, parts.grads, parts.previous_grads)
    weights = balance_weights(norms, rule=rule, remaining=parts.remaining)
    assert torch.equal(weights.norms.nan_to_num(7), expected.norms.nan_to_num(7))
    assert torch.equal(weights.alphas, expected.alphas)
    assert torch.equal(weights.fallbacks, expected.fallbacks)
    assert torch.equal(parts.remaining.nan_to_num(7), whole.remaining.nan_to_num(7))
    flush_balance_ema_(parts.params, parts.averages, weights.alphas)
    for name in names(whole):
        for one, other in zip(getattr(whole, name), getattr(parts, name), strict=True):
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def test_norms_of_shards_add_up(make: Make, forced: str) -> None:
    lists = make([(40_000,), (6, 50)], seed=8)
    whole = lists.copy().run()
    shards = [lists.copy() for _ in range(2)]
    for k, shard in enumerate(shards):
        for name in names(shard):
            setattr(shard, name, [t.chunk(2)[k].contiguous() for t in getattr(shard, name)])
    norms = sum(balance_norms_(x.params, x.averages, x.grads, x.previous_grads) for x in shards)
    torch.testing.assert_close(balance_weights(norms).alphas, whole.alphas, rtol=WEIGHT_RTOL, atol=0)


# Where the kernels do not serve


def test_other_memory_orders(make: Make) -> None:
    channels_last = make([(2, 3, 4, 5)])
    plain = channels_last.copy()
    for name in names(plain):
        getattr(channels_last, name)[0] = getattr(channels_last, name)[0].to(memory_format=torch.channels_last)
    with backend("native"):
        weights = channels_last.run()
    torch.testing.assert_close(weights.alphas, plain.run().alphas)
    torch.testing.assert_close(channels_last.averages, plain.averages)

    strided = make([(6, 8)])
    expected = strided.copy()
    strided.params[0] = torch.cat([strided.params[0]] * 2, dim=1)[:, :8]
    with backend("native"), pytest.raises(BackendError, match="not dense"):
        strided.run()
    strided.run()
    expected.run()
    torch.testing.assert_close(strided.averages, expected.averages)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_go_to_the_reference(make: Make, dtype: torch.dtype) -> None:
    lists = make([(30,)]).copy(dtype)
    with backend("native"), pytest.raises(BackendError, match=rf"float32 or bfloat16, not {dtype}"):
        lists.run()
    weights = lists.run()
    assert weights.alphas.dtype == torch.float32
    assert weights.alphas.item() > 0


def test_empty_lists() -> None:
    weights = balance_ema_([], [], [], [])
    assert weights.alphas.shape == weights.fallbacks.shape == (0,)
    assert weights.norms.shape == balance_norms_([], [], [], []).shape == (0, 3)
    assert balance_weights(weights.norms).alphas.shape == (0,)
    assert adamw_balance_ema_([], [], [], [], [], [], torch.empty(0), step=1, lr=0.1).alphas.shape == (0,)
    flush_balance_ema_([], [], torch.empty(0))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=2).map(tuple), min_size=1, max_size=5),
    rule=st.sampled_from(BALANCE_RULES),
    decay=st.floats(0, 0.999),
    fallback=st.floats(0.001, 1),
    seed=st.integers(0, 1000),
    in_range=st.booleans(),
)
def test_properties(
    make: Make,
    shapes: list[tuple[int, ...]],
    rule: str,
    decay: float,
    fallback: float,
    seed: int,
    in_range: bool,
) -> None:
    lists = make(shapes, seed=seed, in_range=in_range)
    options = {"rule": rule, "decay": decay, "fallback": fallback}
    before, exact = lists.copy(), lists.copy(torch.float64)
    exact_weights = exact.run_reference(**options)
    weights = lists.run(**options)
    assert ((weights.alphas > 0) & (weights.alphas <= 1)).all()
    assert_close_to_exact(lists, weights, exact, exact_weights, before)
    for p, old, new in zip(lists.params, before.averages, lists.averages, strict=True):
        # The average moves towards the parameter, never past it (up to rounding).
        assert ((new - p).abs() <= (old - p).abs() * (1 + 1e-6) + 1e-6 * (p.abs() + old.abs())).all()
    # Each tensor is treated alone: the order of the list does not matter.
    for name in names(before):
        setattr(before, name, getattr(before, name)[::-1])
    before.remaining = before.remaining.flip(0)
    assert torch.equal(before.run(**options).alphas.flip(0), weights.alphas)


# Bad input


def put(name: str, index: int, tensor: Tensor | None) -> Callable[[Any], object]:
    return lambda lists: getattr(lists, name).__setitem__(index, tensor)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"rule": "best"}, r"balance_ema_: rule='best' is unknown; accepted: released, paper, fixed"),
        (None, {"rule": "paper", "remaining": None}, r"rule='paper' needs remaining, .* float32 zeros of shape \("),
        (None, {"scale": 0.0}, r"scale=0.0 must be above 0"),
        (None, {"scale": math.inf}, r"scale=inf must be above 0 and finite"),
        (None, {"rounding": "up"}, r"rounding='up' is unknown; accepted: stochastic, nearest"),
        (None, {"remaining": torch.zeros(1, dtype=torch.float64)}, r"remaining must be contiguous float32"),
        (None, {"decay": 1.0}, r"decay=1.0 must be in \[0, 1\)"),
        (None, {"decay": float("nan")}, "decay=nan"),
        (None, {"decay": -0.1}, "decay=-0.1"),
        (None, {"fallback": 0.0}, r"fallback=0.0 must be in \(0, 1\]"),
        (lambda x: x.averages.pop(), {}, "averages holds 1 tensors, params holds 2"),
        (lambda x: x.previous_grads.clear(), {}, "previous_grads holds 0 tensors"),
        (lambda x: x.params.clear(), {}, "averages holds 2 tensors, params holds 0"),
        (put("grads", 1, torch.ones(3, 2)), {}, r"grads\[1\] has shape \(3, 2\), its parameter \(2, 3\)"),
        (put("params", 0, torch.ones(4, dtype=torch.int32)), {}, r"params\[0\] is torch.int32; accepted: float32"),
        (put("grads", 0, torch.ones(4, device="meta")), {}, r"grads\[0\] is on meta, params\[0\] on cpu"),
        (put("grads", 1, torch.ones(2, 3).to_sparse()), {}, r"grads\[1\] has layout torch.sparse_coo"),
        (put("grads", 1, None), {}, r"grads\[1\] is NoneType, not a tensor"),
        (put("params", 0, None), {}, r"params\[0\] is NoneType, not a tensor"),
        (put("previous_grads", 1, torch.ones(3).expand(2, 3)), {}, r"previous_grads\[1\] is expanded: elements that"),
    ],
)
def test_bad_input_is_one_clear_line(
    make: Make, change: Callable[[Any], object] | None, options: dict[str, object], message: str
) -> None:
    lists = make([(4,), (2, 3)])
    options, before = dict(options), [average.clone() for average in lists.averages]
    averages = list(lists.averages)
    if change is not None:
        change(lists)
    lists.remaining = options.pop("remaining", lists.remaining)
    with pytest.raises(CitFastError, match=message) as caught:
        lists.run(**options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(x, y) for x, y in zip(averages, before, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: balance_weights(torch.zeros(2, 2)), r"norms must be float64 of shape \[tensors, 3\], not torch.fl"),
        (lambda x: balance_weights(torch.zeros(1, 3).double(), rule="x"), "balance_weights: rule='x'"),
        (
            lambda x: flush_balance_ema_(x[0], x[1], torch.zeros(2)),
            r"alphas must be contiguous float32 of shape \(1,\) on cpu, not torch.float32 of shape \(2,\)",
        ),
        (lambda x: flush_balance_ema_(x[0], x[1], torch.zeros(1, dtype=torch.float64)), "not torch.float64"),
    ],
)  # fmt: skip
def test_bad_input_of_the_parts(call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(CitFastError, match=message):
        call([[torch.ones(2, 3)]] * 4)


def test_a_tensor_that_is_written_must_not_be_listed_twice(make: Make) -> None:
    """Tied weights: threads would write the same memory, and the update would be applied twice."""
    lists = make([(4,)] * 3)
    lists.params[2] = lists.params[0]  # only read
    lists.run()
    before = lists.averages[2] = lists.averages[1]
    copy_before = before.clone()
    with pytest.raises(CitFastError, match=r"averages\[2\] is the very tensor averages\[1\], and would be"):
        lists.run()
    assert torch.equal(before, copy_before)


def test_expanded_tensors_may_be_read(make: Make) -> None:
    lists = make([(4, 3)])
    lists.grads[0], lists.previous_grads[0] = torch.ones(3).expand(4, 3), torch.full((1, 1), 3.0).expand(4, 3)
    assert lists.run(store_grads=False).norms[0, 1:].tolist() == [12.0, 24.0]


def test_native_table_with_wrong_columns() -> None:
    with pytest.raises(ValueError, match="rows of 9 integers"):
        _native.flush_balance_ema([[1], [2], [3]], nearest=False, seed=0, threads=1, alphas=0)
    with pytest.raises(ValueError, match="columns of one length"):
        _native.flush_balance_ema([[1, 2], [3]], nearest=False, seed=0, threads=1, alphas=0)
    with pytest.raises(ValueError, match="simd level=mmx: unknown"):
        _native.set_simd_level("mmx")


def test_docstring_examples() -> None:
    result = doctest.testmod(ops.balance_ema)
    assert result.attempted >= 5
    assert result.failed == 0
