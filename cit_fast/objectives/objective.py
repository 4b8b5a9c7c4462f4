"""The protocol of an objective, and the response logits that every objective starts from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cit_fast.data.example import Example, Task
    from cit_fast.data.prompts import PromptEncoder

IGNORE_INDEX = -100


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


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, DeepSpeed and PEFT wrappers."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model


@contextmanager
def _only_rows(head: nn.Module | None, rows: Tensor) -> Iterator[None]:
    """Let the output projection see only the hidden states at ``rows`` [batch, length], as one [rows, d] matrix."""

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[rows], *args[1:]) if hidden.shape[:2] == rows.shape else args

    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def response_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and targets of the response tokens alone.

    The output projection is a fifth of a small model's work and most of its memory; prompts and padding do not need
    it. The model is called as a whole, so every wrapper's own work (gradient synchronisation, gathering of shards) and
    every architecture's own treatment of the logits (soft-cap, scale) happen as usual.

    Returns:
        ``logits`` [response tokens, vocabulary] in the model's dtype and ``targets`` [response tokens], int64.
    """
    labels = batch["labels"]
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    targets = labels[:, 1:][rows[:, :-1]]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    head = None if hasattr(model, "_orig_mod") else unwrap(model).get_output_embeddings()  # type: ignore[operator]
    with _only_rows(head, rows):
        logits = model(**inputs, use_cache=False).logits
    return (logits if logits.dim() == 2 else logits[rows]), targets
