"""Key-part information gain (KPIG, arXiv 2403.10056) in plain PyTorch: the definition every backend is tested
against.

With z, w the logits of one token under the full and the masked instruction, p = softmax(z), q = softmax(w), t
its target::

    token_gain:                 p_t - q_t, log p_t, log q_t,  H(p) = -sum p log p,  KL(p||q) = sum p log(p / q)
    token_gain_statistics:      M = max z,  s = sum e^(z-M),  a = sum (z-M) e^(z-M),
                                c = sum (z-M - (w-N)) e^(z-M), N = max w;  z_t;  the same for w
                                => log p_t = z_t - M - log s,  H(p) = log s - a / s,
                                   KL(p||q) = c / s - log s + log s_w
    key_part_information_gain:  G = sum_{k=1..K} alpha^k (p(t_k) - q(t_k)) over one example's response
    masked_jsd:                 m = (p + q) / 2,  JSD = (KL(p||m) + KL(q||m)) / (2 ln 2), p and q at temperature beta
                                d JSD / dz = p (log(p / m) - KL(p||m)) / (2 beta ln 2)
    linear_kl_divergence:       KL(q||p) = sum q log(q / p),  d/dz = (p - q) / beta,  p and q at temperature beta; with
                                targets over the other tokens alone
    linear_cross_entropy:       -g log p_t,  d/dz = g (p - onehot(t));  g = min(1, H(p) / ln 20)^gate, a constant

Logits exist for a chunk of tokens at a time. Sums run in float32, in float64 where any input is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register

CHUNK_ELEMENTS = 1 << 23
"""Logits held at a time, by default: 32 MiB in float32, a few times that with the intermediate results."""

WEIGHT_BLOCK_ELEMENTS = 1 << 23
"""Elements of a half-precision head widened to float32 at a time, so that no widened copy of the head
exists.
"""


class TokenGain(NamedTuple):
    """What the key parts tell about each token: p predicted from the full instruction, q from the masked one.

    Every field is [T], float32 (float64 for float64 inputs); entropies and divergences are in nats.
    """

    log_prob_full: Tensor
    """log p(target), at most 0."""
    log_prob_masked: Tensor
    """log q(target), at most 0."""
    probability_gain: Tensor
    """p(target) - q(target), in [-1, 1]."""
    entropy_full: Tensor
    """H(p), in [0, log V]."""
    entropy_masked: Tensor
    """H(q), in [0, log V]."""
    kl_full_masked: Tensor
    """KL(p || q), at least 0."""
    kl_masked_full: Tensor
    """KL(q || p), at least 0."""


class LogitOptions(NamedTuple):
    """How a head makes logits: cap(scale (h W^T + bias)); every backend takes this one object."""

    softcap: float | None = None
    """cap(z) = softcap tanh(z / softcap); None: z itself."""
    scale: float = 1.0


GATE_ENTROPY = math.log(20)
"""The entropy in nats from which on a gated token counts in full: that of 20 tokens equally likely."""


class Needed(NamedTuple):
    """Which gradients of a loss to compute; the others are empty tensors."""

    hidden: bool
    weight: bool
    bias: bool


PLAIN = LogitOptions()


@register("token_gain", Backend.REFERENCE)
def token_gain(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    options: LogitOptions = PLAIN,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log p_t, log q_t, p_t - q_t, H(p), H(q), KL(p||q), KL(q||p), each [T]; see
    :func:`cit_fast.ops.token_gain`.

    ``chunk_size`` is the number of tokens whose logits exist at a time.
    """
    dtype = accumulation_dtype(hidden_full, hidden_masked, lm_head_weight, bias)
    out = hidden_full.new_empty((7, targets.shape[0]), dtype=dtype)
    for rows in _chunks(targets.shape[0], lm_head_weight.shape[0], chunk_size):
        log_p = _logits(hidden_full[rows].to(dtype), lm_head_weight, bias, options).log_softmax(dim=1)
        log_q = _logits(hidden_masked[rows].to(dtype), lm_head_weight, bias, options).log_softmax(dim=1)
        target = targets[rows, None].long()
        log_p_target, log_q_target = log_p.gather(1, target)[:, 0], log_q.gather(1, target)[:, 0]
        p, q = log_p.exp(), log_q.exp()
        out[0, rows], out[1, rows] = log_p_target, log_q_target
        out[2, rows] = log_p_target.exp() - log_q_target.exp()
        out[3, rows], out[4, rows] = -_expectation(p, log_p), -_expectation(q, log_q)
        out[5, rows], out[6, rows] = _expectation(p, log_p - log_q), _expectation(q, log_q - log_p)
    log_p_all, log_q_all, gain, entropy_p, entropy_q, kl_pq, kl_qp = (row.clone() for row in out)
    return log_p_all, log_q_all, gain, entropy_p, entropy_q, kl_pq, kl_qp


GAIN_STATISTICS = (
    "max_full",
    "max_masked",
    "sum_full",
    "sum_masked",
    "moment_full",
    "moment_masked",
    "cross_full",
    "cross_masked",
    "target_full",
    "target_masked",
)
"""Rows of the statistics of :func:`token_gain_statistics`: M, s, a, c, z_t under each context."""

NOWHERE = -1e30
"""The maximum of logits that are all -inf, so that differences of maxima stay numbers."""


@register("token_gain_statistics", Backend.REFERENCE)
def token_gain_statistics(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    first_entry: int = 0,
    bias: Tensor | None = None,
    options: LogitOptions = PLAIN,
    chunk_size: int | None = None,
) -> Tensor:
    """:data:`GAIN_STATISTICS` of one piece of the vocabulary, [10, T] float64; see
    :func:`cit_fast.ops.token_gain_statistics`.
    """
    dtype = accumulation_dtype(hidden_full, hidden_masked, lm_head_weight, bias)
    out = hidden_full.new_empty((len(GAIN_STATISTICS), targets.shape[0]), dtype=torch.float64)
    entries = lm_head_weight.shape[0]
    for rows in _chunks(targets.shape[0], entries, chunk_size):
        logits = [
            _logits(hidden[rows].to(dtype), lm_head_weight, bias, options) for hidden in (hidden_full, hidden_masked)
        ]
        maxima = [each.max(dim=1, keepdim=True).values.clamp(min=NOWHERE) for each in logits]
        below = [(each - top).clamp(min=NOWHERE) for each, top in zip(logits, maxima, strict=True)]
        target = targets[rows, None].long() - first_entry
        inside = ((target >= 0) & (target < entries))[:, 0]
        for side in (0, 1):
            weights = below[side].exp()
            picked = logits[side].gather(1, target.clamp(0, entries - 1))[:, 0]
            out[0 + side, rows] = maxima[side][:, 0].double()
            out[2 + side, rows] = weights.sum(dim=1).double()
            out[4 + side, rows] = (weights * below[side]).sum(dim=1).double()
            out[6 + side, rows] = (weights * (below[side] - below[1 - side])).sum(dim=1).double()
            out[8 + side, rows] = picked.double().masked_fill(~inside, -math.inf)
    return out


def merge_statistics(pieces: Tensor) -> Tensor:
    """The statistics of a vocabulary, [10, T], from those of its pieces, [P, 10, T]: sums move to the common maxima."""
    maxima, sums, moments, crosses, targets = pieces.reshape(len(pieces), 5, 2, -1).unbind(1)  # each [P, 2, T]
    top = maxima.amax(dim=0)
    moved = maxima - top
    shrink = moved.exp()
    merged = (
        top,
        (shrink * sums).sum(dim=0),
        (shrink * (moments + moved * sums)).sum(dim=0),
        (shrink * (crosses + (moved - moved.flip(1)) * sums)).sum(dim=0),
        targets.amax(dim=0),
    )
    return torch.cat(merged)


def gains_from_statistics(statistics: Tensor) -> tuple[Tensor, ...]:
    """log p_t, log q_t, p_t - q_t, H(p), H(q), KL(p||q), KL(q||p), each [T], from the statistics [10, T]."""
    maxima, sums, moments, crosses, targets = statistics.reshape(5, 2, -1).unbind(0)  # each [2, T]
    log_sums = sums.log()
    log_probs = (targets - maxima) - log_sums
    probabilities = log_probs.exp()
    entropies = (log_sums - moments / sums).clamp(min=0)
    divergences = (crosses / sums - (log_sums - log_sums.flip(0))).clamp(min=0)
    return (*log_probs, probabilities[0] - probabilities[1], *entropies, *divergences)


def key_part_information_gain(probability_gain: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    """G = sum_k alpha^k (p(t_k) - q(t_k)) per example; see :func:`cit_fast.ops.key_part_information_gain`."""
    weighted = position_weights(offsets, probability_gain, alpha) * probability_gain
    return torch.segment_reduce(weighted, "sum", offsets=offsets.long(), initial=0)


def position_weights(offsets: Tensor, like: Tensor, alpha: float) -> Tensor:
    """alpha^k for every token of the packed examples, k from 1 in each: [T], in the dtype of ``like`` [T]."""
    position = torch.arange(like.shape[0], device=like.device)
    k = position - offsets[example_of_token(offsets, like)] + 1
    return torch.pow(alpha, k.to(like.dtype))


def example_of_token(offsets: Tensor, like: Tensor) -> Tensor:
    """Index of the example each of the packed tokens belongs to, [T] int64."""
    position = torch.arange(like.shape[0], device=like.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, position, right=True) - 1


@register("masked_jsd", Backend.REFERENCE)
def masked_jsd(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    options: LogitOptions,
    needed: Needed,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_r row_weight_r JSD_r and its gradients from one pass over the logits; see
    :func:`cit_fast.ops.masked_jsd`.

    Args:
        hidden_live, hidden_frozen: [T, d] and [T, d'].
        weight_live, weight_frozen: [V, d] and [V, d'].
        temperature, row_weight: [T].
        bias_live, bias_frozen: [V] or None.
        options: how the heads make logits.
        needed: which gradients of hidden_live, weight_live, bias_live to compute.
        chunk_size: number of tokens whose logits exist at a time.

    Returns:
        The sum (0-dim) and the three gradients in the dtypes of their tensors; an empty tensor for each not
        needed.
    """
    live, frozen = (hidden_live, weight_live, bias_live), (hidden_frozen, weight_frozen, bias_frozen)
    dtype = accumulation_dtype(*live, *frozen)
    total = hidden_live.new_zeros((), dtype=dtype)
    sums = _GradientSums(*live, dtype, needed)
    for rows, share, beta, logits, log_p, log_q in _two_sides(
        live, frozen, temperature, row_weight, options, chunk_size
    ):
        p, q = log_p.exp(), log_q.exp()
        log_p_over_m, log_q_over_m = _log_over_mean(log_q - log_p), _log_over_mean(log_p - log_q)
        kl_pm, kl_qm = _expectation(p, log_p_over_m), _expectation(q, log_q_over_m)
        total += (share[:, 0] * (kl_pm + kl_qm)).sum() / (2 * math.log(2))
        if any(needed):
            gradient = torch.where(p > 0, p * (log_p_over_m - kl_pm[:, None]), 0)
            sums.add(rows, gradient * (share / (2 * math.log(2) * beta)), logits, share, options)
    return total, *sums.result()


@register("linear_kl_divergence", Backend.REFERENCE)
def linear_kl_divergence(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    targets: Tensor | None,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    options: LogitOptions,
    needed: Needed,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_r row_weight_r KL(q_r || p_r) and its gradients; see :func:`cit_fast.ops.linear_kl_divergence`.

    Arguments and results as in :func:`masked_jsd`; ``targets`` [T], any value in rows of weight 0, or None.
    """
    live, frozen = (hidden_live, weight_live, bias_live), (hidden_frozen, weight_frozen, bias_frozen)
    total = hidden_live.new_zeros((), dtype=accumulation_dtype(*live, *frozen))
    sums = _GradientSums(*live, total.dtype, needed)
    sides = _two_sides(live, frozen, temperature, row_weight, options, chunk_size, without=targets)
    for rows, share, beta, logits, log_p, log_q in sides:
        p, q = log_p.exp(), log_q.exp()
        total += (share[:, 0] * _expectation(q, log_q - log_p)).sum()
        if any(needed):
            sums.add(rows, (p - q) * (share / beta), logits, share, options)
    return total, *sums.result()


@register("linear_cross_entropy", Backend.REFERENCE)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    options: LogitOptions,
    entropy_gate: float,
    needed: Needed,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_r row_weight_r g_r (-log p_r(target_r)) and its gradients from one pass over the logits; see
    :func:`cit_fast.ops.linear_cross_entropy`.

    Arguments and results as in :func:`masked_jsd`; ``targets`` [T], any value in rows of weight 0; ``entropy_gate`` the
    exponent of g_r.
    """
    dtype = accumulation_dtype(hidden, weight, bias)
    total = hidden.new_zeros((), dtype=dtype)
    sums = _GradientSums(hidden, weight, bias, dtype, needed)
    for rows in _chunks(hidden.shape[0], weight.shape[0], chunk_size):
        share = row_weight[rows, None].to(dtype)
        padding = share == 0
        target = targets[rows, None].long().masked_fill(padding, 0)
        logits = _logits(hidden[rows].to(dtype).masked_fill(padding, 0), weight, bias, options)
        log_p = logits.log_softmax(dim=1)
        gated = share * entropy_gates(log_p, entropy_gate)[:, None] if entropy_gate else share
        # A sum without the padding's terms: 0 times infinity is no number.
        total -= (gated * log_p.gather(1, target)).masked_fill(padding, 0).sum()
        if any(needed):
            gradient = log_p.exp()
            gradient.scatter_add_(1, target, torch.full_like(share, -1))
            sums.add(rows, gradient * gated, logits, share, options)
    return total, *sums.result()


_Side = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states [T, d], the head's weight [V, d] and its bias [V]."""


def _two_sides(
    live: _Side,
    frozen: _Side,
    temperature: Tensor,
    row_weight: Tensor,
    options: LogitOptions,
    chunk_size: int | None,
    without: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Chunk by chunk: rows, their weights and temperatures [t, 1], the live logits, log p and log q [t, V].

    ``without``: of each row a token that is taken out of the vocabulary. A row of weight 0 is padding: whatever its
    hidden state, temperature and token hold, it adds nothing.
    """
    dtype = accumulation_dtype(*live, *frozen)
    for rows in _chunks(live[0].shape[0], live[1].shape[0], chunk_size):
        share = row_weight[rows, None].to(dtype)
        beta = temperature[rows, None].to(dtype).masked_fill(share == 0, 1)
        logits, other = (
            _logits(hidden[rows].to(dtype).masked_fill(share == 0, 0), weight, bias, options)
            for hidden, weight, bias in (live, frozen)
        )
        cooled = [logits / beta, other / beta]
        if without is not None:
            token = without[rows, None].long().masked_fill(share == 0, 0)
            cooled = [each.scatter(1, token, NOWHERE) for each in cooled]
        yield rows, share, beta, logits, cooled[0].log_softmax(dim=1), cooled[1].log_softmax(dim=1)


class _GradientSums:
    """From gradients of cooled, capped logits to those of hidden states, weight and bias."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, needed: Needed) -> None:
        self._hidden, self._weight, self._needed = hidden, weight, needed
        self._bias_dtype = weight.dtype if bias is None else bias.dtype
        self._of_hidden = hidden.new_empty(hidden.shape) if needed.hidden else hidden.new_empty(0)
        self._of_weight = weight.new_zeros(weight.shape if needed.weight else (0,), dtype=dtype)
        self._of_bias = weight.new_zeros(weight.shape[0] if needed.bias else 0, dtype=dtype)

    def add(self, rows: slice, gradient: Tensor, logits: Tensor, share: Tensor, options: LogitOptions) -> None:
        """Of some rows: the gradient [t, V], their logits [t, V] and weights [t, 1]."""
        gradient = gradient * options.scale
        if options.softcap is not None:
            gradient = gradient * (1 - (logits / options.softcap).square())
        if self._needed.hidden:
            self._of_hidden[rows] = _times_weight(gradient, self._weight).to(self._of_hidden.dtype)
        if self._needed.weight:
            self._of_weight += gradient.T @ self._hidden[rows].to(gradient.dtype).masked_fill(share == 0, 0)
        if self._needed.bias:
            self._of_bias += gradient.sum(dim=0)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of their tensors."""
        return self._of_hidden, self._of_weight.to(self._weight.dtype), self._of_bias.to(self._bias_dtype)


def entropy_gates(log_p: Tensor, exponent: float) -> Tensor:
    """min(1, H(p) / ln 20)^exponent of each row of log-probabilities [T, V]: [T]."""
    return (-_expectation(log_p.exp(), log_p) / GATE_ENTROPY).clamp(0, 1).pow(exponent)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    double = any(each is not None and each.dtype == torch.float64 for each in tensors)
    return torch.float64 if double else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: LogitOptions) -> Tensor:
    logits = torch.cat([hidden @ block.T for _, block in _weight_blocks(weight, hidden.dtype)], dim=1)
    if bias is not None:
        logits = logits + bias
    logits = options.scale * logits
    return logits if options.softcap is None else options.softcap * torch.tanh(logits / options.softcap)


def _times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    out = gradient.new_zeros((gradient.shape[0], weight.shape[1]))
    for columns, block in _weight_blocks(weight, gradient.dtype):
        out += gradient[:, columns] @ block
    return out


def _weight_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    rows = weight.shape[0] if weight.dtype == dtype else max(1, WEIGHT_BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        yield block, weight[block].to(dtype)


def _chunks(tokens: int, vocabulary: int, chunk_size: int | None) -> Iterator[slice]:
    size = chunk_size or max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, tokens, size):
        yield slice(start, start + size)


def _log_over_mean(log_ratio: Tensor) -> Tensor:
    """log(p / m) = -log((1 + q/p) / 2) from log(q/p), exact where p and q hardly differ, as when training starts.

    Beyond a ratio of e^80 the value no longer matters, because p is that small, and exp must not overflow.
    """
    return -torch.log1p(torch.expm1(log_ratio.clamp(max=80)) / 2)


def _expectation(p: Tensor, value: Tensor) -> Tensor:
    """sum p value over each row; 0 times infinity is 0, so a logit of -inf takes its token out."""
    return torch.where(p > 0, p * value, 0).sum(dim=1)
