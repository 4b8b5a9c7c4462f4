"""Wasserstein distances in C++ on the CPU (``native``): costs by matrix products, everything after them in csrc/cpu.

Pairs go in batches whose costs fit the memory set aside for them. A pair's result does not depend on its batch.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from cit_fast.backends import Backend, register
from cit_fast.errors import DataError
from cit_fast.reference.wasserstein import COSINE_ROUNDING, Cloud, make_cloud, simplex

BATCH_ENTRIES = 1 << 22
"""Costs held at a time, 32 MiB: a part of a third-level cache; one pair may be larger."""

CANCELLATION = 1e-3
"""Squared distances below this share of |x|^2 + |y|^2 are formed again from differences of coordinates."""

ASSIGNMENT_SIZE = 64
"""Up to this many points in both clouds, weights uniform, SciPy's assignment solver is faster than POT's simplex: six
times at 30 on clustered clouds; at 100 they are even, and at 400 the simplex is twice as fast."""

Pair = tuple[int, int]


@register("wasserstein_matrix", Backend.NATIVE)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Distances of ``pairs`` of packed clouds; see :func:`cit_fast.reference.wasserstein.wasserstein_matrix`."""
    bounds = offsets.tolist()
    clouds = [make_cloud(points[i:j], weights[i:j], metric) for i, j in itertools.pairwise(bounds)]
    solver = _Solver(clouds, metric, p, tolerance, max_iterations)
    differ = _differ(clouds, pairs)
    places: dict[Pair, int] = {}
    place = [places.setdefault((i, j), len(places)) for i, j in pairs[differ].tolist()]
    if method == "exact":
        solved = solver.exact(list(places))
    else:
        solved = solver.entropic(list(places), epsilon, divergence=method == "sinkhorn-divergence")
    values = torch.zeros(len(pairs), 5, dtype=torch.float64)
    values[differ] = solved[place]
    values[:, :3] = values[:, :3].clamp(min=0) ** (1 / p)
    distance, lower, upper, iterations, error = (column.clone() for column in values.unbind(dim=1))
    return distance, lower, upper, iterations.long(), error


def _differ(clouds: list[Cloud], pairs: Tensor) -> Tensor:
    """[M] bool: whether the two clouds of a pair are not the same points with the same weights in the same order."""
    names: dict[bytes, int] = {}
    # Adding 0 makes -0 and 0 the same bytes.
    digests = [
        hashlib.blake2b((cloud.weights.numpy() + 0.0).tobytes() + (cloud.points.numpy() + 0.0).tobytes()).digest()
        for cloud in clouds
    ]
    kind = torch.tensor([names.setdefault(digest, len(names)) for digest in digests])
    return kind[pairs[:, 0].long()] != kind[pairs[:, 1].long()]


class _Solver:
    """The clouds of one call and its options."""

    def __init__(self, clouds: list[Cloud], metric: str, p: float, tolerance: float, max_iterations: int) -> None:
        self.clouds, self.metric, self.p = clouds, metric, p
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.uniform = [bool((cloud.weights == cloud.weights[0]).all()) for cloud in clouds]

    def exact(self, pairs: list[Pair]) -> Tensor:
        """[M, 5]: distance to the power p three times, then 0 and 0."""
        values = []
        for batch, costs in self.batches(pairs):
            for (i, j), cost in zip(batch, costs, strict=True):
                largest = float(cost.max())
                if not math.isfinite(largest):
                    raise self.overflow((i, j))
                a, b = self.clouds[i].weights, self.clouds[j].weights
                value = 0.0
                if largest > 0 and len(a) == len(b) <= ASSIGNMENT_SIZE and self.uniform[i] and self.uniform[j]:
                    value = _assignment(cost)
                elif largest > 0:
                    value = simplex(cost, a, b, f"between clouds {i} and {j}")
                values.append((value, value, value, 0.0, 0.0))
        return torch.tensor(values, dtype=torch.float64).reshape(-1, 5)

    def entropic(self, pairs: list[Pair], epsilon: float | None, *, divergence: bool) -> Tensor:
        """[M, 5]: distance, lower, upper, all to the power p; iterations; marginal error."""
        results = self.sinkhorn(pairs, [epsilon or 0.0] * len(pairs), clamp=True)
        lower, upper, value, iterations, error, used = results.unbind(dim=1)
        distance = upper
        if divergence:
            # With a given epsilon, each cloud's self term is solved once and not once per pair.
            at = used.tolist()
            keys = [[(i, e), (j, e)] for (i, j), e in zip(pairs, at, strict=True)]
            terms = sorted({key for both in keys for key in both if key[1] > 0})
            own = self.sinkhorn([(i, i) for i, _ in terms], [e for _, e in terms], clamp=False)[:, 2].tolist()
            self_term = dict(zip(terms, own, strict=True))
            half = [sum(self_term.get(key, 0.0) for key in both) / 2 for both in keys]
            distance = value - torch.tensor(half, dtype=torch.float64)
        return torch.stack([distance, lower, upper, iterations, error], dim=1)

    def sinkhorn(self, pairs: list[Pair], epsilons: list[float], *, clamp: bool) -> Tensor:
        """[M, 6]: csrc/cpu/wasserstein.h, TransportResult. Epsilon 0: automatic."""
        from cit_fast import _native

        results = torch.empty(len(pairs), 6, dtype=torch.float64)
        done = 0
        for batch, costs in self.batches(pairs):
            table: list[int] = []
            for (i, j), cost in zip(batch, costs, strict=True):
                a, b = self.clouds[i].weights, self.clouds[j].weights
                table += [cost.data_ptr(), *cost.shape, cost.stride(0), a.data_ptr(), b.data_ptr()]
            out = results[done : done + len(batch)]
            _native.sinkhorn(
                table,
                epsilons[done : done + len(batch)],
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
                clamp_epsilon=clamp,
                threads=torch.get_num_threads(),
                results=out.data_ptr(),
            )
            for k in out[:, 5].isnan().nonzero().flatten().tolist():
                raise self.overflow(batch[k])
            done += len(batch)
        return results

    def overflow(self, pair: Pair) -> DataError:
        return DataError(
            f"clouds {pair[0]} and {pair[1]}: their cost {self.metric}^{self.p:g} overflows float64; "
            f"scale the points down"
        )

    def batches(self, pairs: Iterable[Pair]) -> Iterator[tuple[list[Pair], list[Tensor]]]:
        """Pairs with their costs c(x_m, y_n)^p, [n, m] float64 each. The memory is used again for the next batch."""
        batch: list[Pair] = []
        entries = 0
        memory = torch.empty(0, dtype=torch.float64)
        for pair in pairs:
            size = self.entries(pair)
            if batch and entries + size > BATCH_ENTRIES:
                memory = memory if memory.numel() >= entries else memory.new_empty(entries)
                yield batch, self.costs(batch, memory[:entries])
                batch, entries = [], 0
            batch.append(pair)
            entries += size
        if batch:
            memory = memory if memory.numel() >= entries else memory.new_empty(entries)
            yield batch, self.costs(batch, memory[:entries])

    def entries(self, pair: Pair) -> int:
        return len(self.clouds[pair[0]].weights) * len(self.clouds[pair[1]].weights)

    def costs(self, batch: list[Pair], memory: Tensor) -> list[Tensor]:
        costs, start = [], 0
        for i, j in batch:
            x, y = self.clouds[i].points, self.clouds[j].points
            cost = memory[start : start + len(x) * len(y)].view(len(x), len(y))
            start += cost.numel()
            # A product for each pair by itself: with another shape the library might round differently.
            if self.metric == "cosine":
                torch.mm(x, y.T, out=cost)
            else:
                _squared_distances(x, y, cost)
            costs.append(cost)
        if self.metric == "cosine":
            torch.threshold_(memory.neg_().add_(1), COSINE_ROUNDING, 0.0)
        elif self.metric == "euclidean":
            memory.sqrt_()
        if self.p != 1:
            memory.pow_(self.p)
        return costs


def _assignment(cost: Tensor) -> float:
    """min <pi, C> between uniform weights on equally many points, where the best plan is a permutation."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.numpy())
    return float(cost[rows, columns].mean())


def _squared_distances(x: Tensor, y: Tensor, out: Tensor) -> None:
    """|x_m - y_n|^2, [n, m]: exactly 0 between equal points, to rounding elsewhere."""
    centre = y.mean(dim=0)
    x0, y0 = x - centre, y - centre
    norms = x0.square().sum(dim=1)[:, None] + y0.square().sum(dim=1)[None, :]
    torch.addmm(norms, x0, y0.T, alpha=-2, out=out)
    # Where the sum of squares cancels, or overflows, from the differences themselves.
    doubtful = ~((out >= CANCELLATION * norms) & (out < math.inf))
    count = int(doubtful.sum())
    if count == 0:
        return
    if count * 8 > out.numel():
        out.copy_(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_())
        return
    rows, columns = doubtful.nonzero(as_tuple=True)
    for some in range(0, count, 4096):
        i, j = rows[some : some + 4096], columns[some : some + 4096]
        out[i, j] = (x[i] - y[j]).square().sum(dim=1)
