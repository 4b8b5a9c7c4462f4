"""Random hidden states and heads, and their logits written out in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Largest absolute error of a probability against float64 from the same inputs: but for float64, sums run in float32.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "all": {"bias": True, "softcap": 2.0, "scale": 1.5},
}


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def naive_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    logits = hidden.double() @ weight.double().T
    logits = scale * (logits if bias is None else logits + bias.double())
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def head_options(head: str, vocabulary: int, dtype: torch.dtype = torch.float64) -> dict[str, object]:
    options = {"bias": None, "softcap": None, "scale": 1.0, **HEADS[head]}
    if options["bias"]:
        options["bias"] = make(vocabulary, seed=9, dtype=dtype)
    return options


def two_words() -> tuple[Tensor, Tensor, Tensor]:
    """One token whose prediction is (1/4, 3/4) after the full instruction and (1/2, 1/2) after the masked one."""
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    return torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), weight
