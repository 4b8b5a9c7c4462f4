"""The update of a method: what happens to the weights at each optimizer step, and at the end of a stage."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from cit_fast.errors import ConfigError
from cit_fast.methods.stage import Stage
from cit_fast.ops.balance_ema import BalanceRule, Rounding
from cit_fast.optim import AdamWBalanceEMA, AveragingOptimizer, BalanceEMA, BalanceSummary, find_balance_ema
from cit_fast.optim.averaging import AverageOptions

When = Literal["always", "retrained", "from-second"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Update(Protocol):
    """One of the four parts of a method."""

    def wrap(self, optimizer: Optimizer, stage: Stage) -> Optimizer:
        """The optimizer that the stage steps with, made from the one that TrainingArguments describe."""

    def finish(self, optimizer: Optimizer, stage: Stage) -> dict[str, Tensor] | None:
        """Called once when the stage's training is over, before anything is evaluated or kept.

        Returns:
            Weights by name from which training goes on when the stage's adapter set is trained again, if those are
            not the ones that the model holds from now on. The run keeps them; ``stage.averages`` of that later stage
            has what the model held instead.
        """

    def summary(self, optimizer: Optimizer, stage: Stage) -> BalanceSummary | None:
        """``(mean, minimum, maximum, fallback fraction)`` of the last step's balance weights, if there are any."""


class PlainUpdate:
    """The optimizer as it is."""

    def wrap(self, optimizer: Optimizer, stage: Stage) -> Optimizer:
        """The same optimizer."""
        return optimizer

    def finish(self, optimizer: Optimizer, stage: Stage) -> None:
        """Nothing to do."""

    def summary(self, optimizer: Optimizer, stage: Stage) -> BalanceSummary | None:
        """No average, no weights."""
        return None


class BalanceEMAUpdate:
    """LCIA's average of the weights: starts as a copy at a stage's first step, replaces the live weights at its end.

    Source: Qiao et al., ICML 2025, arXiv 2410.10868, algorithm 1 and appendix M, and its released code.

    Args:
        rule, decay, fallback, scale, start, rounding: see :class:`cit_fast.optim.BalanceEMA`.
        average_dtype: ``"float32"``, or ``"bfloat16"`` for half the memory.
        scope: ``"task"``: each stage has an average of its own, and training goes on from it; ``"stream"``: one
            average lives across all stages that train an adapter set, and training goes on from the live weights,
            which every stage then keeps beside the average.
        when: the stages that are averaged. ``"always"`` (algorithm 1); ``"retrained"``: those that train an adapter
            set again, so that a new one learns freely (appendix M and the authors' scripts); ``"from-second"``: all
            but the stream's first (the authors' later toolbox).
    """

    def __init__(
        self,
        rule: BalanceRule = "released",
        decay: float = 0.99,
        fallback: float = 0.01,
        scale: float = 2.0,
        start: Literal["before", "after"] = "before",
        rounding: Rounding = "stochastic",
        average_dtype: Literal["float32", "bfloat16"] = "float32",
        scope: Literal["task", "stream"] = "task",
        when: When = "always",
    ) -> None:
        if average_dtype not in _DTYPES:
            raise ConfigError(f"average_dtype: {average_dtype!r} is unknown; expected float32 or bfloat16")
        if when not in ("always", "retrained", "from-second"):
            raise ConfigError(f"when: {when!r} is unknown; expected always, retrained or from-second")
        self.rule, self.decay, self.fallback, self.scale = rule, decay, fallback, scale
        self.start, self.rounding, self.average_dtype = start, rounding, average_dtype
        self.scope, self.when = scope, when
        AverageOptions(**self._options()).check("balance-ema")

    def _options(self) -> dict[str, Any]:
        names = ("rule", "decay", "fallback", "scale", "start", "rounding", "scope")
        return {name: getattr(self, name) for name in names} | {"average_dtype": _DTYPES[self.average_dtype]}

    def averages(self, stage: Stage) -> bool:
        """Whether the stage is averaged."""
        return {"always": True, "retrained": not stage.new_set, "from-second": stage.index > 1}[self.when]

    def wrap(self, optimizer: Optimizer, stage: Stage) -> Optimizer:
        """torch's AdamW becomes an :class:`AdamWBalanceEMA`, any other is put into a :class:`BalanceEMA`."""
        if not self.averages(stage):
            return optimizer
        made: AveragingOptimizer
        if type(optimizer) is AdamW and not any(
            group["amsgrad"] or group["maximize"] for group in optimizer.param_groups
        ):
            names = ("params", "lr", "betas", "eps", "weight_decay")
            groups = [{name: group[name] for name in names} for group in optimizer.param_groups]
            made = AdamWBalanceEMA(groups, **self._options())
        else:
            made = BalanceEMA(optimizer, **self._options())
        if stage.averages:
            parameters = dict(stage.model.named_parameters())
            made.start_averages_at({parameters[name]: value for name, value in stage.averages.items()})
        return made

    def finish(self, optimizer: Optimizer, stage: Stage) -> dict[str, Tensor] | None:
        """Copy the average over the live weights, which an average of the whole stream needs again."""
        if not self.averages(stage):
            return None
        live = None
        if self.scope == "stream":
            trained = ((name, p) for name, p in stage.model.named_parameters() if p.requires_grad)
            live = {name: parameter.detach().cpu().clone() for name, parameter in trained}
        _averaging(optimizer).copy_averaged_to_parameters()
        return live

    def summary(self, optimizer: Optimizer, stage: Stage) -> BalanceSummary | None:
        """Over parameter tensors, at the last step."""
        return _averaging(optimizer).balance_summary() if self.averages(stage) else None


def stream_wide(update: Any) -> bool:
    """Whether an update's average lives across stages, so that live weights have to be kept with each."""
    return isinstance(update, BalanceEMAUpdate) and update.scope == "stream"


def _averaging(optimizer: Optimizer) -> AveragingOptimizer:
    """Our optimizer inside Accelerate's wrapper."""
    found = find_balance_ema(optimizer)
    if found is None:
        raise ConfigError(
            f"update balance-ema: the optimizer came back as {type(optimizer).__name__}, which hides the average; "
            "an engine that replaces the optimizer cannot be used with this update"
        )
    return found
