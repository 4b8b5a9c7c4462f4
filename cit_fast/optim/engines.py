"""Engines that give an optimizer flat partitions in place of its parameters (DeepSpeed ZeRO and its 16-bit modes).

A partition is a piece of the memory of several parameters laid end to end. It is told by this: a plain tensor, neither
``nn.Parameter`` nor DTensor, that the optimizer was not given by anyone but found in its groups. A fixed weight is
element-wise and right there. A weight that follows from the norms of a tensor needs to know whose pieces a partition
holds: :mod:`cit_fast.optim.partitions` finds that for ZeRO-1, 2 and 3; elsewhere such rules are refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from cit_fast.errors import CitFastError


class GivenParameters:
    """The parameters that an optimizer was given, in order, without keeping them alive."""

    def __init__(self) -> None:
        self._given: dict[int, weakref.ref[Tensor]] = {}
        self._names: dict[int, str] = {}

    def add(self, groups: Iterable[dict[str, Any]]) -> None:
        """The parameters of these groups, too, were given."""
        for group in groups:
            self._given.update((id(param), weakref.ref(param)) for param in group["params"])
            self._names.update(
                (id(param), name) for param, name in zip(group["params"], group.get("param_names", ()), strict=False)
            )

    def alive(self) -> list[Tensor]:
        """Those that still exist, in order."""
        return [param for given in self._given.values() if (param := given()) is not None]

    def keys(self) -> dict[int, str | int]:
        """The name of each, by its id; its position where it was given without one."""
        return {each: self._names.get(each, i) for i, each in enumerate(self._given)}

    def is_partition(self, param: Any) -> bool:
        """Whether ``param`` is a plain tensor that nobody gave."""
        if type(param) is not Tensor:
            return False
        given = self._given.get(id(param))
        return given is None or given() is not param


def refuse_partitions(owner: str, rule: str) -> CitFastError:
    """The error for a rule whose weights follow from the norms of a parameter."""
    return CitFastError(
        f"{owner}: an engine put flat partitions of many parameters in place of the parameters, and nothing tells "
        f'whose pieces they hold, so rule="{rule}" cannot weigh each of them; use rule="fixed", DDP, FSDP2, or '
        "DeepSpeed ZeRO-1, 2 or 3 (no NVMe) with an optimizer that was made before deepspeed.initialize"
    )


def refuse_swap(owner: str) -> CitFastError:
    """The error for putting averages of partitions into a model."""
    return CitFastError(
        f"{owner}: the averages are those of an engine's partitions, and nothing tells where in the model's parameters "
        "they belong; that is known for DeepSpeed ZeRO-1, 2 and 3 (no NVMe) only"
    )


def is_engine(optimizer: Any) -> bool:
    """Whether an optimizer is DeepSpeed's, or has such a one inside."""
    while optimizer is not None:
        if any(base.__module__.startswith("deepspeed.") for base in type(optimizer).__mro__):
            return True
        optimizer = getattr(optimizer, "__dict__", {}).get("optimizer")
    return False


def steps_in_backward(optimizer: Any) -> bool:
    """Whether an optimizer is transformers' stand-in for one optimizer per layer, which step as gradients arrive."""
    return any(base.__name__ == "LayerWiseDummyOptimizer" for base in type(optimizer).__mro__)
