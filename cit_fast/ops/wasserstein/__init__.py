"""Wasserstein distances between many point clouds of different sizes in one call, with a certificate of their error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cit_fast.errors import ConfigError
from cit_fast.ops.backends import (
    KERNELS,
    Backend,
    Work,
    forced_backend,
    implementation,
    register_lazily,
    resolve,
    serving,
)
from cit_fast.ops.wasserstein import cuda, native  # noqa: F401 - native registers itself
from cit_fast.ops.wasserstein.checks import check_options, check_values, packed_points, packed_weights, pair_index
from cit_fast.ops.wasserstein.reference import METHODS, METRICS, TransportOptions

__all__ = ["METHODS", "METRICS", "TransportOptions", "Wasserstein", "wasserstein_matrix"]


TRITON_POINTS = 8192
"""The largest cloud that the Triton kernels take."""


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
        metric: The ground cost c: ``"cosine"`` 1 - cos(x, y), ``"euclidean"``, or
            ``"sqeuclidean"``, its square.
        p: Order, at least 1.
        method: ``"exact"`` (network simplex) or ``"sinkhorn"`` (cost of the entropic plan after rounding it to the
            weights, never below the exact distance).
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
            a fraction of the time, no epsilon. None: epsilon stays.

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
    if gap == 0:
        raise ConfigError("wasserstein_matrix: gap is 0.0; expected a number between 0 and 1, or None")
    options = TransportOptions(
        metric, float(p), method, None if epsilon is None else float(epsilon), float(tolerance), max_iterations,
        gap or 0.0,
    )  # fmt: skip
    check_options(options)
    points, offsets = packed_points(clouds, offsets)
    weight = packed_weights(weights, points, offsets, clouds)
    count = offsets.shape[0] - 1
    index = pair_index(pairs, count)
    # W is symmetric; with each pair in one order, so is its rounding.
    values = torch.ops.cit_fast.wasserstein_matrix(points, offsets, weight, index.sort(dim=1).values, *options)
    if pairs is not None:
        return Wasserstein(*values)
    i, j = index.to(points.device).unbind(dim=1)
    return Wasserstein(*(_symmetric(each, i, j, count) for each in values))


def _symmetric(values: Tensor, i: Tensor, j: Tensor, count: int) -> Tensor:
    matrix = values.new_zeros((count, count))
    return matrix.index_put((i, j), values).index_put((j, i), values)


# The op as torch knows it. An option is spelt in the function above, in TransportOptions and in this schema.

_OPTIONS = "str metric, float p, str method, float? epsilon, float tolerance, int max_iterations, float gap"


@torch.library.custom_op(
    "cit_fast::wasserstein_matrix",
    mutates_args=(),
    schema=f"(Tensor points, Tensor offsets, Tensor weights, Tensor pairs, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _wasserstein_matrix(
    points: Tensor, offsets: Tensor, weights: Tensor, pairs: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    chosen = TransportOptions(*options)
    check_values(points, offsets, weights, pairs, chosen.metric)
    cannot = _kernels_cannot(points, offsets, chosen)
    run = resolve("wasserstein_matrix", points.device, cannot=cannot, work=lambda: Work(elements=len(pairs)))
    # Autocast reaches into a custom op's body; costs in half precision would make the bounds wrong.
    with torch.autocast(points.device.type, enabled=False):
        out: tuple[Tensor, ...] = run(points, offsets, weights, pairs, chosen)
    return out


def _kernels_cannot(points: Tensor, offsets: Tensor, options: TransportOptions) -> dict[Backend, str]:
    """Why the kernels of a GPU cannot serve."""
    if options.method == "exact":
        return dict.fromkeys(KERNELS, "the exact method runs on the CPU")
    if options.gap > 0:  # they have one epsilon for each pair from start to end
        return dict.fromkeys(KERNELS, "its kernels take no gap")
    if points.device.type != "cuda":
        return {}
    largest = int(offsets.diff().max())
    reasons = {}
    if largest > TRITON_POINTS:
        reasons[Backend.TRITON] = f"its kernels take at most {TRITON_POINTS} points in a cloud, not {largest}"
    if Backend.CUDA in serving("wasserstein_matrix", points.device) and not cuda.fits(largest, points.device):
        reasons[Backend.CUDA] = f"a cloud has {largest} points, too many for the shared memory of this GPU"
    return reasons


@_wasserstein_matrix.register_fake
def _(points: Tensor, offsets: Tensor, weights: Tensor, pairs: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtypes = (torch.float64, torch.float64, torch.float64, torch.int64, torch.float64)
    return tuple(points.new_empty((pairs.shape[0],), dtype=dtype) for dtype in dtypes)


@torch.library.custom_op(
    "cit_fast::wasserstein_gradient",
    mutates_args=(),
    schema="(Tensor points, Tensor offsets, Tensor weights, Tensor pairs, Tensor distances, Tensor gradient, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
)
def _wasserstein_gradient(points: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, options = arguments[:5], TransportOptions(*arguments[5:])
    run = _resolve_gradient(points.device)
    with torch.autocast(points.device.type, enabled=False):
        out: tuple[Tensor, ...] = run(points, *tensors, options)
    return out


@_wasserstein_gradient.register_fake
def _(points: Tensor, offsets: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(points), torch.empty_like(weights)


def _resolve_gradient(device: torch.device) -> Callable[..., Any]:
    """GPU kernels have no gradient of their own."""
    if forced_backend() in KERNELS:
        return implementation("wasserstein_gradient", serving("wasserstein_gradient", device)[0])
    return resolve("wasserstein_gradient", device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    points, offsets, weights, pairs, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(points, offsets, weights, pairs, output[0])


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    to_points, to_weights = torch.ops.cit_fast.wasserstein_gradient(*ctx.saved_tensors, gradient, *ctx.options)
    return to_points, None, to_weights, None, *(None for _ in ctx.options)


_wasserstein_matrix.register_autograd(_backward, setup_context=_setup_context)
register_lazily("wasserstein_matrix", Backend.CUDA, "cit_fast.ops.wasserstein.cuda:wasserstein_matrix")
register_lazily("wasserstein_matrix", Backend.TRITON, "cit_fast.kernels.wasserstein:wasserstein_matrix")
