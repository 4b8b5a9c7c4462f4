"""Balance-weight EMA in plain PyTorch: the definition every backend is tested against.

Source: Qiao et al., ICML 2025 (LCIA), arXiv 2410.10868. Per tensor, with ``p`` the parameter, ``e`` its average,
``g`` the gradient::

    (1)  a = |p - e|_1      b = |g|_1      c = |g - g_prev|_1          e before its update
    (2)  alpha, the share of the new parameters, or ``fallback`` where a fraction is not in (0, 1):
         paper:     alpha = a' (1 + b) / (a c)       the paper's equation (45), which writes beta = 1 - alpha
         released:  alpha = scale (1 + b) / (a c)    the authors' code, scale = 2
         fixed:     alpha = 1 - decay
    (3)  alpha = 0 (leave the tensor out) when a or b is not finite: the average never takes in a NaN
    (4)  e <- e + alpha (p - e),   g_prev <- g,   a' <- (1 - alpha) a

``a' = |p_prev - e|_1`` is the distance that the last update left, with the parameter before its step. (4) moves ``e``
along the line to ``p``, so a' follows from two numbers of the last step: no pass over the tensors, no memory of them.

State (averages, moments) in bfloat16 is computed in float32 and written by stochastic rounding: up or down with the
probability that makes the expected value exact, so an update far below the last place still arrives in the mean.
Averages can be rounded to the nearest instead, as the authors' runs do; they then hardly move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register


class BalanceOptions(NamedTuple):
    """How averages follow; every backend takes this one object. See :func:`cit_fast.ops.balance_ema_`."""

    rule: str = "released"
    """Equation (2): ``"released"``, ``"paper"`` or ``"fixed"``."""
    decay: float = 0.99
    """Share of the old average for ``fixed``."""
    fallback: float = 0.01
    """alpha where ``released`` or ``paper`` gives no usable weight."""
    scale: float = 2.0
    """The constant of ``released``."""
    rounding: str = "stochastic"
    """Of bfloat16 averages: ``"stochastic"`` or ``"nearest"``."""
    store_grads: bool = True
    """Whether the gradients overwrite the previous ones."""
    seed: int = 0
    """Of the stochastic rounding of bfloat16 state, in [0, 2**32)."""


class AdamWLists(NamedTuple):
    """The tensors of one step of AdamW with the balance-weight EMA: n of each, of one device."""

    params: Sequence[Tensor]
    """Changed."""
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    """First moments, changed."""
    exp_avg_sqs: Sequence[Tensor]
    """Second moments, changed."""
    averages: Sequence[Tensor]
    """Changed by the pending weights of the step before."""
    previous_grads: Sequence[Tensor]
    """Changed where gradients are stored; empty for a fixed weight."""

    @property
    def columns(self) -> tuple[Sequence[Tensor], ...]:
        """The lists in the order of the kernels' tables: those of the EMA, then the moments."""
        return (self.params, self.averages, self.grads, self.previous_grads, self.exp_avgs, self.exp_avg_sqs)


class AdamWOptions(NamedTuple):
    """One step of AdamW; see ``torch.optim.AdamW``."""

    step: int
    """1 for the first step."""
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class BalanceWeights(NamedTuple):
    """What the balance rule chose for each tensor of a list."""

    alphas: Tensor
    """[tensors], float32, in (0, 1]: share of the new parameters. 0 marks a tensor left out because its parameter or
    its gradient held a value that is not finite."""
    fallbacks: Tensor
    """[tensors], bool: the rule gave no usable weight and its constant was taken."""
    norms: Tensor
    """[tensors, 3], float64: a, b and c of equation (1), from which both follow."""


@register("balance_ema_", Backend.REFERENCE)
def balance_ema_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    remaining: Tensor | None,
    options: BalanceOptions,
) -> BalanceWeights:
    """One EMA step, (1) to (4); see :func:`cit_fast.ops.balance_ema_`. float64 averages give float64 weights."""
    norms = balance_norms_(params, averages, grads, previous_grads, options.store_grads)
    alphas, fallbacks = balance_weight(norms, remaining, options)
    alphas = alphas.to(compute_dtype(averages[0]))
    flush_balance_ema_(params, averages, alphas, options.rounding, options.seed)
    return BalanceWeights(alphas, fallbacks, norms)


@register("balance_norms_", Backend.REFERENCE)
def balance_norms_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    store_grads: bool = True,
) -> Tensor:
    """Equation (1), [tensors, 3] float64; then ``g_prev <- g`` if ``store_grads``."""
    norms = []
    for i, (param, average, grad) in enumerate(zip(params, averages, grads, strict=True)):
        dtype = compute_dtype(average)
        g = grad.to(dtype)
        distance = _l1(param.to(dtype) - average.to(dtype))
        gradient = _l1(g)
        change = torch.zeros_like(gradient)
        if previous_grads:
            change = _l1(g - previous_grads[i].to(dtype))
            if store_grads:
                previous_grads[i].copy_(grad)
        norms.append(torch.stack((distance, gradient, change)))
    return torch.stack(norms)


def balance_weight(norms: Tensor, remaining: Tensor | None, options: BalanceOptions) -> tuple[Tensor, Tensor]:
    """Equations (2) and (3) for norms [tensors, 3]: (alpha [tensors], whether it is the fallback [tensors]).

    ``remaining`` [tensors] is a' on entry and by (4) the next one on return; only ``paper`` reads it.
    """
    distance, gradient, change = norms.unbind(1)
    if options.rule == "fixed":
        alpha = torch.full_like(distance, 1 - options.decay)
        fell_back = torch.zeros_like(distance, dtype=torch.bool)
    else:
        assert remaining is not None or options.rule == "released"  # noqa: S101 - the public functions ask for it
        factor = remaining.to(norms.dtype) if options.rule == "paper" and remaining is not None else options.scale
        alpha = factor * (1 + gradient) / (distance * change)
        fell_back = ~((alpha > 0) & (alpha < 1))  # also where it is not a number
        alpha = alpha.masked_fill(fell_back, options.fallback)
        alpha = alpha.clamp_min(torch.finfo(torch.float32).tiny)  # 0 is reserved for (3)
    finite = torch.isfinite(distance) & torch.isfinite(gradient)
    alpha = torch.where(finite, alpha, 0.0)
    if remaining is not None:
        remaining.copy_((1 - alpha.float().double()) * distance)
    return alpha, fell_back & finite


@register("flush_balance_ema_", Backend.REFERENCE)
def flush_balance_ema_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    alphas: Tensor,
    rounding: str = "stochastic",
    seed: int = 0,
) -> None:
    """Equation (4) for the averages, with ``alphas`` [tensors]."""
    for i, (param, average, alpha) in enumerate(zip(params, averages, alphas, strict=True)):
        dtype = compute_dtype(average)
        moved = moved_average(param.to(dtype), average.to(dtype), alpha.to(dtype))
        if rounding == "nearest":
            average.copy_(moved)
        else:
            _write(average, moved, seed, i, stream=0)


def moved_average(p: Tensor, e: Tensor, alpha: Tensor) -> Tensor:
    """Equation (4) for elements; where alpha is 0 the average stays, whatever the parameter."""
    return torch.where(alpha == 0, e, e + alpha * (p - e))


@register("adamw_balance_ema_", Backend.REFERENCE)
def adamw_balance_ema_(
    lists: AdamWLists, alphas: Tensor, remaining: Tensor | None, adamw: AdamWOptions, options: BalanceOptions
) -> BalanceWeights:
    """Pending (4), then AdamW (Loshchilov and Hutter, 2019, algorithm 2), then (1) to (3); ``alphas`` is replaced.

    An element whose gradient is not finite keeps its parameter and moments.
    """
    params, grads, exp_avgs, exp_avg_sqs, averages, previous_grads = lists
    flush_balance_ema_(params, averages, alphas, options.rounding, options.seed)
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        dtype = compute_dtype(exp_avg)
        p, g, m, v = (each.to(dtype) for each in (param, grad, exp_avg, exp_avg_sq))
        p, m, v = adamw_step(p, g, m, v, adamw)
        param.copy_(p)
        _write(exp_avg, m, options.seed, i, stream=1)
        _write(exp_avg_sq, v, options.seed, i, stream=2)
    norms = balance_norms_(params, averages, grads, previous_grads, options.store_grads)
    weights, fallbacks = balance_weight(norms, remaining, options)
    alphas.copy_(weights)
    return BalanceWeights(alphas, fallbacks, norms)


def adamw_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, adamw: AdamWOptions) -> tuple[Tensor, Tensor, Tensor]:
    """The next p, m and v of elements; the parameter is updated with moments not yet rounded to their own dtype."""
    step, lr, beta1, beta2, eps, weight_decay = adamw
    root_scale = 1 / math.sqrt(1 - beta2**step)
    step_size = lr / (1 - beta1**step)
    new_m = m + (1 - beta1) * (g - m)
    new_v = beta2 * v + (1 - beta2) * (g * g)
    new_p = p * (1 - lr * weight_decay) - step_size * (new_m / (new_v.sqrt() * root_scale + eps))
    finite = torch.isfinite(g)
    return torch.where(finite, new_p, p), torch.where(finite, new_m, m), torch.where(finite, new_v, v)


def _l1(x: Tensor) -> Tensor:
    return x.abs().sum(dtype=torch.float64)


def compute_dtype(state: Tensor) -> torch.dtype:
    """What averages and moments are computed in: float64 where they are kept in it, else float32."""
    return torch.float64 if state.dtype == torch.float64 else torch.float32


# Stochastic rounding

_UINT32 = 0xFFFFFFFF
Word = TypeVar("Word", int, Tensor)


def stochastic_bfloat16(values: Tensor, seed: int, tensor: int, stream: int) -> Tensor:
    """Round float32 values to bfloat16, up with the probability of the fraction that is cut off.

    The random bits are a hash of seed, place and element, so every backend draws the same, in any order.

    Args:
        values: float32, any shape. What is not finite stays what it is; what is finite stays finite.
        seed: Any integer, of which the lowest 32 bits count.
        tensor: Position of the tensor in its list.
        stream: 0 for an average, 1 and 2 for the first and second moment.
    """
    index = torch.arange(values.numel(), device=values.device).view(values.shape)
    return round_by_key(values, rounding_key(seed, tensor, stream), index)


def rounding_key(seed: int, tensor: Word, stream: int) -> Word:
    """What the random bits of a tensor's elements follow from; ``tensor`` may be int64 positions of many."""
    return _mix(_mix(3 * tensor + stream + 1) ^ (seed & _UINT32))


def round_by_key(values: Tensor, key: int | Tensor, index: Tensor) -> Tensor:
    """:func:`stochastic_bfloat16` with the key of each value, or of all, and its position in its tensor, int64."""
    bits = values.contiguous().view(torch.int32).to(torch.int64) & _UINT32
    truncated = (bits >> 16) | torch.where(values.isnan(), 0x40, 0)  # a NaN must not lose its last bit
    rounded = (bits + (_mix((index & _UINT32) ^ key) >> 16)) >> 16
    infinite = (rounded & 0x7F80) == 0x7F80  # by the carry
    return torch.where(infinite | ~values.isfinite(), truncated, rounded).to(torch.int16).view(torch.bfloat16)


def _mix(x: Word) -> Word:
    """A bijection of 32-bit words in which every bit depends on every other (C. Wellons, "lowbias32")."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _UINT32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)


def _write(state: Tensor, values: Tensor, seed: int, tensor: int, stream: int) -> None:
    if state.dtype == torch.bfloat16:
        values = stochastic_bfloat16(values, seed, tensor, stream)
    state.copy_(values)
