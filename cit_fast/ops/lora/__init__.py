"""Linear layers with a low-rank update (LoRA), one or several that read the same input, forward and backward in one op.

What a step of LoRA training costs beside its matrix products is traffic: an input copied to float32 and back, a scaling
and an addition, each a pass over a whole activation, in hundreds of layers. Here A and B, which are small, are cast to
the activation's dtype once a call, the products add to what is there (``addmm_``), and the scaling is one of their
factors. The products are torch's (oneDNN, cuBLAS): kernels of ours for the narrow ones, with sums in float32, were
slower than those on a CPU with AMX (see bench/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cit_fast.errors import DataError
from cit_fast.ops.lora.checks import check_lora_linear

__all__ = ["lora_linear", "lora_linears"]


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
        (y,) = _LoraLinears.apply(x, (scaling,), dropout, weight, a, b, bias)  # type: ignore[no-untyped-call]
    return y  # type: ignore[no-any-return]


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scalings: Sequence[float],
) -> tuple[Tensor, ...]:
    """:func:`lora_linear` of layers that read the same input (query, key and value; gate and up), in one go.

    The products with A are one, and so is the one that brings their gradient back to x; the gradient of x is summed
    where it lies.

    Args:
        x: [..., in]. ``weights``, ``a``, ``b``, ``biases``, ``scalings``: one of each layer, at least one. Ranks may
            differ, dtypes of A and B may not.

    Returns:
        [..., out] of each layer.

    Raises:
        DataError: shapes, dtypes or devices do not fit, or a weight requires a gradient.
        ConfigError: an option out of range.
    """
    biases = biases if biases is not None else [None] * len(weights)
    if not len(weights) == len(a) == len(b) == len(biases) == len(scalings) > 0:
        counts = ", ".join(str(len(each)) for each in (weights, a, b, biases, scalings))
        raise DataError(f"lora_linears: {counts} weights, A, B, biases, scalings; expected as many of each, at least 1")
    for layer in zip(weights, a, b, biases, scalings, strict=True):
        check_lora_linear(x, *layer, 0.0)
    if len({each.dtype for each in (*a, *b)}) > 1:
        found = ", ".join(sorted({str(each.dtype) for each in (*a, *b)}))
        raise DataError(f"lora_linears: A and B are {found}; expected one dtype")
    with torch.autocast(x.device.type, enabled=False):
        ys: tuple[Tensor, ...] = _LoraLinears.apply(  # type: ignore[no-untyped-call]
            x, tuple(scalings), 0.0, *weights, *a, *b, *biases
        )
    return ys


class _LoraLinears(torch.autograd.Function):
    """Of each layer with t = d(x) A^T, g the gradient of y and u = s g B:

    y  = x W^T + bias + s t B^T
    dx = sum over layers of g W + d(u A),  dA = u^T d(x),  dB = s g^T t,  dbias = sum_n g_n

    t and u of all layers lie side by side, as do the rows of their A.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scalings: tuple[float, ...], dropout: float, *layers: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, a, b, biases = _of_each(layers)
        rows = x.reshape(-1, x.shape[-1])
        down, ups = _together([each.to(x.dtype) for each in a], 0), [each.to(x.dtype) for each in b]
        inputs, kept = rows, None
        if dropout:
            kept = torch.native_dropout(rows, dropout, True)[1]
            inputs, scalings = rows * kept, tuple(each / (1 - dropout) for each in scalings)
        inner = inputs @ down.T
        ranks = [each.shape[0] for each in a]
        # Into memory of their own shape: models clamp what a layer gives in place, which no view made here allows.
        ys = [rows.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
        for y, weight, bias, own, up, scaling in zip(
            ys, weights, biases, torch.split(inner, ranks, 1), ups, scalings, strict=True
        ):
            flat = y.view(-1, y.shape[-1])
            if bias is None:
                torch.mm(rows, weight.T, out=flat)
            else:
                torch.addmm(bias, rows, weight.T, out=flat)
            flat.addmm_(own, up.T, alpha=scaling)
        ctx.save_for_backward(rows, inner, kept, down, *weights, *ups)
        ctx.set_materialize_grads(False)
        ctx.scalings, ctx.ranks, ctx.shape, ctx.dtype = scalings, ranks, x.shape, a[0].dtype
        ctx.dtype_b = b[0].dtype
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, inner, kept, down, *saved = ctx.saved_tensors
        weights, ups = saved[: len(gradients)], saved[len(gradients) :]
        wants_x, wants = ctx.needs_input_grad[0], _of_each(ctx.needs_input_grad[3:])
        grad_x: Tensor | None = None
        grads_a: list[Tensor | None] = [None] * len(gradients)
        grads_b, grads_bias = list(grads_a), list(grads_a)
        flat = [None if each is None else each.reshape(-1, each.shape[-1]) for each in gradients]
        for k, (g, own) in enumerate(zip(flat, torch.split(inner, ctx.ranks, 1), strict=True)):
            if g is not None and wants[2][k]:
                grads_b[k] = _product(g.T, own, ctx.dtype_b).mul_(ctx.scalings[k])
            if g is not None and wants[3][k]:
                grads_bias[k] = g.sum(0)
        if wants_x or any(wants[1]):
            outer_parts = [
                rows.new_zeros(len(rows), rank) if g is None else (g @ up).mul_(scaling)
                for g, up, scaling, rank in zip(flat, ups, ctx.scalings, ctx.ranks, strict=True)
            ]
            outer = _together(outer_parts, 1)
        if any(wants[1]):
            together = _product(outer.T, rows if kept is None else rows * kept, ctx.dtype)
            for k, (own, g) in enumerate(zip(torch.split(together, ctx.ranks), flat, strict=True)):
                grads_a[k] = own if wants[1][k] and g is not None else None
        if wants_x:
            for g, weight in zip(flat, weights, strict=True):
                if g is not None:
                    grad_x = g @ weight if grad_x is None else grad_x.addmm_(g, weight)
        if grad_x is not None:
            grad_x = grad_x.addmm_(outer, down) if kept is None else grad_x.addcmul_(outer @ down, kept.to(rows.dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, *[None] * len(gradients), *grads_a, *grads_b, *grads_bias


def _of_each(layers: Sequence[Any]) -> list[Sequence[Any]]:
    """Weights, A, B and biases of so many layers, which come kind by kind."""
    count = len(layers) // 4
    return [layers[k * count : (k + 1) * count] for k in range(4)]


def _together(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``; on a GPU a float32 result is not rounded to half precision on its way."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
