"""The Triton backend of ``wasserstein_matrix``: tables for, and launches of, the kernels in kernels/wasserstein.py.

The kernels are compiled for sm_80 and sm_90 and interpreted on the CPU in the tests, but have not run on a GPU yet, so
they serve only where the backend is forced. ``method="exact"`` runs on the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cit_fast.errors import BackendError, CitFastError
from cit_fast.ops.backends import Backend, register
from cit_fast.ops.wasserstein import device
from cit_fast.ops.wasserstein.device import Batch

# As in kernels/wasserstein.py, which can be imported only where triton is installed.
_DONE = 7
_TARGET, _TOLERANCE, _MOST = 2, 3, 4

# Columns at most, the warps that take them and the registers of a thread, set so that the compiler does not spill and
# at least 256 threads fit a processor. A tile of K is whole rows, a tile of float64 parts of rows: 16 and 2 elements
# for each thread.
_WIDTHS = {64: (4, 168), 256: (4, 128), 1024: (8, 168), 4096: (8, 168), 8192: (16, 128)}
_TILE, _FINE_TILE = 16 * 32, 2 * 32
_CHUNK = 256
_COMBINE = {"num_warps": 4, "maxnreg": 128}

# Pairs of this many costs or columns are shared among programs, so many rows each.
_LARGE, _WIDE = 1 << 18, 4096
_STRIP = 64

# Passes over large pairs between two looks of the host whether they are done.
_PASSES = 32
_COARSE_PASSES = 32 * 24  # at most: halvings of epsilon, two for each of 10 iterations, and a few before and after


@register("wasserstein_matrix", Backend.TRITON, only_when_forced=True)
def _wasserstein_matrix(
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
    with torch.cuda.device(points.device) if points.device.type == "cuda" else nullcontext():
        return device.wasserstein_matrix(
            _solve, points, offsets, weights, pairs, metric, p, method, epsilon, tolerance, max_iterations
        )


class _Layout(NamedTuple):
    """Where a batch's pairs are in the scratch memory; the columns of ``table`` are in kernels/wasserstein.py."""

    table: Tensor
    """[pairs, 10] int64."""
    vectors: int
    partials: int
    strips: int


def _layout(table: Tensor) -> _Layout:
    n, m = table[:, 2], table[:, 3]
    if int(m.max()) > max(_WIDTHS):
        raise BackendError(
            f"wasserstein_matrix: the triton backend takes at most {max(_WIDTHS)} points in the second cloud of a "
            f"pair, not {int(m.max())}; use backend 'reference'"
        )
    strips = torch.where(_is_large(table), (n + _STRIP - 1) // _STRIP, 1)
    lengths = torch.stack([4 * m + 3 * n, strips, 2 * strips * m])
    ends = lengths.cumsum(dim=1)
    first = ends - lengths
    columns = [*table.unbind(dim=1), first[0], strips, first[1], first[2]]
    vectors, count, partials = ends[:, -1].tolist()
    return _Layout(torch.stack(columns, dim=1), vectors, partials, count)


def _solve(batch: Batch) -> Tensor:
    """The pairs of a batch, small ones in a launch for each width, largest first; then the large ones."""
    from cit_fast.kernels.wasserstein import combine_kernel, pass_kernel, solve_kernel

    where = batch.costs.device
    layout = _layout(batch.table)
    state = torch.zeros(len(layout.table), 16, dtype=torch.float64, device=where)
    state[:, 1] = 1.0
    state[:, _TARGET] = batch.epsilons
    state[:, _TOLERANCE] = batch.tolerance
    state[:, _MOST] = batch.max_iterations
    table = layout.table.to(where)
    vectors, partials = (state.new_empty(size) for size in (layout.vectors, layout.partials))
    scalars, results = state.new_empty(layout.strips, 8), state.new_empty(len(table), 6)
    kernels = torch.empty_like(batch.costs)
    matrix = (table, state, batch.costs, kernels, batch.weights, vectors, partials, scalars)
    between = (table, state, batch.weights, vectors, partials, scalars, results)

    large: list[tuple[Tensor, int, dict[str, Any]]] = []
    for block, small_order, large_order in _orders(layout.table):
        options = _options(block)
        if len(small_order):
            solve_kernel[(len(small_order),)](small_order.to(where), *matrix, results, **options)
        if len(large_order):
            most = int(layout.table[large_order.long(), 7].max())
            large.append((large_order.to(where), most, options))
    for order, strips, options in large:
        combine = {"CHUNK": options["CHUNK"], **_COMBINE}
        for _ in range(0, _COARSE_PASSES + 2 * batch.max_iterations, _PASSES):
            for _ in range(_PASSES):
                pass_kernel[(strips, len(order))](order, *matrix, **options)
                combine_kernel[(len(order),)](order, *between, **combine)
            if bool((state[order.long(), 0] == _DONE).all()):
                break
        else:
            raise CitFastError("wasserstein_matrix: the triton backend did not come to an end; use backend 'reference'")
    return results


def _orders(table: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """For each width of a tile, the pairs that one program solves and those that many share, largest first."""
    size = table[:, 2] * table[:, 3]
    blocks = torch.tensor(sorted(_WIDTHS))
    block = blocks[torch.searchsorted(blocks, table[:, 3].contiguous())]
    orders = []
    for width in sorted(set(block.tolist())):
        pairs = (block == width).nonzero()[:, 0]
        pairs = pairs[size[pairs].argsort(descending=True, stable=True)]
        is_large = _is_large(table[pairs])
        small, large = (pairs[each].to(torch.int32) for each in (~is_large, is_large))
        orders.append((width, small, large))
    return orders


def _is_large(table: Tensor) -> Tensor:
    n, m = table[:, 2], table[:, 3]
    return (n * m >= _LARGE) | (m > _WIDE)


def _options(block: int) -> dict[str, Any]:
    (warps, registers), chunk = _WIDTHS[block], min(block, _CHUNK)
    return {
        "TILE_ROWS": max(1, _TILE * warps // block),
        "BLOCK": block,
        "FINE_ROWS": _FINE_TILE * warps // chunk,
        "CHUNK": chunk,
        "num_warps": warps,
        "maxnreg": registers,
    }
