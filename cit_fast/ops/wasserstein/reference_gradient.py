"""Gradients of Wasserstein distances by the envelope theorem, in plain PyTorch: plan and potentials stay as they are.

    d W^p / d x_i = sum_j pi_ij d c(x_i, y_j)^p / d x_i        d W^p / d a_i = f_i, less its mean under a

``exact``                pi and f of the network simplex; where the best ones are not unique, a subgradient.
``sinkhorn``             the gradient of OT_eps, which comes to the distance as epsilon goes to 0.
``sinkhorn-divergence``  that of OT_eps(a, b) - (OT_eps(a, a) + OT_eps(b, b)) / 2, at a fixed epsilon.

The weights' gradients are through their scaling to sum 1. Points without weight take no part: their gradients are 0.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register
from cit_fast.ops.wasserstein.reference import (
    SIMPLEX_ITERATIONS,
    Cloud,
    effective_epsilon,
    entropic,
    ground_cost,
    make_cloud,
)

Term = tuple[int, int, float]
"""Two clouds and the epsilon between them; 0: automatic, or exact."""


class Transport(NamedTuple):
    """Ground cost c (not to the power p), plan, both [n, m]; potentials f [n] and g [m]; the epsilon they are for."""

    cost: Tensor
    plan: Tensor
    f: Tensor
    g: Tensor
    epsilon: float


@register("wasserstein_gradient", Backend.REFERENCE)
def wasserstein_gradient(
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
) -> tuple[Tensor, Tensor]:
    """Gradients of ``sum(gradient * distances)`` with respect to points [P, d] and weights [P].

    Args:
        distances, gradient: [M] float64; the others as in :func:`cit_fast.ops.wasserstein.reference.wasserstein_matrix`.
    """
    clouds = [make_cloud(points[i:j], weights[i:j], metric) for i, j in itertools.pairwise(offsets.tolist())]

    def transports(terms: Iterable[Term]) -> Iterator[Transport]:
        for i, j, at_epsilon in terms:
            (x, a), (y, b) = clouds[i], clouds[j]
            cost = ground_cost(x, y, metric)
            power = cost**p
            if method == "exact":
                yield Transport(cost, *simplex_plan(power, a, b), 0.0)
                continue
            # A self term is at the epsilon where its pair ended.
            eps = at_epsilon or effective_epsilon(power, a, b, epsilon)
            found = entropic(power, a, b, eps, tolerance, max_iterations, 0.0 if at_epsilon else gap)
            yield Transport(cost, found.plan, found.potentials.f, found.potentials.g, found.epsilon)

    terms = pair_terms(pairs, distances, gradient, p)
    divergence = method == "sinkhorn-divergence"
    return accumulate(points, offsets, weights, clouds, terms, transports, metric, p, divergence=divergence)


def pair_terms(pairs: Tensor, distances: Tensor, gradient: Tensor, p: float) -> dict[tuple[int, int], float]:
    """d / d W^p of each pair of different clouds whose distance is not 0, where the gradient is 0."""
    terms: dict[tuple[int, int], float] = {}
    for (i, j), distance, factor in zip(pairs.tolist(), distances.tolist(), gradient.tolist(), strict=True):
        if i != j and distance > 0 and factor != 0:
            terms[i, j] = terms.get((i, j), 0.0) + factor * distance ** (1 - p) / p
    return terms


def accumulate(
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    clouds: list[Cloud],
    terms: dict[tuple[int, int], float],
    transports: Callable[[Iterable[Term]], Iterator[Transport]],
    metric: str,
    p: float,
    *,
    divergence: bool,
) -> tuple[Tensor, Tensor]:
    """Sums over the pairs, then through the scaling of points and weights."""
    to_points = [torch.zeros_like(cloud.points) for cloud in clouds]
    to_weights = [torch.zeros_like(cloud.weights) for cloud in clouds]

    def add(i: int, j: int, factor: float, transport: Transport) -> None:
        x, y = clouds[i].points, clouds[j].points
        for index, each in zip((i, j), cost_gradient(x, y, transport, metric, p), strict=True):
            to_points[index] += factor * each
        to_weights[i] += factor * transport.f
        to_weights[j] += factor * transport.g

    own: dict[tuple[int, float], float] = {}
    for ((i, j), factor), transport in zip(terms.items(), transports((i, j, 0.0) for i, j in terms), strict=True):
        add(i, j, factor, transport)
        for index in (i, j):
            key = index, transport.epsilon
            own[key] = own.get(key, 0.0) - factor / 2
    if divergence:
        for ((i, _), factor), transport in zip(own.items(), transports((i, i, eps) for i, eps in own), strict=True):
            add(i, i, factor, transport)

    point_gradient, weight_gradient = torch.zeros_like(points), torch.zeros_like(weights)
    for index, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        weight = weights[start:end].double()
        carried = (weight / weight.max() / (weight / weight.max()).sum() > 0).nonzero().flatten() + start
        gradient, (unit, a) = to_points[index], clouds[index]
        if metric == "cosine":
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
