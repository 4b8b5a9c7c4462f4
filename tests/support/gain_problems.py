"""Random problems of the information-gain family, and how far the Triton kernels may be from the reference on them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cit_fast import backend
from cit_fast.ops.information_gain import TokenGain

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
PTX = bool(os.environ.get("CIT_FAST_PTX"))  # compiled, and run on the host
ON_HOST = INTERPRETED or PTX
DEVICE = "cpu" if ON_HOST else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias and scale": {"bias": True, "scale": 0.7},
    "softcap": {"bias": True, "softcap": 3.0, "scale": 1.5},
}


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def gradient_error(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """How far the gradient of the mean cross-entropy may be from the exact one, [T, d], to first order.

    Logits are float32 sums of d products; their gradient is rounded to the dtype and multiplied with the head in
    float32 sums of V products; the result is rounded to the dtype.
    """
    h, w = hidden.double(), weight.double()
    eps, unit = torch.finfo(hidden.dtype).eps, 2.0**-24
    logit = h.shape[1] * unit * float((h.abs() @ w.abs().T).max())
    p = (h @ w.T).softmax(dim=1) / len(h)
    slope = p.scatter_add(1, targets.long()[:, None], torch.full((len(h), 1), -1 / len(h), device=h.device).double())
    of_logits = slope.abs() * (eps + len(w) * unit) + 2 * logit * p
    return of_logits @ w.abs() + eps * (slope @ w).abs()


def options_of(head: str, vocabulary: int) -> dict[str, Any]:
    options = {"bias": None, "softcap": None, "scale": 1.0, **HEADS[head]}
    if options["bias"]:
        options["bias"] = make(vocabulary, seed=9)
    return options


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def logit_error(hidden: Tensor, weight: Tensor, scale: float) -> float:
    """How far float32 may be from the exact logit: a rounding and a truncation per term of the product, at worst."""
    size = hidden.double().norm(dim=1).max() * weight.double().norm(dim=1).max()
    return 4 * 2**-24 * math.sqrt(weight.shape[1]) * (1 + float(size)) * abs(scale) + 1e-6


def close(value: Tensor, exact: Tensor, bound: float, name: str) -> None:
    assert value.shape == exact.shape
    assert (value.double() - exact).abs().max() <= bound, f"{name}: {(value.double() - exact).abs().max()} > {bound}"


def both(call: Callable[[Callable[[Any], Any]], Any]) -> tuple[Any, Any]:
    """What the kernels give, and the reference in float64 from the same numbers."""
    with backend("triton"):
        got = call(lambda x: x)
    with backend("reference"):
        return got, call(double)


def close_gains(got: TokenGain, exact: TokenGain, bound: float) -> None:
    for name, value, right in zip(TokenGain._fields, got, exact, strict=True):
        assert value.dtype == torch.float32
        # A divergence weighs errors with log-ratios, an entropy with logarithms.
        close(value, right, bound * (1 if "prob" in name else 1 + float(right.abs().max())), name)


def gradients_close(got: list[Tensor], exact: list[Tensor], bound: float, dtype: torch.dtype) -> None:
    for value, right in zip(got, exact, strict=True):
        # Gradients of logits are rounded to the head's dtype before they are multiplied.
        unit = max(2 * torch.finfo(dtype).eps, 2 * torch.finfo(value.dtype).eps, bound)
        close(value, right, unit * float(right.abs().max()) + 1e-7, f"gradient {list(right.shape)} {value.dtype}")


def loss_and_gradients(loss_of: Callable[..., Tensor], *inputs: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    leaves = [None if each is None else each.detach().clone().requires_grad_() for each in inputs]
    loss = loss_of(*leaves)
    return loss.detach(), list(torch.autograd.grad(loss, [each for each in leaves if each is not None]))
