"""How many examples of each earlier task come back: whole numbers whose sum is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from cit_fast.errors import ConfigError, DataError


@dataclass(frozen=True)
class Budget:
    """The size of a replay, as a share of every earlier task or as a number per earlier task.

    Args:
        fraction: share of each earlier task's training examples, in (0, 1]; at least one example of each.
        per_task: examples per earlier task instead of a fraction, >= 1 (R of the InsCL paper).

    Raises:
        ConfigError: out of range.
    """

    fraction: float = 0.1
    per_task: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction: {self.fraction} is outside (0, 1]")
        if self.per_task is not None and self.per_task < 1:
            raise ConfigError(f"per_task: {self.per_task} is not a positive number of examples")

    def wanted(self, size: int) -> int:
        """What is asked of a task of ``size`` training examples, which may be more than it has."""
        return self.per_task if self.per_task is not None else max(1, round(self.fraction * size))


@dataclass(frozen=True)
class Allocation:
    """Shares, and what had to be done differently.

    Args:
        shares: examples per task, in order; 0 <= share <= what the task has.
        notes: one sentence for each departure from the plain rule; usually empty.
    """

    shares: tuple[int, ...]
    notes: tuple[str, ...] = ()


def allocate(
    distances: Sequence[float], total: int, available: Sequence[int], names: Sequence[str] | None = None
) -> Allocation:
    """Whole shares of ``total`` in proportion to the distances: the farther a task, the more of it comes back::

        a*_j = W_j / sum_k W_k * total

    Each share is rounded down, then those with the largest remainders get one more until the sum is ``total``; of
    equal remainders the earlier task's. The arithmetic is exact, so that ties are ties. A task that has fewer
    examples than its share gives all of them, and the rest is shared among the others by the same rule.

    Args:
        distances: W_j >= 0 of each earlier task to the new one; any scale.
        total: examples to hand out, >= 0.
        available: examples that each task has, >= 0.
        names: of the tasks, for the notes; by default their numbers.

    Returns:
        Shares that sum to ``min(total, sum(available))``.

    Raises:
        DataError: a distance that is negative or not finite, or lists of different lengths.

    Source: InsCL (arXiv 2403.11435), section 3.2. Its released code rounds otherwise: three equal tasks and a total
    of 200 give 68, 66, 66 there and 67, 67, 66 here.

    >>> allocate([0.2, 0.2, 0.2], 200, [500, 500, 500]).shares
    (67, 67, 66)
    """
    if len(distances) != len(available):
        raise DataError(f"allocate: {len(distances)} distances for {len(available)} tasks")
    for task, distance in enumerate(distances):
        if not (math.isfinite(distance) and distance >= 0):
            raise DataError(f"allocate: the distance of task {task} is {distance}; it must be at least 0 and finite")
    notes = []
    weights = [Fraction(distance) for distance in distances]
    if weights and not any(weights):
        notes.append("All distances are zero, so that every earlier task got an equal share.")
    if total > sum(available):
        notes.append(f"The budget of {total} is larger than the history of {sum(available)}: all of it came back.")
        return Allocation(tuple(available), tuple(notes))
    # Tasks that cannot fill their share give all they have; the rest is shared anew until every share fits.
    shares = [0] * len(weights)
    open_tasks, left = list(range(len(weights))), total
    while open_tasks:
        quotas = _quotas([weights[task] for task in open_tasks], left)
        full = [task for task, quota in zip(open_tasks, quotas, strict=True) if quota > available[task]]
        if not full:
            for task, share in zip(open_tasks, _largest_remainders(quotas, left), strict=True):
                shares[task] = share
            break
        for task in full:
            shares[task] = available[task]
            left -= available[task]
        open_tasks = [task for task in open_tasks if task not in full]
        notes += [
            f"{names[task] if names else f'Task {task + 1}'} has only {available[task]} examples, less than its share: "
            "all of them came back, and the rest went to the other tasks."
            for task in full
        ]
    return Allocation(tuple(shares), tuple(notes))


def _quotas(weights: Sequence[Fraction], total: int) -> list[Fraction]:
    """``total`` in proportion to the weights; equal parts where all of them are zero."""
    whole = sum(weights)
    return [total * weight / whole if whole else Fraction(total, len(weights)) for weight in weights]


def _largest_remainders(quotas: Sequence[Fraction], total: int) -> list[int]:
    shares = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda k: shares[k] - quotas[k])  # stable: the earlier of equals
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares
