"""How well a router did: which set answered the prompts of which task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cit_fast.models.adapter_bank import BASE


def routing_record(trained_by: Mapping[str, str], answered_by: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What a stage's record says about the answers.

    Args:
        trained_by: task -> the set that trained it; ``answered_by``: task -> set -> number of prompts.

    Returns:
        Both, and two shares in [0, 1]: ``accuracy``, of the trained tasks' prompts those that the task's own set
        answered; ``to_base``, of the other tasks' prompts those that the base model answered. ``None`` where there are
        no such prompts.
    """
    own = [(counts, trained_by[task]) for task, counts in answered_by.items() if task in trained_by]
    others = [(counts, BASE) for task, counts in answered_by.items() if task not in trained_by]
    return {
        "trained_by": dict(trained_by),
        "answers": {task: dict(counts) for task, counts in answered_by.items()},
        "accuracy": _share(own),
        "to_base": _share(others),
    }


def _share(rows: list[tuple[Mapping[str, int], str]]) -> float | None:
    total = sum(sum(counts.values()) for counts, _ in rows)
    return sum(counts.get(right, 0) for counts, right in rows) / total if total else None
