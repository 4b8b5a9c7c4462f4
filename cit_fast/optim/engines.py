"""Engines that give an optimizer flat partitions in place of its parameters (DeepSpeed ZeRO and its 16-bit modes).

A partition is a piece of the memory of several parameters laid end to end. A fixed weight is element-wise and right
there; a weight that follows from the norms of a tensor is not, so it is refused. Partitions are told by this: they
are plain tensors, neither ``nn.Parameter`` nor DTensor, that the optimizer was not given by anyone but found in its
groups.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from cit_fast.errors import CitFastError


class GivenParameters:
    """The parameters that an optimizer was given, without keeping them alive."""

    def __init__(self) -> None:
        self._given: dict[int, weakref.ref[Tensor]] = {}

    def add(self, params: Iterable[Tensor]) -> None:
        """These, too, were given."""
        self._given.update((id(param), weakref.ref(param)) for param in params)

    def is_partition(self, param: Any) -> bool:
        """Whether ``param`` is a plain tensor that nobody gave."""
        if type(param) is not Tensor:
            return False
        given = self._given.get(id(param))
        return given is None or given() is not param


def refuse_partitions(owner: str, rule: str) -> CitFastError:
    """The error for a rule whose weights follow from the norms of a parameter."""
    return CitFastError(
        f"{owner}: an engine (DeepSpeed ZeRO, bf16 or fp16) put flat partitions of many parameters in place of the "
        f'parameters, so rule="{rule}" cannot weigh each of them; use rule="fixed", DDP or FSDP2'
    )


def refuse_swap(owner: str) -> CitFastError:
    """The error for putting averages of partitions into a model."""
    return CitFastError(
        f"{owner}: the averages are those of an engine's partitions, not of the model's parameters; gather each with "
        'deepspeed.utils.safe_get_full_optimizer_state(parameter, "average")'
    )


def is_engine(optimizer: Any) -> bool:
    """Whether an optimizer is DeepSpeed's, or has such a one inside."""
    while optimizer is not None:
        if any(base.__module__.startswith("deepspeed.") for base in type(optimizer).__mro__):
            return True
        optimizer = getattr(optimizer, "__dict__", {}).get("optimizer")
    return False
