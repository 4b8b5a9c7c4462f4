"""Wasserstein distances on a GPU: costs in batches for the kernels in Triton and CUDA, and the launches of the latter.

Costs are library products in float64: on the GPUs of data centres (A100, H100, H200) as fast as float32 without TF32,
and the bounds need it, for the roundings of a long scalar product in float32 are not small beside a small distance.
Each pair's costs are divided by their largest and stored as float32 once, so that no cost leaves its range; that one
rounding is in the bounds. The costs of one cloud against many are one product and lie side by side.

The kernels in csrc/cuda/wasserstein/ are compiled for sm_80 and sm_90a and run on the host in the tests; on a GPU they
serve where they have proved themselves (:mod:`cit_fast.ops.self_check`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from cit_fast.errors import BackendError
from cit_fast.ops.wasserstein.reference import (
    COSINE_ROUNDING,
    EPSILON_RANGE,
    Cloud,
    Distances,
    Pair,
    TransportOptions,
    overflow,
    solve_pairs,
    squared_distances,
)

BATCH_ENTRIES = 1 << 27
"""Costs held at a time, 512 MiB, and as much again for the iterations; one pair may be larger."""

GROUP_ENTRIES = 1 << 25
"""Costs formed at a time in float64, 256 MiB; one pair may be larger."""

COST_ROUNDING = 2.0**-22
"""Relative: costs are rounded to float32, 2^-24, after roundings in float64."""


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
    options: TransportOptions


Iterate = Callable[[Batch], Tensor]
"""To [pairs, 5] float64: lower and upper bound, iterations, marginal error, epsilon."""


def wasserstein_matrix(
    points: Tensor, offsets: Tensor, weights: Tensor, pairs: Tensor, options: TransportOptions
) -> Distances:
    """Distances by the CUDA kernels; see :func:`cit_fast.ops.wasserstein.reference.wasserstein_matrix`."""
    return on_gpu(iterate, points, offsets, weights, pairs, options)


def fits(points: int, device: torch.device) -> bool:
    """Whether the CUDA kernels take a cloud of so many points on this GPU."""
    from cit_fast import _native_cuda

    blocks, *_ = _native_cuda.transport_team(1, points, torch.cuda.current_stream(device).device_index)
    return bool(blocks > 0)


def on_gpu(
    iterate: Iterate, points: Tensor, offsets: Tensor, weights: Tensor, pairs: Tensor, options: TransportOptions
) -> Distances:
    """:func:`wasserstein_matrix` with the iterations of some kernels."""

    def solve(clouds: list[Cloud], some: list[Pair]) -> Tensor:
        lower, upper, iterations, error, _ = _Costs(clouds, options).solve(iterate, some).unbind(dim=1)
        return torch.stack([upper, lower, upper, iterations, error], dim=1)

    with torch.cuda.device(points.device) if points.device.type == "cuda" else nullcontext():
        return solve_pairs(points, offsets, weights, pairs, options, solve)


class _Costs:
    """The clouds of one call, packed, and the costs of pairs of them."""

    def __init__(self, clouds: list[Cloud], options: TransportOptions) -> None:
        self.points = torch.cat([cloud.points for cloud in clouds])
        self.weights = torch.cat([cloud.weights for cloud in clouds])
        self.sizes = [len(cloud.weights) for cloud in clouds]
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.options = options
        self.device = self.points.device

    def solve(self, iterate: Iterate, pairs: list[Pair]) -> Tensor:
        """[M, 5] like :data:`Iterate`, in units of c^p."""
        results = torch.empty(len(pairs), 5, dtype=torch.float64, device=self.device)
        given = self.options.epsilon or 0.0
        # A batch's costs are shares of their largest, hence its epsilons too, and the results go back to units of c^p.
        for batch in self._batches(pairs):
            places = torch.tensor([place for group in batch for place in group], device=self.device)
            costs, table, largest = self._shares(pairs, batch)
            if not largest.isfinite().all():
                raise overflow(pairs[int(places[int((~largest.isfinite()).nonzero()[0])])], self.options)
            share = (given / largest).clamp(*EPSILON_RANGE) if given > 0 else torch.zeros_like(largest)
            share = share.where(largest > 0, 1.0)
            solved = iterate(Batch(costs, table, self.weights, share, self.options)).where(largest[:, None] > 0, 0.0)
            solved[:, 0] *= 1 - COST_ROUNDING
            solved[:, 1] *= 1 + COST_ROUNDING
            solved[:, [0, 1, 4]] *= largest[:, None]
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
        sizes = self.sizes
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

    def _shares(self, pairs: list[Pair], batch: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """:attr:`Batch.costs`, :attr:`Batch.table` and the largest cost of each pair, float64."""
        sizes, starts = self.sizes, self.starts
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
            cost = self._beside(i, others)
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

    def _beside(self, i: int, others: list[int]) -> Tensor:
        """c(x_m, y_n)^p of one cloud against others side by side, [n, sum m] float64."""
        x = self.points[self.starts[i] : self.starts[i + 1]]
        if others == list(range(others[0], others[-1] + 1)):
            y = self.points[self.starts[others[0]] : self.starts[others[-1] + 1]]
        else:
            y = torch.cat([self.points[self.starts[j] : self.starts[j + 1]] for j in others])
        if self.options.metric == "cosine":
            cost = torch.mm(x, y.T).neg_().add_(1)
            cost = torch.threshold_(cost, COSINE_ROUNDING, 0.0)
        else:
            cost = squared_distances(x, y)
            if self.options.metric == "euclidean":
                cost.sqrt_()
        return cost if self.options.p == 1 else cost.pow_(self.options.p)


def iterate(batch: Batch) -> Tensor:
    """The pairs of a batch, those whose teams are alike in one launch."""
    from cit_fast import _native_cuda

    where = batch.costs.device
    stream = torch.cuda.current_stream(where)
    sizes = [(n, m) for _, _, n, m, _, _ in batch.table.tolist()]
    teams = {size: _native_cuda.transport_team(*size, stream.device_index) for size in set(sizes)}
    alike: dict[tuple[int, int, int], list[int]] = {}
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index][0] * sizes[index][1]):
        blocks, threads, shared_bytes, _ = teams[sizes[index]]
        alike.setdefault((blocks, threads, shared_bytes), []).append(index)
    if (0, 0, 0) in alike:
        most = max(sizes[index][1] for index in alike[0, 0, 0])
        raise BackendError(
            f"wasserstein_matrix: the cuda backend has no room for {most} points in the second cloud of a pair; "
            f"use backend 'reference'"
        )
    # Where every team keeps its K in shared memory, none needs room for it in the memory of the device.
    resident = all(stays for *_, stays in teams.values())
    kernels = batch.costs[:0] if resident else torch.empty_like(batch.costs)
    table, epsilons = batch.table.to(where), batch.epsilons.contiguous()
    results = torch.empty(len(sizes), 5, dtype=torch.float64, device=where)
    for (blocks, threads, shared_bytes), members in alike.items():
        rows = max(-(-sizes[index][0] // blocks) for index in members)
        columns = max(sizes[index][1] for index in members)
        possible = _native_cuda.transport_teams_at_once(blocks, threads, shared_bytes, stream.device_index)
        if possible < 1:
            raise BackendError(
                f"wasserstein_matrix: this GPU, or slice of one, cannot run {blocks} blocks of {shared_bytes} bytes of "
                "shared memory together, as the cuda backend would; use backend 'triton' or 'reference'"
            )
        at_once = min(len(members), possible)
        scratch = results.new_empty(at_once * blocks * _native_cuda.transport_scratch(rows, columns))
        order = torch.tensor(members, dtype=torch.int32, device=where)
        following = torch.zeros(1, dtype=torch.int32, device=where)
        _native_cuda.transport(
            table=table.data_ptr(),
            order=order.data_ptr(),
            count=len(members),
            next=following.data_ptr(),
            costs=batch.costs.data_ptr(),
            kernels=kernels.data_ptr(),
            weights=batch.weights.data_ptr(),
            epsilons=epsilons.data_ptr(),
            results=results.data_ptr(),
            scratch=scratch.data_ptr(),
            rows=rows,
            columns=columns,
            shared_bytes=shared_bytes,
            tolerance=batch.options.tolerance,
            max_iterations=batch.options.max_iterations,
            blocks=blocks,
            threads=threads,
            teams=at_once,
            device=stream.device_index,
            stream=stream.cuda_stream,
        )
    return results
