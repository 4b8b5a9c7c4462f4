"""What a kernel of the information-gain family must get right on a device before it serves there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cit_fast.ops.information_gain.reference import (
    LogitOptions,
    Needed,
    TokenGain,
    gains_from_statistics,
)
from cit_fast.ops.self_check.battery import Bound, Case, Implementation, Results

OPS = ("token_gain", "token_gain_statistics", "masked_jsd", "linear_kl_divergence", "linear_cross_entropy")
DTYPES = ("float32", "bfloat16", "float16")
MUCH = 1 << 24

# Tokens, width, vocabulary: one of everything; around tiles of 32 to 128; many programs, several sweeps of a row.
SIZES = ((1, 1, 1), (3, 7, 5), (37, 70, 1003), (130, 64, 257), (300, 576, 20_011))
INTERPRETED = (*SIZES[:2], (33, 33, 65))
HEADS = {"plain": LogitOptions(), "soft-capped": LogitOptions(softcap=3.0, scale=1.5)}
GATE = 0.5

# Sums of float32 products; logarithms of small probabilities have the error of their logits.
VALUES, LOSS = Bound(1e-4, 1e-4), Bound(1e-4, 1e-4)


class _Problem(NamedTuple):
    full: Tensor
    masked: Tensor
    weight: Tensor
    other: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: Tensor
    row_weight: Tensor

    def exact(self) -> _Problem:
        """In float64."""
        return self._replace(
            **{
                name: each.double()
                for name, each in self._asdict().items()
                if each is not None and each.is_floating_point()
            }
        )


def cases(op: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """See :class:`cit_fast.ops.self_check.battery.Battery`."""
    for size in SIZES if device.type == "cuda" else INTERPRETED:
        for head, options in HEADS.items():
            problem = _make(*size, dtype, device, bias=head != "plain")
            yield _case(op, f"{'x'.join(map(str, size))}, {head}", problem, options)


def _case(op: str, name: str, problem: _Problem, options: LogitOptions) -> Case:
    needed = Needed(True, True, problem.bias is not None)

    def call(run: Implementation, exact: bool) -> Results:
        returned = _run(op, run, problem.exact() if exact else problem, options, needed)
        if op == "token_gain_statistics":
            returned = gains_from_statistics(returned)
        return dict(zip(names, returned, strict=True))

    if op in ("token_gain", "token_gain_statistics"):
        names: tuple[str, ...] = TokenGain._fields
        bounds = dict.fromkeys(names, VALUES)
        # Differences of numbers of that size, and of logits.
        for difference in ("probability_gain", "kl_full_masked", "kl_masked_full"):
            bounds[difference] = Bound(1e-3, 3e-4)
    else:
        names = ("loss", "gradient of the hidden states", "gradient of the head", "gradient of the bias")
        unit = max(1e-4, torch.finfo(problem.weight.dtype).eps)  # logits' gradients are rounded to the head's dtype
        bounds = {"loss": LOSS} | dict.fromkeys(names[1:], Bound(2 * unit, 2 * unit))
    return Case(name, call, bounds)


def _run(op: str, run: Implementation, problem: _Problem, options: LogitOptions, needed: Needed) -> Any:
    full, masked, weight, other, bias, targets, temperature, row_weight = problem
    if op == "token_gain":
        return run(full, masked, weight, targets, bias, options)
    if op == "token_gain_statistics":
        return run(full, masked, weight, targets, 0, bias, options)
    if op == "linear_cross_entropy":
        return run(full, weight, targets, row_weight, bias, options, GATE, needed)
    shared = (full, masked, weight, other, temperature, row_weight)
    if op == "masked_jsd":
        return run(*shared, bias, bias, options, needed)
    return run(*shared, targets, bias, bias, options, needed)


def _make(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device, *, bias: bool
) -> _Problem:
    """Probabilities of the targets from next to nothing to nearly 1."""
    generator = torch.Generator().manual_seed(tokens + vocabulary)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = random(vocabulary, width) * (1.6 / width**0.5)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    towards = 8 * torch.rand(tokens, 1, generator=generator) * weight[targets]
    tensors = (
        random(tokens, width) + towards,
        random(tokens, width) + towards,
        weight,
        weight + 0.1 * random(*weight.shape),
    )
    rows = 1 + torch.rand(tokens, generator=generator), torch.rand(tokens, generator=generator)
    full, masked, weight, other = (each.to(device, dtype) for each in tensors)
    temperature, row_weight = (each.to(device) for each in rows)
    there = random(vocabulary).to(device) if bias else None
    return _Problem(full, masked, weight, other, there, targets.to(device), temperature, row_weight)


def work(op: str, dtype: torch.dtype, device: torch.device, size: str) -> Callable[[Implementation], object]:
    """``little``: 64 tokens of a small model with 32 Ki entries; ``much``: 1,024 tokens and 128 Ki entries."""
    sizes = {"little": (64, 576, 1 << 15), "much": (1024, 2048, 1 << 17)}
    if device.type == "cpu":
        sizes = {"little": (1, 16, 7), "much": (3, 16, 70)}
    problem = _make(*sizes[size], dtype, device, bias=False)
    return lambda run: _run(op, run, problem, LogitOptions(), Needed(True, False, False))
