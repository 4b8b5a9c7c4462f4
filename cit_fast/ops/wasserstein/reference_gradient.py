"""Gradients of Wasserstein distances by the envelope theorem, in plain PyTorch: plan and potentials stay as they are.

    d W^p / d x_i = sum_j pi_ij d c(x_i, y_j)^p / d x_i        d W^p / d a_i = f_i, less its mean under a

``exact``     pi and f of the network simplex; where the best ones are not unique, a subgradient.
``sinkhorn``  the gradient of OT_eps, which comes to the distance as epsilon goes to 0.

The weights' gradients are through their scaling to sum 1. Points without weight take no part: their gradients are 0.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register
from cit_fast.ops.wasserstein.reference import (
    SIMPLEX_ITERATIONS,
    Cloud,
    Pair,
    TransportOptions,
    entropic,
    ground_cost,
    make_clouds,
)


class Transport(NamedTuple):
    """Ground cost c (not to the power p), plan, both [n, m]; potentials f [n] and g [m]."""

    cost: Tensor
    plan: Tensor
    f: Tensor
    g: Tensor


Solve = Callable[[list[Cloud], list[Pair]], Iterator[Transport]]
"""The step that backends differ in: plans and potentials of pairs of clouds, one pair after the other."""


@register("wasserstein_gradient", Backend.REFERENCE)
def wasserstein_gradient(
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    pairs: Tensor,
    distances: Tensor,
    gradient: Tensor,
    options: TransportOptions,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``sum(gradient * distances)`` with respect to points [P, d] and weights [P].

    Args:
        distances, gradient: [M] float64.
        points, offsets, weights, pairs, options: As in :func:`~cit_fast.ops.wasserstein.reference.wasserstein_matrix`.
    """

    def solve(clouds: list[Cloud], some: list[Pair]) -> Iterator[Transport]:
        for i, j in some:
            (x, a), (y, b) = clouds[i], clouds[j]
            cost = ground_cost(x, y, options.metric)
            power = cost**options.p
            if options.method == "exact":
                yield Transport(cost, *simplex_plan(power, a, b))
            else:
                found = entropic(power, a, b, options)
                yield Transport(cost, found.plan, found.potentials.f, found.potentials.g)

    return accumulate(points, offsets, weights, pair_terms(pairs, distances, gradient, options.p), options, solve)


def pair_terms(pairs: Tensor, distances: Tensor, gradient: Tensor, p: float) -> dict[Pair, float]:
    """d / d W^p of each pair of different clouds whose distance is not 0, where the gradient is 0."""
    terms: dict[Pair, float] = {}
    for (i, j), distance, factor in zip(pairs.tolist(), distances.tolist(), gradient.tolist(), strict=True):
        if i != j and distance > 0 and factor != 0:
            terms[i, j] = terms.get((i, j), 0.0) + factor * distance ** (1 - p) / p
    return terms


def accumulate(
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    terms: dict[Pair, float],
    options: TransportOptions,
    solve: Solve,
) -> tuple[Tensor, Tensor]:
    """Sums over the pairs, then through the scaling of points and weights."""
    clouds = make_clouds(points, offsets, weights, options.metric)
    to_points = [torch.zeros_like(cloud.points) for cloud in clouds]
    to_weights = [torch.zeros_like(cloud.weights) for cloud in clouds]
    for ((i, j), factor), transport in zip(terms.items(), solve(clouds, list(terms)), strict=True):
        gradients = cost_gradient(clouds[i].points, clouds[j].points, transport, options.metric, options.p)
        for index, gradient in zip((i, j), gradients, strict=True):
            to_points[index] += factor * gradient
        to_weights[i] += factor * transport.f
        to_weights[j] += factor * transport.g

    point_gradient, weight_gradient = torch.zeros_like(points), torch.zeros_like(weights)
    # Points without weight are in no cloud; their gradients stay 0.
    for index, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        weight = weights[start:end].double()
        carried = (weight / weight.max() / (weight / weight.max()).sum() > 0).nonzero().flatten() + start
        gradient, (unit, a) = to_points[index], clouds[index]
        if options.metric == "cosine":
            gradient = gradient - unit * (unit * gradient).sum(dim=1, keepdim=True)
            gradient = gradient / points[carried].double().norm(dim=1, keepdim=True)
        point_gradient[carried] = gradient.to(points.dtype)
        centred = to_weights[index] - a @ to_weights[index]
        weight_gradient[carried] = (centred / weight.sum()).to(weights.dtype)
    return point_gradient, weight_gradient


def cost_gradient(x: Tensor, y: Tensor, transport: Transport, metric: str, p: float) -> tuple[Tensor, Tensor]:
    """sum pi dc^p with respect to x [n, d] and y [m, d]; for the cosine, before the scaling to unit length."""
    slope = transport.plan * p * transport.cost ** (p - 1)
    if metric == "cosine":
        return -slope @ y, -slope.T @ x
    # Where points meet at p = 1, 0 is a subgradient of |x - y|.
    slope = torch.where(transport.cost > 0, slope / transport.cost, 0.0) if metric == "euclidean" else 2 * slope
    centre = y.mean(dim=0)
    x, y = x - centre, y - centre
    return slope.sum(dim=1)[:, None] * x - slope @ y, slope.sum(dim=0)[:, None] * y - slope.T @ x


def simplex_plan(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best plan and potentials by POT's network simplex."""
    import ot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = ot.emd(
            a.cpu().numpy(), b.cpu().numpy(), cost.cpu().numpy(), numItermax=SIMPLEX_ITERATIONS, log=True
        )
    f, g = (torch.as_tensor(log[name], dtype=cost.dtype, device=cost.device) for name in ("u", "v"))
    return torch.as_tensor(plan, dtype=cost.dtype, device=cost.device), f, g
