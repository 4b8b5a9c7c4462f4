"""Wasserstein distances between weighted point clouds, in plain PyTorch and POT: the definition::

    W(a, b) = ( min_pi <pi, C> )^(1/p),   C_mn = c(x_m, y_n)^p,   pi >= 0 with marginals a and b

``exact``
    POT's network simplex.
``sinkhorn``
    log-domain Sinkhorn with epsilon scaling; the plan is rounded to exact marginals (Altschuler, Weed, Rigollet 2017,
    algorithm 2), so that its cost is never below W^p. The column potential g, made feasible by
    f_i = min_j C_ij - g_j and g_j = min_i C_ij - f_i, gives <a, f> + <b, g> <= W^p.

Everything is float64 whatever the input, so the bounds hold up to 1e-12 or so.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cit_fast.errors import CitFastError, DataError
from cit_fast.ops.backends import Backend, register

METRICS = ("cosine", "euclidean", "sqeuclidean")
METHODS = ("exact", "sinkhorn")

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


CANCELLATION = 1e-3
"""Squared distances below this share of ``|x|^2 + |y|^2`` are formed again from differences of coordinates."""

Pair = tuple[int, int]
Distances = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Distances, lower and upper bounds, iterations (int64) and marginal errors, each [M]; float64 but for the int64."""


class TransportOptions(NamedTuple):
    """What :func:`cit_fast.ops.wasserstein_matrix` was asked for; every backend takes this one object."""

    metric: str
    """The ground cost c: one of ``METRICS``."""
    p: float
    """Order of the distance, at least 1."""
    method: str
    """One of ``METHODS``."""
    epsilon: float | None
    """Entropic regularisation in units of c^p; None: a share of the spread of each pair's costs."""
    tolerance: float
    """Sinkhorn stops at this L1 error of the marginals."""
    max_iterations: int
    """Sinkhorn stops here otherwise."""
    gap: float
    """Epsilon goes down until upper - lower is at most this share of upper; 0: epsilon stays."""


class Cloud(NamedTuple):
    """Points [n, d], unit vectors for the cosine, and weights [n], positive with sum 1; float64."""

    points: Tensor
    weights: Tensor


class Potentials(NamedTuple):
    """Dual potentials f [n] and g [m] of the entropic problem, and the full iterations they took."""

    f: Tensor
    g: Tensor
    iterations: int


class Entropic(NamedTuple):
    """One pair at the epsilon where it ended: bounds on <pi, C>, the plan and the L1 error of its marginals."""

    potentials: Potentials
    plan: Tensor
    lower: float
    upper: float
    marginal_error: float


Solve = Callable[[list[Cloud], list[Pair]], Tensor]
"""The step that backends differ in: from pairs of clouds to [pairs, 5] float64, which are distance, lower and upper
bound, all to the power p, full iterations and marginal error."""


@register("wasserstein_matrix", Backend.REFERENCE)
def wasserstein_matrix(
    points: Tensor, offsets: Tensor, weights: Tensor, pairs: Tensor, options: TransportOptions
) -> Distances:
    """Distances of ``pairs`` of packed clouds; see :func:`cit_fast.ops.wasserstein_matrix`.

    Args:
        points: [P, d]; cloud i is rows offsets[i] to offsets[i+1].
        offsets: [N+1] integer.
        weights: [P], not negative, positive sum in every cloud.
        pairs: [M, 2] integer.
        options: As in the public op.

    Returns:
        distances, lower, upper, iterations (int64), marginal error, each [M], float64.
    """

    def solve(clouds: list[Cloud], some: list[Pair]) -> Tensor:
        results = [solve_pair(clouds, pair, options) for pair in some]
        return torch.tensor(results, dtype=torch.float64, device=points.device).reshape(-1, 5)

    return solve_pairs(points, offsets, weights, pairs, options, solve)


def solve_pairs(
    points: Tensor, offsets: Tensor, weights: Tensor, pairs: Tensor, options: TransportOptions, solve: Solve
) -> Distances:
    """What every backend does around its own ``solve``: each pair of clouds that differ is solved once."""
    clouds = make_clouds(points, offsets, weights, options.metric)
    pairs = pairs.cpu()
    differ = clouds_differ(clouds, pairs)
    places: dict[Pair, int] = {}
    place = [places.setdefault((i, j), len(places)) for i, j in pairs[differ].tolist()]
    solved = solve(clouds, list(places))
    # Identical clouds keep their zeros: their distance is exactly 0, without iterations.
    values = torch.zeros(len(pairs), 5, dtype=torch.float64, device=points.device)
    values[differ.to(points.device)] = solved[torch.tensor(place, dtype=torch.int64, device=points.device)]
    values[:, :3] = values[:, :3].clamp(min=0) ** (1 / options.p)
    distance, lower, upper, iterations, error = (column.clone() for column in values.unbind(dim=1))
    return distance, lower, upper, iterations.long(), error


def solve_pair(clouds: list[Cloud], pair: Pair, options: TransportOptions) -> tuple[float, ...]:
    """One row of what :data:`Solve` returns."""
    (x, a), (y, b) = (clouds[index] for index in pair)
    cost = ground_cost(x, y, options.metric) ** options.p
    largest = float(cost.max())
    if not math.isfinite(largest):
        raise overflow(pair, options)
    if largest == 0:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    if options.method == "exact":
        exact = simplex(cost, a, b, f"between clouds {pair[0]} and {pair[1]}")
        return exact, exact, exact, 0.0, 0.0
    found = entropic(cost, a, b, options)
    return found.upper, found.lower, found.upper, float(found.potentials.iterations), found.marginal_error


def overflow(pair: Pair, options: TransportOptions) -> DataError:
    """The error for a pair with a cost that is not finite."""
    return DataError(
        f"clouds {pair[0]} and {pair[1]}: their cost {options.metric}^{options.p:g} overflows float64; "
        f"scale the points down"
    )


def make_clouds(points: Tensor, offsets: Tensor, weights: Tensor, metric: str) -> list[Cloud]:
    """The packed clouds one by one, each as :func:`make_cloud` makes it."""
    return [make_cloud(points[i:j], weights[i:j], metric) for i, j in itertools.pairwise(offsets.tolist())]


def clouds_differ(clouds: list[Cloud], pairs: Tensor) -> Tensor:
    """[M] bool, CPU: whether the two clouds of a pair differ in a point, in a weight or in their order."""
    # Only clouds whose first and last point are equal are compared in whole. All these points go to the host in one
    # copy, because a GPU would have to be waited for at each. Adding 0 makes -0 and 0 the same bytes.
    firsts = torch.cat([cloud.points[:1] for cloud in clouds])
    lasts = torch.cat([cloud.points[-1:] for cloud in clouds])
    ends = (torch.cat([firsts, lasts], dim=1) + 0.0).cpu().numpy()
    alike: dict[tuple[int, bytes], list[int]] = {}
    kind = list(range(len(clouds)))
    for index, cloud in enumerate(clouds):
        candidates = alike.setdefault((len(cloud.weights), ends[index].tobytes()), [])
        kind[index] = next((other for other in candidates if all(map(torch.equal, cloud, clouds[other]))), index)
        if kind[index] == index:
            candidates.append(index)
    kinds = torch.tensor(kind)[pairs.long()]
    return kinds[:, 0] != kinds[:, 1]


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


def squared_distances(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """``|x_m - y_n|^2``, [n, m], by a product: exactly 0 between equal points, to rounding elsewhere. For backends."""
    centre = y.mean(dim=0)
    x0, y0 = x - centre, y - centre
    norms = x0.square().sum(dim=1)[:, None] + y0.square().sum(dim=1)[None, :]
    out = torch.addmm(norms, x0, y0.T, alpha=-2, out=out)
    # Where the sum of squares cancels, or overflows, from the differences themselves.
    doubtful = ~((out >= CANCELLATION * norms) & (out < math.inf))
    count = int(doubtful.sum())
    if count * 8 > out.numel():
        return out.copy_(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_())
    rows, columns = doubtful.nonzero(as_tuple=True)
    for some in range(0, count, 4096):
        i, j = rows[some : some + 4096], columns[some : some + 4096]
        out[i, j] = (x[i] - y[j]).square().sum(dim=1)
    return out


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


def entropic(cost: Tensor, a: Tensor, b: Tensor, options: TransportOptions) -> Entropic:
    """The entropic plan and its bounds; epsilon is halved until they are within ``gap``, if that is not 0."""
    epsilon = effective_epsilon(cost, a, b, options.epsilon)
    smallest = EPSILON_RANGE[0] * float(cost.max())
    potentials = sinkhorn(cost, a, b, epsilon, options.tolerance, options.max_iterations)
    while True:
        plan, error = transport_plan(cost, a, b, potentials, epsilon)
        upper = float((round_to_marginals(plan, a, b) * cost).sum())
        lower = min(dual_bound(cost, a, b, potentials.g), upper)
        left = options.max_iterations - potentials.iterations
        if options.gap == 0 or upper - lower <= options.gap * upper or left <= 0 or epsilon <= smallest:
            return Entropic(potentials, plan, lower, upper, error)
        epsilon = max(epsilon / 2, smallest)
        f, g, used = _alternate(cost, a, b, potentials.g, epsilon, options.tolerance, left)
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
