"""Balance-weight EMA for lists of tensors of any sizes and dtypes: three Triton kernels, each launched once for a list.

    sweep    a = |p - e|_1, b = |g|_1, c = |g - g_prev|_1 of each row, g_prev <- g; with AdamW the pending
             e += alpha (p - e) and the step of p, m, v come first, on the same loads
    weights  alpha of each row from its a, b, c
    apply    e += alpha (p - e)

``reference/balance_ema.py`` has the equations. Bytes per float32 element: sweep 20, with AdamW 44 (4 less where g_prev
is not written); apply 12. There is next to no arithmetic, so all that counts is wide loads, and enough of them at once.

* A program takes a chunk, about 16 Ki elements of one tensor, and finds its addresses, dtypes and shape in tables in
  device memory: 224 small tensors cost the launches of one large one. At 4 TB/s a processor of an H200 needs 10 to
  20 us for the bytes of a chunk, so the two dependent look-ups that come first are hidden by its neighbours, and a list
  of 7 M elements still is three chunks for each processor.
* A program walks its chunk in tiles of 128 groups of 8 neighbours: one 16-byte access of each of 128 threads for a
  16-bit stream and two for a float32 one, all streams in flight together.
* A row is what has a weight of its own. Rows shorter than a tile lie side by side in it, each in a power of two of
  groups, so that rows of 16 elements do not leave 126 of 128 groups idle.
* Sums of a chunk go to a fixed slot and are added in float64 in a fixed order; inside a tile neighbours are added
  pairwise. So the bits depend on the values alone: not on the grid, the number of warps, the alignment, the other
  tensors of the list, nor on a layout that the compiler chose. Multiplications and additions must not be contracted
  either: launch with ``enable_fp_fusion=False``.
* An address out of a table is not known to be aligned. A flag in the table says whether a tensor is, and the program
  branches to code that was promised it. The other branch takes one element of each group at a time: slower, but with
  few registers, of which the kernel needs the larger number of both.
* The kernels write in place: no autotuning, which would apply an update once per trial.

The dtype of a stream is known at compile time where all tensors of the list agree; else it is MIXED, and the code of
the tensor is taken from the table. ``DTYPES`` has one for each of the six streams.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cit_fast.kernels.elements import ABSENT, GROUP, load, random_key, store, store_state

RELEASED = tl.constexpr(0)
PAPER = tl.constexpr(1)
FIXED = tl.constexpr(2)

# Columns of `shapes` [tensors, 8], int64.
ROW_SIZE = tl.constexpr(0)  # elements of a row
ROWS = tl.constexpr(1)
SPAN_LOG = tl.constexpr(2)  # log2 of the groups of a tile that share a row
ROWS_PER_CHUNK = tl.constexpr(3)  # 1 where a row has several chunks
ROW_CHUNKS = tl.constexpr(4)  # chunks, and slots, of a row
FIRST_CHUNK = tl.constexpr(5)
FIRST_SLOT = tl.constexpr(6)
FIRST_ROW = tl.constexpr(7)  # among the rows of all tensors

# Columns of `streams` [tensors, 8], int64: six addresses, 0 where there is none, then the codes: four bits of dtype for
# each, and one that says that all rows of all streams are whole groups and start at a multiple of 16 bytes.
PARAM = tl.constexpr(0)
AVERAGE = tl.constexpr(1)
GRAD = tl.constexpr(2)
PREVIOUS_GRAD = tl.constexpr(3)
EXP_AVG = tl.constexpr(4)
EXP_AVG_SQ = tl.constexpr(5)
CODES = tl.constexpr(6)
ALIGNED_BIT = tl.constexpr(24)


# A seed of its own for each step must not be compiled for.
@triton.jit(do_not_specialize=["seed"])
def sweep_kernel(
    shapes,
    streams,
    chunks,  # [chunks] int32: the tensor of each
    slots,  # [slots, 3] float32, written: a, b, c of each chunk of each row
    alphas,  # [rows] float32: pending weights (ADAMW only)
    seed,
    beta1_rest,  # 1 - beta1
    beta2,
    beta2_rest,
    decayed,  # 1 - lr weight_decay
    step_size,  # lr / (1 - beta1^step)
    root_scale,  # 1 / sqrt(1 - beta2^step)
    eps,
    DTYPES: tl.constexpr,
    ADAMW: tl.constexpr,
    STORE_GRADS: tl.constexpr,
    BY_ROW: tl.constexpr,  # False: every tensor is one row
    LOG_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Norms of every row, before them AdamW where asked for; see the top of the file."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + chunk)
    shape = shapes + 8 * tensor
    row_size, row_chunks, span_log, begin, first_row, first_slot, rows, cols = _locate(
        shape, chunk, BY_ROW, LOG_GROUPS, CHUNK
    )
    codes, addresses = _streams(streams + 8 * tensor)
    keys = (random_key(seed, tensor, 0), random_key(seed, tensor, 1), random_key(seed, tensor, 2))
    adamw = (beta1_rest, beta2, beta2_rest, decayed, step_size, root_scale, eps)
    aligned = _is_aligned(codes, cols)
    for row_begin in range(0, rows, (1 << LOG_GROUPS) >> span_log):
        alpha = tl.zeros((1 << LOG_GROUPS,), tl.float32)
        if ADAMW:
            alpha = _alphas(alphas + first_row, row_begin, rows, span_log, BY_ROW, LOG_GROUPS)
        a = tl.zeros((1 << LOG_GROUPS,), tl.float32)
        b = tl.zeros((1 << LOG_GROUPS,), tl.float32)
        c = tl.zeros((1 << LOG_GROUPS,), tl.float32)
        if aligned:
            for col_begin in range(0, cols, (1 << span_log) * GROUP):
                row, col = _groups(row_begin, col_begin, span_log, BY_ROW, LOG_GROUPS)
                offs = (row * row_size.to(tl.int32) + col)[:, None] + tl.arange(0, GROUP)[None, :]
                mask = ((row < rows) & (col < cols))[:, None]
                more_a, more_b, more_c = _step(
                    addresses, codes, begin, offs, mask, alpha[:, None], keys, adamw, DTYPES, ADAMW, STORE_GRADS, True
                )
                a += _sum_neighbours(more_a, 3)
                b += _sum_neighbours(more_b, 3)
                c += _sum_neighbours(more_c, 3)
        else:
            for col_begin in range(0, cols, (1 << span_log) * GROUP):
                row, col = _groups(row_begin, col_begin, span_log, BY_ROW, LOG_GROUPS)
                sums_a = (a, a, a)
                sums_b = (b, b, b)
                sums_c = (c, c, c)
                for place in range(GROUP):
                    offs = row * row_size.to(tl.int32) + col + place
                    mask = (row < rows) & (col + place < cols)
                    more_a, more_b, more_c = _step(
                        addresses, codes, begin, offs, mask, alpha, keys, adamw, DTYPES, ADAMW, STORE_GRADS, False
                    )
                    sums_a = _pairwise(sums_a, more_a, place)
                    sums_b = _pairwise(sums_b, more_b, place)
                    sums_c = _pairwise(sums_c, more_c, place)
                a += sums_a[2]
                b += sums_b[2]
                c += sums_c[2]
        # After `level` halvings a lane holds the sum of 2^level groups.
        for level in tl.static_range(LOG_GROUPS + 1):
            if span_log == level:
                of_chunk = row_begin + tl.arange(0, (1 << LOG_GROUPS) >> level)
                at = slots + 3 * (first_slot + of_chunk * row_chunks)
                tl.store(at, a, of_chunk < rows)
                tl.store(at + 1, b, of_chunk < rows)
                tl.store(at + 2, c, of_chunk < rows)
            if level < LOG_GROUPS:
                a = _sum_neighbours(a, 1)
                b = _sum_neighbours(b, 1)
                c = _sum_neighbours(c, 1)


@triton.jit
def _step(
    addresses,
    codes,
    begin,
    offs,
    mask,
    alpha,
    keys,
    adamw,
    DTYPES: tl.constexpr,
    ADAMW: tl.constexpr,
    STORE_GRADS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """All that is done to one element; returns its terms of the three sums, zeros where the mask is off."""
    p = load(addresses, codes, begin, offs, mask, PARAM, DTYPES, WIDE)
    e = load(addresses, codes, begin, offs, mask, AVERAGE, DTYPES, WIDE)
    g = load(addresses, codes, begin, offs, mask, GRAD, DTYPES, WIDE)
    previous = g
    if DTYPES[PREVIOUS_GRAD] != ABSENT:
        previous = load(addresses, codes, begin, offs, mask, PREVIOUS_GRAD, DTYPES, WIDE)
    if ADAMW:
        m = load(addresses, codes, begin, offs, mask, EXP_AVG, DTYPES, WIDE)
        v = load(addresses, codes, begin, offs, mask, EXP_AVG_SQ, DTYPES, WIDE)
        beta1_rest, beta2, beta2_rest, decayed, step_size, root_scale, eps = adamw
        index = begin.to(tl.uint32) + offs.to(tl.uint32)
        e = _move(e, p, alpha)
        e = store_state(addresses, codes, begin, offs, mask, e, index, keys[0], AVERAGE, DTYPES, WIDE)
        new_m = m + beta1_rest * (g - m)
        new_v = beta2 * v + beta2_rest * (g * g)
        # tl.sqrt and / are a few last places off. The step is small beside p, and what tl.sqrt_rn and tl.div_rn do in
        # rare cases, in a branch of each element, costs half as many registers again.
        new_p = p * decayed - step_size * (new_m / (tl.sqrt(new_v) * root_scale + eps))
        finite = tl.abs(g) < float("inf")  # a gradient that is not spoils no more than its own step
        m = tl.where(finite, new_m, m)
        v = tl.where(finite, new_v, v)
        p = tl.where(finite, new_p, p)
        store_state(addresses, codes, begin, offs, mask, m, index, keys[1], EXP_AVG, DTYPES, WIDE)
        store_state(addresses, codes, begin, offs, mask, v, index, keys[2], EXP_AVG_SQ, DTYPES, WIDE)
        p = store(addresses, codes, begin, offs, mask, p, PARAM, DTYPES, WIDE)
    if DTYPES[PREVIOUS_GRAD] != ABSENT and STORE_GRADS:
        store(addresses, codes, begin, offs, mask, g, PREVIOUS_GRAD, DTYPES, WIDE)
    change = tl.abs(g - previous)
    if DTYPES[PREVIOUS_GRAD] == ABSENT:
        change = tl.zeros_like(g)  # where g is not finite, g - g is not 0
    # With eps = 0 the step of an idle lane is 0 / 0.
    return tl.where(mask, tl.abs(p - e), 0.0), tl.abs(g), change


@triton.jit
def weights_kernel(
    groups,  # [programs, 4] int64: first row, first slot, rows, slots of each row; one of the last two is 1
    slots,
    norms,  # [rows, 3] float64, written
    alphas,  # [rows] float32, written
    fallbacks,  # [rows] uint8, written
    constant,  # alpha where the rule gives none, rounded from float64
    RULE: tl.constexpr,  # ABSENT: norms only
    LOG_TILE: tl.constexpr,
):
    """Equations (2) and (3): a program has up to a tile of rows of one slot each, or one row of any number of slots."""
    group = groups + 4 * tl.program_id(0)
    first_row = tl.load(group)
    first_slot = tl.load(group + 1)
    rows = tl.load(group + 2)
    row_slots = tl.load(group + 3)
    lane = tl.arange(0, 1 << LOG_TILE)
    distance = tl.zeros((1 << LOG_TILE,), tl.float64)
    gradient = tl.zeros((1 << LOG_TILE,), tl.float64)
    change = tl.zeros((1 << LOG_TILE,), tl.float64)
    count = rows * row_slots
    for begin in range(0, count, 1 << LOG_TILE):
        at = slots + 3 * (first_slot + begin + lane)
        mask = begin + lane < count
        distance += tl.load(at, mask, other=0.0).to(tl.float64)
        gradient += tl.load(at + 1, mask, other=0.0).to(tl.float64)
        change += tl.load(at + 2, mask, other=0.0).to(tl.float64)
    single = row_slots == 1
    distance = tl.where(single, distance, _sum_neighbours(distance, LOG_TILE))
    gradient = tl.where(single, gradient, _sum_neighbours(gradient, LOG_TILE))
    change = tl.where(single, change, _sum_neighbours(change, LOG_TILE))
    mask = lane < rows
    row = first_row + lane
    tl.store(norms + 3 * row, distance, mask)
    tl.store(norms + 3 * row + 1, gradient, mask)
    tl.store(norms + 3 * row + 2, change, mask)
    if RULE != ABSENT:
        finite = (distance < float("inf")) & (gradient < float("inf"))  # false for NaN
        if RULE == FIXED:
            alpha = tl.zeros((1 << LOG_TILE,), tl.float32) + constant
            fallback = lane < 0
        else:
            weight = 1.0 + gradient
            if RULE == RELEASED:
                weight = 2.0 * weight
            product = distance * change
            # Dividing by the product where it is 0 would give what is not usable: infinity or NaN.
            weight = weight / tl.where(product == 0.0, 1.0, product)
            usable = (product > 0.0) & (weight > 0.0) & (weight < 1.0)  # false for NaN
            if RULE == PAPER:
                weight = 1.0 - weight
            # 0 marks a row that is left out, so a weight too small for a float32 becomes the smallest one.
            alpha = tl.where(usable, weight.to(tl.float32), constant)
            alpha = tl.maximum(alpha, 1.1754943508222875e-38)
            fallback = (usable == 0) & finite
        tl.store(alphas + row, tl.where(finite, alpha, 0.0), mask)
        tl.store(fallbacks + row, fallback.to(tl.uint8), mask)


@triton.jit(do_not_specialize=["seed"])
def apply_kernel(
    shapes,
    streams,
    chunks,
    alphas,  # [rows] float32; 0 leaves a row as it is
    seed,
    DTYPES: tl.constexpr,
    BY_ROW: tl.constexpr,
    LOG_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Equation (4)."""
    # Backwards: the chunks that the sweep read last are the ones still in the cache.
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    tensor = tl.load(chunks + chunk)
    shape = shapes + 8 * tensor
    row_size, _, span_log, begin, first_row, _, rows, cols = _locate(shape, chunk, BY_ROW, LOG_GROUPS, CHUNK)
    codes, addresses = _streams(streams + 8 * tensor)
    key = random_key(seed, tensor, 0)
    aligned = _is_aligned(codes, cols)
    for row_begin in range(0, rows, (1 << LOG_GROUPS) >> span_log):
        alpha = _alphas(alphas + first_row, row_begin, rows, span_log, BY_ROW, LOG_GROUPS)
        for col_begin in range(0, cols, (1 << span_log) * GROUP):
            row, col = _groups(row_begin, col_begin, span_log, BY_ROW, LOG_GROUPS)
            offs = row * row_size.to(tl.int32) + col
            if aligned:
                wide = offs[:, None] + tl.arange(0, GROUP)[None, :]
                mask = ((row < rows) & (col < cols))[:, None]
                _apply(addresses, codes, begin, wide, mask, alpha[:, None], key, DTYPES, True)
            else:
                for place in range(GROUP):
                    mask = (row < rows) & (col + place < cols)
                    _apply(addresses, codes, begin, offs + place, mask, alpha, key, DTYPES, False)


@triton.jit
def _apply(addresses, codes, begin, offs, mask, alpha, key, DTYPES: tl.constexpr, WIDE: tl.constexpr):
    p = load(addresses, codes, begin, offs, mask, PARAM, DTYPES, WIDE)
    e = load(addresses, codes, begin, offs, mask, AVERAGE, DTYPES, WIDE)
    index = begin.to(tl.uint32) + offs.to(tl.uint32)
    store_state(addresses, codes, begin, offs, mask, _move(e, p, alpha), index, key, AVERAGE, DTYPES, WIDE)


# Places


@triton.jit
def _locate(shape, chunk, BY_ROW: tl.constexpr, LOG_GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    """What a chunk is.

    Elements and chunks of a row, and log2 of the groups of a tile that share one; in the tensor the first element of
    the chunk; among those of all tensors its first row, and the slot for it; how many rows it has, and columns of each.
    """
    row_size = tl.load(shape + ROW_SIZE)
    row_chunks = tl.load(shape + ROW_CHUNKS)
    rows_per_chunk = tl.load(shape + ROWS_PER_CHUNK)
    local = chunk - tl.load(shape + FIRST_CHUNK)
    row = local // row_chunks * rows_per_chunk
    col = local % row_chunks * CHUNK
    cols = tl.minimum(row_size - col, CHUNK).to(tl.int32)
    first_row = tl.load(shape + FIRST_ROW) + row
    first_slot = tl.load(shape + FIRST_SLOT) + row * row_chunks + local % row_chunks
    if BY_ROW:
        rows = tl.minimum(tl.load(shape + ROWS) - row, rows_per_chunk).to(tl.int32)
        span_log = tl.load(shape + SPAN_LOG).to(tl.int32)
    else:
        rows: tl.constexpr = 1
        span_log: tl.constexpr = LOG_GROUPS
    return row_size, row_chunks, span_log, row * row_size + col, first_row, first_slot, rows, cols


@triton.jit
def _streams(stream):
    """The codes, and the six addresses: numbers, for they become pointers to what the codes say."""
    addresses = (
        tl.load(stream + PARAM),
        tl.load(stream + AVERAGE),
        tl.load(stream + GRAD),
        tl.load(stream + PREVIOUS_GRAD),
        tl.load(stream + EXP_AVG),
        tl.load(stream + EXP_AVG_SQ),
    )
    return tl.load(stream + CODES), addresses


@triton.jit
def _is_aligned(codes, cols):
    """Whether the chunk is whole groups at multiples of 16 bytes; the last chunk of a tensor may not be."""
    return ((codes >> ALIGNED_BIT) & 1 == 1) & (cols % GROUP == 0)


@triton.jit
def _groups(row_begin, col_begin, span_log, BY_ROW: tl.constexpr, LOG_GROUPS: tl.constexpr):
    """Row and first column of each group of a tile."""
    group = tl.arange(0, 1 << LOG_GROUPS)
    if BY_ROW:
        row = row_begin + (group >> span_log)
        col = col_begin + GROUP * (group & ((1 << span_log) - 1))
    else:
        row = tl.zeros_like(group)
        col = col_begin + GROUP * group
    return row, col


@triton.jit
def _alphas(alphas, row_begin, rows, span_log, BY_ROW: tl.constexpr, LOG_GROUPS: tl.constexpr):
    """The weight of each group of a tile."""
    row, _ = _groups(row_begin, 0, span_log, BY_ROW, LOG_GROUPS)
    if BY_ROW:
        alpha = tl.load(alphas + row, row < rows, other=0.0)
    else:
        alpha = tl.zeros((1 << LOG_GROUPS,), tl.float32) + tl.load(alphas)
    return alpha


# Values


@triton.jit
def _move(e, p, alpha):
    # Where alpha is 0, p may be NaN.
    return tl.where(alpha == 0.0, e, e + alpha * (p - e))


@triton.jit
def _sum_neighbours(x, TIMES: tl.constexpr):
    """[n / 2^TIMES]: sums of neighbours, then of neighbouring sums, ...

    The order is the same in every layout, which tl.sum over more than two does not promise.
    """
    for _ in tl.static_range(TIMES):
        x = tl.sum(tl.reshape(x, (x.numel // 2, 2)), axis=1)
    return x


@triton.jit
def _pairwise(sums, x, place):
    """Take in element ``place`` of each group: after the last, sums[2] is what _sum_neighbours gives, bit for bit."""
    two, four, eight = sums
    two = tl.where(place % 2 == 0, x, two + x)
    four = tl.where(place % 4 == 1, two, tl.where(place % 4 == 3, four + two, four))
    eight = tl.where(place == 3, four, tl.where(place == 7, eight + four, eight))
    return two, four, eight
