"""A small model and a training loop for tests of optimizers."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Four parameters, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: range, scheduler: Any = None) -> None:
    """One step for each number, on the batch of that number; the gradients are large enough to decide the weights."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        model.zero_grad()
        (1000 * model(batch(step, dtype)).float().square().mean()).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def averages(optimizer: Any) -> list[Tensor]:
    """The averages, in the order of the parameters; those that an optimizer still owes are worked out first."""
    getattr(optimizer, "flush", lambda: None)()
    return [optimizer.state[p]["average"].clone() for group in optimizer.param_groups for p in group["params"]]


def values(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    """Whether two lists have the same bits."""
    return len(xs) == len(ys) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
