"""Lists of random tensors for the tests of the balance-weight EMA, and the backends and instruction sets to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from cit_fast import _native, backend
from cit_fast.ops import adamw_balance_ema_, balance_ema_, flush_balance_ema_
from cit_fast.ops.balance_ema import reference

# Every kind of length: empty, shorter than a vector, around a vector, a conversion block and a chunk.
SHAPES = [(1,), (0,), (), (3, 5), (16,), (1023,), (1025,), (4, 4, 17), (16384,), (16385,), (0, 7), (7, 0), (300, 500),
          (2, 16390)]  # fmt: skip


@dataclass
class Lists:
    """The tensors of one call."""

    params: list[Tensor]
    averages: list[Tensor]
    grads: list[Tensor]
    previous_grads: list[Tensor]
    remaining: Tensor

    def copy(self, dtype: torch.dtype | None = None) -> Lists:
        lists = [
            [(t.to(dtype) if dtype else t).clone() for t in getattr(self, field.name)] for field in fields(self)[:4]
        ]
        return Lists(*lists, self.remaining.clone())

    def run(self, **options: object):
        lists = (self.params, self.averages, self.grads, self.previous_grads)
        return balance_ema_(*lists, remaining=self.remaining, **options)

    def run_reference(self, **options: Any):
        lists = (self.params, self.averages, self.grads, self.previous_grads)
        return reference.balance_ema_(*lists, self.remaining, reference.BalanceOptions(**options))


@dataclass
class Moments:
    """The optimizer state of AdamW beside the tensors of the EMA."""

    lists: Lists
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    alphas: Tensor

    def copy(self) -> Moments:
        moments = [[t.clone() for t in tensors] for tensors in (self.exp_avgs, self.exp_avg_sqs)]
        return Moments(self.lists.copy(), *moments, self.alphas.clone())

    def step(self, step: int, **options: object):
        x = self.lists
        return adamw_balance_ema_(
            x.params, x.grads, self.exp_avgs, self.exp_avg_sqs, x.averages, x.previous_grads, self.alphas,
            step=step, remaining=x.remaining, **options,
        )  # fmt: skip

    def flush(self, **options: object) -> None:
        flush_balance_ema_(self.lists.params, self.lists.averages, self.alphas, **options)


def make_lists(
    shapes: list[tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    seed: int = 0,
    in_range: bool = True,
) -> Lists:
    """Random tensors; ``in_range`` scales the distance so that every rule gives a usable weight (if not empty)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES if shapes is None else shapes

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    params = [random(shape).to(dtype) for shape in shapes]
    grads = [random(shape).to(grad_dtype or dtype) for shape in shapes]
    previous = [(grad.float() + random(grad.shape)).to(grad.dtype) for grad in grads]
    # With a = 6 (1 + b) / c and 5 left of the last step's distance: released gives 1/3, paper 5/6.
    averages = []
    for param, grad, before in zip(params, grads, previous, strict=True):
        offset = random(param.shape).sign()
        if in_range and param.numel():
            b, c = grad.double().abs().sum(), (grad.double() - before.double()).abs().sum()
            offset *= (6 * (1 + b) / c / param.numel()).item()
        averages.append(param.float() + offset)
    return Lists(params, averages, grads, previous, torch.full((len(params),), 5.0))


def make_moments(lists: Lists, state_dtype: torch.dtype = torch.float32) -> Moments:
    """AdamW's state before the first step; the averages become ``state_dtype`` too."""
    lists.averages = [average.to(state_dtype) for average in lists.averages]
    zeros = [[torch.zeros(p.shape, dtype=state_dtype) for p in lists.params] for _ in range(2)]
    return Moments(lists, zeros[0], zeros[1], torch.zeros(len(lists.params)))


@pytest.fixture
def make() -> Callable[..., Lists]:
    return make_lists


@pytest.fixture
def moments() -> Callable[..., Moments]:
    return make_moments


@pytest.fixture(params=_native.simd_levels())
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_simd_level(request.param)
    yield request.param
    _native.set_simd_level("")


@pytest.fixture(params=["native", "torch", "reference"])
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend(request.param):
        yield request.param


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
