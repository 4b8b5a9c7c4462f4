"""Wasserstein distances on a GPU: what the Triton and the CUDA backend share, which is everything but the iterations.

Costs are library products in float64: on the GPUs of data centres (A100, H100, H200) as fast as float32 without TF32,
and the bounds need it, for the roundings of a long scalar product in float32 are not small beside a small distance.
Each pair's costs are divided by their largest and stored as float32 once, so that no cost leaves its range; that one
rounding is in the bounds. The costs of one cloud against many are one product and lie side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cit_fast.errors import DataError
from cit_fast.ops.backends import available_backends
from cit_fast.ops.wasserstein import native, reference
from cit_fast.ops.wasserstein.reference import COSINE_ROUNDING, EPSILON_RANGE, make_cloud

BATCH_ENTRIES = 1 << 27
"""Costs held at a time, 512 MiB, and as much again for the iterations; one pair may be larger."""

GROUP_ENTRIES = 1 << 25
"""Costs formed at a time in float64, 256 MiB; one pair may be larger."""

COST_ROUNDING = 2.0**-22
"""Relative: costs are rounded to float32, 2^-24, after roundings in float64."""

CANCELLATION = 1e-3
"""Squared distances below this share of |x|^2 + |y|^2 are formed again from differences of coordinates."""

TABLE = ("cost", "stride", "n", "m", "a", "b")
"""Columns of :attr:`Batch.table`."""

Pair = tuple[int, int]


class Batch(NamedTuple):
    """Pairs to solve. Costs are shares of the largest cost of their pair, and so is everything made of them."""

    costs: Tensor
    """[entries] float32, from 0 to 1."""
    table: Tensor
    """[pairs, 6] int64 on the CPU: first cost, entries between rows, n, m, first weight of the rows, of the columns."""
    weights: Tensor
    """[points] float64, positive, sum 1 in every cloud."""
    epsilons: Tensor
    """[pairs] float64; 0: automatic."""
    tolerance: float
    max_iterations: int


Solve = Callable[[Batch], Tensor]
"""To [pairs, 6] float64: lower, upper, entropic value, iterations, marginal error, epsilon."""


def wasserstein_matrix(
    solve: Solve,
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
    """:func:`cit_fast.ops.wasserstein.reference.wasserstein_matrix` with the iterations by ``solve``; exact on the CPU."""
    if method == "exact":
        inputs = (points.cpu(), offsets.cpu(), weights.cpu(), pairs.cpu())
        run = native if available_backends()["native"].available else reference
        exact = run.wasserstein_matrix(*inputs, metric, p, method, epsilon, tolerance, max_iterations)
        distance, lower, upper, iterations, error = (values.to(points.device) for values in exact)
        return distance, lower, upper, iterations, error
    clouds = _Clouds(points, offsets.tolist(), weights, metric, p)
    differ = clouds.differ(pairs)
    places: dict[Pair, int] = {}
    place = [places.setdefault((i, j), len(places)) for i, j in pairs.cpu()[differ].tolist()]
    solver = _Solver(clouds, solve, tolerance, max_iterations)
    solved = solver.entropic(list(places), epsilon, divergence=method == "sinkhorn-divergence")
    values = torch.zeros(len(pairs), 5, dtype=torch.float64, device=points.device)
    values[differ.to(points.device)] = solved[torch.tensor(place, dtype=torch.int64, device=points.device)]
    values[:, :3] = values[:, :3].clamp(min=0) ** (1 / p)
    distance, lower, upper, iterations, error = (column.clone() for column in values.unbind(dim=1))
    return distance, lower, upper, iterations.long(), error


class _Clouds:
    """All clouds of a call, packed, in float64, without points of no weight."""

    def __init__(self, points: Tensor, offsets: list[int], weights: Tensor, metric: str, p: float) -> None:
        clouds = [make_cloud(points[i:j], weights[i:j], metric) for i, j in itertools.pairwise(offsets)]
        self.points = torch.cat([cloud.points for cloud in clouds])
        self.weights = torch.cat([cloud.weights for cloud in clouds])
        self.sizes = [len(cloud.weights) for cloud in clouds]
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.metric, self.p = metric, p

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        start, end = self.starts[index], self.starts[index + 1]
        return self.points[start:end], self.weights[start:end]

    def differ(self, pairs: Tensor) -> Tensor:
        """[M] bool, CPU: whether the two clouds of a pair are not the same points and weights in the same order."""
        firsts = self.points[torch.tensor(self.starts[:-1], device=self.points.device)]
        heads = (firsts + 0.0).cpu().numpy()  # adding 0 makes -0 and 0 the same bytes
        alike: dict[tuple[int, bytes], list[int]] = {}
        kind = list(range(len(self.sizes)))
        for index, size in enumerate(self.sizes):
            candidates = alike.setdefault((size, heads[index].tobytes()), [])
            same = (each for each in candidates if all(map(torch.equal, self.of(index), self.of(each))))
            kind[index] = next(same, index)
            if kind[index] == index:
                candidates.append(index)
        kinds = torch.tensor(kind)[pairs.cpu().long()]
        return kinds[:, 0] != kinds[:, 1]

    def costs(self, i: int, others: list[int]) -> Tensor:
        """c(x_m, y_n)^p of one cloud against others side by side, [n, sum m] float64."""
        x = self.points[self.starts[i] : self.starts[i + 1]]
        if others == list(range(others[0], others[-1] + 1)):
            y = self.points[self.starts[others[0]] : self.starts[others[-1] + 1]]
        else:
            y = torch.cat([self.of(j)[0] for j in others])
        if self.metric == "cosine":
            cost = torch.mm(x, y.T).neg_().add_(1)
            cost = torch.threshold_(cost, COSINE_ROUNDING, 0.0)
        else:
            cost = _squared_distances(x, y)
            if self.metric == "euclidean":
                cost.sqrt_()
        return cost if self.p == 1 else cost.pow_(self.p)


class _Solver:
    """The pairs of one call."""

    def __init__(self, clouds: _Clouds, solve: Solve, tolerance: float, max_iterations: int) -> None:
        self.clouds, self.solve = clouds, solve
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.device = clouds.points.device

    def entropic(self, pairs: list[Pair], epsilon: float | None, *, divergence: bool) -> Tensor:
        """[M, 5]: distance, lower, upper, all to the power p; iterations; marginal error."""
        given = torch.full((len(pairs),), epsilon or 0.0, dtype=torch.float64, device=self.device)
        results = self.sinkhorn(pairs, given, EPSILON_RANGE[1])
        lower, upper, value, iterations, error, used = results.unbind(dim=1)
        distance = upper
        if divergence:
            # With a given epsilon, each cloud's self term is solved once and not once per pair.
            keys = [[(i, e), (j, e)] for (i, j), e in zip(pairs, used.tolist(), strict=True)]
            terms = sorted({key for both in keys for key in both if key[1] > 0})
            at = torch.tensor([e for _, e in terms], dtype=torch.float64, device=self.device)
            own = self.sinkhorn([(i, i) for i, _ in terms], at, 1e30)[:, 2].tolist()
            self_term = dict(zip(terms, own, strict=True))
            half = [sum(self_term.get(key, 0.0) for key in both) / 2 for both in keys]
            distance = value - torch.tensor(half, dtype=torch.float64, device=self.device)
        return torch.stack([distance, lower, upper, iterations, error], dim=1)

    def sinkhorn(self, pairs: list[Pair], epsilons: Tensor, most: float) -> Tensor:
        """[M, 6] like :data:`Solve`, in units of c^p. Epsilon, 0 if automatic, is at most ``most`` largest costs."""
        results = torch.empty(len(pairs), 6, dtype=torch.float64, device=self.device)
        for batch in self._batches(pairs):
            places = torch.tensor([place for group in batch for place in group], device=self.device)
            costs, table, largest = self._costs(pairs, batch)
            if not largest.isfinite().all():
                i, j = pairs[int(places[int((~largest.isfinite()).nonzero()[0])])]
                raise DataError(
                    f"clouds {i} and {j}: their cost {self.clouds.metric}^{self.clouds.p:g} overflows float64; "
                    f"scale the points down"
                )
            given = epsilons[places]
            share = (given / largest).clamp(EPSILON_RANGE[0], most).where(given > 0, 0.0).where(largest > 0, 1.0)
            solved = self.solve(
                Batch(costs, table, self.clouds.weights, share, self.tolerance, self.max_iterations)
            ).where(largest[:, None] > 0, 0.0)
            solved[:, 0] *= 1 - COST_ROUNDING
            solved[:, 1] *= 1 + COST_ROUNDING
            solved[:, [0, 1, 2, 5]] *= largest[:, None]
            results[places] = solved
        return results

    def _batches(self, pairs: list[Pair]) -> Iterator[list[list[int]]]:
        """Groups of pairs that one product is made for, some at a time; pairs as places in ``pairs``."""
        batch: list[list[int]] = []
        entries = 0
        for group, size in self._groups(pairs):
            if batch and entries + size > BATCH_ENTRIES:
                yield batch
                batch, entries = [], 0
            batch.append(group)
            entries += size
        if batch:
            yield batch

    def _groups(self, pairs: list[Pair]) -> Iterable[tuple[list[int], int]]:
        """Pairs with their first cloud in common, and how many costs they have."""
        sizes = self.clouds.sizes
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        for _, places in itertools.groupby(order, key=lambda place: pairs[place][0]):
            group: list[int] = []
            entries = 0
            for place in places:
                i, j = pairs[place]
                if group and entries + sizes[i] * sizes[j] > GROUP_ENTRIES:
                    yield group, entries
                    group, entries = [], 0
                group.append(place)
                entries += sizes[i] * sizes[j]
            yield group, entries

    def _costs(self, pairs: list[Pair], batch: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """:attr:`Batch.costs`, :attr:`Batch.table` and the largest cost of each pair, float64."""
        sizes, starts = self.clouds.sizes, self.clouds.starts
        total = sum(sizes[i] * sizes[j] for group in batch for i, j in map(pairs.__getitem__, group))
        costs = torch.empty(total, dtype=torch.float32, device=self.device)
        rows: list[tuple[int, ...]] = []
        largest = []
        begin = 0
        for group in batch:
            i, others = pairs[group[0]][0], [pairs[place][1] for place in group]
            widths = [sizes[j] for j in others]
            n, width = sizes[i], sum(widths)
            lengths = torch.tensor(widths, device=self.device)
            cost = self.clouds.costs(i, others)
            most = torch.segment_reduce(cost.amax(dim=0), "max", lengths=lengths, unsafe=True)
            largest.append(most)
            scale = most.where(most > 0, 1.0).repeat_interleave(lengths, output_size=width)
            costs[begin : begin + n * width].view(n, width).copy_(cost.div_(scale))
            column = begin
            for j in others:
                rows.append((column, width, n, sizes[j], starts[i], starts[j]))
                column += sizes[j]
            begin += n * width
        return costs, torch.tensor(rows), torch.cat(largest)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_m - y_n|^2, [n, m]: exactly 0 between equal points, to rounding elsewhere."""
    centre = y.mean(dim=0)
    x0, y0 = x - centre, y - centre
    norms = x0.square().sum(dim=1)[:, None] + y0.square().sum(dim=1)[None, :]
    out = torch.addmm(norms, x0, y0.T, alpha=-2)
    # Where the sum of squares cancels, or overflows, from the differences themselves.
    doubtful = ~((out >= CANCELLATION * norms) & (out < float("inf")))
    count = int(doubtful.sum())
    if count * 8 > out.numel():
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_()
    rows, columns = doubtful.nonzero(as_tuple=True)
    for some in range(0, count, 4096):
        i, j = rows[some : some + 4096], columns[some : some + 4096]
        out[i, j] = (x[i] - y[j]).square().sum(dim=1)
    return out
