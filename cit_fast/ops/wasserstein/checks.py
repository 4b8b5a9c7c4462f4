"""What ``wasserstein_matrix`` asks of its arguments, and its arguments in the one form that backends take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cit_fast.errors import ConfigError, DataError
from cit_fast.ops.wasserstein.reference import METHODS, METRICS, TransportOptions

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_options(options: TransportOptions) -> None:
    """Raise ConfigError for an option that is unknown or out of range."""
    metric, p, method, epsilon, tolerance, max_iterations, gap = options
    if metric not in METRICS:
        raise ConfigError(f"wasserstein_matrix: unknown metric {metric!r}; expected one of {', '.join(METRICS)}")
    if method not in METHODS:
        raise ConfigError(f"wasserstein_matrix: unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if not (p >= 1 and math.isfinite(p)):
        raise ConfigError(f"wasserstein_matrix: p is {p}; expected a number of at least 1")
    if epsilon is not None and not (epsilon > 0 and math.isfinite(epsilon)):
        raise ConfigError(f"wasserstein_matrix: epsilon is {epsilon}; expected a positive number or None")
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise ConfigError(f"wasserstein_matrix: tolerance is {tolerance}; expected a positive number")
    if max_iterations < 1:
        raise ConfigError(f"wasserstein_matrix: max_iterations is {max_iterations}; expected at least 1")
    if not 0 <= gap < 1:
        raise ConfigError(f"wasserstein_matrix: gap is {gap}; expected a number between 0 and 1, or None")


def packed_points(clouds: Sequence[Tensor] | Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Points [P, d] and offsets [N+1] of clouds in either form; DataError where shapes or dtypes do not fit."""
    if isinstance(clouds, Tensor):
        if offsets is None:
            raise DataError("wasserstein_matrix: packed points need offsets; or pass a list of [n_i, d] tensors")
        if offsets.dtype not in INDEX_DTYPES or offsets.dim() != 1 or offsets.shape[0] < 2:
            raise DataError(
                f"wasserstein_matrix: offsets is {list(offsets.shape)} {offsets.dtype}; "
                f"expected [clouds + 1] int32 or int64"
            )
        _check_points(clouds, "the packed points", "P", None)
        return clouds, offsets
    if offsets is not None:
        raise DataError("wasserstein_matrix: offsets belong to packed points; a list of clouds needs none")
    if len(clouds) == 0:
        raise DataError("wasserstein_matrix: no clouds; expected at least one")
    for index, cloud in enumerate(clouds):
        _check_points(cloud, f"cloud {index}", "n", clouds[0])
    sizes = torch.tensor([0] + [cloud.shape[0] for cloud in clouds])
    return torch.cat(list(clouds)), sizes.cumsum(0)


def _check_points(points: Tensor, name: str, rows: str, first: Tensor | None) -> None:
    if points.dtype not in FLOAT_DTYPES:
        raise DataError(f"wasserstein_matrix: {name} is {points.dtype}; expected float16, bfloat16, float32 or float64")
    if points.dim() != 2 or points.shape[1] == 0:
        raise DataError(f"wasserstein_matrix: {name} is {list(points.shape)}; expected [{rows}, d]")
    if first is not None and points.shape[1] != first.shape[1]:
        raise DataError(
            f"wasserstein_matrix: {name} has d = {points.shape[1]} and cloud 0 has d = {first.shape[1]}; "
            f"expected the same"
        )
    if first is not None and points.device != first.device:
        raise DataError(f"wasserstein_matrix: {name} is on {points.device} and cloud 0 on {first.device}; expected one")


def packed_weights(
    weights: Sequence[Tensor] | Tensor | None,
    points: Tensor,
    offsets: Tensor,
    clouds: Sequence[Tensor] | Tensor,
) -> Tensor:
    """Weights [P] on the device of the points; DataError where they do not fit the clouds."""
    if weights is None:
        return points.new_ones(points.shape[0], dtype=torch.float32)
    if not isinstance(weights, Tensor):
        if isinstance(clouds, Tensor) or len(weights) != len(clouds):
            raise DataError(
                f"wasserstein_matrix: {len(weights)} weight tensors for {offsets.shape[0] - 1} clouds; "
                f"expected one for each cloud of a list, or one packed tensor"
            )
        for index, (weight, cloud) in enumerate(zip(weights, clouds, strict=True)):
            if weight.shape != cloud.shape[:1]:
                raise DataError(
                    f"wasserstein_matrix: the weights of cloud {index} are {list(weight.shape)}; "
                    f"expected [{cloud.shape[0]}]"
                )
        weights = torch.cat(list(weights))
    if weights.shape != points.shape[:1] or weights.dtype not in FLOAT_DTYPES:
        raise DataError(
            f"wasserstein_matrix: the packed weights are {list(weights.shape)} {weights.dtype}; "
            f"expected [{points.shape[0]}], floating point"
        )
    return weights.to(points.device)


def pair_index(pairs: int | Sequence[tuple[int, int]] | Tensor | None, count: int) -> Tensor:
    """[M, 2] indices of clouds, on the CPU unless they were given elsewhere."""
    if pairs is None:
        return torch.triu_indices(count, count, offset=1).T.contiguous()
    if isinstance(pairs, int):
        others = torch.arange(count)
        return torch.stack([torch.full_like(others, pairs), others], dim=1)
    index = pairs if isinstance(pairs, Tensor) else torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    if index.dtype not in INDEX_DTYPES or index.dim() != 2 or index.shape[1] != 2:
        raise DataError(
            f"wasserstein_matrix: pairs is {list(index.shape)} {index.dtype}; expected [M, 2] int64 or an index"
        )
    return index


def check_values(points: Tensor, offsets: Tensor, weights: Tensor, pairs: Tensor, metric: str) -> None:
    """Raise DataError for values that no backend can work with; the message names the cloud."""
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != points.shape[0] or bounds != sorted(bounds):
        raise DataError(
            f"wasserstein_matrix: offsets runs from {bounds[0]} to {bounds[-1]}; "
            f"expected ascending numbers from 0 to {points.shape[0]}, the number of points"
        )
    count = len(bounds) - 1
    outside = ((pairs < 0) | (pairs >= count)).any(dim=1).nonzero()
    if len(outside):
        wrong = tuple(pairs[int(outside[0])].tolist())
        raise DataError(f"wasserstein_matrix: pair {wrong} is outside the {count} clouds")
    # One pass over all points first: clouds are many, and each question to a tensor costs microseconds.
    finite = points.isfinite().all(dim=1)
    zero = (points == 0).all(dim=1)
    for cloud, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            raise DataError(f"wasserstein_matrix: cloud {cloud} is empty; expected at least one point")
        if not finite[start:end].all():
            point = int((~finite[start:end]).nonzero()[0])
            raise DataError(f"wasserstein_matrix: cloud {cloud}, point {point} is not finite")
        weight = weights[start:end]
        if not weight.isfinite().all() or (weight < 0).any():
            raise DataError(
                f"wasserstein_matrix: cloud {cloud} has weights from {float(weight.min())} to {float(weight.max())}; "
                f"expected finite numbers, none negative"
            )
        if not (weight > 0).any():
            raise DataError(f"wasserstein_matrix: cloud {cloud} has no mass; expected a positive weight")
        if metric == "cosine" and zero[start:end].any():
            point = int(zero[start:end].nonzero()[0])
            raise DataError(
                f"wasserstein_matrix: cloud {cloud}, point {point} is all zero, which has no cosine; "
                f"drop it or use another metric"
            )
