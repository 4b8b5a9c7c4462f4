"""Balance-weight EMA in plain PyTorch: the definition every backend is tested against.

Source: Qiao et al., ICML 2025 (LCIA), arXiv 2410.10868. Per tensor, with ``p`` the parameter, ``e`` its average,
``g`` the gradient:

    (1)  a = |p - e|_1      b = |g|_1      c = |g - g_prev|_1          e before its update
    (2)  released:  alpha = 2 (1 + b) / (a c),    or ``fallback`` when that is not in (0, 1)
         paper:     alpha = 1 - (1 + b) / (a c),  or ``1 - decay`` when the fraction is not in (0, 1)
         fixed:     alpha = 1 - decay
    (3)  alpha = 0 (leave the tensor out) when a or b is not finite: the average never takes in a NaN
    (4)  e <- e + alpha (p - e),   g_prev <- g
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BalanceWeights(NamedTuple):
    """What the balance rule chose for each tensor of a list.

    Attributes:
        alphas: [n], float32, in (0, 1]: share of the new parameters. 0 marks a tensor left out because its parameter
            or its gradient held a value that is not finite.
        fallbacks: [n], bool: the rule gave no usable weight and its constant was taken.
    """

    alphas: Tensor
    fallbacks: Tensor


def balance_ema_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    rule: str = "released",
    decay: float = 0.99,
    fallback: float = 0.01,
) -> BalanceWeights:
    """One EMA step, (1) to (4); see :func:`cit_fast.ops.balance_ema_`. float64 averages give float64 weights."""
    weights = _weights(params, averages, grads, previous_grads, rule, decay, fallback)
    flush_balance_ema_(params, averages, weights.alphas)
    return weights


def adamw_balance_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    alphas: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rule: str = "released",
    decay: float = 0.99,
    fallback: float = 0.01,
) -> BalanceWeights:
    """Pending (4), then AdamW (Loshchilov and Hutter, 2019, algorithm 2), then (1) to (3); ``alphas`` is replaced."""
    flush_balance_ema_(params, averages, alphas)
    root_scale = math.sqrt(1 - beta2**step)
    step_size = lr / (1 - beta1**step)
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p, g = param.to(exp_avg.dtype), grad.to(exp_avg.dtype)
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p = p * (1 - lr * weight_decay) - step_size * exp_avg / (exp_avg_sq.sqrt() / root_scale + eps)
        param.copy_(p)
    weights = _weights(params, averages, grads, previous_grads, rule, decay, fallback)
    alphas.copy_(weights.alphas)
    return weights


def flush_balance_ema_(params: Sequence[Tensor], averages: Sequence[Tensor], alphas: Tensor) -> None:
    """Equation (4) for the averages, with ``alphas`` [n]."""
    for param, average, alpha in zip(params, averages, alphas.unbind(), strict=True):
        dtype = _compute_dtype(average)
        e = average.to(dtype)
        moved = e + alpha.to(dtype) * (param.to(dtype) - e)
        average.copy_(torch.where(alpha == 0, e, moved))


def balance_weight(
    distance: Tensor, gradient: Tensor, change: Tensor, rule: str, decay: float, fallback: float
) -> tuple[Tensor, Tensor]:
    """Equations (2) and (3) for norms a, b, c [n]: (alpha [n], whether it is the fallback [n])."""
    if rule == "fixed":
        alpha = torch.full_like(distance, 1 - decay)
        fell_back = torch.zeros_like(distance, dtype=torch.bool)
    else:
        numerator = 2 * (1 + gradient) if rule == "released" else 1 + gradient
        weight = numerator / (distance * change)
        fell_back = ~((weight > 0) & (weight < 1))  # also where it is not a number
        alpha = weight.masked_fill(fell_back, fallback if rule == "released" else decay)
        alpha = alpha if rule == "released" else 1 - alpha
        alpha = alpha.clamp_min(torch.finfo(torch.float32).tiny)  # 0 is reserved for (3)
    finite = torch.isfinite(distance) & torch.isfinite(gradient)
    return torch.where(finite, alpha, 0.0), fell_back & finite


def _weights(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    rule: str,
    decay: float,
    fallback: float,
) -> BalanceWeights:
    norms = []
    for i, (param, average, grad) in enumerate(zip(params, averages, grads, strict=True)):
        dtype = _compute_dtype(average)
        g = grad.to(dtype)
        distance, gradient = _l1(param.to(dtype) - average.to(dtype)), _l1(g)
        change = torch.zeros_like(gradient)
        if previous_grads:
            change = _l1(g - previous_grads[i].to(dtype))
            previous_grads[i].copy_(grad)
        norms.append(torch.stack((distance, gradient, change)))
    distance, gradient, change = torch.stack(norms, dim=1).unbind()
    alphas, fallbacks = balance_weight(distance, gradient, change, rule, decay, fallback)
    return BalanceWeights(alphas.to(_compute_dtype(averages[0])), fallbacks)


def _l1(x: Tensor) -> Tensor:
    return x.abs().sum(dtype=torch.float64)


def _compute_dtype(average: Tensor) -> torch.dtype:
    return torch.float64 if average.dtype == torch.float64 else torch.float32
