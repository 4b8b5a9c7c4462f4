"""What the balance-weight EMA ops ask of their arguments: one clear line before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cit_fast.errors import CitFastError

BalanceRule = Literal["released", "paper", "fixed"]
Rounding = Literal["stochastic", "nearest"]
BALANCE_RULES: tuple[BalanceRule, ...] = ("released", "paper", "fixed")
"""The rules by name; the position is the number that csrc/cpu/balance_ema/balance_ema.h gives the rule."""

_FLOAT_DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


def check_rule(
    op: str, rule: str, decay: float, fallback: float, scale: float = 2.0, rounding: str = "stochastic"
) -> None:
    """Raise CitFastError that starts with ``op`` unless the options are as :func:`balance_ema_` says."""
    if rule not in BALANCE_RULES:
        raise CitFastError(f"{op}: rule={rule!r} is unknown; accepted: {', '.join(BALANCE_RULES)}")
    if not 0 <= decay < 1:
        raise CitFastError(f"{op}: decay={decay} must be in [0, 1)")
    if not 0 < fallback <= 1:
        raise CitFastError(f"{op}: fallback={fallback} must be in (0, 1]")
    if not 0 < scale < math.inf:
        raise CitFastError(f"{op}: scale={scale} must be above 0 and finite")
    check_rounding(op, rounding)


def check_rounding(op: str, rounding: str) -> None:
    """Raise CitFastError that starts with ``op`` unless averages can be rounded so."""
    if rounding not in ("stochastic", "nearest"):
        raise CitFastError(f"{op}: rounding={rounding!r} is unknown; accepted: stochastic, nearest")


def check_adamw(op: str, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise CitFastError that starts with ``op`` unless AdamW can run with these options."""
    if step < 1 or step % 1 != 0:
        raise CitFastError(f"{op}: step={step} must be a whole number, 1 for the first step")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:  # math.isfinite would break the graph of torch.compile
            raise CitFastError(f"{op}: {name}={value} must be finite and not negative")
    if len(betas) != 2:
        raise CitFastError(f"{op}: betas={tuple(betas)} must be two numbers")
    if not all(0 <= beta < 1 for beta in betas):
        raise CitFastError(f"{op}: betas={tuple(betas)} must both be in [0, 1)")


def adamw_writes(store_grads: bool) -> tuple[str, ...]:
    """The lists that AdamW with the average writes."""
    always = ("params", "exp_avgs", "exp_avg_sqs", "averages")
    return (*always, "previous_grads") if store_grads else always


def check_lists(
    op: str, lists: dict[str, Sequence[Tensor]], *, written: Sequence[str], previous_optional: bool = False
) -> None:
    """Raise CitFastError unless all lists hold dense floating-point tensors of the parameters' shapes and device.

    In the lists named by ``written`` every element has memory of its own, and no tensor appears twice.
    """
    params = lists["params"]
    device = getattr(params[0], "device", None) if params else None
    shapes = [getattr(param, "shape", None) for param in params]
    for name, tensors in lists.items():
        if previous_optional and name == "previous_grads" and not tensors:
            continue
        if len(tensors) != len(params):
            raise CitFastError(f"{op}: {name} holds {len(tensors)} tensors, params holds {len(params)}")
        if not _all_fit(tensors, shapes, device):
            for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
                if problem := _mismatch(tensor, param, device, written=name in written):
                    raise CitFastError(f"{op}: {name}[{i}] {problem}")
        if name in written and len(set(map(id, tensors))) < len(tensors):
            identities = [id(tensor) for tensor in tensors]
            i = next(i for i, identity in enumerate(identities) if identity in identities[:i])
            first = identities.index(identities[i])
            raise CitFastError(f"{op}: {name}[{i}] is the very tensor {name}[{first}], and would be updated twice")


def _all_fit(tensors: Sequence[Tensor], shapes: list[torch.Size | None], device: torch.device | None) -> bool:
    """All at once, for lists of hundreds of small tensors. False: look at each."""
    try:
        return (
            [tensor.shape for tensor in tensors] == shapes
            and {tensor.dtype for tensor in tensors} <= _FLOAT_DTYPES
            and {tensor.device for tensor in tensors} <= {device}
            and False not in [tensor.is_contiguous() for tensor in tensors]  # and so dense
        )
    except AttributeError:  # not a tensor
        return False


def _mismatch(tensor: Tensor | None, param: Tensor, device: torch.device | None, written: bool) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"is {type(tensor).__name__}, not a tensor"
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}; only dense (strided) tensors are accepted"
    if tensor.shape != param.shape:
        return f"has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}"
    if tensor.device != device:
        return f"is on {tensor.device}, params[0] on {device}; one call takes one device"
    if tensor.dtype not in _FLOAT_DTYPES:
        return f"is {tensor.dtype}; accepted: float32, bfloat16, float16, float64"
    if written and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return "is expanded: elements that share memory cannot be written; clone() it"
    return None


def check_alphas(op: str, alphas: Tensor, params: Sequence[Tensor]) -> None:
    """Raise CitFastError unless ``alphas`` is contiguous float32 with one entry for each parameter."""
    _check_vector(op, "alphas", alphas, params)


def check_remaining(op: str, remaining: Tensor | None, tensors: Sequence[Tensor] | Tensor, rule: str) -> None:
    """Raise CitFastError unless ``remaining`` is as ``alphas``; only ``paper`` needs it."""
    if remaining is not None:
        _check_vector(op, "remaining", remaining, tensors)
    elif rule == "paper":
        raise CitFastError(
            f"{op}: rule='paper' needs remaining, the distances that the last update left: float32 zeros of shape "
            f"({len(tensors)},) before the first"
        )


def _check_vector(op: str, name: str, vector: Tensor, tensors: Sequence[Tensor] | Tensor) -> None:
    expected = (len(tensors),)
    device = tensors.device if isinstance(tensors, Tensor) else tensors[0].device
    right = vector.dtype == torch.float32 and vector.device == device and vector.is_contiguous()
    if tuple(vector.shape) != expected or not right:
        raise CitFastError(
            f"{op}: {name} must be contiguous float32 of shape {expected} on {device}, not "
            f"{vector.dtype} of shape {tuple(vector.shape)} on {vector.device}"
        )


def check_norms(op: str, norms: Tensor) -> None:
    """Raise CitFastError unless ``norms`` is what :func:`balance_norms_` returns."""
    if norms.dim() != 2 or norms.shape[1] != 3 or norms.dtype != torch.float64:
        raise CitFastError(
            f"{op}: norms must be float64 of shape [tensors, 3], not {norms.dtype} of shape {tuple(norms.shape)}"
        )
