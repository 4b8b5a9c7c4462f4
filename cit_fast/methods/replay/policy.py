"""The protocol of a replay policy, and the two baselines."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cit_fast.data.example import Example, Task
from cit_fast.methods.replay.allocation import Budget

if TYPE_CHECKING:
    from torch import nn

    from cit_fast.models.prompts import PromptEncoder


@dataclass(frozen=True)
class ReplayContext:
    """What a policy may look at when a new task arrives.

    Args:
        task: the task about to be trained; ``seen``: the tasks trained before it, in order.
        model: the model as the previous stage left it; ``encoder``: turns examples into its tokens.
        rng: the only source of chance; seeded by run and stage, so a resumed run draws the same examples.
        folder: where a policy may keep what it worked out, with the run; ``cache``: the same, shared by all runs, for
            what is found by its content. ``None``: nowhere.
        decided: what a policy has to say about its choice, filled in by ``select``; plain JSON values, which go into
            the stage's record. The report knows the keys named in :class:`cit_fast.evaluation.StageRecord`.
    """

    task: Task
    seen: Sequence[Task]
    model: nn.Module
    encoder: PromptEncoder
    rng: random.Random
    folder: Path | None = None
    cache: Path | None = None
    decided: dict[str, Any] = field(default_factory=dict)


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
        budget = Budget(fraction, per_task)  # which refuses what is out of range
        self.fraction, self.per_task = budget.fraction, budget.per_task

    def select(self, context: ReplayContext) -> list[Example]:
        """Sample every earlier task, in order."""
        budget = Budget(self.fraction, self.per_task)
        chosen: list[Example] = []
        for task in context.seen:
            chosen += context.rng.sample(task.train, min(budget.wanted(len(task.train)), len(task.train)))
        return chosen
