"""One stage of a run, as router, replay policy and objective see it, and what they return.

router.assign(stage) -> Assignment        which adapter set the new task trains
replay.select(stage) -> Selection         which earlier examples come back
objective.prepare(stage) -> StageInputs   what the stage trains on, in the form the loss wants
update.finish(optimizer, stage) -> Finished   what the weights are when it is trained
router.learn(stage) -> Learned            once the set is trained, how prompts will find it
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cit_fast.data.example import Example, Task
from cit_fast.evaluation.records import Assignment, Learned, ObjectiveRecord, ReplayRecord, UpdateRecord
from cit_fast.models.prompts import PromptEncoder

__all__ = ["Assignment", "Finished", "Learned", "Selection", "Stage", "StageInputs"]


@dataclass(frozen=True)
class Stage:
    """A stage; each part reads what it needs. Outside a run, where a router answers prompts, only the model is known.

    Args:
        model: the model as it is now: before training as the previous stage left it, with every adapter set so far.
        encoder: turns examples into the model's tokens.
        index: 1 for the first stage.
        tasks: what the stage trains: one task, or all of them in a joint run.
        seen: the tasks trained before, in order.
        examples: what the stage trains, new examples first, replayed ones after them; the objective's to prepare.
        new_set: whether the adapter set that the stage trains is new, once the router has assigned it.
        compiled: whether the model will be compiled for training, which goes better with batches of few shapes.
        steps: of the optimizer, once the stage is trained.
        averages: of an average that lives across stages: what the set answers with, by parameter's name, while
            ``model`` holds the weights that training goes on from.
        seed: of this stage; see :meth:`rng`.
        kept: a folder for what holds for the whole run; ``scratch``: a folder of this stage, the same for all
            processes, gone when the stage is committed; ``cache``: shared by all runs, for what is found by its
            content. ``None``: nowhere.
        damaged: adapter sets that cannot answer, for their weights are damaged; the best of the others does.
    """

    model: Any
    encoder: PromptEncoder
    index: int = 0
    tasks: tuple[Task, ...] = ()
    seen: tuple[Task, ...] = ()
    examples: tuple[Example, ...] = ()
    new_set: bool = False
    compiled: bool = False
    steps: int = 0
    averages: Mapping[str, Tensor] | None = None
    seed: str = "0"
    kept: Path | None = None
    scratch: Path | None = None
    cache: Path | None = None
    damaged: frozenset[str] = frozenset()

    @property
    def task(self) -> Task:
        """The new task; of a joint run the first."""
        return self.tasks[0]

    @property
    def known(self) -> tuple[Task, ...]:
        """The new tasks and the seen ones."""
        return (*self.tasks, *self.seen)

    def rng(self, part: str = "") -> random.Random:
        """The only source of chance of a part: equal in a resumed run, unlike that of the other parts."""
        return random.Random(f"{self.seed}/{part}" if part else self.seed)  # noqa: S311  # a seed, not a secret


@dataclass(frozen=True)
class Selection:
    """What a replay policy returns.

    Args:
        examples: of the seen tasks, to be trained again; each with its own task's name.
        record: why these.
    """

    examples: list[Example]
    record: ReplayRecord = field(default_factory=ReplayRecord)


@dataclass(frozen=True)
class StageInputs:
    """What an objective returns before a stage is trained.

    Args:
        features: one per example that fits.
        collator: makes batches of them; ``labels`` of a batch are -100 outside the tokens that the loss is divided by.
        truncated: how many of them had their input shortened; ``skipped``: sources of the examples left out.
        seconds: of the preparation, what counts as training time.
        record: what was found out on the way.
    """

    features: Sequence[Any]
    collator: Callable[[Sequence[Any]], dict[str, Any]]
    truncated: int = 0
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0
    record: ObjectiveRecord = field(default_factory=ObjectiveRecord)


@dataclass(frozen=True)
class Finished:
    """What an update returns when a stage is trained; the model holds the weights that answer.

    Args:
        live: weights by name from which training goes on when the stage's adapter set is trained again, if those are
            not the ones that the model holds. The run keeps them; ``stage.averages`` of that later stage has what the
            model held instead.
        record: what was decided, if anything was.
    """

    live: dict[str, Tensor] | None = None
    record: UpdateRecord | None = None
