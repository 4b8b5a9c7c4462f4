"""KPIG's replay: the tasks that the model half-listens to come back.

Of every earlier task a few random instances are scored by the information gain that their key parts have under the
model as it is now (M_{t-1}). A low gain means that the model answers as if the words that define the task were not
there; the tasks with the lowest mean gain are replayed. It is decided anew for every task.

Source: He et al., ACL 2025, arXiv 2403.10056.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cit_fast.data.example import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.evaluation.records import ReplayRecord
from cit_fast.key_parts.gain import information_gain, predictive_entropy
from cit_fast.key_parts.sources import check_key_parts, discovered_note, key_parts_for_run
from cit_fast.key_parts.wordings import draw_wordings, given_pools
from cit_fast.methods.replay.allocation import Budget, allocate
from cit_fast.methods.stage import Selection, Stage
from cit_fast.processes import split_over_ranks


class KPIGReplay:
    """Replay of the M tasks with the lowest mean information gain.

    By default the replay is as large as that of :class:`RandomReplay`, which gives every earlier task the same share
    of its examples: here the whole budget goes in equal parts to the M tasks with the lowest gain; where they do not
    have enough examples, to the task with the next lowest as well. ``tasks=10, instances=10`` is the paper's setting.

    Args:
        fraction: size of the replay, as a share of every earlier task's training examples, in (0, 1].
        per_task: examples per earlier task on average, instead of a fraction.
        tasks: M, how many tasks are replayed (all, where there are fewer); ``None``: half of the earlier ones, rounded
            up.
        instances: N, examples of each replayed task, instead of a budget.
        scored: random instances of each task that are scored, >= 1; they are the first to be replayed.
        alpha: decay of the information gain per answer token, in (0, 1].
        key_parts: where key parts come from, as in :class:`cit_fast.methods.objectives.KPIG`.
        pool: a file of wordings (see :func:`cit_fast.key_parts.wordings.given_pools`); each instance is scored with one
            drawn from its task's pool, as in the paper, and replayed with its own.
        score: ``"gain"``; or ``"entropy"``, for the tasks about whose answers the model is least decided
            (:func:`cit_fast.key_parts.gain.predictive_entropy`): the paper's ablation without mask.
        share_prefix: see :func:`cit_fast.key_parts.hidden.pair_collator`.
        batch_size: instances scored at a time.

    Raises:
        ConfigError: an option out of range or unknown.
    """

    def __init__(
        self,
        fraction: float = 0.1,
        per_task: int | None = None,
        tasks: int | None = None,
        instances: int | None = None,
        scored: int = 10,
        alpha: float = 0.3,
        key_parts: str | dict[str, Any] = "auto",
        share_prefix: bool | Literal["auto"] = "auto",
        batch_size: int = 16,
        pool: str | None = None,
        score: Literal["gain", "entropy"] = "gain",
    ) -> None:
        if score not in ("gain", "entropy"):
            raise ConfigError(f"score: {score!r} is unknown; expected gain or entropy")
        Budget(fraction, per_task)
        for name, value in (("tasks", tasks), ("instances", instances), ("scored", scored), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is below 1")
        if not 0 < alpha <= 1:
            raise ConfigError(f"alpha: {alpha} is outside (0, 1]")
        check_key_parts(key_parts)
        self.fraction, self.per_task, self.tasks, self.instances = fraction, per_task, tasks, instances
        self.scored, self.alpha, self.key_parts = scored, alpha, key_parts
        self.share_prefix, self.batch_size = share_prefix, batch_size
        self.pool, self.score = pool, score
        self._pools = given_pools(pool)

    def select(self, stage: Stage) -> Selection:
        """Examples of the tasks with the lowest gain, task by task in order.

        Raises:
            DataError: a task of whose instances none has key parts, or none fits.
        """
        if not stage.seen:
            return Selection([])
        rng = stage.rng()
        # The draw does not depend on what is scored: as many are scored, the same examples come first.
        orders = [rng.sample(range(len(task.train)), len(task.train)) for task in stage.seen]
        drawn = [[task.train[k] for k in own[: self.scored]] for task, own in zip(stage.seen, orders, strict=True)]
        notes: list[str] = []
        entropy = self.score == "entropy"
        scores = self._mean_entropies(stage, drawn) if entropy else self._mean_gains(stage, drawn, notes)
        lowest_first = [-value for value in scores] if entropy else scores
        shares = self._shares(lowest_first, [(len(task.train), task.size) for task in stage.seen])
        names = [task.name for task in stage.seen]
        chosen = [
            task.train[k]
            for task, own, share in zip(stage.seen, orders, shares, strict=True)
            for k in sorted(own[:share])
        ]
        record = ReplayRecord(
            budgets=dict(zip(names, shares, strict=True)),
            gains={} if entropy else dict(zip(names, scores, strict=True)),
            details={"predictive_entropy": dict(zip(names, scores, strict=True))} if entropy else {},
            notes=notes,
            scored={name: len(own) for name, own in zip(names, drawn, strict=True)},
        )
        return Selection(chosen, record)

    def _mean_entropies(self, stage: Stage, drawn: Sequence[Sequence[Example]]) -> list[float]:
        """Mean predictive entropy of each task's drawn instances."""
        numbered = list(enumerate(example for own in drawn for example in own))

        def score(mine: Sequence[tuple[int, Example]]) -> list[tuple[int, float]]:
            examples = [example for _, example in mine]
            found = predictive_entropy(stage.model, stage.encoder, examples, batch_size=self.batch_size)
            return [(mine[index][0], value) for index, value in found]

        return self._means(stage, drawn, dict(split_over_ranks(numbered, score)))

    def _mean_gains(self, stage: Stage, drawn: Sequence[Sequence[Example]], notes: list[str]) -> list[float]:
        """Mean G of each task's drawn instances under the model as it is."""
        examples = [example for own in drawn for example in own]
        if self._pools:
            examples = draw_wordings(examples, self._pools, stage.rng("wordings"))
        flat = key_parts_for_run(
            examples,
            self.key_parts,
            stage.model,
            stage.encoder,
            alpha=self.alpha,
            run=stage.kept,
            cache=stage.cache,
        )
        notes += discovered_note(examples, flat, self.key_parts)
        numbered = [(k, example) for k, example in enumerate(flat) if example.key_parts]
        # Long examples first: memory runs out at once or never, and batches hold like lengths.
        numbered.sort(key=lambda entry: -len(entry[1].instruction) - len(entry[1].input))

        def score(mine: Sequence[tuple[int, Example]]) -> list[tuple[int, float]]:
            found = information_gain(
                stage.model,
                stage.encoder,
                [example for _, example in mine],
                alpha=self.alpha,
                batch_size=self.batch_size,
                share_prefix=self.share_prefix,
            )
            return [(mine[each.index][0], each.gain) for each in found if each.gain is not None]

        scores = dict(split_over_ranks(numbered, score))
        start = 0
        for task, own in zip(stage.seen, drawn, strict=True):
            mine = flat[start : start + len(own)]
            if mine and self.key_parts != "data" and not any(example.key_parts for example in mine):
                scores[start] = 0.0
                notes.append(
                    f"Instructions of task {task.name!r} have no part that could be masked, being a clause each: its "
                    "gain counts as 0."
                )
            start += len(own)
        return self._means(stage, drawn, scores)

    def _means(self, stage: Stage, drawn: Sequence[Sequence[Example]], by_number: Mapping[int, float]) -> list[float]:
        """Of each task's drawn instances, whose number among all is the key of ``by_number``."""
        means = []
        start = 0
        for task, own in zip(stage.seen, drawn, strict=True):
            gains = [by_number[k] for k in range(start, start + len(own)) if k in by_number]
            start += len(own)
            if not gains:
                raise DataError(
                    f"replay kpig: none of the {len(own)} instances drawn from task {task.name!r} can be scored: they "
                    "have no key parts, or do not fit; mark key parts in the data, or use key_parts: auto"
                )
            means.append(sum(gains) / len(gains))
        return means

    def _shares(self, gains: Sequence[float], counts: Sequence[tuple[int, int]]) -> list[int]:
        """Examples of each task: those with the lowest gain share the budget; ``counts``: what is there, what was."""
        sizes = [there for there, _ in counts]
        lowest = sorted(range(len(gains)), key=lambda task: gains[task])  # stable: the earlier of equals
        count = min(self.tasks or (len(gains) + 1) // 2, len(gains))
        shares = [0] * len(gains)
        if self.instances is not None:
            for task in lowest[:count]:
                shares[task] = min(self.instances, sizes[task])
            return shares
        budget = Budget(self.fraction, self.per_task)
        total = min(sum(budget.wanted(size) for _, size in counts), sum(sizes))
        while sum(sizes[task] for task in lowest[:count]) < total:
            count += 1
        chosen = sorted(lowest[:count])
        equal = allocate([1.0] * count, total, [sizes[task] for task in chosen])
        for task, share in zip(chosen, equal.shares, strict=True):
            shares[task] = share
        return shares
