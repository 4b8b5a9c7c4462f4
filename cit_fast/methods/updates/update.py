"""The protocol of an update, and the plain one."""

from __future__ import annotations

from typing import Literal, Protocol

from torch.optim import Optimizer

from cit_fast.errors import ConfigError
from cit_fast.methods.stage import Finished, Stage
from cit_fast.optim import BalanceSummary

When = Literal["always", "retrained", "from-second"]
"""The stages that an update changes: every one; ``"retrained"``: those that train an adapter set again, so that a new
one learns freely; ``"from-second"``: all but the stream's first."""


def when_checked(when: str) -> None:
    """Refuse what is no :data:`When`.

    Raises:
        ConfigError: another word.
    """
    if when not in ("always", "retrained", "from-second"):
        raise ConfigError(f"when: {when!r} is unknown; expected always, retrained or from-second")


def due(when: When, stage: Stage) -> bool:
    """Whether the stage is one of those."""
    return {"always": True, "retrained": not stage.new_set, "from-second": stage.index > 1}[when]


class Update(Protocol):
    """What happens to the weights at each optimizer step, and at the end of a stage."""

    def begin(self, stage: Stage) -> None:
        """Called before the stage's first step, and in a resumed stage before the steps that are left.

        ``stage.model`` is as the stage before left it; a checkpoint's weights come later.
        """

    def wrap(self, optimizer: Optimizer, stage: Stage) -> Optimizer:
        """The optimizer that the stage steps with, made from the one that TrainingArguments describe."""

    def finish(self, optimizer: Optimizer, stage: Stage) -> Finished:
        """Called once when the stage's training is over, before anything is evaluated or kept."""

    def summary(self, optimizer: Optimizer, stage: Stage) -> BalanceSummary | None:
        """``(mean, minimum, maximum, fallback fraction)`` of the last step's balance weights, if there are any."""


class PlainUpdate:
    """The optimizer as it is."""

    def begin(self, stage: Stage) -> None:
        """Nothing to do."""

    def wrap(self, optimizer: Optimizer, stage: Stage) -> Optimizer:
        """The same optimizer."""
        return optimizer

    def finish(self, optimizer: Optimizer, stage: Stage) -> Finished:
        """Nothing to do."""
        return Finished()

    def summary(self, optimizer: Optimizer, stage: Stage) -> BalanceSummary | None:
        """No average, no weights."""
        return None
