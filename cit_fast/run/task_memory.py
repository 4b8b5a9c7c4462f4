"""A run's memory of the tasks that it has learned, so that their data may go.

    <run>/memory/<task>.json    the task as it was learned: its evaluation splits, and the training examples kept

What is kept of a task is a beginning of one order (:mod:`cit_fast.methods.memory_order`), as long as the budget allows
at that stage. A stage's own task is written before the stage is committed, and older ones shrink after it: what replay
draws from follows from the committed stages alone, whenever a process was killed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from cit_fast.data.example import Example, Task
from cit_fast.data.kept_task import RecalledTask, bytes_of, kept, read_kept, write_kept
from cit_fast.methods.memory_order import memory_order
from cit_fast.methods.routing.router import routing_text
from cit_fast.methods.stage import Stage
from cit_fast.run.identity import task_digest
from cit_fast.values import Section

FOLDER = "memory"


class MemoryConfig(Section):
    """What a run keeps of the training examples of the tasks that it has learned: one of ``per_task``, ``total``,
    ``bytes`` and ``keep``. ``memory: all`` and ``memory: none`` are short for ``keep``.
    """

    per_task: PositiveInt | None = None
    """So many of each task."""
    total: PositiveInt | None = None
    """So many of all tasks together, in equal shares that shrink as tasks come."""
    bytes: PositiveInt | None = Field(default=None)
    """So many bytes of all tasks together, in equal shares that shrink as tasks come."""
    keep: Literal["all", "none"] | None = None
    """All of them, or none."""
    choose: Literal["random", "insinfo", "gain", "diverse"] = "random"
    """Which of a task's examples, see :func:`cit_fast.methods.memory_order.memory_order`."""

    @model_validator(mode="before")
    @classmethod
    def _all_or_none(cls, value: Any) -> Any:
        return {"keep": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_budget(self) -> MemoryConfig:
        given = [name for name in ("per_task", "total", "bytes", "keep") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of per_task, total and bytes, or all or none, not {' and '.join(given) or 'none of these'}"
            )
        return self

    def shares(self, tasks: Sequence[Sequence[Example]]) -> list[int]:
        """How many examples of each of the learned tasks are kept, from the beginning of its order."""
        sizes = [len(own) for own in tasks]
        if self.keep is not None:
            return sizes if self.keep == "all" else [0] * len(sizes)
        if self.per_task is not None:
            return [min(self.per_task, size) for size in sizes]
        if self.total is not None:
            return _equal_shares(self.total, sizes)
        room = (self.bytes or 0) // max(1, len(sizes))
        return [_that_fit(own, room) for own in tasks]


def _equal_shares(total: int, sizes: Sequence[int]) -> list[int]:
    """The same for each; what a task has too few examples for goes to the others, what cannot be split to the first."""
    shares, left, open_tasks = [0] * len(sizes), min(total, sum(sizes)), list(range(len(sizes)))
    while open_tasks:
        share = left // len(open_tasks)
        full = [task for task in open_tasks if sizes[task] <= share]
        if not full:
            for task in open_tasks:
                shares[task] = share
            for task in open_tasks[: left - share * len(open_tasks)]:
                shares[task] += 1
            break
        for task in full:
            shares[task] = sizes[task]
            left -= sizes[task]
        open_tasks = [task for task in open_tasks if sizes[task] > share]
    return shares


def _that_fit(examples: Sequence[Example], room: int) -> int:
    for count, example in enumerate(examples):
        room -= bytes_of(example)
        if room < 0:
            return count
    return len(examples)


class TaskMemory:
    """The memory in a run's folder.

    Args:
        run: the folder. ``config``: what is kept.
    """

    def __init__(self, run: Path, config: MemoryConfig) -> None:
        self.folder, self.config = run / FOLDER, config
        self._read: dict[str, tuple[tuple[int, int], RecalledTask]] = {}

    def path(self, task: str) -> Path:
        """The file of a task."""
        return self.folder / f"{task}.json"

    def has(self, task: str) -> bool:
        """Whether a task, or its tombstone, is here."""
        return self.path(task).is_file()

    def kept(self, task: str) -> RecalledTask:
        """A task as its file has it; read once, unless it changes.

        Raises:
            RunError: the file is not there, damaged or of another version.
        """
        known = self._read.get(task)
        try:
            found = os.stat(f"{self.folder}{os.sep}{task}.json")  # noqa: PTH116  # of every task, often: a Path is slow
        except OSError:
            return read_kept(self.path(task))  # which says what is wrong
        stamp = found.st_mtime_ns, found.st_ino
        if known is None or known[0] != stamp:
            known = self._read[task] = stamp, read_kept(self.path(task))
        return known[1]

    def recall(self, tasks: Sequence[Task]) -> tuple[RecalledTask, ...]:
        """The learned tasks, of which these are all, each with the training examples that it has at this stage; those
        that were dropped left out.

        Raises:
            RunError: a file is not there, damaged or of another version.
        """
        known = [one for one in (self.kept(task.name) for task in tasks) if not one.dropped]
        shares = self.config.shares([one.train for one in known])
        return tuple(
            one if share >= len(one.train) else dataclasses.replace(one, train=one.train[:share])
            for one, share in zip(known, shares, strict=True)
        )

    def learned(self, stage: Stage, before: Sequence[Task]) -> list[RecalledTask]:
        """What to keep of a stage's tasks, now that they are trained, beside those ``before``; every process computes
        it.
        """
        most = self.config.per_task or self.config.total
        found = []
        for task in stage.tasks:
            of_task = dataclasses.replace(stage, tasks=(task,))
            every = range(len(task.train))
            order = every if self.config.keep == "all" else memory_order(of_task, self.config.choose, most)
            instructions = {routing_text(example, "instruction") for example in task.train}
            instructions |= {example.instruction for example in task.train}
            whole = kept(task, task_digest(task), order, instructions)
            share = self.config.shares([*(each.train for each in before), whole.train])[-1]
            found.append(dataclasses.replace(whole, train=whole.train[:share]))
        return found

    def write(self, tasks: Sequence[RecalledTask]) -> None:
        """Write tasks, before their stage is committed."""
        for task in tasks:
            write_kept(self.path(task.name), task)

    def held_out(self, tasks: Sequence[Task]) -> None:
        """Write tasks that are answered and never trained, where they are not here yet."""
        self.write([kept(task, task_digest(task), ()) for task in tasks if not self.has(task.name)])

    def shrink(self, tasks: Sequence[Task]) -> None:
        """Give up what the budget no longer allows when these tasks are learned, all of whose stages are committed."""
        for task in self.recall(tasks):
            if task is not self._read[task.name][1]:  # it has been cut
                write_kept(self.path(task.name), task)
