"""Plain instruction tuning: cross-entropy on the response."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from cit_fast.errors import ConfigError
from cit_fast.methods.objectives.objective import plain_inputs
from cit_fast.methods.stage import Stage, StageInputs
from cit_fast.models.forward import per_item, response_logits


class CrossEntropy:
    """``L_CE``: mean negative log-likelihood of the response tokens, in nats.

    Args:
        label_smoothing: share of the target's weight that all tokens of the vocabulary have in equal parts, in [0, 1).

    Raises:
        ConfigError: a share outside that.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing: {label_smoothing} is outside [0, 1)")
        self.label_smoothing = label_smoothing

    def prepare(self, stage: Stage) -> StageInputs:
        """Prompts with their answers."""
        return plain_inputs(stage, stage.examples)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """See :class:`cit_fast.methods.objectives.Objective`."""
        found = response_logits(model, batch)
        total = F.cross_entropy(
            found.logits.float(), found.targets, reduction="sum", label_smoothing=self.label_smoothing
        )
        return per_item(total, found.targets.numel(), num_items, found.router_loss)
