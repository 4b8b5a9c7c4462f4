"""The protocol of a router, and the simplest one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cit_fast.data.example import Example, Task


class Router(Protocol):
    """Decides which adapter set a new task trains (reuse or expand), and which one answers a prompt."""

    def assign(self, task: Task) -> str:
        """Name of the adapter set that ``task`` trains; a name not seen before means a new set.

        Called once per stage, in order, also for the stages a resumed run does not train again, so that a router
        rebuilds its memory from the stream alone.
        """

    def answer(self, examples: Sequence[Example]) -> list[str]:
        """For each example the name of the set that answers it; names that ``assign`` has given before."""


class SharedRouter:
    """One adapter set for all tasks."""

    def assign(self, task: Task) -> str:
        """Always the same set."""
        return "shared"

    def answer(self, examples: Sequence[Example]) -> list[str]:
        """Always the same set."""
        return ["shared"] * len(examples)
