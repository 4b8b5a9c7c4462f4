"""RMSNorm in C++ on the CPU (``native``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/dtype.h


@register("rms_norm", Backend.NATIVE)
def _rms_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> Tensor:
    from cit_fast import _native

    y = torch.empty_like(x)
    addresses = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    _native.rms_norm(addresses, **_rows(x), eps=eps, from_one=from_one)
    return y


@register("rms_norm_backward", Backend.NATIVE)
def _rms_norm_backward(x: Tensor, weight: Tensor, grad: Tensor, eps: float, from_one: bool) -> Tensor:
    from cit_fast import _native

    grad_x = torch.empty_like(x)
    addresses = x.data_ptr(), weight.data_ptr(), grad.data_ptr(), grad_x.data_ptr()
    _native.rms_norm_backward(addresses, **_rows(x), eps=eps, from_one=from_one)
    return grad_x


def _rows(x: Tensor) -> dict[str, Any]:
    width = x.shape[-1]
    return {"dtype": DTYPES[x.dtype], "rows": x.numel() // width, "width": width, "threads": torch.get_num_threads()}
