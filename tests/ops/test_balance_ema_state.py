"""bfloat16 averages and moments: stochastic rounding, the same on every backend, and what it is for."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cit_fast import backend
from cit_fast.errors import BackendError
from cit_fast.ops import balance_ema_, flush_balance_ema_
from cit_fast.ops.balance_ema.reference import stochastic_bfloat16

ADAMW = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SIGMAS = 5  # one in a million by chance, and the draws are fixed

Make = Callable[..., Any]


def word(x: int) -> int:
    return x & 0xFFFFFFFF


def mix(x: int) -> int:
    x = word(0x7FEB352D * (x ^ (x >> 16)))
    x = word(0x846CA68B * (x ^ (x >> 15)))
    return x ^ (x >> 16)


def round_one(bits: int, index: int, seed: int, tensor: int, stream: int) -> int:
    """The rounding of one finite number, as integers."""
    key = mix(word(seed) ^ mix(3 * tensor + stream + 1))
    rounded = (bits + (mix(index ^ key) >> 16)) >> 16
    return bits >> 16 if rounded & 0x7F80 == 0x7F80 else rounded


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    seed=st.integers(-(2**40), 2**40),
    tensor=st.integers(0, 10_000),
    stream=st.integers(0, 2),
)
def test_the_definition_in_integers(values: list[float], seed: int, tensor: int, stream: int) -> None:
    floats = torch.tensor(values)
    bits = [word(each) for each in floats.view(torch.int32).tolist()]
    rounded = stochastic_bfloat16(floats, seed, tensor, stream)
    expected = [round_one(each, i, seed, tensor, stream) for i, each in enumerate(bits)]
    assert [each & 0xFFFF for each in rounded.view(torch.int16).tolist()] == expected
    # One of the two neighbours, and what a bfloat16 can hold stays.
    down = floats.view(torch.int32).bitwise_and(-65536).view(torch.float32)
    assert ((rounded.float() - floats).abs() <= (down * 2**-7).abs() + 2.0**-133).all()
    assert torch.equal(stochastic_bfloat16(down, seed, tensor, stream).float(), down)
    assert rounded.isfinite().all()


@pytest.mark.parametrize("value", [1 / 3, -1 / 3, 1e-30, 3e38, 1 + 2**-8, 1 + 2**-15])
def test_is_right_in_the_mean(value: float) -> None:
    exact = torch.tensor(value).double().item()
    draws = stochastic_bfloat16(torch.full((200_000,), value), seed=1, tensor=2, stream=0).double()
    step = 2.0 ** (math.floor(math.log2(abs(exact))) - 7)
    assert 0 < draws.unique().numel() <= 2
    assert abs(draws.mean().item() - exact) <= SIGMAS * step / 2 / math.sqrt(draws.numel())


def test_draws_are_independent() -> None:
    """Of neighbours, seeds, tensors and streams: as many agreements as by chance."""
    values = torch.full((100_000,), 1 + 2**-8)  # up or down with probability 1/2
    variants = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2), (1, 0, 1), (2**31, 0, 0)]
    draws = [stochastic_bfloat16(values, *variant).float() > 1 for variant in variants]
    bound = SIGMAS * math.sqrt(len(values)) / 2
    for i, one in enumerate(draws):
        for other in [*draws[:i], one.roll(1), one.roll(2), one.roll(64)]:
            assert abs((one == other).sum().item() - len(values) / 2) < bound


def test_what_is_not_finite_or_nearly_so() -> None:
    inf, nan = float("inf"), float("nan")
    largest = torch.finfo(torch.float32).max
    # The smallest, that with every bit set and its negative: a carry would run past the sign.
    other_nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([torch.tensor([inf, -inf, nan, largest, -largest, 0.0, -0.0]), other_nans]).repeat(500)
    rounded = stochastic_bfloat16(values, 0, 0, 0).view(500, -1)
    assert (rounded[:, 0] == inf).all()
    assert (rounded[:, 1] == -inf).all()
    assert rounded[:, [2, 7, 8, 9]].isnan().all()
    limit = torch.finfo(torch.bfloat16).max
    assert (rounded[:, 3] == limit).all()
    assert (rounded[:, 4] == -limit).all()
    assert (rounded[:, 5:7].view(torch.int16) == torch.tensor([0, -0x8000], dtype=torch.int16)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_state_has_the_bits_of_the_reference(make: Make, moments: Make, simd: str, dtype: torch.dtype) -> None:
    native = moments(make(None, dtype), torch.bfloat16)
    native.exp_avgs[3::2] = [t.float() for t in native.exp_avgs[3::2]]  # a dtype of its own for every tensor
    native.lists.averages[2::3] = [t.float() for t in native.lists.averages[2::3]]
    native.alphas.fill_(0.375)
    expected = native.copy()
    for state, name in ((native, "native"), (expected, "reference")):
        with backend(name):
            state.lists.grads[6][7] = float("nan")
            state.step(3, **ADAMW, seed=77)
            state.alphas.fill_(0.125)
            state.flush(seed=78)
    for mine, theirs in zip(
        native.exp_avgs + native.exp_avg_sqs, expected.exp_avgs + expected.exp_avg_sqs, strict=True
    ):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(native.lists.averages, expected.lists.averages, strict=True):
        # The parameter may differ in its last place, and with it the average now and then.
        assert (mine != theirs).sum() <= 1 + mine.numel() // 1000
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=2**-20)


def test_finite_and_not_finite_state_natively(simd: str) -> None:
    inf, nan = float("inf"), float("nan")
    every_bit = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([torch.tensor([1 / 3, 3.39e38, -3.39e38, inf, -inf, nan, 1e-40, -0.0]), every_bit]).repeat(40)
    average = torch.zeros(values.shape, dtype=torch.bfloat16)
    with backend("native"):  # alpha 1 from 0: the average becomes the value
        flush_balance_ema_([values], [average], torch.ones(1), seed=5)
    expected = stochastic_bfloat16(values - 0.0 + 0.0, 5, 0, 0)
    assert torch.equal(average.isnan(), expected.isnan())
    assert torch.equal(average[~average.isnan()], expected[~expected.isnan()])


def test_norms_are_those_of_the_stored_average(make: Make, moments: Make, forced: str) -> None:
    state = moments(make([(4000,)]), torch.bfloat16)
    state.alphas.fill_(0.3)
    weights = state.step(1, **ADAMW, seed=1)
    distance = (state.lists.params[0].double() - state.lists.averages[0].double()).abs().sum()
    torch.testing.assert_close(weights.norms[0, 0], distance, rtol=2**-20, atol=0)


def test_same_seed_same_bits(make: Make, forced: str, with_threads: Callable[[int], None]) -> None:
    def averages(seed: int) -> list[torch.Tensor]:
        lists = make([(40_000,), (300, 20)])
        lists.averages = [average.bfloat16() for average in lists.averages]
        lists.run(seed=seed)
        return lists.averages

    one = averages(9)
    with_threads(3)
    for seed, same in ((9, True), (9 + 2**32, True), (9 - 2**32, True), (10, False), (-9, False)):
        assert all(torch.equal(x, y) == same for x, y in zip(one, averages(seed), strict=True))


def test_a_small_weight_does_not_stall(simd: str) -> None:
    """Rounding to nearest stops where the update is below half a last place; stochastic rounding follows."""
    alpha, steps, size = 2**-10, 2500, 4000
    param = torch.ones(size)
    average, nearest = (torch.zeros(size, dtype=torch.bfloat16) for _ in range(2))
    for step in range(steps):
        balance_ema_([param], [average], [param], [], rule="fixed", decay=1 - alpha, seed=step)
        nearest[:1] = nearest[:1].float().lerp(param[:1], alpha).bfloat16()
    expected = 1 - (1 - alpha) ** steps
    assert expected > 0.9
    assert nearest[0] < 0.51
    # A step adds noise of at most half a place of bfloat16, 2^-8 below 1, of which (1 - alpha) stays at each later one.
    deviation = 2**-8 / 2 / math.sqrt(1 - (1 - alpha) ** 2)
    assert abs(average.double().mean().item() - expected) < SIGMAS * deviation / math.sqrt(size)
    assert average.double().std().item() < 1.2 * deviation


def test_training_with_bfloat16_state_follows_float32(make: Make, moments: Make) -> None:
    """On a quadratic: the loss falls as with float32 state; moments with a decay of 0.999 do not stall."""
    losses, second_moments = [], []
    for dtype in (torch.float32, torch.bfloat16):
        state = moments(make([(50, 40)], seed=11), dtype)
        target = make([(50, 40)], seed=12).params[0]
        noise = torch.Generator().manual_seed(0)
        history = []
        for step in range(1, 401):
            error = state.lists.params[0] - target
            history.append(error.square().mean().item())
            state.lists.grads = [error + 0.5 * torch.randn(error.shape, generator=noise)]
            state.step(step, lr=0.02, betas=(0.9, 0.999), weight_decay=0.0, seed=step)
        losses.append(history)
        second_moments.append(state.exp_avg_sqs[0].double().mean().item())
    assert losses[0][-1] < 0.05 * losses[0][0]
    assert all(later < earlier for earlier, later in pairwise(losses[1][:200:20]))
    assert abs(losses[1][-1] - losses[0][-1]) < 0.1 * losses[0][-1]
    assert abs(second_moments[1] / second_moments[0] - 1) < 0.01


def test_not_contiguous_tensors_go_to_the_reference(make: Make) -> None:
    plain = make([(20, 30)])
    plain.averages[0] = plain.averages[0].bfloat16()
    turned = plain.copy()
    for name in ("params", "averages", "grads", "previous_grads"):
        getattr(turned, name)[0] = getattr(turned, name)[0].t().contiguous().t()
    with backend("native"), pytest.raises(BackendError, match="not contiguous, which bfloat16 state"):
        turned.run()
    turned.run(rule="fixed", seed=2)
    plain.run(rule="fixed", seed=2)
    assert torch.equal(turned.averages[0], plain.averages[0])


def test_float16_averages_are_rounded_to_nearest(make: Make) -> None:
    lists = make([(100,)])
    lists.averages[0] = lists.averages[0].half()
    expected = lists.averages[0].float().lerp(lists.params[0], 0.25).half()
    lists.run(rule="fixed", decay=0.75)
    torch.testing.assert_close(lists.averages[0], expected, rtol=2**-10, atol=0)
