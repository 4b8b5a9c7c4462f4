"""The protocol of a replay policy, and the two baselines."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cit_fast.data.example import Example, Task
from cit_fast.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from cit_fast.data.prompts import PromptEncoder


@dataclass(frozen=True)
class ReplayContext:
    """What a policy may look at when a new task arrives.

    Args:
        task: the task about to be trained; ``seen``: the tasks trained before it, in order.
        model: the model as the previous stage left it; ``encoder``: turns examples into its tokens.
        rng: the only source of chance; seeded by run and stage, so a resumed run draws the same examples.
    """

    task: Task
    seen: Sequence[Task]
    model: nn.Module
    encoder: PromptEncoder
    rng: random.Random


class ReplayPolicy(Protocol):
    """Chooses the earlier examples to mix into a stage."""

    def select(self, context: ReplayContext) -> list[Example]:
        """Examples of ``context.seen`` to train again, each with its own task's name."""


class NoReplay:
    """Nothing comes back: plain sequential fine-tuning."""

    def select(self, context: ReplayContext) -> list[Example]:
        """No examples."""
        return []


class RandomReplay:
    """A uniform sample without replacement of every earlier task's training examples.

    Args:
        fraction: share of each earlier task's training examples, in (0, 1].
        per_task: examples per earlier task instead of a fraction (all, where a task has fewer).
    """

    def __init__(self, fraction: float = 0.1, per_task: int | None = None) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction: {fraction} is outside (0, 1]")
        if per_task is not None and per_task < 1:
            raise ConfigError(f"per_task: {per_task} is not a positive number of examples")
        self.fraction, self.per_task = fraction, per_task

    def select(self, context: ReplayContext) -> list[Example]:
        """Sample every earlier task, in order."""
        chosen: list[Example] = []
        for task in context.seen:
            budget = self.per_task if self.per_task is not None else round(self.fraction * len(task.train))
            chosen += context.rng.sample(task.train, min(max(budget, 1), len(task.train)))
        return chosen
