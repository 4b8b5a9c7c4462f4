"""The options of an average of the weights, checked."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from cit_fast.errors import CitFastError
from cit_fast.ops.balance_ema import BalanceRule, Rounding, check_rule
from cit_fast.ops.balance_ema.native import STATE_DTYPES


class AverageOptions(NamedTuple):
    """The options of an average; see :class:`cit_fast.optim.BalanceEMA`."""

    rule: BalanceRule = "released"
    decay: float = 0.99
    fallback: float = 0.01
    scope: Literal["task", "stream"] = "task"
    average_dtype: torch.dtype = torch.float32
    keep_gradients: Literal["reference", "copy"] = "reference"
    scale: float = 2.0
    rounding: Rounding = "stochastic"
    start: Literal["before", "after"] = "before"

    def check(self, owner: str) -> None:
        """Raise CitFastError that starts with ``owner`` unless every option is one that it can be."""
        check_rule(owner, self.rule, self.decay, self.fallback, self.scale, self.rounding)
        check_dtype(owner, "average_dtype", self.average_dtype)
        accepted = {
            "scope": ("task", "stream"),
            "keep_gradients": ("reference", "copy"),
            "start": ("before", "after"),
        }
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                raise CitFastError(f"{owner}: {name}={getattr(self, name)!r} is unknown; accepted: {', '.join(values)}")


def check_dtype(owner: str, name: str, dtype: torch.dtype) -> None:
    """Raise CitFastError unless state can be kept in ``dtype``."""
    if dtype not in STATE_DTYPES:
        raise CitFastError(f"{owner}: {name}={dtype} cannot follow small updates; accepted: float32, bfloat16")
