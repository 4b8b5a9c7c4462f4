"""The default dtype of torch is the user's, and changes nothing of an op on tensors that have dtypes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from cit_fast import ops


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def other_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    default = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(default)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def gains() -> list[Tensor]:
    full, masked, weight = drawn(7, 16, seed=0), drawn(7, 16, seed=1), drawn(33, 16, seed=2)
    return list(ops.token_gain(full, masked, weight, torch.arange(7)))


def losses() -> list[Tensor]:
    live, frozen = drawn(7, 16, seed=0).requires_grad_(), drawn(7, 16, seed=1)
    head, bias = drawn(33, 16, seed=2).requires_grad_(), drawn(33, seed=3).requires_grad_()
    one = torch.ones(7, dtype=torch.float32)
    loss = ops.linear_cross_entropy(live, head, torch.arange(7), bias=bias)
    loss = loss + ops.masked_jsd(live, frozen, head, head, 1.5 * one, one, bias_live=bias, bias_frozen=bias)
    loss.backward()
    return [loss.detach(), *(each.grad for each in (live, head, bias) if each.grad is not None)]


def distances() -> list[Tensor]:
    found = ops.wasserstein_matrix([drawn(5, 8, seed=0), drawn(6, 8, seed=1)])
    return [found.distances]


def update() -> list[Tensor]:
    out = drawn(4, 6, seed=0)
    return [ops.lora_linear(out, drawn(5, 6, seed=1), drawn(2, 6, seed=2), drawn(5, 2, seed=3), scaling=0.5)]


@pytest.mark.parametrize("op", [gains, losses, distances, update])
def test_the_default_dtype_changes_nothing(op: Callable[[], list[Tensor]], other_default: Callable[[], None]) -> None:
    expected = op()
    other_default()
    found = op()
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert all(map(torch.equal, found, expected))
