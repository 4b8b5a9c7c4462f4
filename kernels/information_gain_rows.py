"""Losses from rows of logits that a library GEMM made, and their gradients in place of them: Triton kernels.

:mod:`cit_fast.kernels.information_gain_losses` launches them.

    z = cap(scale (x + bias)),  w the frozen side's
    cross_entropy:  loss = -g log p_t                         dz = g (p - onehot(t)),  g = min(1, H(p) / ln 20)^gate
    jsd:            loss = (KL(p||m) + KL(q||m)) / (2 ln 2)   dz = p (log(p/m) - KL(p||m)),  m = (p+q)/2,
    kl:             loss = KL(q||p)                           dz = p - q
                    both of logits divided by the temperature beta
    all:            dx = dz (1 - (z/cap)^2)

What is the same for a whole row (its weight, scale, 1/(2 ln 2 beta)) multiplies the gradient of its hidden state
instead, [T, d] rather than [T, V]; so what is stored is at most 1 in size and keeps its digits in half precision.

A program takes a row and sweeps it two or three times, every other time backwards: what a sweep read last the next
finds in the second-level cache. 4 bytes of float32 logits are read for each entry, 8 for a pair of sides, and 2 of
gradient written. Whole blocks of a row go without masks; the last one, if it is not whole, has code of its own.
Logarithms are of base 2, as the instructions are. Programs of 1024 threads, one on a processor at a time, keep few rows
on their way and so more of each in that cache. The gradient in 16 bits lies in the first half of the row that it
replaces: a block of it is stored where all logits have been read. Sums are kept by each lane and added up at the end,
in an order that is always the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cit_fast.kernels.information_gain import LN2, LOG2E, NOWHERE

from cit_fast.ops.information_gain.reference import GATE_ENTROPY

FULL_ENTROPY = tl.constexpr(GATE_ENTROPY)
MOST_LOG_RATIO = tl.constexpr(40.0)  # of base 2; beyond it the smaller of p and q no longer matters


@triton.jit(do_not_specialize=["entries"])
def cross_entropy_kernel(
    logits,  # [rows, entries] float32, each row `stride` from the last; what lies between them is read and written, too
    gradient,  # the same memory, or nothing: `lift` times the gradient
    bias,  # [entries] float32, where BIAS
    targets,  # [rows]
    row_weight,  # [rows] float32
    losses,  # [rows] float32, written: row_weight times the loss, 0 where that is 0
    entries,
    stride,
    gradient_stride,
    scale,
    softcap,
    entropy_gate,  # exponent, where GATE
    lift,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    GATE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row a program: the sum of exponentials, then the gradient."""
    row = tl.program_id(0)
    share = tl.load(row_weight + row)
    logits += row.to(tl.int64) * stride
    gradient += row.to(tl.int64) * gradient_stride
    if share == 0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            _store_zeros(gradient, stride, BLOCK)
    else:
        target = tl.load(targets + row).to(tl.int32)
        target = tl.where((target >= 0) & (target < entries), target, entries)
        top = tl.zeros((BLOCK,), tl.float32) + NOWHERE
        total = tl.zeros((BLOCK,), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float32)
        for last in tl.static_range(1, -1, -1):
            for i in range(_blocks(entries, last, BLOCK)):
                offs = _backwards(i, entries, last, BLOCK)
                z, _ = _logits(logits, bias, offs, entries, stride, scale, softcap, 1.0, BIAS, CAP, last)
                if GATE:
                    moment = _take_moment(top, total, moment, z)
                top, total = _take(top, total, z)
        log_sum = _log_sum(top, total)
        gate = _gate(top, total, moment, log_sum, entropy_gate) if GATE else 1.0
        of_target = _logits(logits, bias, target, entries, stride, scale, softcap, 1.0, BIAS, CAP, True)[0]
        tl.store(losses + row, share * gate * LN2 * (log_sum - of_target))
        if GRADIENT:
            for last in tl.static_range(2):
                for i in range(_blocks(entries, last, BLOCK)):
                    offs = _forwards(i, entries, last, BLOCK)
                    z, slope = _logits(logits, bias, offs, entries, stride, scale, softcap, 1.0, BIAS, CAP, last)
                    p = tl.exp2(z - log_sum)
                    dz = slope * (p - tl.where(offs == target, 1.0, 0.0))
                    _replace(gradient, (lift * gate) * dz, offs, stride, last)


@triton.jit(do_not_specialize=["entries"])
def jsd_kernel(
    live,  # [rows, entries] float32, each row `stride` from the last; what lies between them is read and written, too
    frozen,
    gradient,  # the memory of `live`, or nothing: `lift` times the gradient
    bias_live,  # [entries] float32, where BIAS_LIVE
    bias_frozen,
    temperature,  # [rows] float32
    row_weight,
    losses,  # [rows] float32, written: row_weight times the loss, 0 where that is 0
    entries,
    stride,
    gradient_stride,
    scale,
    softcap,
    lift,
    BIAS_LIVE: tl.constexpr,
    BIAS_FROZEN: tl.constexpr,
    CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row a program: both sums of exponentials, both divergences, then the gradient."""
    row = tl.program_id(0)
    share = tl.load(row_weight + row)
    live += row.to(tl.int64) * stride
    frozen += row.to(tl.int64) * stride
    gradient += row.to(tl.int64) * gradient_stride
    if share == 0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            _store_zeros(gradient, stride, BLOCK)
    else:
        cooled = 1 / tl.load(temperature + row)
        sides = (live, frozen, bias_live, bias_frozen, BIAS_LIVE, BIAS_FROZEN)
        top_p = tl.zeros((BLOCK,), tl.float32) + NOWHERE
        top_q = tl.zeros((BLOCK,), tl.float32) + NOWHERE
        total_p = tl.zeros((BLOCK,), tl.float32)
        total_q = tl.zeros((BLOCK,), tl.float32)
        for last in tl.static_range(2):
            for i in range(_blocks(entries, last, BLOCK)):
                offs = _forwards(i, entries, last, BLOCK)
                z, w, _ = _both(sides, offs, entries, stride, scale, softcap, cooled, -1, False, CAP, last)
                top_p, total_p = _take(top_p, total_p, z)
                top_q, total_q = _take(top_q, total_q, w)
        log_sum_p = _log_sum(top_p, total_p)
        log_sum_q = _log_sum(top_q, total_q)

        sum_p = tl.zeros((BLOCK,), tl.float32)
        sum_q = tl.zeros((BLOCK,), tl.float32)
        for last in tl.static_range(1, -1, -1):
            for i in range(_blocks(entries, last, BLOCK)):
                offs = _backwards(i, entries, last, BLOCK)
                z, w, _ = _both(sides, offs, entries, stride, scale, softcap, cooled, -1, False, CAP, last)
                z, w = _finite(z - log_sum_p), _finite(w - log_sum_q)
                p_over_m, q_over_m = _log_over_mean(z, w)
                sum_p += tl.exp2(z) * p_over_m
                sum_q += tl.exp2(w) * q_over_m
        kl_p = tl.sum(sum_p)
        kl_q = tl.sum(sum_q)
        tl.store(losses + row, share * 0.5 * (kl_p + kl_q))

        if GRADIENT:
            for last in tl.static_range(2):
                for i in range(_blocks(entries, last, BLOCK)):
                    offs = _forwards(i, entries, last, BLOCK)
                    z, w, slope = _both(sides, offs, entries, stride, scale, softcap, cooled, -1, False, CAP, last)
                    z, w = _finite(z - log_sum_p), _finite(w - log_sum_q)
                    p_over_m, _ = _log_over_mean(z, w)
                    dz = LN2 * slope * (tl.exp2(z) * (p_over_m - kl_p))
                    _replace(gradient, lift * dz, offs, stride, last)


@triton.jit(do_not_specialize=["entries"])
def kl_kernel(
    live,  # [rows, entries] float32, each row `stride` from the last; what lies between them is read and written, too
    frozen,
    gradient,  # the memory of `live`, or nothing: `lift` times the gradient
    bias_live,  # [entries] float32, where BIAS_LIVE
    bias_frozen,
    temperature,  # [rows] float32
    row_weight,
    targets,  # [rows], where WITHOUT: an entry that is taken out
    losses,  # [rows] float32, written: row_weight times the loss, 0 where that is 0
    entries,
    stride,
    gradient_stride,
    scale,
    softcap,
    lift,
    BIAS_LIVE: tl.constexpr,
    BIAS_FROZEN: tl.constexpr,
    CAP: tl.constexpr,
    WITHOUT: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row a program: both sums of exponentials, then the divergence and the gradient, which does not need it."""
    row = tl.program_id(0)
    share = tl.load(row_weight + row)
    live += row.to(tl.int64) * stride
    frozen += row.to(tl.int64) * stride
    gradient += row.to(tl.int64) * gradient_stride
    if share == 0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            _store_zeros(gradient, stride, BLOCK)
    else:
        cooled = 1 / tl.load(temperature + row)
        sides = (live, frozen, bias_live, bias_frozen, BIAS_LIVE, BIAS_FROZEN)
        out = tl.load(targets + row).to(tl.int32) if WITHOUT else -1
        top_p = tl.zeros((BLOCK,), tl.float32) + NOWHERE
        top_q = tl.zeros((BLOCK,), tl.float32) + NOWHERE
        total_p = tl.zeros((BLOCK,), tl.float32)
        total_q = tl.zeros((BLOCK,), tl.float32)
        for last in tl.static_range(1, -1, -1):
            for i in range(_blocks(entries, last, BLOCK)):
                offs = _backwards(i, entries, last, BLOCK)
                z, w, _ = _both(sides, offs, entries, stride, scale, softcap, cooled, out, WITHOUT, CAP, last)
                top_p, total_p = _take(top_p, total_p, z)
                top_q, total_q = _take(top_q, total_q, w)
        log_sum_p = _log_sum(top_p, total_p)
        log_sum_q = _log_sum(top_q, total_q)

        divergence = tl.zeros((BLOCK,), tl.float32)
        for last in tl.static_range(2):
            for i in range(_blocks(entries, last, BLOCK)):
                offs = _forwards(i, entries, last, BLOCK)
                z, w, slope = _both(sides, offs, entries, stride, scale, softcap, cooled, out, WITHOUT, CAP, last)
                z -= log_sum_p
                w -= log_sum_q
                q = tl.exp2(w)
                divergence += _times(q, w - z)
                if GRADIENT:
                    _replace(gradient, lift * slope * (tl.exp2(z) - q), offs, stride, last)
        tl.store(losses + row, share * LN2 * tl.sum(divergence))


@triton.jit(do_not_specialize=["rows", "entries"])
def bias_kernel(
    gradient,  # [rows, entries]
    factors,  # [rows] float32
    grad_bias,  # [entries] float32, added to
    rows,
    entries,
    stride,
    BLOCK: tl.constexpr,
):
    """Columns of the gradient, added up in the order of the rows."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < entries
    total = tl.load(grad_bias + offs, mask, other=0.0)
    for row in range(rows):
        total += tl.load(factors + row) * tl.load(gradient + offs, mask, other=0.0).to(tl.float32)
        gradient += stride
    tl.store(grad_bias + offs, total, mask)


@triton.jit
def _blocks(entries, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks are whole, or whether a last one is not."""
    return tl.where(entries % BLOCK > 0, 1, 0) if LAST else entries // BLOCK


@triton.jit
def _forwards(i, entries, LAST: tl.constexpr, BLOCK: tl.constexpr):
    return (entries // BLOCK if LAST else i) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _backwards(i, entries, LAST: tl.constexpr, BLOCK: tl.constexpr):
    return (entries // BLOCK - (0 if LAST else 1 + i)) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _logits(
    row,
    bias,
    offs,
    entries,
    stride,
    scale,
    softcap,
    cooled,  # 1 / temperature
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Logits in units of log 2, -inf beyond the row where MASKED, and the slope of the cap."""
    # Of the two limits the one that is a multiple of 16.
    z = tl.load(row + offs, offs < stride, other=0.0) if MASKED else tl.load(row + offs)
    if BIAS:
        z += tl.load(bias + offs, offs < entries, other=0.0) if MASKED else tl.load(bias + offs)
    slope = 1.0
    if CAP:
        # tanh, and 1 - tanh^2; the error of 1e-7 of the difference is one of the cap.
        share = 1 / (1 + tl.exp2(z * (2 * LOG2E * scale / softcap)))
        slope = 4 * share * (1 - share)
        z = (LOG2E * softcap * cooled) * (1 - 2 * share)
    else:
        z *= LOG2E * scale * cooled
    if MASKED:
        z = tl.where(offs < entries, z, -float("inf"))
    return z, slope


@triton.jit
def _both(
    sides,
    offs,
    entries,
    stride,
    scale,
    softcap,
    cooled,
    out,
    WITHOUT: tl.constexpr,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Logits of both sides and the live one's slope; ``out`` is the entry that is taken out, WITHOUT it."""
    live, frozen, bias_live, bias_frozen, BIAS_LIVE, BIAS_FROZEN = sides
    z, slope = _logits(live, bias_live, offs, entries, stride, scale, softcap, cooled, BIAS_LIVE, CAP, MASKED)
    w, _ = _logits(frozen, bias_frozen, offs, entries, stride, scale, softcap, cooled, BIAS_FROZEN, CAP, MASKED)
    if WITHOUT:
        z = tl.where(offs == out, NOWHERE, z)
        w = tl.where(offs == out, NOWHERE, w)
    return z, w, slope


@triton.jit
def _take(top, total, z):
    """The maximum of each lane and the sum of 2^(z - maximum), one exponential for each."""
    change = z - top
    shrink = tl.exp2(-tl.abs(change))
    total = tl.where(change > 0, total * shrink + 1, total + shrink)  # NaN stays
    return tl.maximum(top, z), total


@triton.jit
def _take_moment(top, total, moment, z):
    """The sum of (z - maximum) 2^(z - maximum) of each lane, before :func:`_take` moves the maximum."""
    change = z - top
    shrink = tl.exp2(-tl.abs(change))
    moved = shrink * (moment - change * total)
    # -inf has no share.
    added = moment + tl.where(shrink == 0, 0.0, change * shrink)
    return tl.where(change > 0, tl.where(shrink == 0, 0.0, moved), added)


@triton.jit
def _gate(top, total, moment, log_sum, exponent):
    """min(1, H / ln 20)^exponent from the sums of each lane; NaN stays."""
    highest = tl.max(top)
    below = top - highest
    shrink = tl.exp2(below)
    moments = tl.where(shrink == 0, 0.0, shrink * (moment + below * total))
    entropy = LN2 * (log_sum - highest - tl.sum(moments) / tl.sum(total * shrink))
    part = tl.minimum(tl.maximum(entropy / FULL_ENTROPY, 0.0, propagate_nan=tl.PropagateNan.ALL), 1.0)
    return tl.where(entropy != entropy, entropy, tl.exp2(exponent * tl.log2(part)))


@triton.jit
def _log_sum(top, total):
    highest = tl.max(top)
    return highest + tl.log2(tl.sum(total * tl.exp2(top - highest)))


@triton.jit
def _finite(z):
    """Log-probabilities of which a difference is a number, where both are of an entry that is taken out; NaN stays."""
    return tl.maximum(z, NOWHERE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _log_over_mean(z, w):
    """log2(p/m) and log2(q/m) from log2 p and log2 q; to the last places where they hardly differ.

    With x = log2(q/p): log2(p/m) = 1 - log2(1 + 2^x) = -x/2 + level, level = -log2 cosh(x ln 2 / 2) = 1 - |x|/2 -
    log2(1 + 2^-|x|). Polynomials of least error: of the first form in x^2 to |x| = 1, of the second in 2^-|x| beyond
    it, 7e-9 of the value each. A library's logarithm takes twice the instructions.
    """
    x = tl.maximum(w - z, -MOST_LOG_RATIO, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, MOST_LOG_RATIO, propagate_nan=tl.PropagateNan.ALL)
    size = tl.abs(x)
    x2 = x * x
    near = x2 * (-8.66433970e-2 + x2 * (1.73448531e-3 + x2 * (-5.54650631e-5 + x2 * 1.87660150e-6)))
    e = tl.exp2(-size)
    log_sum = 2.55126895e-1 + e * (-1.47099566e-1 + e * 4.57201959e-2)
    log_sum = e * (1.44269407 + e * (-7.21298819e-1 + e * (4.80056327e-1 + e * (-3.53573431e-1 + e * log_sum))))
    level = tl.where(size < 1, near, (1 - log_sum) - 0.5 * size)
    return level - 0.5 * x, level + 0.5 * x


@triton.jit
def _times(p, value):
    """0 times infinity is 0, so a logit of -inf takes its entry out; NaN stays."""
    return tl.where(p == 0, 0.0, p * value)


@triton.jit
def _replace(gradient, dz, offs, stride, MASKED: tl.constexpr):
    """Store where logits were, once every thread has read its own."""
    tl.debug_barrier()
    if MASKED:
        tl.store(gradient + offs, dz.to(gradient.dtype.element_ty), offs < stride)
    else:
        tl.store(gradient + offs, dz.to(gradient.dtype.element_ty))


@triton.jit
def _store_zeros(gradient, stride, BLOCK: tl.constexpr):
    zeros = tl.zeros((BLOCK,), tl.float32).to(gradient.dtype.element_ty)
    for begin in range(0, stride, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        tl.store(gradient + offs, zeros, offs < stride)
