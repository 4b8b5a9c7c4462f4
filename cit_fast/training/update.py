"""The update of a method: what happens to the weights at each optimizer step, and at the end of a stage."""

from __future__ import annotations

from typing import Literal, Protocol

from torch.optim import Optimizer

from cit_fast.errors import ConfigError
from cit_fast.ops.balance_ema import check_rule
from cit_fast.optim import BalanceEMA, BalanceSummary


class Update(Protocol):
    """One of the four parts of a method."""

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer that the stage steps with, made from the one that TrainingArguments describe."""

    def finish(self, optimizer: Optimizer) -> None:
        """Called once when the stage's training is over, before anything is evaluated or kept."""

    def summary(self, optimizer: Optimizer) -> BalanceSummary | None:
        """``(mean, minimum, maximum, fallback fraction)`` of the last step's balance weights, if there are any."""


class PlainUpdate:
    """The optimizer as it is."""

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """The same optimizer."""
        return optimizer

    def finish(self, optimizer: Optimizer) -> None:
        """Nothing to do."""

    def summary(self, optimizer: Optimizer) -> BalanceSummary | None:
        """No average, no weights."""
        return None


class BalanceEMAUpdate:
    """LCIA's average of the weights: starts as a copy at a stage's first step, replaces the live weights at its end.

    Args:
        rule, decay, fallback: see :class:`cit_fast.optim.BalanceEMA`.
    """

    def __init__(
        self,
        rule: Literal["released", "paper", "fixed"] = "released",
        decay: float = 0.99,
        fallback: float = 0.01,
    ) -> None:
        check_rule("balance-ema", rule, decay, fallback)
        self.rule, self.decay, self.fallback = rule, decay, fallback

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer inside a :class:`cit_fast.optim.BalanceEMA`."""
        return BalanceEMA(optimizer, rule=self.rule, decay=self.decay, fallback=self.fallback, scope="task")

    def finish(self, optimizer: Optimizer) -> None:
        """Copy the average over the live weights."""
        _balance_ema(optimizer).copy_averaged_to_parameters()

    def summary(self, optimizer: Optimizer) -> BalanceSummary | None:
        """Over parameter tensors, at the last step."""
        return _balance_ema(optimizer).balance_summary()


def _balance_ema(optimizer: Optimizer) -> BalanceEMA:
    """The BalanceEMA inside Accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer) if not isinstance(optimizer, BalanceEMA) else optimizer
    if not isinstance(inner, BalanceEMA):
        raise ConfigError(
            f"update balance-ema: the optimizer came back as {type(inner).__name__}, which hides the average; "
            "an engine that replaces the optimizer (DeepSpeed) cannot be used with this update"
        )
    return inner
