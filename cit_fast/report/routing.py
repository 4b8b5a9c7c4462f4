"""What a report says about routing: each stage's decision, and which set answered the prompts of which task."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cit_fast.evaluation.continual import Matrix
from cit_fast.evaluation.records import StageRecord
from cit_fast.models.adapter_bank import BASE
from cit_fast.report.collect import RunView

BASE_NAME = "base model"
_MOST_SCORES = 2  # more make the table wider than a page


def has_routing(view: RunView) -> bool:
    """Whether the run chose between adapter sets."""
    return any(_answers(stage) for stage in view.trained)


def decisions(view: RunView) -> list[dict[str, Any]]:
    """A row per stage: ``task``, ``set``, ``new``, ``scores`` (the highest, as text), ``accuracy``, ``to_base``."""
    rows = []
    for name, stage in zip(view.stage_names, view.trained, strict=True):
        routing = stage.routing
        scores = routing.assignment.scores if routing else {}
        highest = sorted(scores, key=lambda key: -scores[key])[:_MOST_SCORES]
        listed = ", ".join(f"{key} {scores[key]:.2f}" for key in highest)
        rows.append(
            {
                "task": name,
                "set": stage.adapter,
                "new": routing is not None and routing.new,
                "scores": listed + (", …" if len(scores) > _MOST_SCORES else ""),
                "accuracy": _percent(routing.accuracy if routing else None),
                "to_base": _percent(routing.to_base if routing else None),
            }
        )
    return rows


def confusion(view: RunView) -> tuple[Matrix, list[list[str]], list[str], list[str], list[tuple[int, int]]]:
    """Which set answered which task after the last stage that routed.

    Returns:
        Per cent of a task's prompts [tasks, sets], NaN for none; the same as text; names of the rows and columns; the
        cells where a task's prompts belong.
    """
    stage = [stage for stage in view.trained if _answers(stage)][-1]
    answers = _answers(stage)
    until = (each for each in view.trained if each.index <= stage.index)
    trained_by = {task: each.adapter for each in until for task in each.trained}
    own = {task: trained_by.get(task, BASE) for task in answers}
    tasks = [task for task in view.record.tasks if task in answers]
    tasks += [task for task in answers if task not in tasks]  # held-out ones
    seen = [*(each.adapter for each in view.trained), *(name for counts in answers.values() for name in counts)]
    sets = [name for name in dict.fromkeys(seen) if name != BASE]
    if BASE in seen or BASE in own.values():
        sets.append(BASE)
    shares = np.full((len(tasks), len(sets)), np.nan)
    for i, task in enumerate(tasks):
        total = sum(answers[task].values())
        for j, name in enumerate(sets):
            if answers[task].get(name):
                shares[i, j] = 100 * answers[task][name] / total
    texts = [["" if math.isnan(share) else f"{share:.0f}" for share in row] for row in shares]
    framed = [(i, sets.index(own[task])) for i, task in enumerate(tasks) if own[task] in sets]
    return shares, texts, tasks, [BASE_NAME if name == BASE else name for name in sets], framed


def _answers(stage: StageRecord) -> dict[str, dict[str, int]]:
    """Task -> set -> prompts, without tasks that had none."""
    answers = stage.routing.answers if stage.routing else {}
    return {task: counts for task, counts in answers.items() if sum(counts.values())}


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
