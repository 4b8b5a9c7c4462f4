"""None of these: the score below which a router's best set is not trusted and the base model answers.

Set on prompts that the router has not learned from, of trained tasks and, where some are named, of held-out tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cit_fast.data.example import Example, Task
from cit_fast.data.sources import find_tasks, load_task
from cit_fast.errors import ConfigError, DataError

SAMPLE = 32  # prompts of a task


def rejection_threshold(known: Sequence[float], unknown: Sequence[float], reject: float) -> float | None:
    """The score below which a prompt belongs to none of the sets.

    Without scores of unknown prompts, the ``reject`` quantile of the known. With them, the threshold that rejects most
    of the unknown while it rejects at most the share ``reject`` of the known, and of those the one that rejects fewest
    of the known.

    Args:
        known: scores of prompts of trained tasks, higher is more certain; ``unknown``: of other tasks.
        reject: share of the known prompts that may be rejected, in [0, 1); 0 for no rejection at all.

    Returns:
        The threshold, or ``None`` for none.
    """
    if not reject or not known:
        return None
    ordered = np.sort(np.asarray(known, dtype=np.float64))
    highest = float(ordered[int(reject * len(ordered))])  # fewer than that share lie below
    if not unknown:
        return highest
    below = np.asarray(unknown, dtype=np.float64)
    below = below[below < highest]
    if not len(below):  # nothing to gain: reject nothing that is known
        return float(ordered[0])
    # Every threshold above the highest of these rejects them all; halfway to the next known score is far from both.
    top = float(below.max())
    return (top + float(ordered[np.searchsorted(ordered, top, side="right")])) / 2


def lowest_trusted(below: float) -> float:
    """The threshold with room for rounding: it may be the score of a known prompt, which is not to be lost where
    another batch, or another program, rounds the same score otherwise.
    """
    return below - 1e-5 * abs(below)


class Rejection:
    """What sets a router's threshold: prompts of the tasks it learns, and of tasks it never will.

    Args:
        reject: share of the known prompts that may be rejected, in [0, 1); 0 for no rejection.
        held_out: tasks that are never trained: built-in names, files and folders, as ``cit-fast distances`` takes them.

    Raises:
        ConfigError: a share out of range.
    """

    def __init__(self, reject: float, held_out: Sequence[str]) -> None:
        if not 0 <= reject < 1:
            raise ConfigError(f"reject: {reject}; expected a share of the known prompts in [0, 1)")
        self.reject, self.held_out = reject, list(held_out)
        self.below: float | None = None
        self._prompts: list[Example] | None = None

    @staticmethod
    def known_prompts(task: Task) -> list[Example]:
        """Up to 32 of the ``dev`` split, which no router learns from; else of the training split's first half."""
        return list((task.dev or task.train[: max(1, len(task.train) // 2)])[:SAMPLE])

    def unknown_prompts(self) -> list[Example]:
        """Prompts of the held-out tasks, up to 32 of each, read once.

        Raises:
            ConfigError: there is no such task, or it cannot be read.
        """
        if self._prompts is None:
            try:
                sources = find_tasks(self.held_out) if self.held_out else []
                tasks = [load_task(source, train=SAMPLE, dev=0, test=0) for source in sources]
            except DataError as error:
                raise ConfigError(f"router.held_out: {error}") from None
            self._prompts = [example for task in tasks for example in task.train]
        return self._prompts

    def learn(self, known: Sequence[float], unknown: Sequence[float]) -> float | None:
        """The threshold from these scores on; see :func:`rejection_threshold`."""
        self.below = rejection_threshold(known, unknown, self.reject)
        return self.below
