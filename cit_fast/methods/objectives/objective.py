"""The protocol of an objective."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from cit_fast.data.example import Example, Task
    from cit_fast.models.prompts import PromptEncoder


@dataclass(frozen=True)
class StageContext:
    """What an objective may look at before a stage is trained.

    Args:
        examples: what the stage trains, new examples first, replayed ones after them.
        tasks: the new and the seen tasks, whole.
        encoder: turns examples into the model's tokens.
        rng: the only source of chance; seeded by run and stage, so a resumed run draws the same.
        folder: of this stage, the same for all processes and gone when the stage is committed; ``run``: of what holds
            for the whole run; ``cache``: shared by all runs, for what is found by its content. ``None``: nowhere.
        decided: what the objective has to say about the stage; plain JSON values, which go into the stage's record.
    """

    examples: Sequence[Example]
    tasks: Sequence[Task]
    encoder: PromptEncoder
    rng: random.Random
    folder: Path | None = None
    run: Path | None = None
    cache: Path | None = None
    decided: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageInputs:
    """What a stage trains on, in the form that the objective wants.

    Args:
        features: one per example that fits.
        collator: makes batches of them; ``labels`` of a batch are -100 outside the tokens that the loss is divided by.
        truncated: how many of them had their input shortened; ``skipped``: sources of the examples left out.
        seconds: of the preparation, what counts as training time.
    """

    features: Sequence[Any]
    collator: Callable[[Sequence[Any]], dict[str, Any]]
    truncated: int = 0
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0


class Objective(Protocol):
    """What one of the four parts of a method must offer to compute the loss.

    An objective that wants something else than prompts with their answers also has

        ``stage_inputs(model: nn.Module, context: StageContext) -> StageInputs``

    which is called before :meth:`begin_stage`, on every process, with the model as the previous stage left it.
    """

    def begin_stage(self, model: nn.Module) -> None:
        """Called once before each training stage, with the model as the previous stage left it."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """Loss of one micro-batch: sum over its response tokens divided by ``num_items``.

        Args:
            model: the model as the Trainer wraps it (DDP, FSDP, DeepSpeed); call it, not its insides.
            batch: what the collator made: input_ids, labels (-100 outside the response), attention_mask, ...
            num_items: response tokens of the whole accumulated (global) batch; ``None``: of this batch.
        """
