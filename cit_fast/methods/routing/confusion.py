"""How well a router did: which set answered the prompts of which task."""

from __future__ import annotations

from collections.abc import Mapping

from cit_fast.evaluation.records import Assignment, Learned, RoutingRecord
from cit_fast.models.adapter_bank import BASE


def routing_record(
    assignment: Assignment,
    learned: Learned,
    *,
    new: bool,
    trained_by: Mapping[str, str],
    answers: Mapping[str, Mapping[str, int]],
    seconds: float = 0.0,
) -> RoutingRecord:
    """What a stage's record says about routing.

    Args:
        assignment, learned: what the router returned; ``new``: whether its set was made for the stage.
        trained_by: task -> the set that trained it; ``answers``: task -> set -> number of prompts.
        seconds: of choosing.
    """
    own = [(counts, trained_by[task]) for task, counts in answers.items() if task in trained_by]
    others = [(counts, BASE) for task, counts in answers.items() if task not in trained_by]
    return RoutingRecord(
        new,
        assignment,
        learned,
        answers={task: dict(counts) for task, counts in answers.items()},
        accuracy=_share(own),
        to_base=_share(others),
        seconds=seconds,
    )


def _share(rows: list[tuple[Mapping[str, int], str]]) -> float | None:
    total = sum(sum(counts.values()) for counts, _ in rows)
    return sum(counts.get(right, 0) for counts, right in rows) / total if total else None
