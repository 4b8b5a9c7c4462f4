"""Entropic transport in Triton: passes over the matrix of a pair, and how its memory is laid out. See wasserstein.py.

A pass reads all rows of a strip. In float64 it goes through a strip in small tiles: first along rows for what belongs
to rows, which it leaves in memory, then along columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The next pass.
MEAN = tl.constexpr(0)  # sum_ij a_i b_j C_ij
VARIANCE = tl.constexpr(1)
FORM = tl.constexpr(2)  # K, then an iteration
ITERATE = tl.constexpr(3)
MASSES = tl.constexpr(4)  # of the columns of the plan, in float64; an iteration where they are wrong
REACH = tl.constexpr(5)  # log-domain update of the columns, for columns whose mass is below the smallest number
BOUNDS = tl.constexpr(6)
DONE = tl.constexpr(7)

# Columns of `state` [pairs, 16], float64.
MODE = tl.constexpr(0)
EPSILON = tl.constexpr(1)  # of this level of the epsilon scaling
TARGET = tl.constexpr(2)  # of the last level; 0 on entry: automatic
TOLERANCE = tl.constexpr(3)
MOST = tl.constexpr(4)  # iterations of the last level
USED = tl.constexpr(5)  # iterations of this level
COUNT = tl.constexpr(6)  # of all levels
MEAN_COST = tl.constexpr(7)
ERROR = tl.constexpr(8)
NEXT_MODE = tl.constexpr(9)  # after REACH
NEXT_EPSILON = tl.constexpr(10)

# Columns of `table` [pairs, 10], int64.
COST = tl.constexpr(0)  # first entry in costs and kernels
STRIDE = tl.constexpr(1)
ROWS = tl.constexpr(2)
COLUMNS = tl.constexpr(3)
ROW_WEIGHT = tl.constexpr(4)  # first
COLUMN_WEIGHT = tl.constexpr(5)
VECTORS = tl.constexpr(6)  # first element of the pair's vectors: G, V, NEXT, H of m, then TOP, RATIO, F of n
STRIPS = tl.constexpr(7)  # of rows
FIRST_STRIP = tl.constexpr(8)  # among the strips of all pairs: [2, m] sums of columns at PARTIALS and 8 scalars
PARTIALS = tl.constexpr(9)

# A pair's vectors, float64.
G = tl.constexpr(0)  # potential of the columns, -inf where they take no part
V = tl.constexpr(1)  # of the plan u K v; before BOUNDS the part of each column that is kept
NEXT = tl.constexpr(2)  # the next v; before BOUNDS what is missing of each column
H = tl.constexpr(3)  # G / epsilon + log b
TOP = tl.constexpr(0)  # the largest exponent of each row
RATIO = tl.constexpr(1)  # its weight over the sum of its exponentials
F = tl.constexpr(2)  # min_j C_ij - G_j


@triton.jit
def read_mode(state, pair):
    """The next pass."""
    return tl.load(state + 16 * pair + MODE).to(tl.int32)


@triton.jit
def pass_over(
    matrix, pair, strip, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, FINE_ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """Sums over the rows of a strip: up to two for each column and four numbers."""
    table, state, costs, kernels, weights, vectors, partials, scalars = matrix
    row = table + 10 * pair
    at = tl.load(row + COST)
    stride = tl.load(row + STRIDE)
    n = tl.load(row + ROWS).to(tl.int32)
    m = tl.load(row + COLUMNS).to(tl.int32)
    a_ptr = weights + tl.load(row + ROW_WEIGHT)
    b_ptr = weights + tl.load(row + COLUMN_WEIGHT)
    strips = tl.load(row + STRIPS).to(tl.int32)
    by_column = vectors + tl.load(row + VECTORS)
    by_row = by_column + 4 * m
    sums = partials + tl.load(row + PARTIALS) + 2 * strip * m
    numbers = scalars + 8 * (tl.load(row + FIRST_STRIP) + strip)
    mode = read_mode(state, pair)
    inverse = 1.0 / tl.load(state + 16 * pair + EPSILON)
    strip_rows = (n + strips - 1) // strips
    first = strip * strip_rows
    last = tl.minimum(first + strip_rows, n)
    tile = (costs + at, kernels + at, stride, last, m, by_column + H * m, inverse)

    if (mode == FORM) | (mode == ITERATE):
        if mode == FORM:
            _form(tile, first, FINE_ROWS, CHUNK)
            tl.debug_barrier()
        cols = tl.arange(0, BLOCK)
        v = tl.load(by_column + V * m + cols, cols < m, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float64)
        for begin in range(first, last, TILE_ROWS):
            rows = begin + tl.arange(0, TILE_ROWS)
            k = tl.load(kernels + at + _entries(rows, cols, stride), _inside(rows, cols, last, m), other=0.0)
            a = tl.load(a_ptr + rows, rows < last, other=0.0).to(tl.float32)
            u = tl.where(rows < last, a / tl.sum(k * v[None, :], axis=1), 0.0)
            total += tl.sum(k * u[:, None], axis=0).to(tl.float64)
        tl.store(sums + cols, total, cols < m)
    elif mode <= VARIANCE:
        _spread(tile, first, a_ptr, b_ptr, numbers, tl.load(state + 16 * pair + MEAN_COST), mode, FINE_ROWS, CHUNK)
    elif mode == BOUNDS:
        _bounds(tile, first, a_ptr, by_column, by_row, n, sums, numbers, FINE_ROWS, CHUNK)
    else:
        _row_sums(tile, first, a_ptr, by_row, n, FINE_ROWS, CHUNK)
        tl.debug_barrier()
        if mode == MASSES:
            _masses(tile, first, by_row, n, sums, FINE_ROWS, CHUNK)
        else:
            _reach(tile, first, by_row, n, sums, FINE_ROWS, CHUNK)


@triton.jit
def _spread(tile, first, a_ptr, b_ptr, numbers, mean, mode, FINE_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    last, m = tile[3], tile[4]
    total = tl.zeros((FINE_ROWS,), tl.float64)
    for begin in range(first, last, FINE_ROWS):
        rows = begin + tl.arange(0, FINE_ROWS)
        a = tl.load(a_ptr + rows, rows < last, other=0.0)
        for left in range(0, m, CHUNK):
            cols = left + tl.arange(0, CHUNK)
            b = tl.load(b_ptr + cols, cols < m, other=0.0)
            c = _costs(tile, rows, cols)
            if mode == VARIANCE:
                c = (c - mean) * (c - mean)
            total += a * tl.sum(c * b[None, :], axis=1)
    tl.store(numbers, tl.sum(total, axis=0))


@triton.jit
def _form(tile, first, FINE_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """K of the rows of a strip."""
    kernels, stride, last, m = tile[1], tile[2], tile[3], tile[4]
    for begin in range(first, last, FINE_ROWS):
        rows = begin + tl.arange(0, FINE_ROWS)
        top = _row_tops(tile, rows, CHUNK)
        for left in range(0, m, CHUNK):
            cols = left + tl.arange(0, CHUNK)
            k = tl.exp((_exponents(tile, rows, cols) - top[:, None]).to(tl.float32))
            tl.store(kernels + _entries(rows, cols, stride), k, _inside(rows, cols, last, m))


@triton.jit
def _row_sums(tile, first, a_ptr, by_row, n, FINE_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """TOP and RATIO: the plan is RATIO_i exp(h_j - C_ij / epsilon - TOP_i)."""
    last, m = tile[3], tile[4]
    for begin in range(first, last, FINE_ROWS):
        rows = begin + tl.arange(0, FINE_ROWS)
        top = _row_tops(tile, rows, CHUNK)
        total = tl.zeros((FINE_ROWS,), tl.float64)
        for left in range(0, m, CHUNK):
            cols = left + tl.arange(0, CHUNK)
            total += tl.sum(tl.exp(_exponents(tile, rows, cols) - top[:, None]), axis=1)
        a = tl.load(a_ptr + rows, rows < last, other=1.0)
        tl.store(by_row + TOP * n + rows, top, rows < last)
        tl.store(by_row + RATIO * n + rows, a / total, rows < last)


@triton.jit
def _masses(tile, first, by_row, n, sums, FINE_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    last, m = tile[3], tile[4]
    for left in range(0, m, CHUNK):
        cols = left + tl.arange(0, CHUNK)
        total = tl.zeros((CHUNK,), tl.float64)
        for begin in range(first, last, FINE_ROWS):
            rows = begin + tl.arange(0, FINE_ROWS)
            total += tl.sum(_plan(tile, rows, cols, by_row, n), axis=0)
        tl.store(sums + cols, total, cols < m)


@triton.jit
def _reach(tile, first, by_row, n, sums, FINE_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """log sum_i a_i exp((f_i - C_ij) / epsilon) as the largest exponent and the sum that is left."""
    last, m, inverse = tile[3], tile[4], tile[6]
    for left in range(0, m, CHUNK):
        cols = left + tl.arange(0, CHUNK)
        most = tl.full((CHUNK,), float("-inf"), tl.float64)
        total = tl.zeros((CHUNK,), tl.float64)
        for begin in range(first, last, FINE_ROWS):
            rows = begin + tl.arange(0, FINE_ROWS)
            log_a_f = tl.log(tl.load(by_row + RATIO * n + rows, rows < last, other=1.0))
            log_a_f -= tl.load(by_row + TOP * n + rows, rows < last, other=0.0)
            u = tl.where((rows < last)[:, None], log_a_f[:, None] - _costs(tile, rows, cols) * inverse, float("-inf"))
            new = tl.maximum(most, tl.max(u, axis=0))
            total = total * tl.exp(most - new) + tl.sum(tl.exp(u - new[None, :]), axis=0)
            most = new
        tl.store(sums + cols, most, cols < m)
        tl.store(sums + m + cols, total, cols < m)


@triton.jit
def _bounds(tile, first, a_ptr, by_column, by_row, n, sums, numbers, FINE_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Cost of the plan after rounding and the feasible potentials; TOP and RATIO are those of MASSES."""
    last, m = tile[3], tile[4]
    plan_cost = tl.zeros((FINE_ROWS,), tl.float64)
    missing_cost = tl.zeros((FINE_ROWS,), tl.float64)
    missing_mass = tl.zeros((FINE_ROWS,), tl.float64)
    dual = tl.zeros((FINE_ROWS,), tl.float64)
    for begin in range(first, last, FINE_ROWS):
        rows = begin + tl.arange(0, FINE_ROWS)
        mass = tl.zeros((FINE_ROWS,), tl.float64)
        to_missing = tl.zeros((FINE_ROWS,), tl.float64)
        f = tl.full((FINE_ROWS,), float("inf"), tl.float64)
        for left in range(0, m, CHUNK):
            cols = left + tl.arange(0, CHUNK)
            kept = tl.load(by_column + V * m + cols, cols < m, other=0.0)
            plan = _plan(tile, rows, cols, by_row, n) * kept[None, :]
            mass += tl.sum(plan, axis=1)
            c = _costs(tile, rows, cols)
            plan_cost += tl.sum(plan * c, axis=1)
            to_missing += tl.sum(c * tl.load(by_column + NEXT * m + cols, cols < m, other=0.0)[None, :], axis=1)
            g = tl.load(by_column + G * m + cols, cols < m, other=float("-inf"))
            f = tl.minimum(f, tl.min(c - g[None, :], axis=1))
        a = tl.load(a_ptr + rows, rows < last, other=0.0)
        missing_row = tl.maximum(a - mass, 0.0)
        missing_cost += missing_row * to_missing
        missing_mass += missing_row
        dual += a * f
        tl.store(by_row + F * n + rows, f, rows < last)
    tl.store(numbers, tl.sum(plan_cost, axis=0))
    tl.store(numbers + 1, tl.sum(missing_cost, axis=0))
    tl.store(numbers + 2, tl.sum(missing_mass, axis=0))
    tl.store(numbers + 3, tl.sum(dual, axis=0))
    tl.debug_barrier()
    for left in range(0, m, CHUNK):
        cols = left + tl.arange(0, CHUNK)
        least = tl.full((CHUNK,), float("inf"), tl.float64)
        for begin in range(first, last, FINE_ROWS):
            rows = begin + tl.arange(0, FINE_ROWS)
            f = tl.load(by_row + F * n + rows, rows < last, other=float("-inf"))
            least = tl.minimum(least, tl.min(_costs(tile, rows, cols) - f[:, None], axis=0))
        tl.store(sums + cols, least, cols < m)


@triton.jit
def _entries(rows, cols, stride):
    return rows.to(tl.int64)[:, None] * stride + cols[None, :]


@triton.jit
def _inside(rows, cols, last, m):
    return (rows < last)[:, None] & (cols < m)[None, :]


@triton.jit
def _costs(tile, rows, cols):
    costs, stride, last, m = tile[0], tile[2], tile[3], tile[4]
    return tl.load(costs + _entries(rows, cols, stride), _inside(rows, cols, last, m), other=0.0).to(tl.float64)


@triton.jit
def _exponents(tile, rows, cols):
    """h - C / epsilon, -inf beyond the last column and h beyond the last row."""
    m, h_ptr, inverse = tile[4], tile[5], tile[6]
    h = tl.load(h_ptr + cols, cols < m, other=float("-inf"))
    # Explicitly one rounding: MASSES and BOUNDS must see the same plan.
    return tl.fma(_costs(tile, rows, cols), -inverse, tl.zeros((rows.shape[0], 1), tl.float64) + h[None, :])


@triton.jit
def _row_tops(tile, rows, CHUNK: tl.constexpr):
    top = tl.full((rows.shape[0],), float("-inf"), tl.float64)
    for left in range(0, tile[4], CHUNK):
        top = tl.maximum(top, tl.max(_exponents(tile, rows, left + tl.arange(0, CHUNK)), axis=1))
    return top


@triton.jit
def _plan(tile, rows, cols, by_row, n):
    last = tile[3]
    top = tl.load(by_row + TOP * n + rows, rows < last, other=float("inf"))
    ratio = tl.load(by_row + RATIO * n + rows, rows < last, other=0.0)
    return tl.exp(_exponents(tile, rows, cols) - top[:, None]) * ratio[:, None]
