"""Wasserstein distances in C++ on the CPU (``native``): csrc/cpu/products.h and wasserstein.h, batches and forms here.

Pairs go in batches whose costs fit the memory set aside for them. A pair's result does not depend on its batch.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from cit_fast.errors import DataError
from cit_fast.ops.backends import Backend, register
from cit_fast.ops.wasserstein.reference import COSINE_ROUNDING, Cloud, make_cloud, pivot
from cit_fast.ops.wasserstein.reference_gradient import Term, Transport, accumulate, pair_terms, simplex_plan

BATCH_ENTRIES = 1 << 20
"""Costs held at a time, 8 MiB: a part of a third-level cache; one pair may be larger."""

CANCELLATION = 1e-3
"""Squared distances below this share of |x|^2 + |y|^2 are formed again from differences of coordinates."""

PATHS_ENTRIES = 1000 * 1000
"""Costs up to which shortest augmenting paths are faster than POT's network simplex whatever the weights: twice at 100,
1.3 times at 1000. With uniform weights on clouds of one size they are faster at any size, 5 to 20 times."""

FLOAT_COSTS = 64, 1e-5
"""Cosine costs are summed in float32, twice as fast, from this d on and where no better tolerance is asked for. Their
error (csrc/cpu/products.h) is a part of the bounds."""

SHARE_OF_COSTS = 0.2, 1e-2
"""Float32 costs are made again in float64 where their error is more than this share of the gap, or of this gap if none
is asked for: between very near clouds."""

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
    gap: float = 0.0,
    potentials: dict[Pair, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Distances of ``pairs`` of packed clouds; see :func:`cit_fast.ops.wasserstein.reference.wasserstein_matrix`."""
    bounds = offsets.tolist()
    clouds = [make_cloud(points[i:j], weights[i:j], metric) for i, j in itertools.pairwise(bounds)]
    solver = _Solver(clouds, metric, p, tolerance, max_iterations, gap, potentials)
    if method == "sinkhorn" and metric == "cosine" and p == 1 and (gap > 0 or tolerance >= FLOAT_COSTS[1]):
        solver.single = points.shape[1] >= FLOAT_COSTS[0]
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


@register("wasserstein_gradient", Backend.NATIVE)
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
    """See :func:`cit_fast.ops.wasserstein.reference_gradient.wasserstein_gradient`."""
    clouds = [make_cloud(points[i:j], weights[i:j], metric) for i, j in itertools.pairwise(offsets.tolist())]
    solver = _Solver(clouds, metric, p, tolerance, max_iterations, gap)
    terms = pair_terms(pairs, distances, gradient, p)

    def transports(some: Iterable[Term]) -> Iterator[Transport]:
        return solver.transports(list(some), None if method == "exact" else epsilon or 0.0)

    divergence = method == "sinkhorn-divergence"
    return accumulate(points, offsets, weights, clouds, terms, transports, metric, p, divergence=divergence)


def _differ(clouds: list[Cloud], pairs: Tensor) -> Tensor:
    """[M] bool: whether the two clouds of a pair are not the same points with the same weights in the same order."""
    kind: list[int] = []
    kinds = 0
    # Only clouds whose first and last point are equal are compared in whole. Adding 0 makes -0 and 0 the same bytes.
    alike: dict[tuple[int, bytes], list[int]] = {}
    for index, (points, weights) in enumerate(clouds):
        ends = (points[[0, -1]] + 0.0).numpy().tobytes()
        candidates = alike.setdefault((len(points), ends), [])
        for other in candidates:
            if torch.equal(weights, clouds[other].weights) and torch.equal(points, clouds[other].points):
                kind.append(kind[other])
                break
        else:
            kind.append(kinds)
            kinds += 1
            candidates.append(index)
    kinds_of_pairs = torch.tensor(kind)[pairs.long()]
    return kinds_of_pairs[:, 0] != kinds_of_pairs[:, 1]


class _Solver:
    """The clouds of one call and its options."""

    def __init__(
        self,
        clouds: list[Cloud],
        metric: str,
        p: float,
        tolerance: float,
        max_iterations: int,
        gap: float = 0.0,
        potentials: dict[Pair, Tensor] | None = None,
    ) -> None:
        self.clouds, self.metric, self.p = clouds, metric, p
        self.tolerance, self.max_iterations, self.gap = tolerance, max_iterations, gap
        self.potentials = potentials
        self.single = False
        # Numbers, because a tensor takes microseconds to tell its size and address, and pairs are many.
        self.sizes = [cloud.weights.shape[0] for cloud in clouds]
        self.weights_at = [cloud.weights.data_ptr() for cloud in clouds]
        self.panels: dict[bool, list[Tensor]] = {}

    @functools.cached_property
    def uniform(self) -> list[bool]:
        return [bool((cloud.weights == cloud.weights[0]).all()) for cloud in self.clouds]

    def by_paths(self, pair: Pair) -> bool:
        """Whether shortest augmenting paths are the fastest exact solver."""
        i, j = pair
        balanced = self.uniform[i] and self.uniform[j] and self.sizes[i] == self.sizes[j]
        return balanced or self.entries(pair) <= PATHS_ENTRIES

    @property
    def cost_error(self) -> float:
        from cit_fast import _native

        return _native.FLOAT_COST_ERROR if self.single else 0.0

    def exact(self, pairs: list[Pair]) -> Tensor:
        """[M, 5]: distance to the power p three times, then 0 and 0."""
        values = torch.zeros(len(pairs), dtype=torch.float64)
        done = 0
        for batch, costs in self.batches(pairs):
            here: list[int] = []
            there: list[int] = []
            for k, pair in enumerate(batch):
                (here if self.by_paths(pair) else there).append(k)
            results = torch.zeros(len(here), 6, dtype=torch.float64)
            table = self.table([batch[k] for k in here], [costs.at[k] for k in here])
            self.paths(table, 0.0, results)
            for k, broken in zip(here, results[:, 5].isnan().tolist(), strict=True):
                if broken:
                    raise self.overflow(batch[k])
            values[done + torch.tensor(here, dtype=torch.int64)] = results[:, 1]
            there += [k for k, iterations in zip(here, results[:, 3].tolist(), strict=True) if iterations < 0]
            for k, value in zip(there, self.simplex([batch[k] for k in there], [costs[k] for k in there]), strict=True):
                values[done + k] = value
            done += len(batch)
        return torch.stack([values, values, values, torch.zeros_like(values), torch.zeros_like(values)], dim=1)

    def simplex(self, pairs: list[Pair], costs: list[Tensor]) -> list[float]:
        """POT lets go of the interpreter lock while it pivots."""

        def solve(pair: Pair, cost: Tensor) -> float:
            largest = float(cost.max())
            if not math.isfinite(largest):
                raise self.overflow(pair)
            a, b = (self.clouds[index].weights for index in pair)
            return pivot(cost, a, b, f"between clouds {pair[0]} and {pair[1]}") if largest > 0 else 0.0

        if not pairs:
            return []
        # The filters of warnings are common to all threads.
        with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
            warnings.simplefilter("ignore")
            return list(pool.map(solve, pairs, costs))

    def entropic(self, pairs: list[Pair], epsilon: float | None, *, divergence: bool) -> Tensor:
        """[M, 5]: distance, lower, upper, all to the power p; iterations; marginal error."""
        if self.gap > 0 and not divergence and self.potentials is None:
            results = self.certified(pairs, epsilon)
        else:
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
        values = torch.stack([distance, lower, upper, iterations, error], dim=1)
        if self.single:
            share, default = SHARE_OF_COSTS
            near = (2 * self.cost_error > share * (self.gap or default) * upper).nonzero().flatten().tolist()
            self.single = False
            if near:
                values[near] = self.entropic([pairs[k] for k in near], epsilon, divergence=divergence)
        return values

    def certified(self, pairs: list[Pair], epsilon: float | None) -> Tensor:
        """[M, 6], as :meth:`sinkhorn`: bounds as near as asked for. Where shortest paths solve a pair fast, they get
        there in a fraction of the time Sinkhorn takes at a small epsilon."""
        results = torch.zeros(len(pairs), 6, dtype=torch.float64)
        results[:, 3] = -1
        some = [k for k, pair in enumerate(pairs) if self.by_paths(pair)]
        done = 0
        for batch, costs in self.batches(pairs[k] for k in some):
            out = torch.empty(len(batch), 6, dtype=torch.float64)
            self.paths(self.table(batch, costs.at), self.gap, out)
            for k in out[:, 5].isnan().nonzero().flatten().tolist():
                raise self.overflow(batch[k])
            results[some[done : done + len(batch)]] = out
            done += len(batch)
        rest = (results[:, 3] < 0).nonzero().flatten().tolist()
        if rest:
            results[rest] = self.sinkhorn([pairs[k] for k in rest], [epsilon or 0.0] * len(rest), clamp=True)
        return results

    def paths(self, table: list[int], gap: float, results: Tensor) -> None:
        from cit_fast import _native

        _native.exact_transport(
            table, gap=gap, cost_error=self.cost_error, threads=torch.get_num_threads(), results=results.data_ptr()
        )

    def transports(self, terms: list[Term], epsilon: float | None) -> Iterator[Transport]:
        """Plans and potentials; exact ones where epsilon is None, else at a term's own epsilon if it has one."""
        from cit_fast import _native

        done = 0
        for batch, costs in self.batches([(i, j) for i, j, _ in terms]):
            own = [at_epsilon for _, _, at_epsilon in terms[done : done + len(batch)]]
            done += len(batch)
            wanted = [(torch.empty_like(c), c.new_empty(c.shape[0]), c.new_empty(c.shape[1])) for c in costs]
            results = torch.empty(len(batch), 6, dtype=torch.float64)
            table, threads = self.table(batch, costs.at, wanted), torch.get_num_threads()
            if epsilon is None:
                self.paths(table, 0.0, results)
            else:
                _native.sinkhorn(
                    table,
                    [each or epsilon for each in own],
                    tolerance=self.tolerance,
                    max_iterations=self.max_iterations,
                    gap=0.0 if own[0] else self.gap,
                    cost_error=0.0,
                    clamp_epsilon=not own[0],
                    threads=threads,
                    results=results.data_ptr(),
                )
            for (i, j), cost, transport, result in zip(batch, costs, wanted, results.tolist(), strict=True):
                base = cost ** (1 / self.p) if self.p != 1 else cost
                if result[3] < 0:
                    yield Transport(base, *simplex_plan(cost, self.clouds[i].weights, self.clouds[j].weights), 0.0)
                else:
                    yield Transport(base, *transport, result[5])

    def sinkhorn(self, pairs: list[Pair], epsilons: list[float], *, clamp: bool) -> Tensor:
        """[M, 6]: csrc/cpu/wasserstein.h, TransportResult. Epsilon 0: automatic. Not clamped: of self terms."""
        from cit_fast import _native

        results = torch.empty(len(pairs), 6, dtype=torch.float64)
        done = 0
        for batch, costs in self.batches(pairs):
            out = results[done : done + len(batch)]
            starts, ends = self.warm(batch) if clamp else ([], [])
            _native.sinkhorn(
                self.table(batch, costs.at, starts=starts, ends=ends),
                epsilons[done : done + len(batch)],
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
                gap=self.gap if clamp else 0.0,
                cost_error=self.cost_error,
                clamp_epsilon=clamp,
                threads=torch.get_num_threads(),
                results=out.data_ptr(),
            )
            if self.potentials is not None:
                self.potentials.update(zip(batch, ends, strict=False))
            for k in out[:, 5].isnan().nonzero().flatten().tolist():
                raise self.overflow(batch[k])
            done += len(batch)
        return results

    def warm(self, batch: list[Pair]) -> tuple[list[Tensor | None], list[Tensor]]:
        """Potentials to start from, and memory for those of this call."""
        if self.potentials is None:
            return [], []
        starts: list[Tensor | None] = []
        for pair in batch:
            start, b = self.potentials.get(pair), self.clouds[pair[1]].weights
            starts.append(start if start is not None and start.shape == b.shape else None)
        return starts, [torch.empty_like(self.clouds[j].weights) for _, j in batch]

    def table(
        self,
        pairs: list[Pair],
        costs_at: list[int],
        wanted: Sequence[tuple[Tensor, Tensor, Tensor]] = (),
        starts: Sequence[Tensor | None] = (),
        ends: Sequence[Tensor] = (),
    ) -> list[int]:
        """csrc/bindings.cpp, kTransportColumns."""
        table: list[int] = []
        for k, ((i, j), cost_at) in enumerate(zip(pairs, costs_at, strict=True)):
            n, m = self.sizes[i], self.sizes[j]
            table += [cost_at, n, m, m, self.weights_at[i], self.weights_at[j]]
            table += [each.data_ptr() for each in wanted[k]] if wanted else [0, 0, 0]
            start = starts[k] if starts else None
            table += [0 if start is None else start.data_ptr(), ends[k].data_ptr() if ends else 0]
        return table

    def overflow(self, pair: Pair) -> DataError:
        return DataError(
            f"clouds {pair[0]} and {pair[1]}: their cost {self.metric}^{self.p:g} overflows float64; "
            f"scale the points down"
        )

    def batches(self, pairs: Iterable[Pair]) -> Iterator[tuple[list[Pair], _Costs]]:
        """Pairs with their costs c(x_m, y_n)^p. The memory is used again for the next batch."""
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
        return self.sizes[pair[0]] * self.sizes[pair[1]]

    def costs(self, batch: list[Pair], memory: Tensor) -> _Costs:
        costs = _Costs(memory, [(self.sizes[i], self.sizes[j]) for i, j in batch])
        if self.metric == "cosine":
            self.cosine_costs(batch, costs.at)
        else:
            for (i, j), cost in zip(batch, costs, strict=True):
                _squared_distances(self.clouds[i].points, self.clouds[j].points, cost)
            if self.metric == "euclidean":
                memory.sqrt_()
        if self.p != 1:
            memory.pow_(self.p)
        return costs

    def cosine_costs(self, batch: list[Pair], costs_at: list[int]) -> None:
        from cit_fast import _native

        if self.single not in self.panels:
            self.panels[self.single] = _packed(self.clouds, torch.float32 if self.single else torch.float64)
        at = [panel.data_ptr() for panel in self.panels[self.single]]
        d = self.clouds[0].points.shape[1]
        table: list[int] = []
        for (i, j), cost_at in zip(batch, costs_at, strict=True):
            table += [at[i], at[j], cost_at, self.sizes[i], self.sizes[j], d]
        _native.cosine_costs(table, single=self.single, rounding=COSINE_ROUNDING, threads=torch.get_num_threads())


class _Costs(Sequence[Tensor]):
    """Costs [n, m], float64, one after another in one memory; and their addresses, ``at``."""

    def __init__(self, memory: Tensor, shapes: list[tuple[int, int]]) -> None:
        self.memory, self.shapes = memory, shapes
        self.starts = list(itertools.accumulate((n * m for n, m in shapes), initial=0))
        self.at = [memory.data_ptr() + 8 * start for start in self.starts[:-1]]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, k: Any) -> Any:
        return self.memory[self.starts[k] : self.starts[k + 1]].view(self.shapes[k])


def _packed(clouds: list[Cloud], dtype: torch.dtype) -> list[Tensor]:
    """Points in the order in which csrc/cpu/products.h reads them."""
    from cit_fast import _native

    panels = [torch.empty(_native.packed_size(*points.shape), dtype=dtype) for points, _ in clouds]
    table: list[int] = []
    for (points, _), panel in zip(clouds, panels, strict=True):
        table += [points.data_ptr(), panel.data_ptr(), *points.shape]
    _native.pack_clouds(table, single=dtype == torch.float32, threads=torch.get_num_threads())
    return panels


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
