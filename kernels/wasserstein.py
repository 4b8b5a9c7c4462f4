"""Entropic transport of many pairs of point clouds with bounds on the exact value: Triton kernels.

    K_ij = exp((g_j - C_ij) / eps + log b_j - max_j)         formed again when v leaves 1e-6 .. 1e6
    u_i  = a_i / sum_j K_ij v_j                              the rows of the plan u_i K_ij v_j are right
    v_j  = b_j / sum_i u_i K_ij                              then its columns

``reference/wasserstein.py`` has the definition, ``csrc/cpu/wasserstein.cpp`` the same steps on the CPU. An iteration
reads K once, in tiles of whole rows: the sums of a row's columns give u_i, which adds the row to the sums of the columns.
That is 4 bytes and two multiply-adds an entry, no exponential, so what counts is where K is read from: of a pair up to
some 200 x 200 it stays in the first-level cache of the one processor that solves it, and up to some 3000 x 3000 in the
second-level cache of the GPU.

* A pair is a small machine whose state is in memory: ``_pass`` goes once over the matrix and leaves sums of columns,
  ``_combine`` makes the next potentials of them and chooses the next pass (MEAN, VARIANCE: automatic epsilon; FORM, ITERATE:
  above; MASSES, REACH: potentials in float64; BOUNDS). ``solve_kernel`` runs it to the end in one launch, one program a
  pair, stopping by itself. For large pairs many programs make a pass, in strips of rows, and one combines
  (``pass_kernel``, ``combine_kernel``); the host looks now and then whether all pairs are done.
* Exponents are float64 wherever they are formed: (g - C) / eps goes to 1e9 and its last places are the plan. So are the
  sums of the columns, and everything that the bounds are made of; the plan they are of is formed with the same operations
  in MASSES and in BOUNDS, so that its masses are right to the last places whatever the size of the exponents.
* All sums are in a fixed order; there are no atomic operations.
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

# As in the reference and in csrc/cpu/wasserstein.cpp.
EPSILON_OF_SPREAD = tl.constexpr(0.05)
LEAST_EPSILON = tl.constexpr(1e-9)
COARSE_TOLERANCE = tl.constexpr(0.05)
COARSE_ITERATIONS = tl.constexpr(10)
LEAST_MASS = tl.constexpr(1e-25)  # columns with less take no part in the iteration
FLOAT_SHARE = tl.constexpr(0.75)  # where iterations with K in float32 stop, of the tolerance
FLOAT_TOLERANCE = tl.constexpr(5e-7)  # the error that they can reach
LEAST_V = tl.constexpr(1e-6)
MOST_V = tl.constexpr(1e6)
LEAST_SUM = tl.constexpr(1e-30)
LEAST_DOUBLE_SUM = tl.constexpr(1e-290)


# A pair's vectors, float64.
G = tl.constexpr(0)  # potential of the columns, -inf where they take no part
V = tl.constexpr(1)  # of the plan u K v; before BOUNDS the part of each column that is kept
NEXT = tl.constexpr(2)  # the next v; before BOUNDS what is missing of each column
H = tl.constexpr(3)  # G / epsilon + log b
TOP = tl.constexpr(0)  # the largest exponent of each row
RATIO = tl.constexpr(1)  # its weight over the sum of its exponentials
F = tl.constexpr(2)  # min_j C_ij - G_j


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
    results,  # [pairs, 6] float64, written
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least the columns of each pair
    FINE_ROWS: tl.constexpr,  # a tile of float64
    CHUNK: tl.constexpr,
):
    """All of a pair, which is one strip, by one program."""
    pair = tl.load(order + tl.program_id(0))
    mode = _mode(state, pair)
    while mode < DONE:
        matrix = (table, state, costs, kernels, weights, vectors, partials, scalars)
        _pass(matrix, pair, 0, TILE_ROWS, BLOCK, FINE_ROWS, CHUNK)
        tl.debug_barrier()  # other threads read what these wrote to memory
        _combine((table, state, weights, vectors, partials, scalars, results), pair, CHUNK)
        tl.debug_barrier()
        mode = _mode(state, pair)


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
    if (strip < tl.load(table + 10 * pair + STRIPS)) & (_mode(state, pair) < DONE):
        matrix = (table, state, costs, kernels, weights, vectors, partials, scalars)
        _pass(matrix, pair, strip, TILE_ROWS, BLOCK, FINE_ROWS, CHUNK)


@triton.jit
def combine_kernel(order, table, state, weights, vectors, partials, scalars, results, CHUNK: tl.constexpr):
    """What follows a pass over all strips of a pair."""
    pair = tl.load(order + tl.program_id(0))
    if _mode(state, pair) < DONE:
        _combine((table, state, weights, vectors, partials, scalars, results), pair, CHUNK)


@triton.jit
def _mode(state, pair):
    return tl.load(state + 16 * pair + MODE).to(tl.int32)


# Passes over the matrix


@triton.jit
def _pass(
    matrix, pair, strip, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, FINE_ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """Sums over the rows of a strip: up to two for each column and five numbers."""
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
    mode = _mode(state, pair)
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
def _spread(
    tile, first, a_ptr, b_ptr, numbers, mean, mode, FINE_ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    costs, kernels, stride, last, m, h_ptr, inverse = tile
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
    costs, kernels, stride, last, m, h_ptr, inverse = tile
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
    costs, kernels, stride, last, m, h_ptr, inverse = tile
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
    value = tl.zeros((FINE_ROWS,), tl.float64)
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
        ratio = tl.load(by_row + RATIO * n + rows, rows < last, other=1.0)
        log_sum = tl.log(tl.where(rows < last, a, 1.0) / ratio) + tl.load(by_row + TOP * n + rows, rows < last, other=0.0)
        missing_row = tl.maximum(a - mass, 0.0)
        missing_cost += missing_row * to_missing
        missing_mass += missing_row
        dual += a * f
        value -= a * log_sum
        tl.store(by_row + F * n + rows, f, rows < last)
    tl.store(numbers, tl.sum(plan_cost, axis=0))
    tl.store(numbers + 1, tl.sum(missing_cost, axis=0))
    tl.store(numbers + 2, tl.sum(missing_mass, axis=0))
    tl.store(numbers + 3, tl.sum(dual, axis=0))
    tl.store(numbers + 4, tl.sum(value, axis=0))
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
    costs, kernels, stride, last, m, h_ptr, inverse = tile
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
    now = (tl.load(state + EPSILON), tl.load(state + TARGET), tl.load(state + USED), tl.load(state + NEXT_EPSILON))
    tl.debug_barrier()  # all threads have the state before one changes it
    if (mode == FORM) | (mode == ITERATE):
        _after_iteration(state, now, by_column, b_ptr, sums, strips, m, CHUNK)
    elif mode == MASSES:
        _after_masses(state, now, by_column, b_ptr, sums, strips, m, CHUNK)
    elif mode == REACH:
        _after_reach(state, now, by_column, b_ptr, sums, strips, m, CHUNK)
    elif mode == BOUNDS:
        _after_bounds(state, now, by_column, b_ptr, sums, numbers, strips, m, results + 6 * pair, CHUNK)
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
    epsilon, target, used, _ = now
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
    enough = tl.where(coarse, tl.maximum(tolerance, COARSE_TOLERANCE), tl.maximum(tolerance * FLOAT_SHARE, FLOAT_TOLERANCE))
    most = tl.where(coarse, COARSE_ITERATIONS + 0.0, tl.load(state + MOST))
    stop = (tl.sum(error, axis=0) <= enough) | (used >= most)
    in_range = (tl.min(smallest, axis=0) >= LEAST_V) & (tl.max(largest, axis=0) <= MOST_V)
    reached = tl.min(least_sum, axis=0) >= LEAST_SUM
    finished = stop & (epsilon <= target)
    next_epsilon = tl.where(stop & coarse, tl.maximum(epsilon / 2.0, target), epsilon)
    tl.store(state + COUNT, tl.load(state + COUNT) + 1.0)
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
    epsilon, _, used, _ = now
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
        tl.store(state + COUNT, tl.load(state + COUNT) + 1.0)
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
    epsilon, _, _, next_epsilon = now
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
def _after_bounds(state, now, by_column, b_ptr, sums, numbers, strips, m, out, CHUNK: tl.constexpr):
    lower = tl.zeros((CHUNK,), tl.float64)
    value = tl.zeros((CHUNK,), tl.float64)
    for left in range(0, m, CHUNK):
        cols = left + tl.arange(0, CHUNK)
        b = tl.load(b_ptr + cols, cols < m, other=0.0)
        least = tl.full((CHUNK,), float("inf"), tl.float64)
        for strip in range(strips):
            least = tl.minimum(least, tl.load(sums + 2 * strip * m + cols, cols < m, other=0.0))
        g = tl.load(by_column + G * m + cols, cols < m, other=0.0)
        lower += b * least
        value += tl.where(b >= LEAST_MASS, b * g, 0.0)
    epsilon = now[0]
    missing_mass = _sum_numbers(numbers + 2, strips)
    missing_cost = _sum_numbers(numbers + 1, strips) / tl.where(missing_mass > 0.0, missing_mass, 1.0)
    upper = _sum_numbers(numbers, strips) + missing_cost
    dual = _sum_numbers(numbers + 3, strips) + tl.sum(lower, axis=0)
    tl.store(out, tl.maximum(tl.minimum(dual, upper), 0.0))
    tl.store(out + 1, upper)
    tl.store(out + 2, epsilon * _sum_numbers(numbers + 4, strips) + tl.sum(value, axis=0))
    tl.store(out + 3, tl.load(state + COUNT))
    tl.store(out + 4, tl.load(state + ERROR))
    tl.store(out + 5, epsilon)
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
