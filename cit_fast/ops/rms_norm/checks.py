"""What RMSNorm accepts: shapes, dtypes, devices and options."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cit_fast.errors import ConfigError, DataError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    """Raise DataError or ConfigError unless rows, weight and eps fit each other."""
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in _FLOATS:
            raise DataError(f"rms_norm: {name} is {tensor.dtype}; expected float16, bfloat16, float32 or float64")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise DataError(
            f"rms_norm: weight is {weight.dtype} on {weight.device}, x {x.dtype} on {x.device}; expected one"
        )
    if x.dim() == 0 or weight.shape != x.shape[-1:] or weight.shape[0] == 0:
        raise DataError(f"rms_norm: x {list(x.shape)}, weight {list(weight.shape)}; expected [..., d] and [d], d >= 1")
    if not (math.isfinite(eps) and eps >= 0):
        raise ConfigError(f"rms_norm: eps is {eps}; expected a finite number of at least 0")
