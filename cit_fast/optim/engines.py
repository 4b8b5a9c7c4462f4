"""Engines that give an optimizer flat partitions in place of its parameters (DeepSpeed ZeRO and its 16-bit modes).

A partition is a piece of the memory of several parameters laid end to end. It is told by this: a plain tensor, neither
``nn.Parameter`` nor DTensor, that the optimizer was not given by anyone but found in its groups, where none of the
given ones is left. A fixed weight is element-wise and right there. A weight that follows from the norms of a tensor
needs to know whose pieces a partition holds: :mod:`cit_fast.optim.partitions` finds that for ZeRO-1, 2 and 3; elsewhere
such rules are refused.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from torch import Tensor

from cit_fast.errors import CitFastError


class GivenParameters:
    """The parameters that an optimizer was given, in order.

    They are held, not referred to weakly: ``torch.utils.swap_tensors``, by which FSDP2 moves a model, would refuse.
    """

    def __init__(self) -> None:
        self._given: dict[int, Tensor] = {}
        self._names: dict[int, str] = {}

    def add(self, groups: Iterable[dict[str, Any]]) -> None:
        """The parameters of these groups, too, were given."""
        for group in groups:
            self._given.update((id(param), param) for param in group["params"])
            self._names.update(
                (id(param), name) for param, name in zip(group["params"], group.get("param_names", ()), strict=False)
            )

    def follow(self, groups: Iterable[dict[str, Any]], state: Container[Tensor]) -> None:
        """What has joined given parameters in the groups counts as given; what has left groups and state does not.

        An engine leaves none of the given ones in the groups: then nothing changes.
        """
        listed = {id(param) for group in groups for param in group["params"]}
        if listed.isdisjoint(self._given):
            return
        self.add(groups)
        self._given = {key: param for key, param in self._given.items() if key in listed or param in state}
        self._names = {key: name for key, name in self._names.items() if key in self._given}

    def all(self) -> list[Tensor]:
        """The given parameters, in order."""
        return list(self._given.values())

    def keys(self) -> dict[int, str | int]:
        """The name of each, by its id; its position where it was given without one."""
        return {each: self._names.get(each, i) for i, each in enumerate(self._given)}

    def is_partition(self, param: Any) -> bool:
        """Whether ``param`` is a plain tensor that nobody gave."""
        return type(param) is Tensor and id(param) not in self._given


def refuse_partitions(owner: str, rule: str) -> CitFastError:
    """The error for a rule whose weights follow from the norms of a parameter."""
    return CitFastError(
        f"{owner}: an engine put flat partitions of many parameters in place of the parameters, and nothing tells "
        f'whose pieces they hold, so rule="{rule}" cannot weigh each of them; use rule="fixed", DDP, FSDP2, or '
        "DeepSpeed ZeRO-1, 2 or 3 (no NVMe) with an optimizer that was made before deepspeed.initialize (a tensor put "
        "there by hand must be an nn.Parameter)"
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


def hides_steps(optimizer: Any) -> str | None:
    """Why a wrapper around this optimizer would not see its steps or its state as they are; None where it would."""
    kinds = {base.__name__ for base in type(optimizer).__mro__}
    if "AcceleratedOptimizer" in kinds:
        return (
            "accelerator.prepare() made this optimizer, whose step() does nothing while gradients accumulate; "
            "use accelerator.prepare(BalanceEMA(optimizer)), or BalanceEMA.attach(optimizer)"
        )
    if "ZeroRedundancyOptimizer" in kinds:
        return (
            "ZeroRedundancyOptimizer would leave the averages out of what it saves; "
            "use ZeroRedundancyOptimizer(params, optimizer_class=AdamWBalanceEMA) and its .optim"
        )
    return None
