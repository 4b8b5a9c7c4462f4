"""LCIA's average of the weights as the update of a method."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from cit_fast.errors import ConfigError
from cit_fast.methods.stage import Finished, Stage
from cit_fast.methods.updates.update import When, due, when_checked
from cit_fast.ops.balance_ema import BalanceRule, Rounding
from cit_fast.optim import AdamWBalanceEMA, AveragingOptimizer, BalanceEMA, BalanceSummary, find_balance_ema
from cit_fast.optim.average_options import AverageOptions

_LAG = 10  # rho of BEMA
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BalanceEMAUpdate:
    """LCIA's average of the weights: starts as a copy at a stage's first step, replaces the live weights at its end.

    Source: Qiao et al., ICML 2025, arXiv 2410.10868, algorithm 1 and appendix M, and its released code.

    Args:
        rule, decay, fallback, scale, start, rounding: see :class:`cit_fast.optim.BalanceEMA`.
        average_dtype: ``"float32"``, or ``"bfloat16"`` for half the memory.
        scope: ``"task"``: each stage has an average of its own, and training goes on from it; ``"stream"``: one
            average lives across all stages that train an adapter set, and training goes on from the live weights,
            which every stage then keeps beside the average.
        when: the stages that are averaged, see :data:`cit_fast.methods.updates.When`. ``"always"`` is algorithm 1,
            ``"retrained"`` appendix M and the authors' scripts, ``"from-second"`` the authors' later toolbox.
        bias_power: eta >= 0 of BEMA's correction (arXiv 2508.00180; 0.2 in its experiments): the lag of an average
            behind T steps that have moved the weights from theta_0 to theta_T is made up for by adding
            (10 + T)^-eta (theta_T - theta_0) to it. ``None``: no correction.

    Raises:
        ConfigError: an option out of range or unknown, or a correction where the average lives across stages.
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
        bias_power: float | None = None,
    ) -> None:
        if average_dtype not in _DTYPES:
            raise ConfigError(f"average_dtype: {average_dtype!r} is unknown; expected float32 or bfloat16")
        when_checked(when)
        self.rule, self.decay, self.fallback, self.scale = rule, decay, fallback, scale
        self.start, self.rounding, self.average_dtype = start, rounding, average_dtype
        self.scope, self.when = scope, when
        if bias_power is not None and not (bias_power >= 0 and math.isfinite(bias_power)):
            raise ConfigError(f"bias_power: {bias_power} is negative or not finite")
        if bias_power is not None and scope == "stream":
            raise ConfigError("bias_power: corrects the lag behind one stage's steps; use scope: task")
        self.bias_power = bias_power
        self._first: dict[str, Tensor] = {}
        AverageOptions(**self._options()).check("balance-ema")

    def _options(self) -> dict[str, Any]:
        names = ("rule", "decay", "fallback", "scale", "start", "rounding", "scope")
        return {name: getattr(self, name) for name in names} | {"average_dtype": _DTYPES[self.average_dtype]}

    @property
    def needs_whole_weights(self) -> bool:
        """Whether weights of before the stage are kept, as this process has them."""
        return self.bias_power is not None

    def averages(self, stage: Stage) -> bool:
        """Whether the stage is averaged."""
        return due(self.when, stage)

    def begin(self, stage: Stage) -> None:
        """Keep a copy of what trains, if the average will be corrected; it starts with the optimizer."""
        if self.bias_power is not None and self.averages(stage):
            self._first = {name: p.detach().clone() for name, p in stage.model.named_parameters() if p.requires_grad}

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

    def finish(self, optimizer: Optimizer, stage: Stage) -> Finished:
        """Copy the average over the live weights, which an average of the whole stream needs again."""
        if not self.averages(stage):
            return Finished()
        live = None
        if self.scope == "stream":
            trained = ((name, p) for name, p in stage.model.named_parameters() if p.requires_grad)
            live = {name: parameter.detach().cpu().clone() for name, parameter in trained}
        correction = self._correction(stage)
        _averaging(optimizer).copy_averaged_to_parameters()
        with torch.no_grad():
            for parameter, added in correction:
                parameter.add_(added)
        return Finished(live)

    @torch.no_grad()
    def _correction(self, stage: Stage) -> list[tuple[Tensor, Tensor]]:
        """Parameters as they are now, and what BEMA adds to their averages."""
        if self.bias_power is None:
            return []
        first, self._first = self._first, {}
        share = (_LAG + stage.steps) ** -self.bias_power
        parameters = dict(stage.model.named_parameters())
        return [(parameters[name], share * (parameters[name] - before)) for name, before in first.items()]

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
