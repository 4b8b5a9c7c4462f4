"""Plain instruction tuning: cross-entropy on the response."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from cit_fast.objectives.objective import response_logits


class CrossEntropy:
    """``L_CE``: mean negative log-likelihood of the response tokens, in nats."""

    def begin_stage(self, model: nn.Module) -> None:
        """Nothing to prepare."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """See :class:`cit_fast.objectives.Objective`."""
        logits, targets = response_logits(model, batch)
        total = F.cross_entropy(logits.float(), targets, reduction="sum")
        return total / (max(targets.numel(), 1) if num_items is None else num_items)
