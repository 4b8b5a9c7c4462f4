"""A linear layer with a low-rank update (LoRA), forward and backward in one op.

What a step of LoRA training costs beside its matrix products is traffic: an input copied to float32 and back, a scaling
and an addition, each a pass over a whole activation, in hundreds of layers. Here A and B, which are small, are cast to
the activation's dtype once a call, the products add to what is there (``addmm_``), and the scaling is one of their
factors. The products are torch's (oneDNN, cuBLAS): kernels of ours for the narrow ones, with sums in float32, were
slower than those on a CPU with AMX (see bench/RESULTS.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cit_fast.ops.lora.checks import check_lora_linear

__all__ = ["lora_linear"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """``x W^T + bias + scaling d(x) A^T B^T``, with gradients for x, A, B and bias; W is frozen.

    Args:
        x: [..., in] float16, bfloat16, float32 or float64.
        weight: [out, in], W, in the dtype of ``x``.
        a: [r, in], A, in any of these dtypes.
        b: [out, r], B.
        bias: [out] in the dtype of ``x``, or None.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        dropout: probability in [0, 1) with which an element of ``x`` does not reach A, drawn as
            :func:`torch.nn.functional.dropout` draws: the same state of the generator drops the same elements.

    Returns:
        [..., out] in the dtype of ``x``. Products are in that dtype, their sums in float32.

    Raises:
        DataError: shapes, dtypes or devices do not fit, or W requires a gradient.
        ConfigError: an option out of range.

    Source: LoRA (arXiv 2106.09685), equation 3.
    """
    check_lora_linear(x, weight, a, b, bias, scaling, dropout)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _LoraLinear.apply(x, weight, a, b, bias, scaling, dropout)  # type: ignore[no-untyped-call]
    return y


class _LoraLinear(torch.autograd.Function):
    """With t = d(x) A^T, g the gradient of y and u = s g B:

    y  = x W^T + bias + s t B^T
    dx = g W + d(u A),  dA = u^T d(x),  dB = s g^T t,  dbias = sum_n g_n
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scaling: float, dropout: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        down, up = a.to(x.dtype), b.to(x.dtype)
        inputs, kept = rows, None
        if dropout:
            kept = torch.native_dropout(rows, dropout, True)[1]
            inputs, scaling = rows * kept, scaling / (1 - dropout)
        inner = inputs @ down.T
        y = torch.nn.functional.linear(rows, weight, bias).addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(rows, inner, weight, down, up, kept)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, down, up, kept = ctx.saved_tensors
        wants_x, _, wants_a, wants_b, wants_bias, _, _ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_bias = None
        g = gradient.reshape(-1, gradient.shape[-1])
        if wants_b:
            grad_b = _product(g.T, inner, ctx.dtypes[1]).mul_(ctx.scaling)
        if wants_x or wants_a:
            outer = (g @ up).mul_(ctx.scaling)
        if wants_a:
            grad_a = _product(outer.T, rows if kept is None else rows * kept, ctx.dtypes[0])
        if wants_x:
            grad_x = g @ weight
            grad_x = grad_x.addmm_(outer, down) if kept is None else grad_x.addcmul_(outer @ down, kept.to(g.dtype))
            grad_x = grad_x.view(ctx.shape)
        if wants_bias:
            grad_bias = g.sum(0)
        return grad_x, None, grad_a, grad_b, grad_bias, None, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``; on a GPU a float32 result is not rounded to half precision on its way."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
