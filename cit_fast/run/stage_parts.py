"""The four parts of a method as they are in each stage, and a router that goes on, or begins with a later stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cit_fast.cache import cache_folder
from cit_fast.data.example import Task
from cit_fast.errors import RunError
from cit_fast.methods.config import MethodConfig
from cit_fast.methods.routing import SharedRouter
from cit_fast.methods.stage import Stage
from cit_fast.models.parked_sets import set_names
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run.config import RunConfig
from cit_fast.run.parts import Parts
from cit_fast.run.run_folder import RunFolder
from cit_fast.run.stage_settings import method_at, training_at


class StageParts:
    """Changes the parts of one method's run from stage to stage, as ``stages`` of its configuration says.

    Args:
        config: of the run; ``method``: as it began; ``parts``: at work, which are changed.
        parts_of: makes the parts of a method. ``folder``: of the run. ``encoder``: makes the prompts.
        say: prints a line.
    """

    def __init__(
        self,
        config: RunConfig,
        method: MethodConfig,
        parts: Parts,
        parts_of: Callable[[MethodConfig, Mapping[str, Any]], Mapping[str, Any]],
        folder: RunFolder,
        encoder: PromptEncoder,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.method, self.parts, self._parts_of = config, method, parts, parts_of
        self.folder, self.encoder, self._say = folder, encoder, say
        self._router_since = 1

    def _at(self, index: int) -> Mapping[str, Any]:
        """The parts of stage ``index``, new."""
        training = training_at(self.config.training, self.config.stages, index)
        return self._parts_of(method_at(self.method, self.config.stages, index), training)

    def take_up_settings(
        self, index: int, model: Any, stream: Sequence[Task], seen: Callable[[int], Sequence[Task]]
    ) -> None:
        """The parts as they are from stage ``index`` on; another router gets to know the earlier tasks.

        Args:
            stream: all tasks; ``seen``: those before a stage that something is left of, with what is left.

        Raises:
            RunError: nothing is left of a task that the router needs examples of.
        """
        if not any(entry.from_ <= index for entry in self.config.stages):
            return
        now, before = (method_at(self.method, self.config.stages, each).router for each in (index, max(1, index - 1)))
        self.parts.change(self._at(index), router=index == 1 or now != before)
        if now != before:
            self._say(f"  from here on: router {now.name}")
            self._router_since = index
            self._adopt(index, model, stream, seen(index))

    def _adopt(self, index: int, model: Any, stream: Sequence[Task], seen: Sequence[Task]) -> None:
        """Let a router that begins with stage ``index`` know the tasks before, each with the set that it trained."""
        left = {task.name: task for task in seen}
        known = {task.name: task for task in stream} | left
        for stage in self.folder.stages()[1:index]:
            for name in stage.trained:
                if name not in left and self.parts.router.adopts == "examples":
                    raise RunError(
                        f"{self.folder.path}: router {self.parts.router.name} needs examples of {name!r}, and none are "
                        "left of it"
                    )
                seed = f"{self.config.seed}/{index}/{name}"
                one = Stage(model, self.encoder, index, tasks=(known[name],), seed=seed, cache=cache_folder())
                self.parts.router.adopt(one, stage.adapter)

    def take_up_router(self, index: int, model: Any) -> None:
        """What the router knew when stage ``index`` was committed.

        Raises:
            RunError: it is damaged, or knows a set that no stage has trained.
        """
        if index == 0:
            return
        folder = self.folder.stage_path(index) / "router"
        router = self._at(index)["router"] if self.config.stages else self.parts.router
        if isinstance(router, SharedRouter) and not folder.is_dir():  # of an older run, in which it remembered nothing
            return
        self.parts.router = type(router).load(folder)
        missing = sorted(set(self.parts.router.sets) - set_names(model))
        if missing and set_names(model):  # a model that was trained whole has no sets
            raise RunError(f"{folder}: knows the adapter set {missing[0]!r}, which no stage has trained")

    def save_router(self, folder: Path, index: int) -> None:
        """Write what the router knows after stage ``index``."""
        earlier = self.folder.stage_path(index - 1) / "router"
        same = earlier.is_dir() and index > self._router_since  # and not another router's
        self.parts.save_router(folder, earlier if same else None)
