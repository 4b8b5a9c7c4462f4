"""A linear layer with a low-rank update (LoRA, arXiv 2106.09685) in plain PyTorch: the definition.

With x [N, in] the layer's input, W [out, in] frozen, A [r, in], B [out, r], s the scaling and d the dropout:

    y = x W^T + bias + s d(x) A^T B^T      (equation 3)

Everything is in float64 but the result, and autograd finds the gradients.
"""

from __future__ import annotations

from torch import Tensor


def lora_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scaling: float, kept: Tensor | None, p: float
) -> Tensor:
    """``kept``: [N, in] bool, which elements of x reach A, each times 1 / (1 - p); None: all."""
    x64 = x.double()
    dropped = x64 if kept is None else x64 * kept / (1 - p)
    y = x64 @ weight.double().T + scaling * (dropped @ a.double().T @ b.double().T)
    return (y if bias is None else y + bias.double()).to(x.dtype)
