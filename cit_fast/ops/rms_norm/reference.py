"""RMSNorm in plain PyTorch: the definition every backend is tested against.

With x a row of width d, w its factor (the weight, or 1 + weight where ``from_one``), g the gradient of y and
r = (mean(x^2) + eps)^(-1/2):

    y = x r w,   dx = r (g w - x r^2 mean(g w x)),   dweight = sum over rows of g x r

Sums and products are in float32, in float64 for float64 inputs; a result is rounded once.

Source: arXiv 1910.07467, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register


def wide(x: Tensor) -> Tensor:
    """In the dtype of the sums."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def normed(x: Tensor, eps: float) -> Tensor:
    """x r, in the dtype of the sums."""
    return wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)


@register("rms_norm", Backend.REFERENCE)
def rms_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> Tensor:
    """See :func:`cit_fast.ops.rms_norm`."""
    return (normed(x, eps) * (wide(weight) + from_one)).to(x.dtype)


@register("rms_norm_backward", Backend.REFERENCE)
def rms_norm_backward(x: Tensor, weight: Tensor, grad: Tensor, eps: float, from_one: bool) -> Tensor:
    """The gradient of x."""
    inverse = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    scaled = wide(grad) * (wide(weight) + from_one)
    along = (scaled * wide(x)).mean(-1, keepdim=True)
    return (inverse * (scaled - wide(x) * inverse.square() * along)).to(x.dtype)
