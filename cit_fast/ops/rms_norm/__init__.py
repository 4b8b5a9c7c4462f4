"""RMSNorm in one pass forward and one back.

In plain PyTorch it is eight passes over a layer's input forward and more than that back. GPUs have kernels of others
for it (transformers' own, Liger's); here it is in C++ for a CPU, and in plain PyTorch elsewhere and in compiled graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cit_fast.ops.backends import Backend, resolve
from cit_fast.ops.rms_norm import native, reference
from cit_fast.ops.rms_norm.checks import check_rms_norm

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, from_one: bool = False) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` of each row; differentiable once, in x and weight.

    Args:
        x: [..., d] float16, bfloat16, float32 or float64.
        weight: [d] in the dtype of ``x``.
        eps: finite, at least 0.
        from_one: the factor is 1 + weight (Gemma).

    Returns:
        [..., d] in the dtype of ``x``, rounded once. Sums are in float32, or in float64 for float64.

    Raises:
        DataError: shapes, dtypes or devices do not fit.
        ConfigError: ``eps`` is out of range.

    Source: arXiv 1910.07467, equation 4.
    """
    check_rms_norm(x, weight, eps)
    if torch.compiler.is_compiling():
        return reference.rms_norm(x, weight, eps, from_one)  # a compiler makes one pass of it
    y: Tensor = _RmsNorm.apply(x, weight, float(eps), from_one)  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, from_one: bool) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.options = eps, from_one
        return _run("rms_norm", x, weight, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        eps = ctx.options[0]
        grad_x = _run("rms_norm_backward", x, weight, grad.contiguous(), *ctx.options)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            rows = reference.normed(x, eps) * reference.wide(grad)
            grad_weight = rows.flatten(0, -2).sum(0).to(weight.dtype) if x.dim() > 1 else rows.to(weight.dtype)
        return grad_x, grad_weight, None, None


def _run(op: str, x: Tensor, *arguments: Any) -> Tensor:
    cannot = {} if x.dtype in native.DTYPES else {Backend.NATIVE: "it takes no float64"}
    result: Tensor = resolve(op, x.device, cannot=cannot)(x, *arguments)
    return result
