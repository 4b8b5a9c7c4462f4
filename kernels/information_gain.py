"""Key-part information gain: two contexts of the same tokens, one pass over the vocabulary, no logits. Triton kernels.

    z = cap(scale (h W^T + bias)), w likewise for the masked context
    M = max z,  s = sum e^{z-M},  a = sum e^{z-M} (z-M),  c = sum e^{z-M} ((z-M) - (w-M_w)),  z_target
    =>  log p_t = z_t - M - log s,  H(p) = log s - a/s,  KL(p||q) = c/s - log s + log s_w,  q likewise

``cit_fast/ops/information_gain/reference.py`` has the definitions. 4 T V d FLOP for T tokens, and next to no bytes: the
head once for each group of rows below, so tensor cores decide. What follows from that:

* A program has two accumulators [BLOCK_M, BLOCK_N], the two contexts of the same tokens on one tile of the head. The
  tile is loaded once for both, as if the product had twice as many rows, and what a divergence compares is in the same
  thread's registers. Sums of a row stay inside a warp where BLOCK_M is 16 rows for each warp.
* A program takes ``tiles`` tiles of the vocabulary, one after the other, and moves M, s, a, c of its rows along;
  another kernel merges the programs' results in a fixed order, in float64. No atomic operations: the same call gives
  the same bits.
* Programs that run at the same time are ``group`` blocks of rows on the same few tiles: hidden states of a group stay
  in the second-level cache and the head streams past them.
* Logits are in units of log 2, so that e^{z-M} is one instruction; float64 turns them back at the end.
* float32 goes through the tensor cores in three products of TF32 (``tf32x3``), as plain TF32 has an error of 1e-3. By
  counting that is no faster on sm_90 than products without tensor cores, which would need tiles of their own. Operands
  of two dtypes are widened to float32 in registers.

The kernels are compiled for sm_80 and sm_90 and interpreted on the CPU in the tests; on a GPU they serve where they
have proved themselves. The tables of tiles were chosen by counting, not by timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cit_fast.ops.information_gain.native import rows_of
from cit_fast.ops.information_gain.reference import GAIN_STATISTICS, LogitOptions
from cit_fast.ops.information_gain.reference import NOWHERE as LEAST_MAXIMUM

# The maximum of logits that are all -inf, so that differences of maxima stay numbers.
NOWHERE = tl.constexpr(LEAST_MAXIMUM)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
STATISTICS = tl.constexpr(len(GAIN_STATISTICS))


# What differs from call to call must not be compiled for.
@triton.jit(do_not_specialize=["tokens", "entries", "first_entry", "splits", "tiles", "group"])
def gain_kernel(
    full,  # [tokens, width]
    masked,  # [tokens, width]
    weight,  # [entries, width]
    bias,  # [entries] float32, where BIAS
    targets,  # [tokens], of the whole vocabulary
    partials,  # [splits, STATISTICS, tokens] float32, written; logits and what is made of them in units of log 2
    tokens,
    entries,
    width,
    full_stride,
    masked_stride,
    weight_stride,
    first_entry,
    splits,
    tiles,  # of a program
    group,
    scale,
    softcap,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    EVEN: tl.constexpr,  # width is a multiple of BLOCK_K
    PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Statistics of BLOCK_M tokens under both contexts over one piece of the vocabulary."""
    block, split = _place(tl.cdiv(tokens, BLOCK_M), splits, group)
    first_row = block * BLOCK_M
    # Rows and entries beyond the last repeat it: their results are masked, their loads need not be.
    rows = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1 - first_row)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    full_ptrs = full + first_row.to(tl.int64) * full_stride + rows[:, None] * full_stride + offs_k[None, :]
    masked_ptrs = masked + first_row.to(tl.int64) * masked_stride + rows[:, None] * masked_stride + offs_k[None, :]
    target = tl.load(targets + first_row + rows).to(tl.int64) - first_entry
    target = tl.where((target >= 0) & (target < entries), target, -1).to(tl.int32)

    p = _nothing(BLOCK_M)
    q = _nothing(BLOCK_M)
    first = split * tiles * BLOCK_N
    weight += first.to(tl.int64) * weight_stride
    bias += first
    target -= first
    entries -= first
    for start in range(0, tl.minimum(tiles * BLOCK_N, entries), BLOCK_N):
        cols = start + tl.minimum(offs_n, entries - 1 - start)
        weight_ptrs = weight + cols[None, :].to(tl.int64) * weight_stride + offs_k[:, None]
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        w = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, width, BLOCK_K):
            head = _tile(weight_ptrs + k, offs_k[:, None] < width - k, EVEN, PRECISE)
            a = _tile(full_ptrs + k, offs_k[None, :] < width - k, EVEN, PRECISE)
            b = _tile(masked_ptrs + k, offs_k[None, :] < width - k, EVEN, PRECISE)
            z = tl.dot(a, head, z, input_precision="tf32x3")
            w = tl.dot(b, head, w, input_precision="tf32x3")
        beyond = tl.where(offs_n < entries - start, 0.0, -float("inf"))[None, :]
        z = _logit(z, bias + cols, scale, softcap, BIAS, CAP) + beyond
        w = _logit(w, bias + cols, scale, softcap, BIAS, CAP) + beyond
        is_target = offs_n[None, :] == (target - start)[:, None]
        p, q = _update(p, q, z, w, is_target)

    offs = tl.arange(0, BLOCK_M)
    out = partials + split.to(tl.int64) * STATISTICS * tokens + first_row + offs
    for i in tl.static_range(5):
        tl.store(out + 2 * i * tokens, p[i], first_row + offs < tokens)
        tl.store(out + (2 * i + 1) * tokens, q[i], first_row + offs < tokens)


@triton.jit(do_not_specialize=["tokens", "splits"])
def statistics_kernel(partials, statistics, tokens, splits, BLOCK: tl.constexpr):
    """[STATISTICS, tokens] float64 of all pieces together, in natural units."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p, q = _merge(partials, tokens, splits, offs, BLOCK)
    for i in tl.static_range(5):
        tl.store(statistics + 2 * i * tokens + offs, p[i], offs < tokens)
        tl.store(statistics + (2 * i + 1) * tokens + offs, q[i], offs < tokens)


@triton.jit(do_not_specialize=["tokens", "splits"])
def gains_kernel(
    partials,
    log_prob_full,  # [tokens] float32, written, as all that follow
    log_prob_masked,
    probability_gain,
    entropy_full,
    entropy_masked,
    kl_full_masked,
    kl_masked_full,
    tokens,
    splits,
    BLOCK: tl.constexpr,
):
    """What token_gain returns, of all pieces together."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < tokens
    p, q = _merge(partials, tokens, splits, offs, BLOCK)
    log_s_p = tl.log(p[1])
    log_s_q = tl.log(q[1])
    log_p = p[4] - p[0] - log_s_p
    log_q = q[4] - q[0] - log_s_q
    tl.store(log_prob_full + offs, log_p, mask)
    tl.store(log_prob_masked + offs, log_q, mask)
    tl.store(probability_gain + offs, tl.exp(log_p) - tl.exp(log_q), mask)
    tl.store(entropy_full + offs, _at_least_0(log_s_p - p[2] / p[1]), mask)
    tl.store(entropy_masked + offs, _at_least_0(log_s_q - q[2] / q[1]), mask)
    tl.store(kl_full_masked + offs, _at_least_0(p[3] / p[1] - (log_s_p - log_s_q)), mask)
    tl.store(kl_masked_full + offs, _at_least_0(q[3] / q[1] - (log_s_q - log_s_p)), mask)


@triton.jit
def _place(blocks, splits, group):
    """Block of rows and piece of the vocabulary of this program: all blocks of a group on a piece, then the next."""
    program = tl.program_id(0)
    first = program // (group * splits) * group
    size = tl.minimum(blocks - first, group)
    inside = program - first * splits
    return first + inside % size, inside // size


@triton.jit
def _tile(pointers, mask, EVEN: tl.constexpr, PRECISE: tl.constexpr):
    x = tl.load(pointers) if EVEN else tl.load(pointers, mask, other=0.0)
    if PRECISE:
        x = x.to(tl.float32)
    return x


@triton.jit
def _logit(x, bias_ptrs, scale, softcap, BIAS: tl.constexpr, CAP: tl.constexpr):
    """cap(scale (x + bias)) in units of log 2."""
    if BIAS:
        x += tl.load(bias_ptrs)[None, :]
    if CAP:
        # tanh; the error of 1e-7 of the difference is one of the cap.
        x = (LOG2E * softcap) * (1 - 2 / (1 + tl.exp2(x * (2 * LOG2E * scale / softcap))))
    else:
        x *= LOG2E * scale
    return x


@triton.jit
def _nothing(BLOCK_M: tl.constexpr):
    """M, s, a, c and the target's logit of no entries."""
    zero = tl.zeros((BLOCK_M,), tl.float32)
    return zero + NOWHERE, zero, zero, zero, zero - float("inf")


@triton.jit
def _update(p, q, z, w, is_target):
    """Take the logits z and w of one tile into the statistics p and q."""
    top_p = tl.maximum(p[0], tl.max(z, axis=1))
    top_q = tl.maximum(q[0], tl.max(w, axis=1))
    target_p = tl.maximum(p[4], tl.max(tl.where(is_target, z, -float("inf")), axis=1))
    target_q = tl.maximum(q[4], tl.max(tl.where(is_target, w, -float("inf")), axis=1))
    # -inf would be no number times 0; NaN stays.
    z = tl.maximum(z - top_p[:, None], NOWHERE, propagate_nan=tl.PropagateNan.ALL)
    w = tl.maximum(w - top_q[:, None], NOWHERE, propagate_nan=tl.PropagateNan.ALL)
    moved_p = p[0] - top_p
    moved_q = q[0] - top_q
    p = _add(p, tl.exp2(z), z, z - w, top_p, moved_p, moved_p - moved_q, target_p)
    q = _add(q, tl.exp2(w), w, w - z, top_q, moved_q, moved_q - moved_p, target_q)
    return p, q


@triton.jit
def _add(p, weights, below, ratio, top, moved, moved_ratio, target):
    shrink = tl.exp2(moved)
    s = shrink * p[1] + tl.sum(weights, axis=1)
    a = shrink * (p[2] + moved * p[1]) + tl.sum(weights * below, axis=1)
    c = shrink * (p[3] + moved_ratio * p[1]) + tl.sum(weights * ratio, axis=1)
    return top, s, a, c, target


@triton.jit
def _merge(partials, tokens, splits, offs, BLOCK: tl.constexpr):
    """The statistics of both contexts over all pieces, [BLOCK] float64 each, in natural units."""
    mask = offs < tokens
    top_p = tl.zeros((BLOCK,), tl.float32) + NOWHERE
    top_q = tl.zeros((BLOCK,), tl.float32) + NOWHERE
    target_p = tl.zeros((BLOCK,), tl.float32) - float("inf")
    target_q = tl.zeros((BLOCK,), tl.float32) - float("inf")
    for split in range(splits):
        piece = partials + split * STATISTICS * tokens + offs
        top_p = tl.maximum(top_p, tl.load(piece, mask, other=0.0))
        top_q = tl.maximum(top_q, tl.load(piece + tokens, mask, other=0.0))
        target_p = tl.maximum(target_p, tl.load(piece + 8 * tokens, mask, other=0.0))
        target_q = tl.maximum(target_q, tl.load(piece + 9 * tokens, mask, other=0.0))
    zero = tl.zeros((BLOCK,), tl.float64)
    p = (zero, zero, zero)
    q = (zero, zero, zero)
    for split in range(splits):
        piece = partials + split * STATISTICS * tokens + offs
        moved_p = tl.load(piece, mask, other=0.0) - top_p
        moved_q = tl.load(piece + tokens, mask, other=0.0) - top_q
        p = _add_piece(p, piece, tokens, mask, moved_p, moved_p - moved_q)
        q = _add_piece(q, piece + tokens, tokens, mask, moved_q, moved_q - moved_p)
    return _natural(top_p, p, target_p), _natural(top_q, q, target_q)


@triton.jit
def _add_piece(p, piece, tokens, mask, moved, moved_ratio):
    shrink = tl.exp2(moved).to(tl.float64)
    s = tl.load(piece + 2 * tokens, mask, other=1.0).to(tl.float64)
    a = tl.load(piece + 4 * tokens, mask, other=0.0).to(tl.float64)
    c = tl.load(piece + 6 * tokens, mask, other=0.0).to(tl.float64)
    return p[0] + shrink * s, p[1] + shrink * (a + moved * s), p[2] + shrink * (c + moved_ratio * s)


@triton.jit
def _natural(top, sums, target):
    return top.to(tl.float64) * LN2, sums[0], sums[1] * LN2, sums[2] * LN2, target.to(tl.float64) * LN2


@triton.jit
def _at_least_0(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


# Launches


class _Tiling(NamedTuple):
    """Of gain_kernel: rows of each context, entries and columns of a tile; warps; tiles on their way at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


FUSED = {"enable_fp_fusion": True}
"""Multiplications and additions are contracted, whatever the default of a version of Triton."""

# By GPU and by the bits of the operands, such that nothing spills. "any" fits 99 KB of shared memory; "unaligned" is
# for rows that do not start at multiples of 16 bytes, which no asynchronous copy can take. What is not named is "any".
_TILINGS = {
    ("any", 16): _Tiling(64, 128, 32, 8, 3),
    ("any", 32): _Tiling(32, 64, 32, 4, 3),
    ("sm_80", 16): _Tiling(128, 128, 32, 8, 4),
    ("sm_80", 32): _Tiling(64, 64, 16, 4, 4),
    ("sm_90", 16): _Tiling(128, 128, 64, 8, 4),
    ("sm_90", 32): _Tiling(128, 64, 32, 8, 3),
    ("sm_100", 16): _Tiling(128, 64, 64, 8, 4),
    ("unaligned", 16): _Tiling(32, 64, 32, 4, 2),
    ("unaligned", 32): _Tiling(32, 32, 32, 4, 2),
}
_ARCHITECTURES = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
_GROUP_BYTES = 24 << 20  # hidden states of a group of programs, about half of the second-level cache
_MOST_ROWS = 1 << 14  # of one launch, which bounds the partial results
_LEAST_TILES, _MOST_TILES = 4, 64
_MERGE = {"BLOCK": 128, "num_warps": 4, **FUSED}


def token_gain(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: LogitOptions,
) -> tuple[Tensor, ...]:
    """See :func:`cit_fast.ops.token_gain`."""
    tokens = targets.shape[0]
    gains = tuple(hidden_full.new_empty(tokens, dtype=torch.float32) for _ in range(7))
    with device_of(hidden_full):
        for rows in slices(tokens, _MOST_ROWS):
            partials = _partials(
                hidden_full[rows], hidden_masked[rows], lm_head_weight, targets[rows], 0, bias, options
            )
            splits, _, count = partials.shape
            gains_kernel[(-(-count // _MERGE["BLOCK"]),)](
                partials, *(gain[rows] for gain in gains), count, splits, **_MERGE
            )
    return gains


def token_gain_statistics(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    first_entry: int,
    bias: Tensor | None,
    options: LogitOptions,
) -> Tensor:
    """See :func:`cit_fast.ops.token_gain_statistics`."""
    tokens = targets.shape[0]
    pieces = [hidden_full.new_empty((STATISTICS.value, 0), dtype=torch.float64)]
    with device_of(hidden_full):
        for rows in slices(tokens, _MOST_ROWS):
            partials = _partials(
                hidden_full[rows], hidden_masked[rows], lm_head_weight, targets[rows], first_entry, bias, options
            )
            splits, _, count = partials.shape
            pieces.append(partials.new_empty((STATISTICS.value, count), dtype=torch.float64))
            statistics_kernel[(-(-count // _MERGE["BLOCK"]),)](partials, pieces[-1], count, splits, **_MERGE)
    return torch.cat(pieces, dim=1)


def _partials(
    full: Tensor,
    masked: Tensor,
    weight: Tensor,
    targets: Tensor,
    first_entry: int,
    bias: Tensor | None,
    options: LogitOptions,
) -> Tensor:
    """Statistics of each piece of the vocabulary, [pieces, 10, T] float32; logits in units of log 2."""
    (tokens, width), entries = full.shape, weight.shape[0]
    precise = not full.dtype == masked.dtype == weight.dtype != torch.float32
    if precise:
        full, masked = full.float(), masked.float()
    full, masked = rows_of(full), rows_of(masked)
    aligned = all(_is_aligned(each) for each in (full, masked, weight))
    kind, bits = _architecture(full.device) if aligned else "unaligned", 32 if precise else 16
    tiling = _TILINGS.get((kind, bits), _TILINGS["any", bits])
    blocks = -(-tokens // tiling.BLOCK_M)
    tiles = _tiles(blocks, -(-entries // tiling.BLOCK_N), _processors(full.device))
    splits = -(-entries // (tiles * tiling.BLOCK_N))
    partials = torch.empty(splits, STATISTICS.value, tokens, dtype=torch.float32, device=full.device)
    gain_kernel[(blocks * splits,)](
        full,
        masked,
        weight,
        partials if bias is None else bias.float().contiguous(),
        targets.contiguous(),
        partials,
        tokens,
        entries,
        width,
        full.stride(0),
        masked.stride(0),
        weight.stride(0),
        first_entry,
        splits,
        tiles,
        min(blocks, max(1, _GROUP_BYTES // (2 * tiling.BLOCK_M * width * full.element_size()))),
        options.scale,
        float(options.softcap or 0),
        BIAS=bias is not None,
        CAP=options.softcap is not None,
        EVEN=width % tiling.BLOCK_K == 0,
        PRECISE=precise,
        **tiling._asdict(),
        **FUSED,
    )
    return partials


def _is_aligned(matrix: Tensor) -> bool:
    """As Triton sees it, which compiles for it: strides and widths count in multiples of 16 elements."""
    return matrix.stride(0) % 16 == matrix.shape[1] % 16 == matrix.data_ptr() % 16 == 0


def _tiles(blocks: int, tiles: int, processors: int) -> int:
    """Tiles of a program, so that few processors wait for the last ones."""

    def time(each: int) -> float:
        waves = -(-blocks * -(-tiles // each) // processors)
        return waves * (each + 0.5)  # half a tile to start and to end a program

    return min(range(min(tiles, _LEAST_TILES), min(tiles, _MOST_TILES) + 1), key=time)


def slices(count: int, size: int) -> Iterator[slice]:
    """``size`` rows at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """The device of ``tensor`` made the current one, if it is a GPU."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


@cache
def _architecture(device: torch.device) -> str:
    return _ARCHITECTURES.get(torch.cuda.get_device_capability(device), "any") if device.type == "cuda" else "any"


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
