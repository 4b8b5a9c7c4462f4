"""Wasserstein distances between many point clouds of different sizes in one call, with a certificate of their error."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cit_fast.errors import ConfigError, DataError
from cit_fast.ops.backends import Backend, backend, forced_backend, resolve
from cit_fast.ops.wasserstein import cuda as _wasserstein_cuda
from cit_fast.ops.wasserstein import native as _wasserstein_native
from cit_fast.ops.wasserstein import triton as _wasserstein_triton
from cit_fast.ops.wasserstein.reference import METHODS, METRICS

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


class Wasserstein(NamedTuple):
    """Distances and what is known of their error.

    Each field is [N, N] (all pairs; symmetric, diagonal 0), [N] (one cloud against all) or [M] (given pairs).
    """

    distances: Tensor
    """float64, at least 0, exactly 0 between identical clouds."""
    lower: Tensor
    """float64, at most the exact distance."""
    upper: Tensor
    """float64, at least the exact distance."""
    iterations: Tensor
    """int64, full Sinkhorn iterations; 0 where the distance is exact, or certified without them (``gap``)."""
    marginal_error: Tensor
    """float64, L1 distance of the entropic plan's marginals from the weights; 0 where there are no iterations."""


@dataclass(frozen=True)
class WarmStart:
    """Column potentials of Sinkhorn by pair of cloud indices: pass one object to several calls, and each starts from
    where the last ended. For clouds that keep their places and sizes while points, weights or epsilon move a little;
    a pair that is new, or of another size, starts cold. Results are as good, but not the same bits."""

    potentials: dict[tuple[int, int], Tensor] = field(default_factory=dict)


def wasserstein_matrix(
    clouds: Sequence[Tensor] | Tensor,
    weights: Sequence[Tensor] | Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    metric: str = "cosine",
    p: float = 1.0,
    method: str = "exact",
    pairs: int | Sequence[tuple[int, int]] | Tensor | None = None,
    epsilon: float | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    gap: float | None = None,
    warm_start: WarmStart | None = None,
) -> Wasserstein:
    """W(a, b) = ( min_pi sum_mn pi_mn c(x_m, y_n)^p )^(1/p) between weighted point clouds.

    Differentiable once, with respect to points and weights: the gradient of ``distances`` is that of the envelope
    theorem, the plan held fixed (:mod:`cit_fast.ops.wasserstein.reference_gradient`). For ``"sinkhorn"`` that is the
    gradient of the entropic value. Backward solves the pairs again instead of keeping their plans.

    Args:
        clouds: N tensors [n_i, d], or all points packed as [P, d] with ``offsets``; float16, bfloat16,
            float32 or float64.
        weights: Mass per point, as N tensors [n_i] or packed [P]; not negative, scaled to sum 1 in every
            cloud. None: uniform.
        offsets: [N+1] int32 or int64, for packed points only: cloud i is rows offsets[i] to offsets[i+1].
        metric: The ground cost c: ``"cosine"`` 1 - cos(x, y), ``"euclidean"`` |x - y|, ``"sqeuclidean"`` |x - y|^2.
        p: Order, at least 1.
        method: ``"exact"`` (network simplex), ``"sinkhorn"`` (cost of the entropic plan after rounding it to
            the weights, never below the exact distance) or ``"sinkhorn-divergence"`` (entropic value less its
            self terms; may lie on either side of the exact distance, also outside the bounds).
        pairs: None: all pairs. An index i: cloud i against all. Else [M, 2] indices.
        epsilon: Entropic regularisation in units of c^p, positive; brought into 1e-9 to 1e6 of the largest
            cost. None: 5 % of the standard deviation of each pair's cost.
        tolerance: Sinkhorn stops for each pair by itself at this L1 error of the marginals (mass is 1).
            Positive. From 1e-5 on, or with a ``gap``, ``native`` may sum cosines in float32; the bounds allow for it.
        max_iterations: Sinkhorn stops here otherwise, which ``marginal_error`` shows; iterations of the
            epsilon scaling, at most 10 a level, come on top. The bounds hold in any case.
        gap: Sinkhorn halves epsilon until upper - lower is at most this share of upper, for each pair by itself and
            within ``max_iterations``: 1e-3 certifies the distance to a thousandth. ``native`` certifies pairs of up to
            a million costs, and uniform clouds of one size, by the exact solver instead, which stops at such bounds:
            a fraction of the time, no epsilon. Not for a divergence or a warm start. None: epsilon stays.
        warm_start: Where Sinkhorn starts from, and what it leaves for the next call; the result has no gradient then.

    Returns:
        :class:`Wasserstein`. For the exact method lower = distance = upper.

    Raises:
        DataError: A cloud is empty, has no mass, a negative weight, a point that is not finite or (cosine)
            all zero, or another d; shapes or dtypes do not fit. The message names the cloud.
        ConfigError: An option is unknown or out of range.

    Source: InsCL (arXiv 2403.11435), with the cosine and p = 1; Altschuler, Weed, Rigollet 2017
    for the upper bound.

    >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]])
    >>> wasserstein_matrix([x, y], metric="euclidean").distances.tolist()
    [[0.0, 2.0], [2.0, 0.0]]
    """
    _check_options(metric, p, method, epsilon, tolerance, max_iterations)
    if gap is not None and not 0 < gap < 1:
        raise ConfigError(f"wasserstein_matrix: gap is {gap}; expected a number between 0 and 1, or None")
    points, offsets = _packed_points(clouds, offsets)
    weight = _packed_weights(weights, points, offsets, clouds)
    count = offsets.shape[0] - 1
    index = _pair_index(pairs, count)
    # W is symmetric; with each pair in one order, so is its rounding.
    inputs = points, offsets, weight, index.sort(dim=1).values
    options: tuple[Any, ...] = (
        metric,
        float(p),
        method,
        None if epsilon is None else float(epsilon),
        float(tolerance),
        max_iterations,
        gap or 0.0,
    )
    if warm_start is None:
        values = torch.ops.cit_fast.wasserstein_matrix(*inputs, *options)
    else:
        run: Callable[..., tuple[Tensor, ...]] = functools.partial(_run, potentials=warm_start.potentials)
        with torch.no_grad():
            values = run(*inputs, *options)
    if pairs is not None:
        return Wasserstein(*values)
    i, j = index.to(points.device).unbind(dim=1)
    return Wasserstein(*(_symmetric(each, i, j, count) for each in values))


def _symmetric(values: Tensor, i: Tensor, j: Tensor, count: int) -> Tensor:
    matrix = values.new_zeros((count, count))
    return matrix.index_put((i, j), values).index_put((j, i), values)


# --- registration -------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "cit_fast::wasserstein_matrix",
    mutates_args=(),
    schema="(Tensor points, Tensor offsets, Tensor weights, Tensor pairs, str metric, float p, str method, "
    "float? epsilon, float tolerance, int max_iterations, float gap=0.0) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _wasserstein_matrix(
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    pairs: Tensor,
    metric: str,
    p: float,
    method: str,
    epsilon: float | None,
    tolerance: float,
    max_iterations: int,
    gap: float = 0.0,
) -> tuple[Tensor, ...]:
    return _run(points, offsets, weights, pairs, metric, p, method, epsilon, tolerance, max_iterations, gap)


def _run(
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    pairs: Tensor,
    metric: str,
    p: float,
    method: str,
    epsilon: float | None,
    tolerance: float,
    max_iterations: int,
    gap: float,
    potentials: dict[tuple[int, int], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    _check_values(points, offsets, weights, pairs, metric)
    more: dict[str, Any] = {}
    if method != "exact" and gap > 0:
        more["gap"] = gap
    if method != "exact" and potentials is not None:
        more["potentials"] = potentials
    reason = f"its kernels take no {' or '.join(more)}"
    cannot = dict.fromkeys((Backend.CUDA, Backend.TRITON), reason) if more else None
    run = resolve("wasserstein_matrix", points.device, cannot=cannot)
    # Autocast reaches into a custom op's body; costs in half precision would make the bounds wrong.
    with torch.autocast(points.device.type, enabled=False):
        out: tuple[Tensor, ...] = run(
            points, offsets, weights, pairs, metric, p, method, epsilon, tolerance, max_iterations, **more
        )
    return out


@_wasserstein_matrix.register_fake
def _(
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    pairs: Tensor,
    metric: str,
    p: float,
    method: str,
    epsilon: float | None,
    tolerance: float,
    max_iterations: int,
    gap: float = 0.0,
) -> tuple[Tensor, ...]:
    dtypes = (torch.float64, torch.float64, torch.float64, torch.int64, torch.float64)
    return tuple(points.new_empty((pairs.shape[0],), dtype=dtype) for dtype in dtypes)


@torch.library.custom_op(
    "cit_fast::wasserstein_gradient",
    mutates_args=(),
    schema="(Tensor points, Tensor offsets, Tensor weights, Tensor pairs, Tensor distances, Tensor gradient, "
    "str metric, float p, str method, float? epsilon, float tolerance, "
    "int max_iterations, float gap=0.0) -> (Tensor, Tensor)",
)
def _wasserstein_gradient(
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    pairs: Tensor,
    distances: Tensor,
    gradient: Tensor,
    metric: str,
    p: float,
    method: str,
    epsilon: float | None,
    tolerance: float,
    max_iterations: int,
    gap: float = 0.0,
) -> tuple[Tensor, ...]:
    run = _resolve_gradient(points.device)
    with torch.autocast(points.device.type, enabled=False):
        out: tuple[Tensor, ...] = run(
            points, offsets, weights, pairs, distances, gradient, metric, p, method, epsilon, tolerance,
            max_iterations, gap,
        )  # fmt: skip
    return out


@_wasserstein_gradient.register_fake
def _(
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    pairs: Tensor,
    distances: Tensor,
    gradient: Tensor,
    metric: str,
    p: float,
    method: str,
    epsilon: float | None,
    tolerance: float,
    max_iterations: int,
    gap: float = 0.0,
) -> tuple[Tensor, ...]:
    return torch.empty_like(points), torch.empty_like(weights)


def _resolve_gradient(device: torch.device) -> Callable[..., Any]:
    """GPU kernels have no gradient of their own; the reference runs on their device."""
    if forced_backend() in (Backend.CUDA, Backend.TRITON):
        with backend(Backend.REFERENCE):
            return resolve("wasserstein_gradient", device)
    return resolve("wasserstein_gradient", device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    points, offsets, weights, pairs, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(points, offsets, weights, pairs, output[0])


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    to_points, to_weights = torch.ops.cit_fast.wasserstein_gradient(*ctx.saved_tensors, gradient, *ctx.options)
    return to_points, None, to_weights, None, *(None for _ in ctx.options)


_wasserstein_matrix.register_autograd(_backward, setup_context=_setup_context)


# --- checks and packing -------------------------------------------------------------------------------------


def _check_options(
    metric: str, p: float, method: str, epsilon: float | None, tolerance: float, max_iterations: int
) -> None:
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


def _packed_points(clouds: Sequence[Tensor] | Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
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


def _packed_weights(
    weights: Sequence[Tensor] | Tensor | None,
    points: Tensor,
    offsets: Tensor,
    clouds: Sequence[Tensor] | Tensor,
) -> Tensor:
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


def _pair_index(pairs: int | Sequence[tuple[int, int]] | Tensor | None, count: int) -> Tensor:
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


def _check_values(points: Tensor, offsets: Tensor, weights: Tensor, pairs: Tensor, metric: str) -> None:
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
