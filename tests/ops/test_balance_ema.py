"""The balance-weight EMA ops against their definition in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cit_fast import _native, backend, reference
from cit_fast.errors import BackendError, CitFastError
from cit_fast.ops import BALANCE_RULES, adamw_balance_ema_, balance_ema_, flush_balance_ema_

# Sums run in float32 over at most 1024 values per lane, all positive: relative error of a norm below 1024 * 2^-24 at
# worst, of the weight below three times that. The average is then one multiply-add in float32 away from exact.
WEIGHT_RTOL = 3 * 1024 * 2**-24
AVERAGE_ULP = 4 * 2**-24
# A parameter is stored rounded: half a last place of its dtype, and AdamW's own float32 arithmetic below it.
PARAM_RTOL = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(PARAM_RTOL)

SHAPES = [(1,), (0,), (3, 5), (16,), (1023,), (1025,), (4, 4, 17), (16384,), (16385,), (0, 7), (300, 500)]


@dataclass
class Lists:
    """The tensors of one call."""

    params: list[Tensor]
    averages: list[Tensor]
    grads: list[Tensor]
    previous_grads: list[Tensor]

    def copy(self, dtype: torch.dtype | None = None) -> Lists:
        return Lists(*([(t.to(dtype) if dtype else t).clone() for t in getattr(self, f.name)] for f in fields(self)))

    def run(self, **options: object):
        return balance_ema_(self.params, self.averages, self.grads, self.previous_grads, **options)

    def run_reference(self, rule: str = "released", decay: float = 0.99, fallback: float = 0.01):
        return reference.balance_ema_(
            self.params, self.averages, self.grads, self.previous_grads, rule, decay, fallback
        )


def make(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    seed: int = 0,
    in_range: bool = True,
) -> Lists:
    """Random tensors; ``in_range`` scales the distance so that every rule gives a usable weight (if not empty)."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    params = [random(shape).to(dtype) for shape in shapes]
    grads = [random(shape).to(grad_dtype or dtype) for shape in shapes]
    previous = [(grad.float() + random(grad.shape)).to(grad.dtype) for grad in grads]
    # With a = 6 (1 + b) / c: released gives 1/3, paper 5/6.
    averages = []
    for param, grad, before in zip(params, grads, previous, strict=True):
        offset = random(param.shape).sign()
        if in_range and param.numel():
            b, c = grad.double().abs().sum(), (grad.double() - before.double()).abs().sum()
            offset *= (6 * (1 + b) / c / param.numel()).item()
        averages.append(param.float() + offset)
    return Lists(params, averages, grads, previous)


def assert_close_to_exact(got: Lists, weights, exact: Lists, exact_weights) -> None:
    torch.testing.assert_close(
        weights.alphas.double(), exact_weights.alphas.double(), rtol=WEIGHT_RTOL, atol=0, equal_nan=False
    )
    assert torch.equal(weights.fallbacks, exact_weights.fallbacks)
    for e, expected, p in zip(got.averages, exact.averages, got.params, strict=True):
        if e.numel():
            scale = expected.abs() + p.double().abs()
            error = ((e.double() - expected).abs() / scale).max().item()
            assert error <= AVERAGE_ULP + WEIGHT_RTOL
    for previous, grad in zip(got.previous_grads, got.grads, strict=True):
        assert torch.equal(previous, grad.to(previous.dtype))


@pytest.fixture(params=_native.simd_levels())
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_simd_level(request.param)
    yield request.param
    _native.set_simd_level("")


@pytest.fixture(params=["native", "reference"])
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend(request.param):
        yield request.param


@pytest.mark.parametrize("rule", BALANCE_RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(forced: str, dtype: torch.dtype, rule: str) -> None:
    lists = make(SHAPES, dtype)
    exact = lists.copy(torch.float64)
    exact_weights = exact.run_reference(rule)
    weights = lists.run(rule=rule)
    assert weights.alphas.dtype == torch.float32
    assert_close_to_exact(lists, weights, exact, exact_weights)
    has_elements = torch.tensor([param.numel() > 0 for param in lists.params])
    assert torch.equal(weights.fallbacks, torch.zeros_like(has_elements) if rule == "fixed" else ~has_elements)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_every_simd_level_gives_the_same_bits(simd: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    lists = make(SHAPES, dtype, grad_dtype, seed=1)
    for previous in lists.previous_grads[::2]:
        previous.data = previous.float()  # a dtype of its own
    best, exact = lists.copy(), lists.copy(torch.float64)
    exact_weights = exact.run_reference("paper")
    weights = lists.run(rule="paper")
    assert_close_to_exact(lists, weights, exact, exact_weights)
    _native.set_simd_level("")
    best_weights = best.run(rule="paper")
    assert torch.equal(weights.alphas, best_weights.alphas)
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
def test_bits_do_not_depend_on_the_number_of_threads(size: int) -> None:
    results = []
    for threads in (1, 2, 3, 7):
        lists = make([(size,), (5,), (size // 2 + 1,)], seed=2)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append((lists.run().alphas, *lists.averages))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_first_step_with_equal_gradients_falls_back(forced: str) -> None:
    lists = make([(10,)] * 2)
    lists.previous_grads = [grad.clone() for grad in lists.grads]
    weights = lists.copy().run(rule="released", fallback=0.125)
    assert weights.alphas.tolist() == [0.125, 0.125]
    assert weights.fallbacks.all()
    weights = lists.run(rule="paper", decay=0.75)
    assert weights.alphas.tolist() == [0.25, 0.25]


def test_the_two_rules_put_the_same_fraction_on_opposite_sides(forced: str) -> None:
    # a = 2, b = 3, c = 8: (1 + b) / (a c) = 1/4
    p, e, g, previous = ([torch.tensor([x, y])] for x, y in ((1.0, 1.0), (0.0, 0.0), (1.0, 2.0), (5.0, 6.0)))
    assert balance_ema_(p, copy.deepcopy(e), g, copy.deepcopy(previous), rule="released").alphas.item() == 0.5
    assert balance_ema_(p, copy.deepcopy(e), g, copy.deepcopy(previous), rule="paper").alphas.item() == 0.75
    assert balance_ema_(p, e, g, previous, rule="fixed", decay=0.875).alphas.item() == 0.125
    assert e[0].tolist() == [0.125, 0.125]


def test_weight_too_small_for_float32_is_not_zero(forced: str) -> None:
    # 2 (1 + 1e30) / (1e35 * 1e35) is 2e-40: usable, but below the smallest normal float32
    lists = Lists([torch.tensor([1e35])], [torch.zeros(1)], [torch.tensor([1e30])], [torch.tensor([1e35])])
    weights = lists.run()
    assert 0 < weights.alphas.item() < 1e-37
    assert not weights.fallbacks.item()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_magnitudes(forced: str, scale: float) -> None:
    lists = make([(5000,), (40_000,)], seed=3, in_range=False)
    lists = Lists(*([t * scale for t in getattr(lists, f.name)] for f in fields(lists)))
    exact = lists.copy(torch.float64)
    exact_weights = exact.run_reference()
    weights = lists.run()
    assert torch.isfinite(weights.alphas).all()
    assert torch.equal(weights.fallbacks, exact_weights.fallbacks)
    assert all(average.isfinite().all() for average in lists.averages)


@pytest.mark.parametrize("where", ["params", "grads"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", BALANCE_RULES)
def test_values_that_are_not_finite_never_reach_the_average(forced: str, where: str, value: float, rule: str) -> None:
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


def test_the_step_after_a_nan_gradient_falls_back(forced: str) -> None:
    lists = make([(50,)])
    lists.previous_grads[0][3] = float("nan")
    weights = lists.run()
    assert weights.fallbacks.tolist() == [True]
    assert weights.alphas.tolist() == [torch.tensor(0.01).item()]
    assert lists.previous_grads[0].isfinite().all()


def test_fixed_needs_no_previous_gradients(forced: str) -> None:
    lists = make([(50,), (200_000,)])
    e = [average.clone() for average in lists.averages]
    balance_ema_(lists.params, lists.averages, lists.grads, [], rule="fixed", decay=0.9)
    for p, before, after in zip(lists.params, e, lists.averages, strict=True):
        torch.testing.assert_close(after, before.lerp(p, 0.1))


def test_other_memory_orders() -> None:
    channels_last = make([(2, 3, 4, 5)])
    plain = channels_last.copy()
    for name in (f.name for f in fields(plain)):
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


def test_other_dtypes_go_to_the_reference() -> None:
    doubles = make([(30,)]).copy(torch.float64)
    weights = doubles.run()
    assert weights.alphas.dtype == torch.float32
    halves = make([(30,)]).copy(torch.bfloat16)
    assert halves.run().alphas.item() > 0
    with backend("native"), pytest.raises(BackendError, match=r"float32, not torch\.bfloat16"):
        halves.run()


def test_empty_lists() -> None:
    weights = balance_ema_([], [], [], [])
    assert weights.alphas.shape == weights.fallbacks.shape == (0,)
    assert adamw_balance_ema_([], [], [], [], [], [], torch.empty(0), step=1, lr=0.1).alphas.shape == (0,)
    flush_balance_ema_([], [], torch.empty(0))


@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    rule=st.sampled_from(BALANCE_RULES),
    decay=st.floats(0, 0.999),
    fallback=st.floats(0.001, 1),
    seed=st.integers(0, 1000),
    in_range=st.booleans(),
)
def test_properties(sizes: list[int], rule: str, decay: float, fallback: float, seed: int, in_range: bool) -> None:
    lists = make([(size,) for size in sizes], seed=seed, in_range=in_range)
    before, exact = lists.copy(), lists.copy(torch.float64)
    exact_weights = exact.run_reference(rule, decay, fallback)
    weights = lists.run(rule=rule, decay=decay, fallback=fallback)
    assert ((weights.alphas > 0) & (weights.alphas <= 1)).all()
    assert_close_to_exact(lists, weights, exact, exact_weights)
    for p, old, new in zip(lists.params, before.averages, lists.averages, strict=True):
        # The average moves towards the parameter, never past it (up to rounding).
        assert ((new - p).abs() <= (old - p).abs() * (1 + 1e-6) + 1e-6 * p.abs()).all()
    # Each tensor is treated alone: the order of the list does not matter.
    backwards = Lists(*(getattr(before, f.name)[::-1] for f in fields(before)))
    assert torch.equal(backwards.run(rule=rule, decay=decay, fallback=fallback).alphas.flip(0), weights.alphas)


# AdamW in the same sweep


@dataclass
class Moments:
    """The optimizer state of AdamW beside the tensors of the EMA."""

    lists: Lists
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    alphas: Tensor

    @staticmethod
    def zeros(lists: Lists) -> Moments:
        zeros = [[torch.zeros(p.shape) for p in lists.params] for _ in range(2)]
        return Moments(lists, zeros[0], zeros[1], torch.zeros(len(lists.params)))

    def step(self, step: int, **options: object):
        x = self.lists
        return adamw_balance_ema_(
            x.params, x.grads, self.exp_avgs, self.exp_avg_sqs, x.averages, x.previous_grads, self.alphas,
            step=step, **options,
        )  # fmt: skip


ADAMW = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def run_fused(dtype: torch.dtype, rule: str, steps: int = 4, shapes: list[tuple[int, ...]] = SHAPES):
    state = Moments.zeros(make(shapes, dtype, seed=5))
    history = []
    for step in range(1, steps + 1):
        state.lists.grads = make(shapes, dtype, seed=100 + step).grads
        weights = state.step(step, **ADAMW, rule=rule)
        assert weights.alphas is state.alphas
        history.append((weights.alphas.clone(), weights.fallbacks))
    flush_balance_ema_(state.lists.params, state.lists.averages, state.alphas)
    assert not state.alphas.any()
    return state, history


@pytest.mark.parametrize("rule", BALANCE_RULES)
def test_fused_adamw_is_torch_adamw_followed_by_balance_ema(forced: str, rule: str) -> None:
    state, history = run_fused(torch.float32, rule)
    lists = make(SHAPES, seed=5)
    params = [torch.nn.Parameter(p) for p in lists.params]
    optimizer = torch.optim.AdamW(params, **ADAMW, fused=True)
    for step in range(1, 5):
        for param, grad in zip(params, make(SHAPES, seed=100 + step).grads, strict=True):
            param.grad = grad
        optimizer.step()
        lists.params, lists.grads = [p.detach() for p in params], [p.grad for p in params]
        weights = lists.run(rule=rule)
        alphas, fallbacks = history[step - 1]
        torch.testing.assert_close(weights.alphas, alphas, rtol=WEIGHT_RTOL, atol=0)
        assert torch.equal(weights.fallbacks, fallbacks)
    for mine, theirs in zip(state.lists.params, params, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=PARAM_RTOL[torch.float32], atol=1e-6)
    torch.testing.assert_close(state.lists.averages, lists.averages, rtol=2**-20, atol=1e-6)
    for i, param in enumerate(params):
        if param.numel():
            torch.testing.assert_close(state.exp_avgs[i], optimizer.state[param]["exp_avg"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state.exp_avg_sqs[i], optimizer.state[param]["exp_avg_sq"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", BALANCE_RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_native_matches_the_reference(simd: str, dtype: torch.dtype, rule: str) -> None:
    shapes = [(1,), (0,), (1030,), (16385,)]
    with backend("native"):
        native, native_history = run_fused(dtype, rule, 2, shapes)
    with backend("reference"):
        expected, expected_history = run_fused(dtype, rule, 2, shapes)
    for (alphas, fallbacks), (expected_alphas, expected_fallbacks) in zip(
        native_history, expected_history, strict=True
    ):
        torch.testing.assert_close(alphas, expected_alphas, rtol=WEIGHT_RTOL, atol=0)
        assert torch.equal(fallbacks, expected_fallbacks)
    for mine, theirs in zip(native.lists.params, expected.lists.params, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=PARAM_RTOL[dtype], atol=1e-6)
    # An average follows its parameter, one rounding of the parameter's dtype away.
    torch.testing.assert_close(native.lists.averages, expected.lists.averages, rtol=PARAM_RTOL[dtype], atol=1e-4)
    for previous, grad in zip(native.lists.previous_grads, native.lists.grads, strict=True):
        assert torch.equal(previous, grad)


def test_fused_bits_do_not_depend_on_threads_or_simd(simd: str) -> None:
    def flat(state: Moments) -> Tensor:
        tensors = [*state.lists.params, *state.lists.averages, *state.exp_avgs, *state.exp_avg_sqs]
        return torch.cat([t.flatten() for t in tensors])

    one = flat(run_fused(torch.float32, "paper", 2)[0])
    _native.set_simd_level("")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = flat(run_fused(torch.float32, "paper", 2)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)


def test_fused_fixed_without_previous_gradients(forced: str) -> None:
    state = Moments.zeros(make([(100,), (20_000,)]))
    state.lists.previous_grads = []
    weights = state.step(1, lr=0.1, rule="fixed", decay=0.5)
    assert weights.alphas.tolist() == [0.5, 0.5]


def test_fused_leaves_out_what_is_not_finite(forced: str) -> None:
    state = Moments.zeros(make([(100,), (100,)]))
    before = state.lists.copy()
    state.lists.grads[0][5] = float("nan")
    weights = state.step(1, lr=0.1)
    assert weights.alphas[0] == 0
    assert weights.alphas[1] > 0
    state.step(2, lr=0.1)
    flush_balance_ema_(state.lists.params, state.lists.averages, state.alphas)
    assert torch.equal(state.lists.averages[0], before.averages[0])
    assert state.lists.averages[1].isfinite().all()


@pytest.mark.parametrize("size", [5, 19])
def test_fused_with_eps_zero_on_odd_lengths(forced: str, size: int) -> None:
    state = Moments.zeros(make([(size,)]))
    assert state.step(1, lr=0.1, eps=0.0).alphas.item() > 0
    assert state.lists.params[0].isfinite().all()


# torch.library


def sample_call() -> tuple[Lists, Moments]:
    lists = make([(3, 5), (1,), (0,), (70,)])
    return lists, Moments.zeros(make([(3, 5), (1,), (0,), (70,)]))


def test_opcheck() -> None:
    lists, state = sample_call()
    x = state.lists
    arguments = (lists.params, lists.averages, lists.grads, lists.previous_grads, "paper", 0.9, 0.1)
    torch.library.opcheck(torch.ops.cit_fast.balance_ema_.default, arguments)
    arguments = (
        x.params, x.grads, state.exp_avgs, state.exp_avg_sqs, x.averages, x.previous_grads, state.alphas,
        1, 0.1, 0.9, 0.99, 1e-8, 0.1, "released", 0.99, 0.01,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.cit_fast.adamw_balance_ema_.default, arguments)
    torch.library.opcheck(torch.ops.cit_fast.flush_balance_ema_.default, (x.params, x.averages, state.alphas))


def test_compiles_without_a_graph_break() -> None:
    def step(lists: Lists, state: Moments) -> tuple[Tensor, Tensor]:
        weights = balance_ema_(lists.params, lists.averages, lists.grads, lists.previous_grads, rule="paper")
        x = state.lists
        fused = adamw_balance_ema_(
            x.params, x.grads, state.exp_avgs, state.exp_avg_sqs, x.averages, x.previous_grads, state.alphas,
            step=1, lr=0.1,
        )  # fmt: skip
        flush_balance_ema_(x.params, x.averages, fused.alphas)
        return weights.alphas, fused.fallbacks

    eager, compiled = sample_call(), sample_call()
    expected = step(*eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(compiled[0].averages, eager[0].averages, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(compiled[1].lists.averages, eager[1].lists.averages, strict=True))


def test_parameters_that_require_gradients() -> None:
    lists = make([(10,)])
    lists.params = [torch.nn.Parameter(p) for p in lists.params]
    assert not lists.run().alphas.requires_grad
    state = Moments.zeros(lists)
    state.step(1, lr=0.1)
    assert lists.params[0].is_leaf


# Bad input


def _ema(change: Callable[[Lists], object] | None = None, **options: object) -> None:
    lists = make([(4,), (2, 3)])
    if change is not None:
        change(lists)
    lists.run(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _ema(rule="best"), r"balance_ema_: rule='best' is unknown; accepted: released, paper, fixed"),
        (lambda: _ema(decay=1.0), r"decay=1.0 must be in \[0, 1\)"),
        (lambda: _ema(decay=float("nan")), "decay=nan"),
        (lambda: _ema(fallback=0.0), r"fallback=0.0 must be in \(0, 1\]"),
        (lambda: _ema(lambda x: x.averages.pop()), "averages holds 1 tensors, params holds 2"),
        (lambda: _ema(lambda x: x.previous_grads.clear()), "previous_grads holds 0 tensors"),
        (lambda: _ema(lambda x: x.params.clear()), "averages holds 2 tensors, params holds 0"),
        (
            lambda: _ema(lambda x: x.grads.__setitem__(1, torch.ones(3, 2))),
            r"grads\[1\] has shape \(3, 2\), its parameter \(2, 3\)",
        ),
        (
            lambda: _ema(lambda x: x.params.__setitem__(0, torch.ones(4, dtype=torch.int32))),
            r"params\[0\] is torch.int32; accepted: float32",
        ),
        (
            lambda: _ema(lambda x: x.grads.__setitem__(0, torch.ones(4, device="meta"))),
            r"grads\[0\] is on meta, params\[0\] on cpu",
        ),
        (
            lambda: _ema(lambda x: x.grads.__setitem__(1, torch.ones(2, 3).to_sparse())),
            r"grads\[1\] has layout torch.sparse_coo",
        ),
        (lambda: Moments.zeros(make([(4,)])).step(0, lr=0.1), "adamw_balance_ema_: step=0 must be at least 1"),
        (lambda: Moments.zeros(make([(4,)])).step(1, lr=-0.1), "lr=-0.1 must be finite and not negative"),
        (lambda: Moments.zeros(make([(4,)])).step(1, lr=0.1, eps=float("inf")), "eps=inf"),
        (lambda: Moments.zeros(make([(4,)])).step(1, lr=0.1, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (
            lambda: flush_balance_ema_([torch.ones(2)], [torch.ones(2)], torch.zeros(2)),
            r"alphas must be contiguous float32 of shape \(1,\) on cpu, not torch.float32 of shape \(2,\)",
        ),
        (
            lambda: flush_balance_ema_([torch.ones(2)], [torch.ones(2)], torch.zeros(1, dtype=torch.float64)),
            "not torch.float64",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(call: Callable[[], None], message: str) -> None:
    with pytest.raises(CitFastError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_native_table_with_a_wrong_number_of_columns() -> None:
    with pytest.raises(ValueError, match="rows of 8 integers"):
        _native.flush_balance_ema([1, 2, 3], threads=1, alphas=0)
    with pytest.raises(ValueError, match="simd level=mmx: unknown"):
        _native.set_simd_level("mmx")


def test_docstring_example() -> None:
    import doctest

    from cit_fast.ops import balance_ema

    assert doctest.testmod(balance_ema).failed == 0
