"""The protocol of an objective, and the response logits that every objective starts from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cit_fast.errors import ConfigError

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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards exactly those modules train that trained before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


class ResponseLogits(NamedTuple):
    """What :func:`response_logits` finds."""

    logits: Tensor
    """[response tokens, vocabulary], in the model's dtype."""
    targets: Tensor
    """[response tokens] int64."""
    router_loss: Tensor | None
    """See :func:`router_loss`."""


def response_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> ResponseLogits:
    """Logits and targets of the response tokens alone.

    The output projection is a fifth of a small model's work and most of its memory; prompts and padding do not need
    it. The model is called as a whole, so every wrapper's own work (gradient synchronisation, gathering of shards) and
    every architecture's own treatment of the logits (soft-cap, scale) happen as usual.
    """
    labels = batch["labels"]
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    targets = labels[:, 1:][rows[:, :-1]]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    head = None if hasattr(model, "_orig_mod") else unwrap(model).get_output_embeddings()  # type: ignore[operator]
    with _only_rows(head, rows):
        output = model(**inputs, use_cache=False)
    logits = output.logits
    return ResponseLogits(logits if logits.dim() == 2 else logits[rows], targets, router_loss(model, output))


def router_loss(model: nn.Module, output: Any) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, times its coefficient, of one forward pass.

    ``None`` where the model has no router, or its configuration does not ask for the loss (``output_router_logits``).
    """
    balance = getattr(output, "aux_loss", None)
    if not isinstance(balance, Tensor):
        return None
    base: Any = unwrap(model)
    holders = (base, base.config, base.config.get_text_config())
    found = (getattr(holder, "router_aux_loss_coef", None) for holder in holders)
    coefficient = next((value for value in found if value is not None), None)
    if coefficient is None:
        raise ConfigError(
            f"{type(base).__name__}: has a router's loss and no router_aux_loss_coef to weigh it with; set it, or "
            "output_router_logits: false, in the model's configuration"
        )
    return balance * float(coefficient)


def per_item(total: Tensor, count: int, num_items: Tensor | int | None, router: Tensor | None) -> Tensor:
    """A sum over ``count`` response tokens as the loss of a micro-batch.

    Args:
        total: the sum; ``count``: of how many tokens.
        num_items: tokens of the whole accumulated batch; ``None``: of this micro-batch.
        router: a loss per forward pass. It counts by the micro-batch's share of the tokens, so that the whole batch has
            its mean, into however many micro-batches it is cut.
    """
    items: Tensor | int = max(count, 1) if num_items is None else num_items
    return total / items if router is None else (total + router * count) / items
