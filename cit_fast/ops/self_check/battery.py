"""What a kernel must get right to serve: the cases of each family of ops, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

Implementation = Callable[..., Any]
Results = dict[str, Tensor]


class Bound(NamedTuple):
    """How far a result may be from the exact one: shares of that element and of the largest one."""

    relative: float
    of_largest: float = 0.0
    same: float = 0.0
    """How many of the elements must be the very same, as a share: of what is rounded by chance, with known bits."""


class Case(NamedTuple):
    """One call of an op."""

    name: str
    call: Callable[[Implementation, bool], Results]
    """Calls an implementation, in float64 where the second argument is True, on tensors of its own; gives all that the
    call returns or writes."""
    bounds: Mapping[str, Bound]
    """Of each result."""


class Battery(Protocol):
    """The cases of a family: a module."""

    OPS: tuple[str, ...]
    DTYPES: tuple[str, ...]
    MUCH: int
    """From how many elements on there is much to do."""

    def cases(self, op: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
        """Small, hard ones: odd sizes, tails, nothing at all, extremes."""

    def work(self, op: str, dtype: torch.dtype, device: torch.device, size: str) -> Callable[[Implementation], object]:
        """A call to be timed, of a size that users have; on a CPU, where kernels are interpreted, a small one."""


class _Batteries(dict[str, Battery]):
    """Loaded when asked for, by the name of the family: they call the ops, whose modules ask for the check."""

    def __missing__(self, family: str) -> Battery:
        self[family] = cast("Battery", import_module(f"cit_fast.ops.{family}.battery"))
        return self[family]


FAMILIES = ("balance_ema", "information_gain", "wasserstein")
SIZES = ("little", "much")
BATTERIES = _Batteries()


def family_of(op: str) -> str:
    """The family whose battery has this op."""
    return next(family for family in FAMILIES if op in BATTERIES[family].OPS)


def size_of(op: str, elements: int) -> str:
    """``"little"`` or ``"much"``."""
    return SIZES[elements >= BATTERIES[family_of(op)].MUCH]


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` and the like."""
    return str(dtype).removeprefix("torch.")


def problem(case: Case, kernel: Implementation, reference: Implementation, device: torch.device) -> str | None:
    """What a kernel gets wrong in a case, in one line; None: nothing."""
    exact = case.call(reference, True)
    first = case.call(kernel, False)
    for name, bound in case.bounds.items():
        if found := _difference(first[name], exact[name], bound):
            return f"{case.name}: {name} {found}"
    second = _on_another_stream(lambda: case.call(kernel, False), device)
    for name, value in first.items():
        if not torch.equal(_bits(value), _bits(second[name])):
            return f"{case.name}: {name} has other bits when called again"
    return None


def _difference(value: Tensor, exact: Tensor, bound: Bound) -> str | None:
    if value.shape != exact.shape:
        return f"has shape {list(value.shape)}, not {list(exact.shape)}"
    if value.numel() == 0:
        return None
    value, exact = value.double().cpu(), exact.double().cpu()
    same = (value == exact) | (value.isnan() & exact.isnan())
    finite = exact.isfinite()
    largest = float(exact[finite].abs().max()) if finite.any() else 0.0
    allowed = bound.relative * exact.abs() + bound.of_largest * largest
    right = same | (finite & value.isfinite() & ((value - exact).abs() <= allowed))
    others = int((~same).sum())
    if right.all() and others <= max(2.0, (1 - bound.same) * value.numel()):
        return None
    if right.all():
        return f"is rounded another way in {others} of {value.numel()} elements"
    worst = int((~right).flatten().nonzero()[0])
    got, expected = float(value.flatten()[worst]), float(exact.flatten()[worst])
    return f"is {got:.6g} where {expected:.6g} is right ({int((~right).sum())} of {value.numel()} elements)"


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def _on_another_stream(call: Callable[[], Results], device: torch.device) -> Results:
    if device.type != "cuda":
        return call()
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        results = call()
    stream.synchronize()
    return results
