"""The protocol of a router, and the simplest one."""

from __future__ import annotations

from typing import Protocol

from cit_fast.data.example import Task


class Router(Protocol):
    """Decides which adapter set a new task trains (reuse or expand)."""

    def assign(self, task: Task) -> str:
        """Name of the adapter set that ``task`` trains; a name not seen before means a new set.

        Called once per stage, in order, also for the stages a resumed run does not train again, so that a router
        rebuilds its memory from the stream alone.
        """


class SharedRouter:
    """One adapter set for all tasks."""

    def assign(self, task: Task) -> str:
        """Always the same set."""
        return "shared"
