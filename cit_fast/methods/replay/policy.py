"""The protocol of a replay policy, and the two baselines."""

from __future__ import annotations

from typing import Protocol

from cit_fast.methods.replay.allocation import Budget
from cit_fast.methods.stage import Selection, Stage


class ReplayPolicy(Protocol):
    """Chooses the earlier examples to mix into a stage."""

    def select(self, stage: Stage) -> Selection:
        """Examples of ``stage.seen`` to train again, each with its own task's name, and why these.

        Not called for the first stage, unless the policy has an attribute ``from_first`` that is true.
        """


class NoReplay:
    """Nothing comes back: plain sequential fine-tuning."""

    def select(self, stage: Stage) -> Selection:
        """No examples."""
        return Selection([])


class RandomReplay:
    """A uniform sample without replacement of every earlier task's training examples.

    Args:
        fraction: share of each earlier task's training examples, in (0, 1].
        per_task: examples per earlier task instead of a fraction (all, where a task has fewer).
    """

    def __init__(self, fraction: float = 0.1, per_task: int | None = None) -> None:
        budget = Budget(fraction, per_task)  # which refuses what is out of range
        self.fraction, self.per_task = budget.fraction, budget.per_task

    def select(self, stage: Stage) -> Selection:
        """Sample every earlier task, in order."""
        budget, rng = Budget(self.fraction, self.per_task), stage.rng()
        chosen = [rng.sample(task.train, min(budget.wanted(task.size), len(task.train))) for task in stage.seen]
        return Selection([example for own in chosen for example in own])
