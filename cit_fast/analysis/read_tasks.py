"""Read the tasks that an analysis is given as files, folders and names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from cit_fast.data.example import Task
from cit_fast.data.sources import find_tasks, load_task
from cit_fast.errors import DataError

Progress = Callable[[str, int, int], object]
"""Called with what is going on, how much of it is done and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """A :data:`Progress` that shows nothing."""


def read_tasks(
    data: Sequence[str],
    *,
    train: int | None = None,
    least: int = 1,
    markers: tuple[str, str] | None = None,
    progress: Progress = silent,
) -> list[Task]:
    """The training examples of all tasks at these places.

    Args:
        data: see :func:`cit_fast.data.sources.find_tasks`.
        train: examples per task at most; ``None``: all.
        least: fewest tasks that there must be.
        markers: what stands around key parts in the text of instructions.

    Raises:
        DataError: too few tasks, or one that cannot be read.
    """
    sources = find_tasks(data)
    if len(sources) < least:
        raise DataError(f"{' '.join(data)}: only one task ({sources[0].name}); distances need at least two")
    tasks = []
    for number, source in enumerate(sources, 1):
        marked = source if markers is None else dataclasses.replace(source, key_part_markers=markers)
        tasks.append(load_task(marked, train=train, dev=0, test=0))
        progress("Reading tasks", number, len(sources))
    return tasks
