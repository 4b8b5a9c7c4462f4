"""What the last step decided: balance weights by name, their summary, and how often an average was left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cit_fast.ops.balance_ema import BalanceWeights
from cit_fast.optim.engines import GivenParameters
from cit_fast.optim.sweeps import Sweep


class BalanceSummary(NamedTuple):
    """The last step's balance weights in four numbers, over the tensors that were averaged (0 where none was)."""

    mean: float
    minimum: float
    maximum: float
    fallback_fraction: float


class LastStep(NamedTuple):
    """What one call of the op decided: parameters, a weight for each; for which flat partition."""

    params: list[Tensor]
    weights: BalanceWeights
    flat: Tensor | None = None


class ReportingOptimizer(Optimizer):
    """Base of the optimizers that keep an average: their reports."""

    _last: list[LastStep]
    _skipped: dict[torch.device, Tensor]
    _given: GivenParameters

    def balance_weights(self) -> dict[str | int, float]:
        """The last step's weight alpha, the share of the new values, of each parameter that had a gradient.

        0 means that the parameter was left out. Keys are the names, where the optimizer was given
        ``named_parameters()``, else the positions over all groups; what has left the groups since is not in it. Waits
        for the device; empty before the first step.
        """
        keys = self._given.keys()  # the engine's groups hold other tensors
        keys.update((id(param), i) for i, param in enumerate(self._parameters()))
        for group in self.param_groups:
            keys.update(
                {id(param): name for param, name in zip(group["params"], group.get("param_names", ()), strict=False)}
            )
        found: dict[str | int, float] = {}
        for params, weights, _ in self._last:
            for param, alpha in zip(params, weights.alphas.tolist(), strict=True):
                if id(param) in keys:
                    found[keys[id(param)]] = alpha
        return found

    def balance_summary(self) -> BalanceSummary | None:
        """Mean, minimum and maximum of the last step's weights and the fraction that fell back.

        None before the first step. What was left out does not count. Waits for the device, so call it when you log,
        not in every step.
        """
        if not self._last:
            return None
        alphas = torch.cat([step.weights.alphas.cpu() for step in self._last])
        fallbacks = torch.cat([step.weights.fallbacks.cpu() for step in self._last])
        used = alphas > 0
        if not used.any():
            return BalanceSummary(0.0, 0.0, 0.0, 0.0)
        alphas, fell_back = alphas[used].double(), fallbacks[used].double()
        return BalanceSummary(alphas.mean().item(), alphas.min().item(), alphas.max().item(), fell_back.mean().item())

    @property
    def skipped_updates(self) -> int:
        """How often an average was left out for values not finite, since this object was made."""
        return sum(int(count) for count in self._skipped.values())

    def _report(self, sweep: Sweep, weights: BalanceWeights) -> None:
        device = weights.alphas.device
        skipped = (weights.alphas == 0).sum()
        self._skipped[device] = self._skipped[device] + skipped if device in self._skipped else skipped
        if sweep.partition is None:
            self._last.append(LastStep(sweep.params, weights))
        else:
            self._last.append(LastStep(sweep.partition.params, weights, sweep.params[0]))

    def _begin_report(self, present: Sequence[Tensor]) -> None:
        """A new step, or the part of an engine's step that concerns the partitions in ``present``."""
        self._last = [last for last in self._last if last.flat is not None and not any(last.flat is p for p in present)]

    def _parameters(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))
