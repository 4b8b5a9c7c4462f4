"""What a kernel of the Wasserstein distances must get right on a device before it serves there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import torch

from cit_fast.ops.self_check.battery import Bound, Case, Implementation, Results
from cit_fast.ops.wasserstein.reference import METRICS, TransportOptions

OPS = ("wasserstein_matrix",)
DTYPES = ("float32",)  # costs are made in float64 of whatever points there are
MUCH = 64

SIZES = (1, 2, 20, 33, 100, 130, 300, 700)  # every tier: one program, a team of several blocks, strips of rows
INTERPRETED = (1, 2, 5)

# Of two plans that both stopped at 1e-6 of the mass; at distances up to ten times the mean.
AGREEMENT = Bound(2e-5, 2e-5)


def cases(op: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """See :class:`cit_fast.ops.self_check.battery.Battery`."""
    on_a_gpu = device.type == "cuda"
    for metric in METRICS if on_a_gpu else METRICS[:1]:
        yield _case(SIZES if on_a_gpu else INTERPRETED, _options(metric, device), dtype, device)


def _options(metric: str, device: torch.device) -> TransportOptions:
    iterations = 1000 if device.type == "cuda" else 10  # of the interpreter
    return TransportOptions(metric, 1.0, "sinkhorn", None, 1e-6, iterations, 0.0)


def _case(sizes: tuple[int, ...], options: TransportOptions, dtype: torch.dtype, device: torch.device) -> Case:
    tensors = _packed(sizes, 16, dtype, device)

    def call(run: Implementation, exact: bool) -> Results:
        points, *rest = (each.cpu() for each in tensors) if exact else tensors
        distances, lower, upper, *_ = run(points.double() if exact else points, *rest, options)
        return {"distances": distances, "lower": lower, "upper": upper}

    return Case(
        f"clouds of {', '.join(map(str, sizes))}, {options.metric}",
        call,
        dict.fromkeys(("distances", "lower", "upper"), AGREEMENT),
    )


def _packed(sizes: tuple[int, ...], d: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Points, offsets, weights and all pairs of clusters around different centres."""
    generator = torch.Generator().manual_seed(0)
    points = torch.cat(
        [torch.randn(n, d, generator=generator) + 2 * torch.randn(1, d, generator=generator) for n in sizes]
    )
    weights = torch.rand(len(points), generator=generator) + 0.1
    offsets = torch.tensor([0, *accumulate(sizes)])
    pairs = torch.triu_indices(len(sizes), len(sizes), offset=1).T.contiguous()
    return points.to(device, dtype), offsets.to(device), weights.to(device), pairs


def work(op: str, dtype: torch.dtype, device: torch.device, size: str) -> Callable[[Implementation], object]:
    """``little``: 6 pairs; ``much``: 1,225 pairs of clouds of 100."""
    count, points = (4, 100) if size == "little" else (50, 100)
    if device.type == "cpu":
        count, points = (2, 3) if size == "little" else (3, 3)
    tensors = _packed((points,) * count, 384, dtype, device)
    return lambda run: run(*tensors, _options("cosine", device))
