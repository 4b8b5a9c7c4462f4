"""Balance-weight EMA for lists of tensors of any sizes and dtypes: three Triton kernels, each launched once for a list.

    sweep    a = |p - e|_1, b = |g|_1, c = |g - g_prev|_1 of each tensor, g_prev <- g; with AdamW the pending
             e += alpha (p - e) and the step of p, m, v come first, on the same loads
    weights  alpha of each tensor from its a, b, c
    apply    e += alpha (p - e)

``cit_fast/ops/balance_ema/reference.py`` has the equations. Bytes per float32 element: sweep 20, with AdamW 44 (4 less
where g_prev is not written); apply 12. There is next to no arithmetic, so all that counts is wide loads, and enough of
them at once.

* A program takes a chunk, about 16 Ki elements of one tensor, and finds its addresses, dtypes and shape in tables in
  device memory: 224 small tensors cost the launches of one large one. At 4 TB/s a processor of an H200 needs 10 to
  20 us for the bytes of a chunk, so the two dependent look-ups that come first are hidden by its neighbours, and a list
  of 7 M elements still is three chunks for each processor.
* A program walks its chunk in tiles of 128 groups of 8 neighbours: one 16-byte access of each of 128 threads for a
  16-bit stream and two for a float32 one, all streams in flight together.
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

The kernels are compiled for sm_80 and sm_90 and interpreted on the CPU in the tests; on a GPU they serve where they
have proved themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from cit_fast.kernels.balance_ema_tables import (
    ALIGNED_BIT,
    AVERAGE,
    CHUNK,
    CODES,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST_CHUNK,
    GRAD,
    LOG_GROUPS,
    PARAM,
    PREVIOUS_GRAD,
    SIZE,
    common_dtype,
    current_stream,
    layout,
    stream_table,
    table_on,
)
from cit_fast.kernels.elements import ABSENT, GROUP, load, pairwise, random_key, store, store_state, sum_neighbours
from torch import Tensor

from cit_fast.ops.balance_ema.native import RULES, empty_weights
from cit_fast.ops.balance_ema.reference import AdamWLists, AdamWOptions, BalanceOptions, BalanceWeights

PAPER = tl.constexpr(RULES["paper"])
FIXED = tl.constexpr(RULES["fixed"])


# A seed of its own for each step must not be compiled for.
@triton.jit(do_not_specialize=["seed"])
def sweep_kernel(
    sizes,
    streams,
    chunks,  # [chunks] int32: the tensor of each
    slots,  # [chunks, 3] float32, written: a, b, c of each chunk
    alphas,  # [tensors] float32: pending weights (ADAMW only)
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
    NEAREST: tl.constexpr,
    LOG_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Norms of every chunk, before them AdamW where asked for; see the top of the file."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + chunk)
    begin, count = _locate(sizes + 2 * tensor, chunk, CHUNK)
    codes, addresses = _streams(streams + 8 * tensor)
    keys = (random_key(seed, tensor, 0), random_key(seed, tensor, 1), random_key(seed, tensor, 2))
    adamw = (beta1_rest, beta2, beta2_rest, decayed, step_size, root_scale, eps)
    alpha = 0.0
    if ADAMW:
        alpha = tl.load(alphas + tensor)
    a = tl.zeros((1 << LOG_GROUPS,), tl.float32)
    b = tl.zeros((1 << LOG_GROUPS,), tl.float32)
    c = tl.zeros((1 << LOG_GROUPS,), tl.float32)
    group = GROUP * tl.arange(0, 1 << LOG_GROUPS)
    if _is_aligned(codes, count):
        for left in range(0, count, GROUP << LOG_GROUPS):
            offs = (left + group)[:, None] + tl.arange(0, GROUP)[None, :]
            mask = (left + group < count)[:, None]
            more_a, more_b, more_c = _step(
                addresses, codes, begin, offs, mask, alpha, keys, adamw, DTYPES, ADAMW, STORE_GRADS, NEAREST, True
            )
            a += sum_neighbours(more_a, 3)
            b += sum_neighbours(more_b, 3)
            c += sum_neighbours(more_c, 3)
    else:
        for left in range(0, count, GROUP << LOG_GROUPS):
            sums_a = (a, a, a)
            sums_b = (b, b, b)
            sums_c = (c, c, c)
            for place in range(GROUP):
                offs = left + group + place
                mask = offs < count
                more_a, more_b, more_c = _step(
                    addresses, codes, begin, offs, mask, alpha, keys, adamw, DTYPES, ADAMW, STORE_GRADS, NEAREST, False
                )
                sums_a = pairwise(sums_a, more_a, place)
                sums_b = pairwise(sums_b, more_b, place)
                sums_c = pairwise(sums_c, more_c, place)
            a += sums_a[2]
            b += sums_b[2]
            c += sums_c[2]
    slot = slots + 3 * chunk + tl.arange(0, 1)
    tl.store(slot, sum_neighbours(a, LOG_GROUPS))
    tl.store(slot + 1, sum_neighbours(b, LOG_GROUPS))
    tl.store(slot + 2, sum_neighbours(c, LOG_GROUPS))


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
    NEAREST: tl.constexpr,
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
        e = _store_average(addresses, codes, begin, offs, mask, e, index, keys[0], DTYPES, NEAREST, WIDE)
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
    sizes,
    slots,
    norms,  # [tensors, 3] float64, written
    alphas,  # [tensors] float32, written
    fallbacks,  # [tensors] uint8, written
    remaining,  # [tensors] float32, a' before and after; alphas where HAS_REMAINING is off
    constant,  # alpha where the rule gives none, rounded from float64
    scale,
    RULE: tl.constexpr,  # ABSENT: norms only
    HAS_REMAINING: tl.constexpr,
    CHUNK: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """Equations (2) and (3) for one tensor, whose chunks have a slot each."""
    tensor = tl.program_id(0)
    first = tl.load(sizes + 2 * tensor + FIRST_CHUNK)
    count = tl.maximum(tl.cdiv(tl.load(sizes + 2 * tensor + SIZE), CHUNK), 1)
    lane = tl.arange(0, 1 << LOG_TILE)
    one = tl.arange(0, 1)
    if RULE == PAPER:  # before the sums, whose barriers lie between this and the store
        left = tl.load(remaining + tensor + one).to(tl.float64)
    distance = tl.zeros((1 << LOG_TILE,), tl.float64)
    gradient = tl.zeros((1 << LOG_TILE,), tl.float64)
    change = tl.zeros((1 << LOG_TILE,), tl.float64)
    for begin in range(0, count, 1 << LOG_TILE):
        at = slots + 3 * (first + begin + lane)
        mask = begin + lane < count
        distance += tl.load(at, mask, other=0.0).to(tl.float64)
        gradient += tl.load(at + 1, mask, other=0.0).to(tl.float64)
        change += tl.load(at + 2, mask, other=0.0).to(tl.float64)
    distance = sum_neighbours(distance, LOG_TILE)
    gradient = sum_neighbours(gradient, LOG_TILE)
    change = sum_neighbours(change, LOG_TILE)
    tl.store(norms + 3 * tensor + one, distance)
    tl.store(norms + 3 * tensor + 1 + one, gradient)
    tl.store(norms + 3 * tensor + 2 + one, change)
    if RULE != ABSENT:
        finite = (distance < float("inf")) & (gradient < float("inf"))  # false for NaN
        if RULE == FIXED:
            alpha = tl.zeros((1,), tl.float32) + constant
            fallback = one < 0
        else:
            weight = scale * (1.0 + gradient)
            if RULE == PAPER:
                weight = left * (1.0 + gradient)
            product = distance * change
            # Dividing by the product where it is 0 would give what is not usable: infinity or NaN.
            weight = weight / tl.where(product == 0.0, 1.0, product)
            usable = (product > 0.0) & (weight > 0.0) & (weight < 1.0)  # false for NaN
            # 0 marks a tensor that is left out, so a weight too small for a float32 becomes the smallest one.
            alpha = tl.where(usable, weight.to(tl.float32), constant)
            alpha = tl.maximum(alpha, 1.1754943508222875e-38)
            fallback = (usable == 0) & finite
        alpha = tl.where(finite, alpha, 0.0)
        tl.store(alphas + tensor + one, alpha)
        if HAS_REMAINING:
            tl.store(remaining + tensor + one, ((1.0 - alpha.to(tl.float64)) * distance).to(tl.float32))
        tl.store(fallbacks + tensor + one, fallback.to(tl.uint8))


@triton.jit(do_not_specialize=["seed"])
def apply_kernel(
    sizes,
    streams,
    chunks,
    alphas,  # [tensors] float32; 0 leaves a tensor as it is
    seed,
    DTYPES: tl.constexpr,
    NEAREST: tl.constexpr,
    LOG_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Equation (4)."""
    # Backwards: the chunks that the sweep read last are the ones still in the cache.
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    tensor = tl.load(chunks + chunk)
    begin, count = _locate(sizes + 2 * tensor, chunk, CHUNK)
    codes, addresses = _streams(streams + 8 * tensor)
    key = random_key(seed, tensor, 0)
    alpha = tl.load(alphas + tensor)
    aligned = _is_aligned(codes, count)
    for left in range(0, count, GROUP << LOG_GROUPS):
        offs = left + GROUP * tl.arange(0, 1 << LOG_GROUPS)
        if aligned:
            wide = offs[:, None] + tl.arange(0, GROUP)[None, :]
            _apply(addresses, codes, begin, wide, (offs < count)[:, None], alpha, key, DTYPES, NEAREST, True)
        else:
            for place in range(GROUP):
                mask = offs + place < count
                _apply(addresses, codes, begin, offs + place, mask, alpha, key, DTYPES, NEAREST, False)


@triton.jit
def _apply(
    addresses, codes, begin, offs, mask, alpha, key, DTYPES: tl.constexpr, NEAREST: tl.constexpr, WIDE: tl.constexpr
):
    p = load(addresses, codes, begin, offs, mask, PARAM, DTYPES, WIDE)
    e = load(addresses, codes, begin, offs, mask, AVERAGE, DTYPES, WIDE)
    index = begin.to(tl.uint32) + offs.to(tl.uint32)
    _store_average(addresses, codes, begin, offs, mask, _move(e, p, alpha), index, key, DTYPES, NEAREST, WIDE)


@triton.jit
def _store_average(
    addresses, codes, begin, offs, mask, e, index, key, DTYPES: tl.constexpr, NEAREST: tl.constexpr, WIDE: tl.constexpr
):
    if NEAREST:
        stored = store(addresses, codes, begin, offs, mask, e, AVERAGE, DTYPES, WIDE)
    else:
        stored = store_state(addresses, codes, begin, offs, mask, e, index, key, AVERAGE, DTYPES, WIDE)
    return stored


# Places


@triton.jit
def _locate(size, chunk, CHUNK: tl.constexpr):
    """The first element of a chunk in its tensor, and how many it has."""
    begin = (chunk - tl.load(size + FIRST_CHUNK)) * CHUNK
    return begin, tl.minimum(tl.load(size + SIZE) - begin, CHUNK).to(tl.int32)


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
def _is_aligned(codes, count):
    """Whether the chunk is whole groups at multiples of 16 bytes; the last chunk of a tensor may not be."""
    return ((codes >> ALIGNED_BIT) & 1 == 1) & (count % GROUP == 0)


# Values


@triton.jit
def _move(e, p, alpha):
    # Where alpha is 0, p may be NaN.
    return tl.where(alpha == 0.0, e, e + alpha * (p - e))


# Launches

_LOG_SLOTS = 10  # of a program of weights_kernel
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_TILING = {"LOG_GROUPS": LOG_GROUPS, "CHUNK": CHUNK, **_OPTIONS}
_NO_STEP = dict.fromkeys(("beta1_rest", "beta2", "beta2_rest", "decayed", "step_size", "root_scale", "eps"), 0.0)


def balance_norms_(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    store_grads: bool,
) -> Tensor:
    """See :func:`cit_fast.ops.balance_norms_`."""
    with _device_of(params):
        call = _Call([params, averages, grads, previous_grads, [], []])
        return call.weights(call.sweep(store_grads), None, None, None).norms


def balance_ema_(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    remaining: Tensor | None,
    options: BalanceOptions,
) -> BalanceWeights:
    """See :func:`cit_fast.ops.balance_ema_`."""
    with _device_of(params):
        call = _Call([params, averages, grads, previous_grads, [], []])
        weights = call.weights(call.sweep(options.store_grads), options, None, remaining)
        call.apply(weights.alphas, options.rounding, options.seed)
    return weights


def adamw_balance_ema_(
    lists: AdamWLists, alphas: Tensor, remaining: Tensor | None, adamw: AdamWOptions, options: BalanceOptions
) -> BalanceWeights:
    """See :func:`cit_fast.ops.adamw_balance_ema_`."""
    # In float64 here; rounded to float32 at the launch.
    step = {
        "beta1_rest": 1 - adamw.beta1,
        "beta2": adamw.beta2,
        "beta2_rest": 1 - adamw.beta2,
        "decayed": 1 - adamw.lr * adamw.weight_decay,
        "step_size": adamw.lr / (1 - adamw.beta1**adamw.step),
        "root_scale": 1 / math.sqrt(1 - adamw.beta2**adamw.step),
        "eps": adamw.eps,
    }
    with _device_of(lists.params):
        call = _Call(lists.columns)
        slots = call.sweep(options.store_grads, step, alphas, options.rounding, options.seed)
        return call.weights(slots, options, alphas, remaining)


def flush_balance_ema_(params: list[Tensor], averages: list[Tensor], alphas: Tensor, rounding: str, seed: int) -> None:
    """See :func:`cit_fast.ops.flush_balance_ema_`."""
    with _device_of(params):
        _Call([params, averages, [], [], [], []]).apply(alphas, rounding, seed)


class _Call:
    """The tables of one list of tensors on the device, and the launches that read them."""

    def __init__(self, streams: Sequence[Sequence[Tensor]]) -> None:
        """``streams`` in the order of the columns; an empty list is a stream that is not there."""
        self.params = streams[0]
        self.device = self.params[0].device
        stream = current_stream(self.device)
        self.layout = layout(tuple(param.numel() for param in self.params), self.device, stream)
        self.streams = table_on(stream_table(streams).tobytes(), self.device, stream)
        self.dtypes = tuple(common_dtype(tensors) for tensors in streams)

    def sweep(
        self,
        store_grads: bool,
        step: dict[str, float] | None = None,
        alphas: Tensor | None = None,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> Tensor:
        """Launch sweep_kernel; returns the slots."""
        sizes, chunks = self.layout
        slots = torch.empty(len(chunks), 3, dtype=torch.float32, device=self.device)
        sweep_kernel[(len(chunks),)](
            sizes,
            self.streams,
            chunks,
            slots,
            slots if alphas is None else alphas,
            _as_int32(seed),
            **(step or _NO_STEP),
            DTYPES=self.dtypes,
            ADAMW=step is not None,
            STORE_GRADS=store_grads,
            NEAREST=rounding == "nearest",
            **_TILING,
        )
        return slots

    def weights(
        self, slots: Tensor, options: BalanceOptions | None, alphas: Tensor | None, remaining: Tensor | None
    ) -> BalanceWeights:
        """Launch weights_kernel, which writes to ``alphas`` where given; without options: the norms alone."""
        weights = empty_weights(self.params)
        if alphas is not None:
            weights = weights._replace(alphas=alphas)
        constant, scale = 0.0, 0.0
        if options is not None:
            constant = 1 - options.decay if options.rule == "fixed" else options.fallback
            scale = options.scale
        weights_kernel[(len(self.params),)](
            self.layout.sizes,
            slots,
            weights.norms,
            weights.alphas,
            weights.fallbacks.view(torch.uint8),
            weights.alphas if remaining is None else remaining,
            constant,
            scale,
            HAS_REMAINING=remaining is not None,
            RULE=ABSENT.value if options is None else RULES[options.rule],
            CHUNK=CHUNK,
            LOG_TILE=_LOG_SLOTS,
            **_OPTIONS,
        )
        return weights

    def apply(self, alphas: Tensor, rounding: str, seed: int) -> None:
        """Launch apply_kernel."""
        sizes, chunks = self.layout
        apply_kernel[(len(chunks),)](
            sizes,
            self.streams,
            chunks,
            alphas,
            _as_int32(seed),
            DTYPES=self.dtypes,
            NEAREST=rounding == "nearest",
            **_TILING,
        )


def _device_of(params: Sequence[Tensor]) -> AbstractContextManager[Any]:
    device = params[0].device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _as_int32(seed: int) -> int:
    """The same 32 bits; a value that would not fit makes Triton compile the kernel again for 64 bits."""
    return seed - (1 << 32) if seed >= 1 << 31 else seed
