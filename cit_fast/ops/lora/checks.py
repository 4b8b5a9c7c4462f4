"""What the low-rank linear layer accepts: shapes, dtypes, devices and options."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cit_fast.errors import ConfigError, DataError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_lora_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scaling: float, dropout: float
) -> None:
    """Raise DataError or ConfigError unless input, weights and options fit each other."""
    tensors = {"x": x, "weight": weight, "a": a, "b": b}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise DataError(f"lora_linear: {name} is {tensor.dtype}; expected float16, bfloat16, float32 or float64")
        if tensor.device != x.device:
            raise DataError(f"lora_linear: {name} is on {tensor.device} and x on {x.device}; expected one")
        if name in ("weight", "bias") and tensor.dtype != x.dtype:
            raise DataError(f"lora_linear: {name} is {tensor.dtype} and x {x.dtype}; cast one of them")
    if not _fit(x, weight, a, b, bias):
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise DataError(
            f"lora_linear: {found}; expected x [..., in], weight [out, in], a [r, in], b [out, r], bias [out]"
        )
    if weight.requires_grad:
        raise DataError("lora_linear: weight requires a gradient and would get none; freeze it")
    if not math.isfinite(scaling):
        raise ConfigError(f"lora_linear: scaling is {scaling}; expected a finite number")
    if not 0 <= dropout < 1:
        raise ConfigError(f"lora_linear: dropout is {dropout}; expected a number in [0, 1)")


def _fit(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    if x.dim() == 0 or not weight.dim() == a.dim() == b.dim() == 2:
        return False
    out, features = weight.shape
    rank = a.shape[0]
    return (
        x.shape[-1] == a.shape[1] == features
        and b.shape == (out, rank)
        and (bias is None or bias.shape == (out,))
        and 0 not in (out, features, rank)
    )
