"""Entropic transport of many pairs of point clouds with bounds on the exact value: Triton kernels.

    K_ij = exp((g_j - C_ij) / eps + log b_j - max_j)         formed again when v leaves 1e-6 .. 1e6
    u_i  = a_i / sum_j K_ij v_j                              the rows of the plan u_i K_ij v_j are right
    v_j  = b_j / sum_i u_i K_ij                              then its columns

``cit_fast/ops/wasserstein/reference.py`` has the definition, ``csrc/cpu/wasserstein/wasserstein.cpp`` the same steps on
the CPU. An iteration reads K once, in tiles of whole rows: the sum of a row gives its u, with which the row adds to the
sums of the columns. That is 4 bytes and two multiply-adds an entry, no exponential, so what counts is where K is read
from: of a pair up to some 200 x 200 it stays in the first-level cache of the one processor that solves it, and up to
some 3000 x 3000 in the second-level cache of the GPU.

* A pair is a small machine whose state is in memory. ``pass_over`` goes once over the matrix and leaves sums of columns
  (wasserstein_passes.py); ``_combine`` makes the next potentials of them and chooses the next pass. ``solve_kernel``
  runs it to the end in one launch, one program a pair, stopping by itself. For large pairs many programs make a pass,
  in strips of rows, and one combines (``pass_kernel``, ``combine_kernel``); the host looks now and then whether all are
  done.
* Exponents are float64 wherever they are formed: (g - C) / eps goes to 1e9 and its last places are the plan. So are the
  sums of columns and all that the bounds are made of. The plan of the bounds is formed with the same operations in
  MASSES and in BOUNDS, so that its masses are right to the last places whatever the size of the exponents.
* All sums are in a fixed order; there are no atomic operations.

The kernels are compiled for sm_80 and sm_90 and interpreted on the CPU in the tests; on a GPU they serve where they
have proved themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from cit_fast.kernels.wasserstein_passes import (
    BOUNDS,
    COLUMN_WEIGHT,
    COLUMNS,
    COUNT,
    DONE,
    EPSILON,
    ERROR,
    FIRST_STRIP,
    FORM,
    ITERATE,
    MASSES,
    MEAN,
    MEAN_COST,
    MODE,
    MOST,
    NEXT,
    NEXT_EPSILON,
    NEXT_MODE,
    PARTIALS,
    REACH,
    STRIPS,
    TARGET,
    TOLERANCE,
    USED,
    VARIANCE,
    VECTORS,
    G,
    H,
    V,
    pass_over,
    read_mode,
)
from torch import Tensor

from cit_fast.errors import BackendError, CitFastError
from cit_fast.ops.wasserstein import reference
from cit_fast.ops.wasserstein.cuda import Batch, on_gpu
from cit_fast.ops.wasserstein.reference import Distances, TransportOptions

EPSILON_OF_SPREAD = tl.constexpr(reference.EPSILON_OF_SPREAD)
LEAST_EPSILON = tl.constexpr(reference.EPSILON_RANGE[0])
COARSE_TOLERANCE = tl.constexpr(reference.COARSE_TOLERANCE)
COARSE_ITERATIONS = tl.constexpr(reference.COARSE_ITERATIONS)
# As in csrc/sinkhorn.h.
LEAST_MASS = tl.constexpr(1e-25)  # columns with less take no part in the iteration
FLOAT_SHARE = tl.constexpr(0.75)  # where iterations with K in float32 stop, of the tolerance
FLOAT_TOLERANCE = tl.constexpr(5e-7)  # the error that they can reach
LEAST_V = tl.constexpr(1e-6)
MOST_V = tl.constexpr(1e6)
LEAST_SUM = tl.constexpr(1e-30)
LEAST_DOUBLE_SUM = tl.constexpr(1e-290)


@triton.jit
def solve_kernel(
    order,  # [programs] int32: pairs
    table,
    state,
    costs,  # float32
    kernels,  # float32, of the same layout
    weights,  # float64
    vectors,  # float64
    partials,  # float64
    scalars,  # [strips, 8] float64
    results,  # [pairs, 5] float64, written: lower and upper bound, iterations, marginal error, epsilon
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least the columns of each pair
    FINE_ROWS: tl.constexpr,  # a tile of float64
    CHUNK: tl.constexpr,
):
    """All of a pair, which is one strip, by one program."""
    pair = tl.load(order + tl.program_id(0))
    mode = read_mode(state, pair)
    while mode < DONE:
        matrix = (table, state, costs, kernels, weights, vectors, partials, scalars)
        pass_over(matrix, pair, 0, TILE_ROWS, BLOCK, FINE_ROWS, CHUNK)
        tl.debug_barrier()  # other threads read what these wrote to memory
        _combine((table, state, weights, vectors, partials, scalars, results), pair, CHUNK)
        tl.debug_barrier()
        mode = read_mode(state, pair)


@triton.jit
def pass_kernel(
    order,
    table,
    state,
    costs,
    kernels,
    weights,
    vectors,
    partials,
    scalars,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FINE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The next pass over one strip of a pair."""
    pair = tl.load(order + tl.program_id(1))
    strip = tl.program_id(0)
    if (strip < tl.load(table + 10 * pair + STRIPS)) & (read_mode(state, pair) < DONE):
        matrix = (table, state, costs, kernels, weights, vectors, partials, scalars)
        pass_over(matrix, pair, strip, TILE_ROWS, BLOCK, FINE_ROWS, CHUNK)


@triton.jit
def combine_kernel(order, table, state, weights, vectors, partials, scalars, results, CHUNK: tl.constexpr):
    """What follows a pass over all strips of a pair."""
    pair = tl.load(order + tl.program_id(0))
    if read_mode(state, pair) < DONE:
        _combine((table, state, weights, vectors, partials, scalars, results), pair, CHUNK)


# Between the passes


@triton.jit
def _combine(memory, pair, CHUNK: tl.constexpr):
    """The next potentials and the next pass."""
    table, states, weights, vectors, partials, scalars, results = memory
    row = table + 10 * pair
    m = tl.load(row + COLUMNS).to(tl.int32)
    strips = tl.load(row + STRIPS).to(tl.int32)
    by_column = vectors + tl.load(row + VECTORS)
    b_ptr = weights + tl.load(row + COLUMN_WEIGHT)
    sums = partials + tl.load(row + PARTIALS)
    numbers = scalars + 8 * tl.load(row + FIRST_STRIP)
    state = states + 16 * pair
    mode = tl.load(state + MODE).to(tl.int32)
    epsilon, target, next_epsilon = tl.load(state + EPSILON), tl.load(state + TARGET), tl.load(state + NEXT_EPSILON)
    now = (epsilon, target, next_epsilon, tl.load(state + USED), tl.load(state + COUNT))
    tl.debug_barrier()  # all threads have the state before one changes it
    if (mode == FORM) | (mode == ITERATE):
        _after_iteration(state, now, by_column, b_ptr, sums, strips, m, CHUNK)
    elif mode == MASSES:
        _after_masses(state, now, by_column, b_ptr, sums, strips, m, CHUNK)
    elif mode == REACH:
        _after_reach(state, now, by_column, b_ptr, sums, strips, m, CHUNK)
    elif mode == BOUNDS:
        _after_bounds(state, now, b_ptr, sums, numbers, strips, m, results + 5 * pair, CHUNK)
    elif mode == MEAN:
        tl.store(state + MEAN_COST, _sum_numbers(numbers, strips))
        tl.store(state + MODE, VARIANCE + 0.0)
    else:
        target = now[1]
        automatic = tl.maximum(tl.sqrt(_sum_numbers(numbers, strips)) * EPSILON_OF_SPREAD, LEAST_EPSILON)
        target = tl.where(target > 0.0, target, automatic)
        epsilon = tl.maximum(target, 1.0)
        tl.store(state + TARGET, target)
        tl.store(state + EPSILON, epsilon)
        tl.store(state + MODE, FORM + 0.0)
        for left in range(0, m, CHUNK):
            cols = left + tl.arange(0, CHUNK)
            b = tl.load(b_ptr + cols, cols < m, other=0.0)
            _set_potential(by_column, m, cols, b, tl.where(b >= LEAST_MASS, 0.0, float("-inf")).to(tl.float64), epsilon)


@triton.jit
def _set_potential(by_column, m, cols, b, g, epsilon):
    """G, H, and V = 1."""
    tl.store(by_column + G * m + cols, g, cols < m)
    tl.store(by_column + H * m + cols, g / epsilon + tl.log(tl.where(cols < m, b, 1.0)), cols < m)
    tl.store(by_column + V * m + cols, tl.where(b >= LEAST_MASS, 1.0, 0.0).to(tl.float64), cols < m)


@triton.jit
def _after_iteration(state, now, by_column, b_ptr, sums, strips, m, CHUNK: tl.constexpr):
    epsilon, target, _, used, count = now
    used += 1.0
    tolerance = tl.load(state + TOLERANCE)
    error = tl.zeros((CHUNK,), tl.float64)
    smallest = tl.full((CHUNK,), 1.0, tl.float64)
    largest = tl.full((CHUNK,), 1.0, tl.float64)
    least_sum = tl.full((CHUNK,), 1.0, tl.float64)
    for left in range(0, m, CHUNK):
        cols = left + tl.arange(0, CHUNK)
        b = tl.load(b_ptr + cols, cols < m, other=0.0)
        takes_part = b >= LEAST_MASS
        total = _sum_strips(sums, cols, strips, m)
        v = tl.load(by_column + V * m + cols, cols < m, other=0.0)
        error += tl.where(takes_part, tl.abs(v * total - b), 0.0)
        least_sum = tl.minimum(least_sum, tl.where(takes_part, total, 1.0))
        next_v = b / tl.where(total > 1e-300, total, 1e-300)
        next_v = tl.where(takes_part, next_v.to(tl.float32).to(tl.float64), 0.0)
        smallest = tl.minimum(smallest, tl.where(takes_part, next_v, 1.0))
        largest = tl.maximum(largest, next_v)
        tl.store(by_column + NEXT * m + cols, next_v, cols < m)

    coarse = epsilon > target
    enough = tl.where(
        coarse, tl.maximum(tolerance, COARSE_TOLERANCE), tl.maximum(tolerance * FLOAT_SHARE, FLOAT_TOLERANCE)
    )
    most = tl.where(coarse, COARSE_ITERATIONS + 0.0, tl.load(state + MOST))
    stop = (tl.sum(error, axis=0) <= enough) | (used >= most)
    in_range = (tl.min(smallest, axis=0) >= LEAST_V) & (tl.max(largest, axis=0) <= MOST_V)
    reached = tl.min(least_sum, axis=0) >= LEAST_SUM
    finished = stop & (epsilon <= target)
    next_epsilon = tl.where(stop & coarse, tl.maximum(epsilon / 2.0, target), epsilon)
    tl.store(state + COUNT, count + 1.0)
    tl.store(state + USED, tl.where(stop & coarse, 0.0, used))
    tl.debug_barrier()
    if in_range & (stop == 0):
        for left in range(0, m, CHUNK):
            cols = left + tl.arange(0, CHUNK)
            tl.store(by_column + V * m + cols, tl.load(by_column + NEXT * m + cols, cols < m), cols < m)
        tl.store(state + MODE, ITERATE + 0.0)
    else:
        # The plan at the end is that of this K and v, and so is the one that columns are reached from.
        moved = reached & (finished == 0)
        at_epsilon = tl.where(moved, next_epsilon, epsilon)
        for left in range(0, m, CHUNK):
            cols = left + tl.arange(0, CHUNK)
            b = tl.load(b_ptr + cols, cols < m, other=0.0)
            takes_part = b >= LEAST_MASS
            v = tl.load(by_column + V * m + cols, cols < m, other=1.0)
            v = tl.where(moved, tl.load(by_column + NEXT * m + cols, cols < m, other=1.0), v)
            g = tl.load(by_column + G * m + cols, cols < m, other=0.0)
            g += tl.where(takes_part, epsilon * tl.log(tl.where(takes_part, v, 1.0)), 0.0)
            _set_potential(by_column, m, cols, b, g, at_epsilon)
        tl.store(state + EPSILON, at_epsilon)
        tl.store(state + NEXT_MODE, FORM + 0.0)
        tl.store(state + NEXT_EPSILON, next_epsilon)
        tl.store(state + MODE, tl.where(finished, MASSES + 0.0, tl.where(reached, FORM + 0.0, REACH + 0.0)))


@triton.jit
def _after_masses(state, now, by_column, b_ptr, sums, strips, m, CHUNK: tl.constexpr):
    epsilon, _, _, used, count = now
    error = tl.zeros((CHUNK,), tl.float64)
    least_sum = tl.full((CHUNK,), 1.0, tl.float64)
    for left in range(0, m, CHUNK):
        cols = left + tl.arange(0, CHUNK)
        b = tl.load(b_ptr + cols, cols < m, other=0.0)
        total = _sum_strips(sums, cols, strips, m)
        error += tl.abs(total - b)
        least_sum = tl.minimum(least_sum, tl.where(b >= LEAST_MASS, total, 1.0))
    marginal_error = tl.sum(error, axis=0)
    reached = tl.min(least_sum, axis=0) >= LEAST_DOUBLE_SUM
    if (marginal_error <= tl.load(state + TOLERANCE)) | (used >= tl.load(state + MOST)):
        for left in range(0, m, CHUNK):
            cols = left + tl.arange(0, CHUNK)
            b = tl.load(b_ptr + cols, cols < m, other=0.0)
            total = _sum_strips(sums, cols, strips, m)
            kept = tl.where(total > b, b / tl.where(total > b, total, 1.0), 1.0)
            tl.store(by_column + V * m + cols, kept, cols < m)
            tl.store(by_column + NEXT * m + cols, tl.maximum(b - total, 0.0), cols < m)
        tl.store(state + ERROR, marginal_error)
        tl.store(state + MODE, BOUNDS + 0.0)
    else:
        tl.store(state + COUNT, count + 1.0)
        tl.store(state + USED, used + 1.0)
        if reached:
            for left in range(0, m, CHUNK):
                cols = left + tl.arange(0, CHUNK)
                b = tl.load(b_ptr + cols, cols < m, other=0.0)
                takes_part = b >= LEAST_MASS
                ratio = tl.where(takes_part, b, 1.0) / tl.where(takes_part, _sum_strips(sums, cols, strips, m), 1.0)
                g = tl.load(by_column + G * m + cols, cols < m, other=0.0)
                _set_potential(by_column, m, cols, b, g + epsilon * tl.log(ratio), epsilon)
        else:
            tl.store(state + NEXT_MODE, MASSES + 0.0)
            tl.store(state + NEXT_EPSILON, epsilon)
            tl.store(state + MODE, REACH + 0.0)


@triton.jit
def _after_reach(state, now, by_column, b_ptr, sums, strips, m, CHUNK: tl.constexpr):
    epsilon, _, next_epsilon, _, _ = now
    for left in range(0, m, CHUNK):
        cols = left + tl.arange(0, CHUNK)
        b = tl.load(b_ptr + cols, cols < m, other=0.0)
        top = tl.full((CHUNK,), float("-inf"), tl.float64)
        total = tl.zeros((CHUNK,), tl.float64)
        for strip in range(strips):
            its_top = tl.load(sums + 2 * strip * m + cols, cols < m, other=0.0)
            its_total = tl.load(sums + (2 * strip + 1) * m + cols, cols < m, other=1.0)
            new = tl.maximum(top, its_top)
            total = total * tl.exp(top - new) + its_total * tl.exp(its_top - new)
            top = new
        g = tl.where(b >= LEAST_MASS, -epsilon * (top + tl.log(total)), float("-inf"))
        _set_potential(by_column, m, cols, b, g, next_epsilon)
    tl.store(state + EPSILON, next_epsilon)
    tl.store(state + MODE, tl.load(state + NEXT_MODE))


@triton.jit
def _after_bounds(state, now, b_ptr, sums, numbers, strips, m, out, CHUNK: tl.constexpr):
    lower = tl.zeros((CHUNK,), tl.float64)
    for left in range(0, m, CHUNK):
        cols = left + tl.arange(0, CHUNK)
        b = tl.load(b_ptr + cols, cols < m, other=0.0)
        least = tl.full((CHUNK,), float("inf"), tl.float64)
        for strip in range(strips):
            least = tl.minimum(least, tl.load(sums + 2 * strip * m + cols, cols < m, other=0.0))
        lower += b * least
    missing_mass = _sum_numbers(numbers + 2, strips)
    missing_cost = _sum_numbers(numbers + 1, strips) / tl.where(missing_mass > 0.0, missing_mass, 1.0)
    upper = _sum_numbers(numbers, strips) + missing_cost
    dual = _sum_numbers(numbers + 3, strips) + tl.sum(lower, axis=0)
    tl.store(out, tl.maximum(tl.minimum(dual, upper), 0.0))
    tl.store(out + 1, upper)
    tl.store(out + 2, now[4])
    tl.store(out + 3, tl.load(state + ERROR))
    tl.store(out + 4, now[0])
    tl.store(state + MODE, DONE + 0.0)


@triton.jit
def _sum_strips(sums, cols, strips, m):
    total = tl.zeros_like(cols).to(tl.float64)
    for strip in range(strips):
        total += tl.load(sums + 2 * strip * m + cols, cols < m, other=0.0)
    return total


@triton.jit
def _sum_numbers(numbers, strips):
    total = tl.load(numbers)
    for strip in range(1, strips):
        total += tl.load(numbers + 8 * strip)
    return total


# --- launches ---

# Columns at most, the warps that take them and the registers of a thread, set so that the compiler does not spill and
# at least 256 threads fit a processor. A tile of K is whole rows, a tile of float64 parts of rows: 16 and 2 elements
# for each thread.
_WIDTHS = {64: (4, 168), 128: (4, 128), 256: (4, 128), 512: (8, 128), 1024: (8, 168), 4096: (8, 168), 8192: (16, 128)}
_TILE, _FINE_TILE = 16 * 32, 2 * 32
_CHUNK = 256
# Contracted whatever the default of a version of Triton: where it matters fma is written out.
_COMBINE = {"num_warps": 4, "maxnreg": 128, "enable_fp_fusion": True}

# Pairs of this many costs or columns are shared among programs, so many rows each.
_LARGE, _WIDE = 1 << 18, 4096
_STRIP = 64

# Passes over large pairs between two looks of the host whether they are done.
_PASSES = 32
_COARSE_PASSES = 32 * 24  # at most: halvings of epsilon, two for each of 10 iterations, and a few before and after


def wasserstein_matrix(
    points: Tensor, offsets: Tensor, weights: Tensor, pairs: Tensor, options: TransportOptions
) -> Distances:
    """Distances by these kernels; see :func:`cit_fast.ops.wasserstein.reference.wasserstein_matrix`."""
    return on_gpu(iterate, points, offsets, weights, pairs, options)


class _Layout(NamedTuple):
    """Where a batch's pairs are in the scratch memory; the columns of ``table`` are in wasserstein_passes.py."""

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


def iterate(batch: Batch) -> Tensor:
    """The pairs of a batch, small ones in a launch for each width, largest first; then the large ones."""
    # The host looks only now and then whether large pairs are done, because each look waits for the device.
    where = batch.costs.device
    layout = _layout(batch.table)
    state = torch.zeros(len(layout.table), 16, dtype=torch.float64, device=where)
    state[:, EPSILON.value] = 1.0
    state[:, TARGET.value] = batch.epsilons
    state[:, TOLERANCE.value] = batch.options.tolerance
    state[:, MOST.value] = batch.options.max_iterations
    table = layout.table.to(where)
    vectors, partials = (state.new_empty(size) for size in (layout.vectors, layout.partials))
    scalars, results = state.new_empty(layout.strips, 8), state.new_empty(len(table), 5)
    kernels = torch.empty_like(batch.costs)
    matrix = (table, state, batch.costs, kernels, batch.weights, vectors, partials, scalars)
    between = (table, state, batch.weights, vectors, partials, scalars, results)

    large: list[tuple[Tensor, int, dict[str, Any]]] = []
    for block, small_order, large_order in _orders(layout.table):
        options = _options(block)
        if len(small_order):
            solve_kernel[(len(small_order),)](small_order.to(where), *matrix, results, **options)
        if len(large_order):
            most = int(layout.table[large_order.long(), STRIPS.value].max())
            large.append((large_order.to(where), most, options))
    for order, strips, options in large:
        combine = {"CHUNK": options["CHUNK"], **_COMBINE}
        for _ in range(0, _COARSE_PASSES + 2 * batch.options.max_iterations, _PASSES):
            for _ in range(_PASSES):
                pass_kernel[(strips, len(order))](order, *matrix, **options)
                combine_kernel[(len(order),)](order, *between, **combine)
            if bool((state[order.long(), MODE.value] == DONE.value).all()):
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
        "enable_fp_fusion": True,
    }
