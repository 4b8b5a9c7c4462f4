"""Replay of the earlier examples whose answers the model finds least likely.

Source: Hazard et al., SuRe, arXiv 2511.22367.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from cit_fast.data.example import Example
from cit_fast.errors import ConfigError
from cit_fast.evaluation.records import ReplayRecord
from cit_fast.key_parts.gain import answer_surprise
from cit_fast.methods.replay.allocation import Budget
from cit_fast.methods.stage import Selection, Stage
from cit_fast.processes import split_over_ranks


class SurpriseReplay:
    """Of every earlier task the examples with the largest mean negative log-likelihood of the answer.

    The model is the one that the stage before left. (The paper fills a buffer as tasks arrive; here earlier data is
    there, so every stage ranks anew.) To rank all of it would cost more with every task, so candidates are drawn.

    Args:
        fraction: share of each earlier task's training examples, in (0, 1].
        per_task: examples per earlier task instead of a fraction (all, where a task has fewer).
        candidates: examples drawn at random for each that is replayed, >= 1; ``None``: the whole task is ranked.
        batch_size: examples scored at a time, >= 1.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        fraction: float = 0.1,
        per_task: int | None = None,
        candidates: int | None = 4,
        batch_size: int = 16,
    ) -> None:
        Budget(fraction, per_task)
        for name, value in (("candidates", candidates), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is below 1")
        self.fraction, self.per_task = fraction, per_task
        self.candidates, self.batch_size = candidates, batch_size

    def select(self, stage: Stage) -> Selection:
        """Examples of every earlier task, in order; what cannot be scored for its length comes last."""
        if not stage.seen:
            return Selection([])
        budget = Budget(self.fraction, self.per_task)
        shares = [min(budget.wanted(task.size), len(task.train)) for task in stage.seen]
        drawn, record = most_surprising(stage, shares, stage.rng(), self.candidates, self.batch_size)
        chosen = [task.train[k] for task, own in zip(stage.seen, drawn, strict=True) for k in own]
        budgets = {task.name: share for task, share in zip(stage.seen, shares, strict=True)}
        return Selection(chosen, replace(record, budgets=budgets))


def most_surprising(
    stage: Stage, shares: Sequence[int], rng: random.Random, candidates: int | None = 4, batch_size: int = 16
) -> tuple[list[list[int]], ReplayRecord]:
    """Of each earlier task so many examples with the least likely answers: their places, ascending, and the scores.

    Args:
        shares: examples of each, at most what it has; ``candidates``, ``batch_size``: see :class:`SurpriseReplay`.
    """
    drawn: list[list[int]] = []
    for task, share in zip(stage.seen, shares, strict=True):
        count = len(task.train) if candidates is None else min(share * candidates, len(task.train))
        drawn.append(rng.sample(range(len(task.train)), count))
    flat = [(task, k) for task, own in zip(stage.seen, drawn, strict=True) for k in own]

    def score(mine: Sequence[tuple[int, Example]]) -> list[tuple[int, float]]:
        examples = [example for _, example in mine]
        found = answer_surprise(stage.model, stage.encoder, examples, batch_size=batch_size)
        return [(mine[index][0], value) for index, value in found]

    surprise = dict(split_over_ranks([(n, task.train[k]) for n, (task, k) in enumerate(flat)], score))
    chosen: list[list[int]] = []
    means: dict[str, dict[str, float]] = {"surprise of candidates": {}, "surprise of replayed": {}}
    start = 0
    for task, own, share in zip(stage.seen, drawn, shares, strict=True):
        numbers = range(start, start + len(own))
        ranked = sorted(numbers, key=lambda n: -surprise.get(n, -1.0))[:share]  # what does not fit comes last
        chosen.append([flat[n][1] for n in sorted(ranked)])
        for kind, some in zip(means, (numbers, ranked), strict=True):
            known = [surprise[n] for n in some if n in surprise]
            if known:
                means[kind][task.name] = sum(known) / len(known)
        start += len(own)
    scored = {task.name: len(own) for task, own in zip(stage.seen, drawn, strict=True)}
    return chosen, ReplayRecord(details=means, scored=scored)
