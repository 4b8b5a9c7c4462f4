"""What a kernel of the balance-weight EMA must get right on a device before it serves there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cit_fast.ops.balance_ema import reference
from cit_fast.ops.balance_ema.checks import BALANCE_RULES
from cit_fast.ops.balance_ema.reference import AdamWLists, AdamWOptions, BalanceOptions, BalanceWeights
from cit_fast.ops.self_check.battery import Bound, Case, Implementation, Results

OPS = ("balance_norms_", "balance_ema_", "adamw_balance_ema_", "flush_balance_ema_")
DTYPES = ("float32", "bfloat16", "float16")
MUCH = 1 << 24

# Tails of a group, of a tile and of a chunk, no elements, one.
SHAPES = ((1,), (0,), (3, 5), (9, 8), (2047,), (2, 8193), (16384 + 40,), (0, 7))
INTERPRETED = ((1,), (0,), (3, 5), (9, 8), (1031,))
ADAMW = AdamWOptions(step=3, lr=0.01, beta1=0.8, beta2=0.95, eps=1e-8, weight_decay=0.1)

# A sum of float32 values off by a few last places for each level of its tree; a weight has three of them.
NORMS, WEIGHTS = Bound(1e-5), Bound(1e-4)
# A step is a small part of its parameter; half a last place of the dtype that is written, or a whole one by chance.
WRITTEN = {
    torch.float32: Bound(2**-20, 2**-22),
    torch.bfloat16: Bound(2**-7, 2**-20),
    torch.float16: Bound(2**-10, 2**-20),
}

STATE = ("averages", "exp_avgs", "exp_avg_sqs")
SAME = 0.99
"""Of state in bfloat16, whose random bits are known: another order of operations moves few elements across."""


class _Kind(NamedTuple):
    name: str
    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    finite: bool = True


class _Tensors(NamedTuple):
    """Of one call."""

    lists: AdamWLists
    alphas: Tensor
    remaining: Tensor

    def copy(self, *, exact: bool) -> _Tensors:
        """Of the same dtypes, or in float64 but for what is rounded before the norms are taken of it.

        Those are the parameters, and state in bfloat16, with which the reference computes in float32.
        """
        exact = exact and self.lists.averages[0].dtype == torch.float32
        params, *rest = (
            [tensor.double() if exact and i else tensor.clone() for tensor in tensors]
            for i, tensors in enumerate(self.lists)
        )
        return _Tensors(AdamWLists(params, *rest), self.alphas.clone(), self.remaining.clone())


def cases(op: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """See :class:`cit_fast.ops.self_check.battery.Battery`."""
    float32 = torch.float32
    kinds = [_Kind("as in training", dtype, dtype, float32), _Kind("not finite", dtype, dtype, float32, finite=False)]
    if dtype != float32:
        kinds.append(_Kind("parameters in float32", float32, dtype, float32))
    if dtype == torch.bfloat16:
        kinds.append(_Kind("state in bfloat16", dtype, dtype, dtype))
    for kind in kinds:
        tensors = _make(kind, SHAPES if device.type == "cuda" else INTERPRETED, device)
        for options in _options(op):
            yield _case(op, kind, tensors, options)


def _options(op: str) -> Iterator[BalanceOptions]:
    yield BalanceOptions(seed=7)
    yield BalanceOptions(rounding="nearest", store_grads=False)
    if op in ("balance_ema_", "adamw_balance_ema_"):
        for rule in BALANCE_RULES:
            yield BalanceOptions(rule=rule, decay=0.9, fallback=0.3, seed=7)


def _case(op: str, kind: _Kind, tensors: _Tensors, options: BalanceOptions) -> Case:
    def call(run: Implementation, exact: bool) -> Results:
        mine = tensors.copy(exact=exact)
        returned = _run(op, run, mine, options)
        results = {"alphas": mine.alphas, "remaining": mine.remaining}
        if op == "adamw_balance_ema_":
            results = _beside_what_is_written(returned, mine, tensors, options)
        elif isinstance(returned, BalanceWeights):
            results |= returned._asdict()
        elif returned is not None:
            results["norms"] = returned
        for name, several in mine.lists._asdict().items():
            results |= {f"{name}[{i}]": tensor for i, tensor in enumerate(several)}
        return results

    bounds = {"alphas": WEIGHTS, "remaining": WEIGHTS}
    if op != "flush_balance_ema_":
        bounds["norms"] = NORMS
    if op in ("balance_ema_", "adamw_balance_ema_"):
        bounds["fallbacks"] = Bound(0)
    for name, several in tensors.lists._asdict().items():
        bound = WRITTEN[tensors.lists.params[0].dtype if name == "params" else several[0].dtype]
        if kind.state == torch.bfloat16 and name in STATE and options.rounding != "nearest":
            bound = bound._replace(same=SAME)
        bounds |= {f"{name}[{i}]": bound for i in range(len(several))}
    return Case(f"{kind.name}, {options.rule}, {options.rounding}", call, bounds)


def _beside_what_is_written(
    weights: BalanceWeights, mine: _Tensors, before: _Tensors, options: BalanceOptions
) -> Results:
    """Norms and weights as shares of those of the parameters and averages that were written.

    Where an element of the parameters, in half precision, may be rounded up or down, a norm may differ by as much.
    """
    lists = mine.lists
    written = [[tensor.double() for tensor in each] for each in (lists.params, lists.averages)]
    gradients = [[tensor.double() for tensor in each] for each in (before.lists.grads, before.lists.previous_grads)]
    norms = reference.balance_norms_(written[0], written[1], gradients[0], gradients[1], store_grads=False)
    remaining = before.remaining.clone()
    alphas, fallbacks = reference.balance_weight(norms, remaining, options)
    pairs = {
        "norms": (weights.norms, norms),
        "alphas": (weights.alphas, alphas),
        "remaining": (mine.remaining, remaining),
        "fallbacks": (weights.fallbacks, fallbacks),
    }
    results = {}
    for name, pair in pairs.items():
        value, right = (each.double() for each in pair)
        alike = (value == right) | (value.isnan() & right.isnan())
        results[name] = torch.where(alike, 1.0, value / right)
    return results


def _run(op: str, run: Implementation, tensors: _Tensors, options: BalanceOptions) -> Any:
    (params, grads, _, _, averages, previous), alphas, remaining = tensors.lists, tensors.alphas, tensors.remaining
    if op == "balance_norms_":
        return run(params, averages, grads, previous, options.store_grads)
    if op == "balance_ema_":
        return run(params, averages, grads, previous, remaining, options)
    if op == "adamw_balance_ema_":
        return run(tensors.lists, alphas, remaining, ADAMW, options)
    return run(params, averages, alphas, options.rounding, options.seed)


def _make(
    kind: _Kind,
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
    where: torch.device = torch.device("cpu"),  # noqa: B008 - never changed
) -> _Tensors:
    """Random numbers are drawn on ``where``."""
    generator = torch.Generator(where).manual_seed(0)

    def random(dtype: torch.dtype, factor: float = 1.0) -> list[Tensor]:
        drawn = (torch.randn(shape, generator=generator, device=where) for shape in shapes)
        return [(factor * each).to(device, dtype) for each in drawn]

    params, grads, exp_avgs = random(kind.param), random(kind.grad), random(kind.state, 0.1)
    averages = [param.to(kind.state) + offset for param, offset in zip(params, random(kind.state, 0.5), strict=True)]
    squares = [tensor.abs() for tensor in random(kind.state, 0.01)]
    previous = random(kind.grad)
    if not kind.finite:
        grads[2].view(-1)[7], params[3].view(-1)[-1], grads[4].view(-1)[-1] = float("nan"), float("inf"), float("-inf")
    alphas = torch.rand(len(shapes), generator=generator, device=where).to(device)
    alphas[::3] = 0  # nothing is pending there
    return _Tensors(
        AdamWLists(params, grads, exp_avgs, squares, averages, previous), alphas, torch.full_like(alphas, 2.0)
    )


def work(op: str, dtype: torch.dtype, device: torch.device, size: str) -> Callable[[Implementation], object]:
    """``little``: an adapter of 224 tensors of rank 16; ``much``: 2^25 parameters in eight tensors."""
    if device.type == "cpu":
        shapes: tuple[tuple[int, ...], ...] = ((16, 40), (3000,)) if size == "little" else ((2, 16384),)
    elif size == "little":
        shapes = tuple((16, 1024 + 2048 * (i % 2)) if i % 4 < 2 else (1024 + 2048 * (i % 2), 16) for i in range(224))
    else:
        shapes = ((1 << 11, 1 << 11),) * 8
    tensors = _make(_Kind("", dtype, dtype, torch.float32), shapes, device, where=device)
    return lambda run: _run(op, run, tensors, BalanceOptions())
