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
    merge_statistics,
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


class _Variant(NamedTuple):
    """What an op can be asked for: by default what most callers ask for."""

    name: str
    head: str = "plain"
    special: bool = False
    """A gate, a divergence of the other tokens alone, a vocabulary in two pieces, targets of 32 bits."""
    gradients: bool = True
    wide_head: bool = False
    """The head in float32, whatever the hidden states."""


EVERYWHERE = (_Variant("plain"), _Variant("soft-capped, special", "soft-capped", special=True))
ONCE = (_Variant("the loss alone", gradients=False), _Variant("head in float32", wide_head=True))


def cases(op: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """See :class:`cit_fast.ops.self_check.battery.Battery`."""
    sizes = SIZES if device.type == "cuda" else INTERPRETED
    for size in sizes:
        for variant in (*EVERYWHERE, *ONCE) if size == sizes[2] else EVERYWHERE:
            problem = _make(*size, dtype, device, bias=variant.head != "plain")
            if variant.wide_head:
                problem = problem._replace(weight=problem.weight.float(), other=problem.other.float())
            if variant.special:
                problem = problem._replace(targets=problem.targets.int())
            yield _case(op, f"{'x'.join(map(str, size))}, {variant.name}", problem, variant)


def _case(op: str, name: str, problem: _Problem, variant: _Variant) -> Case:
    needed = Needed(variant.gradients, variant.gradients, variant.gradients and problem.bias is not None)

    def call(run: Implementation, exact: bool) -> Results:
        returned = _run(op, run, problem.exact() if exact else problem, HEADS[variant.head], needed, variant.special)
        return dict(zip(names, returned, strict=True))

    if op in ("token_gain", "token_gain_statistics"):
        names: tuple[str, ...] = TokenGain._fields
        bounds = dict.fromkeys(names, VALUES)
        # Differences of numbers of that size, and of logits.
        for difference in ("probability_gain", "kl_full_masked", "kl_masked_full"):
            bounds[difference] = Bound(1e-3, 3e-4)
    else:
        names = ("loss", "gradient of the hidden states", "gradient of the head", "gradient of the bias")
        # Logits' gradients are rounded to the narrower dtype of the product.
        unit = max(1e-4, *(torch.finfo(each.dtype).eps for each in (problem.full, problem.weight)))
        bounds = {"loss": LOSS} | dict.fromkeys(names[1:], Bound(2 * unit, 2 * unit))
    return Case(name, call, bounds)


def _run(op: str, run: Implementation, problem: _Problem, options: LogitOptions, needed: Needed, special: bool) -> Any:
    full, masked, weight, other, bias, targets, temperature, row_weight = problem
    if op == "token_gain":
        return run(full, masked, weight, targets, bias, options)
    if op == "token_gain_statistics":
        pieces = []
        for first, piece in _pieces(weight, 2 if special else 1):
            own_bias = None if bias is None else bias[first : first + len(piece)]
            pieces.append(run(full, masked, piece, targets, first, own_bias, options))
        return gains_from_statistics(merge_statistics(torch.stack(pieces)))
    if op == "linear_cross_entropy":
        return run(full, weight, targets, row_weight, bias, options, GATE if special else 0.0, needed)
    shared = (full, masked, weight, other, temperature, row_weight)
    if op == "masked_jsd":
        return run(*shared, bias, bias, options, needed)
    return run(*shared, targets if special else None, bias, bias, options, needed)


def _pieces(weight: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    first = 0
    for piece in weight.tensor_split(count):
        if len(piece):
            yield first, piece
        first += len(piece)


def _make(
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = False,
    where: torch.device = torch.device("cpu"),  # noqa: B008 - never changed
) -> _Problem:
    """Probabilities of the targets from next to nothing to nearly 1; random numbers are drawn on ``where``."""
    generator = torch.Generator(where).manual_seed(tokens + vocabulary)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=where)

    weight = random(vocabulary, width) * (1.6 / width**0.5)
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=where)
    towards = 8 * torch.rand(tokens, 1, generator=generator, device=where) * weight[targets]
    full, masked = (
        (random(tokens, width) + towards).to(device, dtype),
        (random(tokens, width) + towards).to(device, dtype),
    )
    head = weight.to(device, dtype)
    other = head if vocabulary >= 1 << 15 else (weight + 0.1 * random(vocabulary, width)).to(device, dtype)
    temperature = 1 + torch.rand(tokens, generator=generator, device=where)
    row_weight = torch.rand(tokens, generator=generator, device=where)
    if tokens > 1:
        row_weight[0] = 0  # a token that does not count
    there = random(vocabulary).to(device) if bias else None
    return _Problem(full, masked, head, other, there, targets.to(device), temperature.to(device), row_weight.to(device))


def work(op: str, dtype: torch.dtype, device: torch.device, size: str) -> Callable[[Implementation], object]:
    """``little``: 64 tokens of a small model with 32 Ki entries; ``much``: 1,024 tokens and 128 Ki entries."""
    sizes = {"little": (64, 576, 1 << 15), "much": (1024, 2048, 1 << 17)}
    if device.type == "cpu":
        sizes = {"little": (1, 16, 7), "much": (3, 16, 70)}
    problem = _make(*sizes[size], dtype, device, where=device)
    return lambda run: _run(op, run, problem, LogitOptions(), Needed(True, False, False), False)
