"""Exponential moving average of parameters whose weight follows from the gradients, for whole lists of tensors at once.

Source: Qiao et al., ICML 2025 (LCIA), arXiv 2410.10868; the equations are at the top of
:mod:`cit_fast.reference.balance_ema`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cit_fast.backends import Backend, register, resolve
from cit_fast.errors import CitFastError
from cit_fast.ops._balance_ema_backends import kernels_cannot
from cit_fast.reference import balance_ema as reference
from cit_fast.reference.balance_ema import BalanceWeights

__all__ = [
    "BALANCE_RULES",
    "BalanceRule",
    "BalanceWeights",
    "adamw_balance_ema_",
    "balance_ema_",
    "check_rule",
    "flush_balance_ema_",
]

BalanceRule = Literal["released", "paper", "fixed"]
BALANCE_RULES: tuple[BalanceRule, ...] = ("released", "paper", "fixed")
"""The rules by name; the position is the number that csrc/cpu/balance_ema.h gives the rule."""

_FLOAT_DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


def balance_ema_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    *,
    rule: BalanceRule = "released",
    decay: float = 0.99,
    fallback: float = 0.01,
) -> BalanceWeights:
    """Move each average towards its parameter by a weight that the gradients decide, in place.

    Per tensor: ``a = |p - e|_1``, ``b = |g|_1``, ``c = |g - g_prev|_1`` with the average before its update;
    ``alpha`` from the rule; then ``e += alpha (p - e)`` and ``g_prev = g``. To be called after the optimizer step,
    gradients still there.

    Args:
        params: n tensors of any shape; float32, bfloat16 or float16 (float64: reference backend only). All lists
            live on one device.
        averages: n tensors of the same shapes, **changed**. float32 is meant; other dtypes go to the reference
            backend, and 16-bit averages stop following when the update is below half of their last place.
        grads: n tensors of the same shapes, any of the four dtypes.
        previous_grads: n tensors of the same shapes, any of the four dtypes, **overwritten** by the gradients. A
            first step is expressed by a copy of the gradients: ``c`` is then 0 and the rule falls back. May be
            ``[]`` for ``rule="fixed"``, which needs none.
        rule: ``"released"`` (the authors' code): ``alpha = 2 (1 + b) / (a c)``; ``"paper"``:
            ``alpha = 1 - (1 + b) / (a c)``; ``"fixed"``: ``alpha = 1 - decay``.
        decay: Share of the old average, in [0, 1), for ``fixed`` and where ``paper``'s fraction is not in (0, 1).
        fallback: ``alpha``, in (0, 1], where ``released``'s fraction is not in (0, 1).

    Returns:
        ``BalanceWeights(alphas [n] float32, fallbacks [n] bool)`` on the tensors' device; nothing is synchronised
        with the host. A tensor whose parameter or gradient holds NaN or infinity (or whose absolute values sum
        beyond float32 within 16 Ki elements) is left out: its alpha is 0 and its average stays, so an average never
        becomes NaN. An empty tensor falls back.

    Raises:
        CitFastError: Lists of different length, tensors that do not fit each other, an option out of range.
        BackendError: A backend was forced that cannot serve these tensors.

    >>> p, e, g = [torch.ones(3)], [torch.zeros(3)], [torch.full((3,), 0.5)]
    >>> balance_ema_(p, e, g, [torch.full((3,), 9.0)]).alphas  # 2 (1 + 1.5) / (3 * 25.5)
    tensor([0.0654])
    """
    check_rule("balance_ema_", rule, decay, fallback)
    lists = {"params": params, "averages": averages, "grads": grads, "previous_grads": previous_grads}
    if not params and not any(lists.values()):
        return _nothing()
    _check_lists("balance_ema_", lists, previous_optional=rule == "fixed")
    with torch.no_grad():
        return BalanceWeights(
            *_balance_ema(list(params), list(averages), list(grads), list(previous_grads), rule, decay, fallback)
        )


def adamw_balance_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    alphas: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    rule: BalanceRule = "released",
    decay: float = 0.99,
    fallback: float = 0.01,
) -> BalanceWeights:
    """AdamW and the balance-weight EMA in one sweep over memory.

    The average update of a step is done at the start of the next one, when the parameter is read anyway: first the
    pending ``e += alphas (p - e)``, then AdamW as ``torch.optim.AdamW`` does it, then the norms with the new
    parameter give the new ``alphas``. With :func:`flush_balance_ema_` before the averages are used, the result is
    that of :func:`balance_ema_` after each AdamW step.

    Args:
        params, grads, averages, previous_grads, rule, decay, fallback: As in :func:`balance_ema_`; ``params`` are
            **changed**.
        exp_avgs, exp_avg_sqs: n tensors each, float32, **changed**: the moments of AdamW.
        alphas: [n], float32, **changed**: on entry the pending weights (0 = none, as before the first step), on
            return the new ones.
        step: 1 for the first step.
        lr, betas, eps, weight_decay: As in ``torch.optim.AdamW``.

    Returns:
        ``BalanceWeights(alphas, fallbacks)``, with the tensor ``alphas`` that was passed in.

    Raises:
        CitFastError, BackendError: As in :func:`balance_ema_`.
    """
    op = "adamw_balance_ema_"
    check_rule(op, rule, decay, fallback)
    _check_adamw(op, step, lr, betas, eps, weight_decay)
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "averages": averages,
        "previous_grads": previous_grads,
    }
    if not params and not any(lists.values()):
        return _nothing()
    _check_lists(op, lists, previous_optional=rule == "fixed")
    _check_alphas(op, alphas, params)
    with torch.no_grad():
        fallbacks = _adamw_balance_ema(
            *(list(each) for each in lists.values()),
            alphas,
            step,
            float(lr),
            *(float(beta) for beta in betas),
            float(eps),
            float(weight_decay),
            rule,
            decay,
            fallback,
        )
    return BalanceWeights(alphas, fallbacks)


def flush_balance_ema_(params: Sequence[Tensor], averages: Sequence[Tensor], alphas: Tensor) -> None:
    """Apply pending average updates, ``averages += alphas (params - averages)``, and set ``alphas`` to 0.

    Args:
        params: n tensors, as in :func:`balance_ema_`.
        averages: n tensors of the same shapes, **changed**.
        alphas: [n], float32, **changed**: the pending weights that :func:`adamw_balance_ema_` left; 0 = nothing
            pending.

    Raises:
        CitFastError, BackendError: As in :func:`balance_ema_`.
    """
    lists = {"params": params, "averages": averages}
    if not params and not averages:
        return
    _check_lists("flush_balance_ema_", lists)
    _check_alphas("flush_balance_ema_", alphas, params)
    with torch.no_grad():
        _flush_balance_ema(list(params), list(averages), alphas)
        alphas.zero_()


# Registration: one torch.library op per public function; the backend is chosen when the op runs, not when traced. The
# native and the CUDA kernels register themselves in _balance_ema_backends.py.


@torch.library.custom_op(
    "cit_fast::balance_ema_",
    mutates_args=("averages", "previous_grads"),
    schema="(Tensor[] params, Tensor(a1!)[] averages, Tensor[] grads, Tensor(a3!)[] previous_grads, "
    "str rule, float decay, float fallback) -> (Tensor, Tensor)",
)
def _balance_ema(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    rule: str,
    decay: float,
    fallback: float,
) -> tuple[Tensor, Tensor]:
    cannot = kernels_cannot(averages, params, averages, grads, previous_grads)
    run = resolve("balance_ema_", params[0].device, cannot=cannot)
    alphas, fallbacks = run(params, averages, grads, previous_grads, rule, decay, fallback)
    return alphas.float(), fallbacks


@_balance_ema.register_fake
def _(params: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    n, device = len(params), params[0].device
    return torch.empty(n, device=device), torch.empty(n, device=device, dtype=torch.bool)


@torch.library.custom_op(
    "cit_fast::adamw_balance_ema_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "averages", "previous_grads", "alphas"),
    schema="(Tensor(a0!)[] params, Tensor[] grads, Tensor(a2!)[] exp_avgs, Tensor(a3!)[] exp_avg_sqs, "
    "Tensor(a4!)[] averages, Tensor(a5!)[] previous_grads, Tensor(a6!) alphas, int step, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, str rule, float decay, float fallback) -> Tensor",
)
def _adamw_balance_ema(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    previous_grads: list[Tensor],
    alphas: Tensor,
    *options: Any,
) -> Tensor:
    lists = (params, grads, exp_avgs, exp_avg_sqs, averages, previous_grads)
    cannot = kernels_cannot([*averages, *exp_avgs, *exp_avg_sqs], *lists)
    run = resolve("adamw_balance_ema_", params[0].device, cannot=cannot)
    fallbacks: Tensor = run(*lists, alphas, *options).fallbacks
    return fallbacks


@_adamw_balance_ema.register_fake
def _(params: list[Tensor], *_: Any) -> Tensor:
    return torch.empty(len(params), device=params[0].device, dtype=torch.bool)


@torch.library.custom_op(
    "cit_fast::flush_balance_ema_",
    mutates_args=("averages",),
    schema="(Tensor[] params, Tensor(a1!)[] averages, Tensor alphas) -> ()",
)
def _flush_balance_ema(params: list[Tensor], averages: list[Tensor], alphas: Tensor) -> None:
    cannot = kernels_cannot(averages, params, averages)
    resolve("flush_balance_ema_", params[0].device, cannot=cannot)(params, averages, alphas)


@_flush_balance_ema.register_fake
def _(params: list[Tensor], averages: list[Tensor], alphas: Tensor) -> None:
    return None


register("balance_ema_", Backend.REFERENCE)(reference.balance_ema_)
register("adamw_balance_ema_", Backend.REFERENCE)(reference.adamw_balance_ema_)
register("flush_balance_ema_", Backend.REFERENCE)(reference.flush_balance_ema_)


def _nothing() -> BalanceWeights:
    return BalanceWeights(torch.empty(0), torch.empty(0, dtype=torch.bool))


# Checks


def check_rule(op: str, rule: str, decay: float, fallback: float) -> None:
    """Raise CitFastError that starts with ``op`` unless the three options are as :func:`balance_ema_` says."""
    if rule not in BALANCE_RULES:
        raise CitFastError(f"{op}: rule={rule!r} is unknown; accepted: {', '.join(BALANCE_RULES)}")
    if not 0 <= decay < 1:
        raise CitFastError(f"{op}: decay={decay} must be in [0, 1)")
    if not 0 < fallback <= 1:
        raise CitFastError(f"{op}: fallback={fallback} must be in (0, 1]")


def _check_adamw(op: str, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if step < 1:
        raise CitFastError(f"{op}: step={step} must be at least 1 (the first step)")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not (value >= 0 and math.isfinite(value)):
            raise CitFastError(f"{op}: {name}={value} must be finite and not negative")
    if not all(0 <= beta < 1 for beta in betas):
        raise CitFastError(f"{op}: betas={tuple(betas)} must both be in [0, 1)")


def _check_lists(op: str, lists: dict[str, Sequence[Tensor]], *, previous_optional: bool = False) -> None:
    params = lists["params"]
    device = params[0].device if params else None
    for name, tensors in lists.items():
        if previous_optional and name == "previous_grads" and not tensors:
            continue
        if len(tensors) != len(params):
            raise CitFastError(f"{op}: {name} holds {len(tensors)} tensors, params holds {len(params)}")
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            if (
                tensor.shape == param.shape
                and tensor.dtype in _FLOAT_DTYPES
                and tensor.device == device
                and tensor.layout == torch.strided
            ):
                continue
            raise CitFastError(f"{op}: {name}[{i}] " + _mismatch(tensor, param, device))


def _mismatch(tensor: Tensor, param: Tensor, device: torch.device | None) -> str:
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}; only dense (strided) tensors are accepted"
    if tensor.shape != param.shape:
        return f"has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}"
    if tensor.device != device:
        return f"is on {tensor.device}, params[0] on {device}; one call takes one device"
    return f"is {tensor.dtype}; accepted: float32, bfloat16, float16, float64"


def _check_alphas(op: str, alphas: Tensor, params: Sequence[Tensor]) -> None:
    expected = (len(params),)
    right = alphas.dtype == torch.float32 and alphas.device == params[0].device and alphas.is_contiguous()
    if tuple(alphas.shape) != expected or not right:
        raise CitFastError(
            f"{op}: alphas must be contiguous float32 of shape {expected} on {params[0].device}, not "
            f"{alphas.dtype} of shape {tuple(alphas.shape)} on {alphas.device}"
        )
