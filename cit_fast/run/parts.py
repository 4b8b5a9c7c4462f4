"""The four parts of a method in a run: what they return is checked before it is used, and their notes are said."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.markup import escape
from torch.optim import Optimizer

from cit_fast.errors import ConfigError
from cit_fast.evaluation.records import Assignment, Learned, ObjectiveRecord, ReplayRecord, UpdateRecord
from cit_fast.methods.stage import Finished, Selection, Stage, StageInputs
from cit_fast.run.identity import check_plain_values

_Returned = TypeVar("_Returned")


class Parts:
    """Router, replay, objective and update; every call says what is wrong with what the part returned.

    Args:
        parts: by kind. They are copied: what a part remembers of one run must not reach the next.
        say: prints a line.
    """

    def __init__(self, parts: Mapping[str, Any], say: Callable[[str], None]) -> None:
        own = copy.deepcopy(dict(parts))
        self.router, self.replay = own["router"], own["replay"]
        self.objective, self.update = own["objective"], own["update"]
        self._say = say

    def change(self, parts: Mapping[str, Any], *, router: bool) -> None:
        """Take other parts from now on.

        Args:
            router: whether the router is another one, too, and not the one that has learned until now.
        """
        own = copy.deepcopy({kind: part for kind, part in parts.items() if router or kind != "router"})
        self.replay, self.objective, self.update = own["replay"], own["objective"], own["update"]
        self.router = own.get("router", self.router)

    def assign(self, stage: Stage) -> Assignment:
        """The adapter set that the new task trains."""
        return self._recorded("router", "assign", self.router.assign(stage), Assignment)

    def select(self, stage: Stage) -> Selection:
        """The earlier examples that come back."""
        selection = self._returned("replay", "select", self.replay.select(stage), Selection)
        self._recorded("replay", "select", selection.record, ReplayRecord)
        return selection

    def prepare(self, stage: Stage) -> StageInputs:
        """What the stage trains on, in the form the loss wants."""
        inputs = self._returned("objective", "prepare", self.objective.prepare(stage), StageInputs)
        self._recorded("objective", "prepare", inputs.record, ObjectiveRecord)
        return inputs

    def finish(self, optimizer: Optimizer | None, stage: Stage) -> Finished:
        """What the weights are when the stage is trained."""
        finished: Finished = self._returned("update", "finish", self.update.finish(optimizer, stage), Finished)
        if finished.record is not None:
            self._recorded("update", "finish", finished.record, UpdateRecord)
        return finished

    def learn(self, stage: Stage) -> Learned:
        """What the router learns from the task, now that its set is trained."""
        return self._recorded("router", "learn", self.router.learn(stage), Learned)

    def save_router(self, folder: Path, earlier: Path | None) -> None:
        """Write what the router remembers; ``earlier``: where the stage before has written it."""
        if "earlier" in inspect.signature(self.router.save).parameters:
            self.router.save(folder, earlier=earlier)
        else:
            self.router.save(folder)

    def _returned(self, kind: str, method: str, value: Any, wanted: type[_Returned]) -> _Returned:
        """What a part returned, if it is of the right kind."""
        if not isinstance(value, wanted):
            part = type(getattr(self, kind)).__name__
            raise ConfigError(
                f"{kind}: {part}.{method}() returned a {type(value).__name__}; return a {wanted.__name__} "
                f"({wanted.__module__})"
            )
        return value

    def _recorded(self, kind: str, method: str, value: Any, wanted: type[_Returned]) -> _Returned:
        """What a part returned for the record, if it can be kept there; its notes are said at once."""
        found: Any = self._returned(kind, method, value, wanted)
        check_plain_values(found, f"{kind}: {type(getattr(self, kind)).__name__}.{method}()")
        for note in found.notes:
            self._say(f"  {escape(note)}")
        return found  # type: ignore[no-any-return]
