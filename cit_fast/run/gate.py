"""A gate: limits that a stage must keep to become the current one; :mod:`cit_fast.run.candidates` has the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from cit_fast.evaluation.records import Broken, GateRecord, GeneralRecord, StageRecord
from cit_fast.values import Section


class GateConfig(Section):
    """Limits that a stage must keep, in points. Only tasks that are answered after the stage count."""

    forgetting: float | None = Field(default=None, ge=0, le=100)
    """Mean fall of the earlier tasks from their best, at most."""
    task_fall: float | None = Field(default=None, ge=0, le=100)
    """Fall of any one of the earlier tasks, at most."""
    new_task: float | None = Field(default=None, ge=0, le=100)
    """Score of the new task, at least."""
    general: float | None = Field(default=None, ge=0, le=100)
    """Fall of the general abilities, and of every benchmark beside them, from the untrained model's, at most
    (``evaluation.general``)."""
    on: Literal["test", "dev"] | None = None
    """The split that judges, by default the one that is evaluated."""

    @model_validator(mode="after")
    def _some_limit(self) -> GateConfig:
        if all(limit is None for limit in (self.forgetting, self.task_fall, self.new_task, self.general)):
            raise ValueError("give a limit: forgetting, task_fall, new_task or general")
        return self


def judge(
    config: GateConfig, split: str, scores: Mapping[str, float], new: Sequence[str], before: Sequence[StageRecord]
) -> GateRecord:
    """What a stage breaks.

    Args:
        split: that the scores are of; ``scores``: task -> score after the stage; ``new``: the tasks it trained.
        before: the records of the stages that were trained before it, in order.
    """
    best: dict[str, float] = {}
    for stage in before:
        known = stage.gate.scores if stage.gate is not None and stage.gate.split == split else stage.scores
        for task in {*best, *stage.trained} & {*known}:
            best[task] = max(best.get(task, 0.0), known[task])
    falls = {task: best[task] - scores[task] for task in best if task in scores and task not in new}
    broken = []
    mean = sum(falls.values()) / len(falls) if falls else 0.0
    if config.forgetting is not None and mean > config.forgetting:
        broken.append(Broken("forgetting", None, config.forgetting, mean))
    if config.task_fall is not None:
        broken += [
            Broken("task_fall", task, config.task_fall, fall) for task, fall in falls.items() if fall > config.task_fall
        ]
    if config.new_task is not None:
        low = [task for task in new if task in scores and scores[task] < config.new_task]
        broken += [Broken("new_task", task, config.new_task, scores[task]) for task in low]
    return GateRecord(
        split, {task: score for task, score in scores.items() if task in best or task in new}, falls, broken
    )


def judge_general(
    config: GateConfig, record: GateRecord, untrained: GeneralRecord | None, now: GeneralRecord | None
) -> GateRecord:
    """The record with what the general abilities say."""
    if config.general is not None and untrained is not None and now is not None:
        falls: dict[str | None, float] = {None: untrained.score - now.score}
        falls |= {name: untrained.main[name] - score for name, score in now.main.items() if name in untrained.main}
        for name, fall in falls.items():
            if fall > config.general:
                record.broken.append(Broken("general", name, config.general, fall))
    return record


def said(broken: Broken) -> str:
    """One limit that was broken, in words."""
    what = {
        "forgetting": "the earlier tasks have fallen by {found:.1f} on average (at most {limit:g})",
        "task_fall": "{task} has fallen by {found:.1f} (at most {limit:g})",
        "general": f"{broken.task or 'the general abilities'} fell by {{found:.1f}} (at most {{limit:g}})",
        "new_task": "{task} scores {found:.1f} (at least {limit:g})",
    }[broken.limit]
    return what.format(task=broken.task, found=broken.found, limit=broken.at)
