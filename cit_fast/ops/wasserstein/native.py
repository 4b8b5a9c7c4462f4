"""Wasserstein distances in C++ on the CPU (``native``): csrc/cpu/wasserstein/ with its batches and tables here.

Pairs go in batches whose costs fit the memory set aside for them. A pair's result does not depend on its batch.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register
from cit_fast.ops.wasserstein.reference import (
    COSINE_ROUNDING,
    Cloud,
    Distances,
    Pair,
    TransportOptions,
    overflow,
    pivot,
    solve_pairs,
    squared_distances,
)
from cit_fast.ops.wasserstein.reference_gradient import Transport, accumulate, pair_terms, simplex_plan

BATCH_ENTRIES = 1 << 20
"""Costs held at a time, 8 MiB: a part of a third-level cache; one pair may be larger."""

PATHS_ENTRIES = 1000 * 1000
"""Costs up to which shortest augmenting paths are faster than POT's network simplex whatever the weights: twice at 100,
1.3 times at 1000. With uniform weights on clouds of one size they are faster at any size, 5 to 20 times."""

FLOAT_COSTS = 64, 1e-5
"""Cosine costs are summed in float32, twice as fast, from this d on and where no better tolerance is asked for. Their
error (csrc/cpu/wasserstein/products.h) is a part of the bounds."""

SHARE_OF_COSTS = 0.2, 1e-2
"""Float32 costs are made again in float64 where their error is more than this share of the gap, or of this gap if none
is asked for: between very near clouds."""


def _on_the_cpu(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Copies of tensors that are elsewhere go in, results go back: milliseconds, where seconds are worked."""

    @functools.wraps(run)
    def by_way_of_cpu(points: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        if points.device.type == "cpu":
            return run(points, *arguments)
        there = [each.cpu() if isinstance(each, Tensor) else each for each in (points, *arguments)]
        return tuple(each.to(points.device) for each in run(*there))

    return by_way_of_cpu


@register("wasserstein_matrix", Backend.NATIVE, by_way_of_cpu=True)
@_on_the_cpu
def wasserstein_matrix(
    points: Tensor, offsets: Tensor, weights: Tensor, pairs: Tensor, options: TransportOptions
) -> Distances:
    """Distances of ``pairs`` of packed clouds; see :func:`cit_fast.ops.wasserstein.reference.wasserstein_matrix`."""

    def solve(clouds: list[Cloud], some: list[Pair]) -> Tensor:
        solver = _Solver(clouds, options)
        return solver.exact(some) if options.method == "exact" else solver.entropic(some)

    return solve_pairs(points, offsets, weights, pairs, options, solve)


@register("wasserstein_gradient", Backend.NATIVE, by_way_of_cpu=True)
@_on_the_cpu
def wasserstein_gradient(
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    pairs: Tensor,
    distances: Tensor,
    gradient: Tensor,
    options: TransportOptions,
) -> tuple[Tensor, Tensor]:
    """See :func:`cit_fast.ops.wasserstein.reference_gradient.wasserstein_gradient`."""

    def solve(clouds: list[Cloud], some: list[Pair]) -> Iterator[Transport]:
        solver = _Solver(clouds, options)
        solver.use_float32 = False
        return solver.transports(some)

    return accumulate(points, offsets, weights, pair_terms(pairs, distances, gradient, options.p), options, solve)


class _Solver:
    """The clouds of one call and its options."""

    def __init__(self, clouds: list[Cloud], options: TransportOptions) -> None:
        self.clouds, self.options = clouds, options
        self.use_float32 = (
            options.method == "sinkhorn"
            and options.metric == "cosine"
            and options.p == 1
            and (options.gap > 0 or options.tolerance >= FLOAT_COSTS[1])
            and clouds[0].points.shape[1] >= FLOAT_COSTS[0]
        )
        self.threads = torch.get_num_threads()
        # Numbers, because a tensor takes microseconds to tell its size and address, and pairs are many.
        self.sizes = [cloud.weights.shape[0] for cloud in clouds]
        self.weights_at = [cloud.weights.data_ptr() for cloud in clouds]
        self.panels: dict[torch.dtype, list[Tensor]] = {}

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

        return _native.FLOAT_COST_ERROR if self.use_float32 else 0.0

    def exact(self, pairs: list[Pair]) -> Tensor:
        """[M, 5]: distance to the power p three times, then 0 and 0."""
        values = torch.zeros(len(pairs), dtype=torch.float64)
        done = 0
        for batch, costs in self.batches(pairs):
            here: list[int] = []
            there: list[int] = []
            for k, pair in enumerate(batch):
                (here if self.by_paths(pair) else there).append(k)
            results = torch.zeros(len(here), 5, dtype=torch.float64)
            table = self.table([batch[k] for k in here], [costs.at[k] for k in here])
            self.paths(table, 0.0, results)
            self.check([batch[k] for k in here], results)
            values[done + torch.tensor(here, dtype=torch.int64)] = results[:, 1]
            there += [k for k, iterations in zip(here, results[:, 2].tolist(), strict=True) if iterations < 0]
            for k, value in zip(there, self.simplex([batch[k] for k in there], [costs[k] for k in there]), strict=True):
                values[done + k] = value
            done += len(batch)
        return torch.stack([values, values, values, torch.zeros_like(values), torch.zeros_like(values)], dim=1)

    def simplex(self, pairs: list[Pair], costs: list[Tensor]) -> list[float]:
        """POT lets go of the interpreter lock while it pivots."""

        def solve(pair: Pair, cost: Tensor) -> float:
            largest = float(cost.max())
            if not math.isfinite(largest):
                raise overflow(pair, self.options)
            a, b = (self.clouds[index].weights for index in pair)
            return pivot(cost, a, b, f"between clouds {pair[0]} and {pair[1]}") if largest > 0 else 0.0

        if not pairs:
            return []
        # The filters of warnings are common to all threads.
        with warnings.catch_warnings(), ThreadPoolExecutor(self.threads) as pool:
            warnings.simplefilter("ignore")
            return list(pool.map(solve, pairs, costs))

    def entropic(self, pairs: list[Pair]) -> Tensor:
        """[M, 5]: distance, lower, upper, all to the power p; iterations; marginal error."""
        results = self.certified(pairs) if self.options.gap > 0 else self.sinkhorn(pairs)
        lower, upper, iterations, error = (results[:, column] for column in range(4))
        values = torch.stack([upper, lower, upper, iterations, error], dim=1)
        if self.use_float32:
            # Between very near clouds the error of float32 costs is not small: these pairs once more, in float64.
            share, default = SHARE_OF_COSTS
            too_much = 2 * self.cost_error > share * (self.options.gap or default) * upper
            near = too_much.nonzero().flatten().tolist()
            self.use_float32 = False
            if near:
                values[near] = self.entropic([pairs[k] for k in near])
        return values

    def certified(self, pairs: list[Pair]) -> Tensor:
        """[M, 5], as :meth:`sinkhorn`: bounds as near as asked for. Where shortest paths solve a pair fast, they get
        there in a fraction of the time Sinkhorn takes at a small epsilon."""
        results = torch.zeros(len(pairs), 5, dtype=torch.float64)
        results[:, 2] = -1
        some = [k for k, pair in enumerate(pairs) if self.by_paths(pair)]
        done = 0
        for batch, costs in self.batches(pairs[k] for k in some):
            out = torch.empty(len(batch), 5, dtype=torch.float64)
            self.paths(self.table(batch, costs.at), self.options.gap, out)
            self.check(batch, out)
            results[some[done : done + len(batch)]] = out
            done += len(batch)
        rest = (results[:, 2] < 0).nonzero().flatten().tolist()
        if rest:
            results[rest] = self.sinkhorn([pairs[k] for k in rest])
        return results

    def sinkhorn(self, pairs: list[Pair]) -> Tensor:
        """[M, 5]: csrc/cpu/wasserstein/wasserstein.h, TransportResult."""
        results = torch.empty(len(pairs), 5, dtype=torch.float64)
        done = 0
        for batch, costs in self.batches(pairs):
            out = results[done : done + len(batch)]
            self.iterate(self.table(batch, costs.at), out)
            self.check(batch, out)
            done += len(batch)
        return results

    def transports(self, pairs: list[Pair]) -> Iterator[Transport]:
        """Plans and potentials, exact ones or those where Sinkhorn ends."""
        exact, p = self.options.method == "exact", self.options.p
        for batch, costs in self.batches(pairs):
            wanted = [(torch.empty_like(c), c.new_empty(c.shape[0]), c.new_empty(c.shape[1])) for c in costs]
            results = torch.empty(len(batch), 5, dtype=torch.float64)
            table = self.table(batch, costs.at, wanted)
            self.paths(table, 0.0, results) if exact else self.iterate(table, results)
            for (i, j), cost, transport, result in zip(batch, costs, wanted, results.tolist(), strict=True):
                base = cost ** (1 / p) if p != 1 else cost
                gave_up = result[2] < 0  # only shortest paths do
                best = simplex_plan(cost, self.clouds[i].weights, self.clouds[j].weights) if gave_up else transport
                yield Transport(base, *best)

    def paths(self, table: list[int], gap: float, results: Tensor) -> None:
        from cit_fast import _native

        _native.exact_transport(
            table, gap=gap, cost_error=self.cost_error, threads=self.threads, results=results.data_ptr()
        )

    def iterate(self, table: list[int], results: Tensor) -> None:
        from cit_fast import _native

        _native.sinkhorn(
            table,
            epsilon=self.options.epsilon or 0.0,
            tolerance=self.options.tolerance,
            max_iterations=self.options.max_iterations,
            gap=self.options.gap,
            cost_error=self.cost_error,
            threads=self.threads,
            results=results.data_ptr(),
        )

    def check(self, pairs: list[Pair], results: Tensor) -> None:
        """Raise for the first pair with a cost that is not finite, which has no epsilon."""
        for k in results[:, 4].isnan().nonzero().flatten().tolist():
            raise overflow(pairs[k], self.options)

    def table(
        self, pairs: list[Pair], costs_at: list[int], wanted: Sequence[tuple[Tensor, Tensor, Tensor]] = ()
    ) -> list[int]:
        """csrc/bindings.cpp, kTransportColumns."""
        table: list[int] = []
        for k, ((i, j), cost_at) in enumerate(zip(pairs, costs_at, strict=True)):
            n, m = self.sizes[i], self.sizes[j]
            table += [cost_at, n, m, m, self.weights_at[i], self.weights_at[j]]
            table += [each.data_ptr() for each in wanted[k]] if wanted else [0, 0, 0]
        return table

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
        if self.options.metric == "cosine":
            self.cosine_costs(batch, costs.at)
        else:
            for (i, j), cost in zip(batch, costs, strict=True):
                squared_distances(self.clouds[i].points, self.clouds[j].points, cost)
            if self.options.metric == "euclidean":
                memory.sqrt_()
        if self.options.p != 1:
            memory.pow_(self.options.p)
        return costs

    def cosine_costs(self, batch: list[Pair], costs_at: list[int]) -> None:
        from cit_fast import _native

        dtype = torch.float32 if self.use_float32 else torch.float64
        if dtype not in self.panels:
            self.panels[dtype] = _packed(self.clouds, dtype)
        at = [panel.data_ptr() for panel in self.panels[dtype]]
        d = self.clouds[0].points.shape[1]
        table: list[int] = []
        for (i, j), cost_at in zip(batch, costs_at, strict=True):
            table += [at[i], at[j], cost_at, self.sizes[i], self.sizes[j], d]
        _native.cosine_costs(table, use_float32=self.use_float32, rounding=COSINE_ROUNDING, threads=self.threads)


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
    """Points in the order in which csrc/cpu/wasserstein/products.h reads them."""
    from cit_fast import _native

    panels = [torch.empty(_native.packed_size(*points.shape), dtype=dtype) for points, _ in clouds]
    table: list[int] = []
    for (points, _), panel in zip(clouds, panels, strict=True):
        table += [points.data_ptr(), panel.data_ptr(), *points.shape]
    _native.pack_clouds(table, use_float32=dtype == torch.float32, threads=torch.get_num_threads())
    return panels
