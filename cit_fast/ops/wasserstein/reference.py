"""Wasserstein distances between weighted point clouds, in plain PyTorch and POT: the definition.

    W(a, b) = ( min_pi <pi, C> )^(1/p),   C_mn = c(x_m, y_n)^p,   pi >= 0 with marginals a and b

``exact``                POT's network simplex.
``sinkhorn``             log-domain Sinkhorn with epsilon scaling; the plan is rounded to exact marginals
                         (Altschuler, Weed, Rigollet 2017, algorithm 2), so that its cost is never below W^p.
                         The column potential g, made feasible by f_i = min_j C_ij - g_j and g_j = min_i C_ij
                         - f_i, gives <a, f> + <b, g> <= W^p.
``sinkhorn-divergence``  OT_eps(a, b) - (OT_eps(a, a) + OT_eps(b, b)) / 2, with OT_eps = min <pi, C> + eps
                         KL(pi || a b^T) (Feydy et al. 2019); the bounds are those of ``sinkhorn``.

Everything is float64 whatever the input, so the bounds hold up to 1e-12 or so.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from cit_fast.errors import CitFastError, DataError
from cit_fast.ops.backends import Backend, register

METRICS = ("cosine", "euclidean", "sqeuclidean")
METHODS = ("exact", "sinkhorn", "sinkhorn-divergence")

EPSILON_OF_SPREAD = 0.05
"""Automatic epsilon, as a share of the standard deviation of the cost."""

EPSILON_RANGE = (1e-9, 1e6)
"""Smallest and largest epsilon as a share of the largest cost: outside, float64 cannot tell the plan from its limit."""

COSINE_ROUNDING = 1e-14
"""Cosine distances below this are rounding errors of the scalar product, and count as 0."""

SIMPLEX_ITERATIONS = 100_000_000
"""Limit of the network simplex, out of reach at any size that fits into memory."""

COARSE_ITERATIONS, COARSE_TOLERANCE = 10, 0.05
"""Effort per level of the epsilon scaling before the last: it only has to bring the potentials near."""


class Cloud(NamedTuple):
    """Points [n, d], unit vectors for the cosine, and weights [n], positive with sum 1; float64."""

    points: Tensor
    weights: Tensor


class Potentials(NamedTuple):
    """Dual potentials f [n] and g [m] of the entropic problem, and the full iterations they took."""

    f: Tensor
    g: Tensor
    iterations: int

    def value(self, a: Tensor, b: Tensor) -> Tensor:
        """OT_eps: the dual value (the plan's mass is 1, so its entropy term vanishes)."""
        return a @ self.f + b @ self.g


class Entropic(NamedTuple):
    """One pair at the epsilon it ended at: bounds on <pi, C>, the plan and the L1 error of its marginals."""

    potentials: Potentials
    plan: Tensor
    lower: float
    upper: float
    marginal_error: float
    epsilon: float


class Result(NamedTuple):
    """One pair: its distance, bounds on the exact one, iterations, L1 error of the plan's marginals."""

    distance: float
    lower: float
    upper: float
    iterations: int
    marginal_error: float


@register("wasserstein_matrix", Backend.REFERENCE)
def wasserstein_matrix(
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
    potentials: dict[tuple[int, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Distances of ``pairs`` of packed clouds; see :func:`cit_fast.ops.wasserstein_matrix`.

    Args:
        points: [P, d]; cloud i is rows offsets[i] to offsets[i+1].
        offsets: [N+1] integer.
        weights: [P], not negative, positive sum in every cloud.
        pairs: [M, 2] integer.
        metric, p, method, epsilon, tolerance, max_iterations, gap (0: none): as in the public op.
        potentials: Column potentials by pair, to start from; those of this call are put there.

    Returns:
        distances, lower, upper, iterations (int64), marginal error, each [M], float64.
    """
    bounds = offsets.tolist()
    clouds = [make_cloud(points[i:j], weights[i:j], metric) for i, j in itertools.pairwise(bounds)]

    @functools.cache  # with a given epsilon, each cloud's self term is solved once and not once per pair
    def self_term(index: int, at_epsilon: float) -> float:
        x, a = clouds[index]
        cost = ground_cost(x, x, metric) ** p
        return float(sinkhorn(cost, a, a, at_epsilon, tolerance, max_iterations).value(a, a))

    def solve(i: int, j: int) -> Result:
        (x, a), (y, b) = clouds[i], clouds[j]
        if i == j or (torch.equal(a, b) and torch.equal(x, y)):
            return Result(0.0, 0.0, 0.0, 0, 0.0)
        cost = ground_cost(x, y, metric) ** p
        largest = float(cost.max())
        if not math.isfinite(largest):
            raise DataError(f"clouds {i} and {j}: their cost {metric}^{p:g} overflows float64; scale the points down")
        if largest == 0:
            return Result(0.0, 0.0, 0.0, 0, 0.0)
        if method == "exact":
            exact = simplex(cost, a, b, f"between clouds {i} and {j}")
            return Result(exact, exact, exact, 0, 0.0)
        start = None if potentials is None else potentials.get((i, j))
        eps = effective_epsilon(cost, a, b, epsilon)
        found = entropic(cost, a, b, eps, tolerance, max_iterations, gap, start)
        if potentials is not None:
            potentials[i, j] = found.potentials.g
        distance = found.upper
        if method == "sinkhorn-divergence":
            own = (self_term(i, found.epsilon) + self_term(j, found.epsilon)) / 2
            distance = float(found.potentials.value(a, b)) - own
        iterations = found.potentials.iterations
        return Result(max(distance, 0.0), max(found.lower, 0.0), found.upper, iterations, found.marginal_error)

    results = [solve(i, j) for i, j in pairs.tolist()]
    values = torch.tensor(results, dtype=torch.float64, device=points.device).reshape(-1, 5)
    root = values[:, :3] ** (1 / p)
    return (
        root[:, 0].clone(),
        root[:, 1].clone(),
        root[:, 2].clone(),
        values[:, 3].long(),
        values[:, 4].clone(),
    )


def make_cloud(points: Tensor, weights: Tensor, metric: str) -> Cloud:
    """Points of positive weight in float64, of unit length for the cosine; weights scaled to sum 1."""
    weights = weights.double() / weights.max().double()
    weights = weights / weights.sum()
    carried = weights > 0
    points, weights = points[carried].double(), weights[carried]
    if metric == "cosine":
        # Two steps, so that neither a huge nor a tiny vector leaves the range in its square.
        points = points / points.abs().amax(dim=1, keepdim=True)
        points = points / points.norm(dim=1, keepdim=True)
    return Cloud(points, weights)


def ground_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """c(x_m, y_n), [n, m]; exactly 0 between equal points."""
    if metric == "cosine":
        cosine_distance = 1 - x @ y.T
        return cosine_distance.masked_fill(cosine_distance < COSINE_ROUNDING, 0)
    # Coordinate differences, because |x|^2 + |y|^2 - 2 x.y loses the small distances to cancellation.
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance if metric == "euclidean" else distance.square()


def simplex(cost: Tensor, a: Tensor, b: Tensor, where: str) -> float:
    """min <pi, C> by POT's network simplex."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it has to say is in the log
        return pivot(cost, a, b, where)


def pivot(cost: Tensor, a: Tensor, b: Tensor, where: str) -> float:
    """:func:`simplex`, warnings and all.

    POT leaves masses below its epsilon (about 1e-15) where they are. Their share is added, each carried to its nearest
    point: within the rounding of the marginals that is what they cost, and where all else is free it is the distance.
    """
    import ot  # here, because it takes a second and half of the users never need it

    given = (each.cpu().numpy() for each in (a, b, cost))
    plan, log = ot.emd(*given, numItermax=SIMPLEX_ITERATIONS, log=True)
    if log["warning"] is not None:
        raise CitFastError(f"exact transport {where} failed: {log['warning']}; use method='sinkhorn'")
    carried = torch.from_numpy(plan).to(cost)
    left_a, left_b = carried.sum(dim=1) < a / 2, carried.sum(dim=0) < b / 2
    left = (a * cost.amin(dim=1))[left_a].sum() + (b * cost.amin(dim=0))[left_b].sum()
    return max(float(log["cost"]), 0.0) + float(left)


def effective_epsilon(cost: Tensor, a: Tensor, b: Tensor, epsilon: float | None) -> float:
    """The given epsilon, or a share of the cost's spread under a b^T, kept where float64 can follow."""
    largest = float(cost.max())
    if epsilon is None:
        centred = cost / largest - a @ (cost / largest) @ b
        epsilon = EPSILON_OF_SPREAD * largest * float(a @ centred.square() @ b) ** 0.5
    low, high = EPSILON_RANGE
    return min(max(epsilon, low * largest), high * largest)


def entropic(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    tolerance: float,
    max_iterations: int,
    gap: float = 0.0,
    start: Tensor | None = None,
) -> Entropic:
    """The entropic plan and its bounds; epsilon is halved until they are within ``gap``, if that is not 0."""
    smallest = EPSILON_RANGE[0] * float(cost.max())
    if start is not None and start.shape == b.shape:
        potentials = Potentials(*_alternate(cost, a, b, start, epsilon, tolerance, max_iterations))
    else:
        potentials = sinkhorn(cost, a, b, epsilon, tolerance, max_iterations)
    while True:
        plan, error = transport_plan(cost, a, b, potentials, epsilon)
        upper = float((round_to_marginals(plan, a, b) * cost).sum())
        lower = min(dual_bound(cost, a, b, potentials.g), upper)
        left = max_iterations - potentials.iterations
        if gap == 0 or upper - lower <= gap * upper or left <= 0 or epsilon <= smallest:
            return Entropic(potentials, plan, lower, upper, error, epsilon)
        epsilon = max(epsilon / 2, smallest)
        f, g, used = _alternate(cost, a, b, potentials.g, epsilon, tolerance, left)
        potentials = Potentials(f, g, potentials.iterations + used)


def sinkhorn(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, tolerance: float, max_iterations: int) -> Potentials:
    """Potentials at ``epsilon``, starting at the largest cost and halving; rows exact, columns to ``tolerance``."""
    g = torch.zeros_like(b)
    iterations, level = 0, float(cost.max())
    while level > epsilon:
        _, g, used = _alternate(cost, a, b, g, level, max(tolerance, COARSE_TOLERANCE), COARSE_ITERATIONS)
        iterations, level = iterations + used, level / 2
    f, g, used = _alternate(cost, a, b, g, epsilon, tolerance, max_iterations)
    return Potentials(f, g, iterations + used)


def _alternate(
    cost: Tensor, a: Tensor, b: Tensor, g: Tensor, epsilon: float, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, int]:
    log_a, log_b = a.log()[:, None], b.log()[None, :]
    iterations = 0
    while iterations < max_iterations:
        iterations += 1
        f = -epsilon * torch.logsumexp(log_b + (g[None, :] - cost) / epsilon, dim=1)
        g_next = -epsilon * torch.logsumexp(log_a + (f[:, None] - cost) / epsilon, dim=0)
        # The rows are exact after f; column j sums to b_j exp((g_j - g_next_j) / epsilon).
        if (b * torch.expm1((g - g_next) / epsilon)).abs().sum() <= tolerance:
            break
        g = g_next
    return f, g, iterations


def transport_plan(cost: Tensor, a: Tensor, b: Tensor, potentials: Potentials, epsilon: float) -> tuple[Tensor, float]:
    """pi = a b^T exp((f + g - C) / eps) and the L1 error of its two marginals."""
    exponent = (potentials.f[:, None] + potentials.g[None, :] - cost) / epsilon
    plan = torch.exp(exponent + a.log()[:, None] + b.log()[None, :])
    return plan, float((plan.sum(dim=1) - a).abs().sum() + (plan.sum(dim=0) - b).abs().sum())


def round_to_marginals(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The nearby plan whose marginals are exactly a and b (Altschuler, Weed, Rigollet 2017, algorithm 2)."""
    plan = plan * (a / plan.sum(dim=1)).clamp(max=1)[:, None]
    plan = plan * (b / plan.sum(dim=0)).clamp(max=1)[None, :]
    missing_a, missing_b = (a - plan.sum(dim=1)).clamp(min=0), (b - plan.sum(dim=0)).clamp(min=0)
    missing = missing_a.sum()
    return plan if missing == 0 else plan + torch.outer(missing_a, missing_b) / missing


def dual_bound(cost: Tensor, a: Tensor, b: Tensor, g: Tensor) -> float:
    """<a, f> + <b, g> <= min <pi, C> for potentials made feasible by two c-transforms."""
    f = (cost - g[None, :]).amin(dim=1)
    g = (cost - f[:, None]).amin(dim=0)
    return float(a @ f + b @ g)
