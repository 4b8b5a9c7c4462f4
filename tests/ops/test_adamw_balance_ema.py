"""AdamW and the balance-weight EMA in one sweep: against both in turn, the definition, and with bad gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cit_fast import _native, backend
from cit_fast.errors import CitFastError
from cit_fast.ops import BALANCE_RULES, balance_weights

NORM_RTOL = 1024 * 2**-24  # float32 sums of at most 1024 positive values per lane
WEIGHT_RTOL = 3 * NORM_RTOL
# A parameter is stored rounded: half a last place of its dtype, and AdamW's own float32 arithmetic below it.
PARAM_RTOL = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Native and reference do the same float32 operations in the same order, but torch's square root may be one last place
# off: that of sqrt(v) in the update.
UPDATE_RTOL = 2 * 2**-23
ADAMW = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}

Make = Callable[..., Any]


def tensors_of(state: Any) -> list[Tensor]:
    x = state.lists
    return [*x.params, *x.averages, *x.previous_grads, *state.exp_avgs, *state.exp_avg_sqs, state.alphas]


@pytest.fixture
def run(make: Make, moments: Make) -> Make:
    """Some steps and a flush: (state, [(alphas, fallbacks) of each step])."""

    def run_steps(
        dtype: torch.dtype = torch.float32,
        steps: int = 4,
        shapes: list[tuple[int, ...]] | None = None,
        **options: object,
    ) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        state = moments(make(shapes, dtype, seed=5))
        history = []
        for step in range(1, steps + 1):
            state.lists.grads = make(shapes, dtype, seed=100 + step).grads
            weights = state.step(step, **ADAMW, **options)
            assert weights.alphas is state.alphas
            history.append((weights.alphas.clone(), weights.fallbacks))
        state.flush()
        assert not state.alphas.any()
        return state, history

    return run_steps


@pytest.mark.parametrize("rule", BALANCE_RULES)
def test_is_torch_adamw_followed_by_balance_ema(make: Make, run: Make, forced: str, rule: str) -> None:
    state, history = run(rule=rule)
    lists = make(seed=5)
    params = [torch.nn.Parameter(p) for p in lists.params]
    optimizer = torch.optim.AdamW(params, **ADAMW, fused=True)
    for step in range(1, 5):
        for param, grad in zip(params, make(seed=100 + step).grads, strict=True):
            param.grad = grad
        optimizer.step()
        lists.params, lists.grads = [p.detach() for p in params], [p.grad for p in params]
        weights = lists.run(rule=rule)
        alphas, fallbacks = history[step - 1]
        torch.testing.assert_close(weights.alphas, alphas, rtol=2 * WEIGHT_RTOL, atol=0)
        assert torch.equal(weights.fallbacks, fallbacks)
    for mine, theirs in zip(state.lists.params, params, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=PARAM_RTOL[torch.float32], atol=1e-6)
    torch.testing.assert_close(state.lists.averages, lists.averages, rtol=2**-20, atol=1e-6)
    for i, param in enumerate(params):
        if param.numel():
            torch.testing.assert_close(state.exp_avgs[i], optimizer.state[param]["exp_avg"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state.exp_avg_sqs[i], optimizer.state[param]["exp_avg_sq"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", list(PARAM_RTOL), ids=str)
def test_one_native_step_is_the_definition(make: Make, moments: Make, simd: str, dtype: torch.dtype) -> None:
    native = moments(make(None, dtype))
    for k, moment in enumerate((native.exp_avgs, native.exp_avg_sqs)):
        for tensor, other in zip(moment, make(seed=40 + k).params, strict=True):
            tensor.copy_(other.abs())
    native.alphas.uniform_(generator=torch.Generator().manual_seed(1))
    native.alphas[1::5] = 0
    expected = native.copy()
    with backend("native"):
        weights = native.step(7, **ADAMW)
    with backend("reference"):
        expected_weights = expected.step(7, **ADAMW)
    others = slice(len(native.lists.params), -1)  # all but parameters and weights
    for mine, theirs in zip(tensors_of(native)[others], tensors_of(expected)[others], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(native.lists.params, expected.lists.params, strict=True):
        rtol = UPDATE_RTOL if dtype == torch.float32 else PARAM_RTOL[dtype]
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=UPDATE_RTOL)
    # A bfloat16 parameter that rounds the other way shifts its norm by one of its last places.
    torch.testing.assert_close(weights.norms, expected_weights.norms, rtol=2 * NORM_RTOL, atol=PARAM_RTOL[dtype])
    torch.testing.assert_close(native.alphas, expected.alphas, rtol=2 * WEIGHT_RTOL, atol=PARAM_RTOL[dtype] ** 2)
    assert torch.equal(weights.fallbacks, expected_weights.fallbacks)
    assert torch.equal(balance_weights(weights.norms).alphas, native.alphas)


@pytest.mark.parametrize("rule", BALANCE_RULES)
@pytest.mark.parametrize("dtype", list(PARAM_RTOL), ids=str)
def test_native_steps_follow_the_reference(run: Make, simd: str, dtype: torch.dtype, rule: str) -> None:
    shapes = [(1,), (0,), (1030,), (16385,)]
    with backend("native"):
        native, native_history = run(dtype, 2, shapes, rule=rule)
    with backend("reference"):
        expected, expected_history = run(dtype, 2, shapes, rule=rule)
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


def test_bits_do_not_depend_on_threads_or_simd(run: Make, simd: str, with_threads: Callable[[int], None]) -> None:
    one = tensors_of(run(steps=2, rule="paper")[0])
    _native.set_simd_level("")
    with_threads(3)
    three = tensors_of(run(steps=2, rule="paper")[0])
    assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))


def test_gradients_that_the_caller_keeps_are_not_stored(make: Make, moments: Make, forced: str) -> None:
    stored = moments(make())
    kept = stored.copy()
    before = [previous.clone() for previous in kept.lists.previous_grads]
    stored.step(1, **ADAMW)
    kept.step(1, **ADAMW, store_grads=False)
    assert all(torch.equal(x, y) for x, y in zip(kept.lists.previous_grads, before, strict=True))
    kept.lists.previous_grads = [grad.clone() for grad in kept.lists.grads]
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(kept), tensors_of(stored), strict=True))


def test_fixed_without_previous_gradients(make: Make, moments: Make, forced: str) -> None:
    state = moments(make([(100,), (20_000,)]))
    state.lists.previous_grads = []
    weights = state.step(1, lr=0.1, rule="fixed", decay=0.5)
    assert weights.alphas.tolist() == [0.5, 0.5]
    assert not weights.norms[:, 2].any()


@pytest.mark.parametrize("dtype", list(PARAM_RTOL), ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_element_with_a_bad_gradient_keeps_its_values(
    make: Make, moments: Make, simd: str, dtype: torch.dtype, value: float
) -> None:
    results = []
    for name in ("native", "reference"):
        state = moments(make([(100,), (100,), (3, 2000)], dtype))
        with backend(name):
            state.step(1, **ADAMW)
            before = state.copy()
            bad = [torch.tensor([5, 97]), torch.tensor([]).long(), torch.tensor([4321, 5999])]
            for grad, where in zip(state.lists.grads, bad, strict=True):
                grad.view(-1)[where] = value
            weights = state.step(2, **ADAMW)
        assert (weights.alphas == 0).tolist() == [True, False, True]
        for i, where in enumerate(bad):
            untouched = torch.zeros(state.lists.params[i].numel(), dtype=torch.bool)
            untouched[where] = True
            for old, new in (
                (before.lists.params[i], state.lists.params[i]),
                (before.exp_avgs[i], state.exp_avgs[i]),
                (before.exp_avg_sqs[i], state.exp_avg_sqs[i]),
            ):
                assert new.isfinite().all()
                assert torch.equal((old == new).view(-1)[untouched], torch.ones(len(where), dtype=torch.bool))
                # A 16-bit parameter may round back to what it was; moments never do.
                if old.dtype == torch.float32:
                    assert not (old == new).view(-1)[~untouched].any()
            # The pending update belongs to the step before, which was good.
            assert (state.lists.averages[i] != before.lists.averages[i]).all()
        results.append(state)
    assert all(torch.equal(x, y) for x, y in zip(results[0].exp_avg_sqs, results[1].exp_avg_sqs, strict=True))


def test_a_bad_gradient_never_reaches_the_average(make: Make, moments: Make, forced: str) -> None:
    state = moments(make([(100,), (100,)]))
    before = state.lists.copy()
    state.lists.grads[0][5] = float("nan")
    weights = state.step(1, lr=0.1)
    assert weights.alphas[0] == 0
    assert weights.alphas[1] > 0
    state.step(2, lr=0.1)
    state.flush()
    assert torch.equal(state.lists.averages[0], before.averages[0])
    assert state.lists.averages[1].isfinite().all()


def test_tied_parameters_are_refused(make: Make, moments: Make) -> None:
    state = moments(make([(4,), (4,)]))
    state.lists.params[1] = state.lists.params[0]
    before = state.copy()
    with pytest.raises(CitFastError, match=r"params\[1\] is the very tensor params\[0\], and would be updated twice"):
        state.step(1, lr=0.1)
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(state), tensors_of(before), strict=True))


def test_a_step_count_kept_as_a_float(make: Make, moments: Make, forced: str) -> None:
    state = moments(make([(10,)]))
    other = state.copy()
    state.step(3, lr=0.1)
    other.step(torch.tensor(3.0), lr=0.1)  # as torch.optim keeps it
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(state), tensors_of(other), strict=True))


@pytest.mark.parametrize("size", [5, 19])
def test_eps_zero_on_odd_lengths(make: Make, moments: Make, forced: str, size: int) -> None:
    state = moments(make([(size,)]))
    assert state.step(1, lr=0.1, eps=0.0).alphas.item() > 0
    assert state.lists.params[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, "adamw_balance_ema_: step=0 must be a whole number, 1 for the first step"),
        ({"step": 1.5}, "step=1.5 must be a whole number"),
        ({"lr": -0.1}, "lr=-0.1 must be finite and not negative"),
        ({"eps": float("inf")}, "eps=inf"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas=\(0.9, 0.99, 0.999\) must be two numbers"),
        ({"rule": "mean"}, "adamw_balance_ema_: rule='mean'"),
    ],
)
def test_bad_options(make: Make, moments: Make, options: dict[str, Any], message: str) -> None:
    state = moments(make([(2, 3)]))
    before = state.copy()
    with pytest.raises(CitFastError, match=message) as caught:
        state.step(**{"step": 1, "lr": 0.1, **options})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(state), tensors_of(before), strict=True))
