"""A causal language model's forward pass as losses need it: response logits alone, router loss, evaluation mode."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cit_fast.errors import ConfigError
from cit_fast.models.prompts import IGNORED
from cit_fast.models.wrappers import unwrap

_locks: weakref.WeakKeyDictionary[nn.Module, AbstractContextManager[object]] = weakref.WeakKeyDictionary()
_registry = threading.Lock()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, no other thread changes what the base model computes with (adapter sets, settings, modes, hooks).

    Whoever changes one of these for a while does so in here; a second thread waits. One thread may be inside more than
    once.

    Args:
        model: in wrappers or not; all around one base model wait for each other.
    """
    with _registry:
        lock = _locks.setdefault(unwrap(model), threading.RLock())
    with lock:
        yield


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
def head_input(model: nn.Module, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give the output projection ``select(hidden)`` instead of ``hidden``; no effect on a model without one.

    The one place where cit-fast hooks into a model's forward pass: the model is called as a whole, so that every
    wrapper does its own work, and only what the projection has to multiply changes.

    Args:
        model: a causal language model, in wrappers or not.
        select: the projection's input, [batch, length, d] as the model hands it over -> what it multiplies.
    """
    head = unwrap(model).get_output_embeddings()  # type: ignore[operator]
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (select(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def whole_rows(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, the output projection's input has no strides of a larger tensor.

    After a prompt it is a slice, for which torch on a CPU copies the whole projection once per prompt: 3.6 GB for 64
    prompts and a vocabulary of 49,000, two fifths of a short evaluation's time. Of one prompt the slice even counts as
    contiguous, and it is copied all the same.
    """
    return head_input(model, lambda hidden: hidden.clone(memory_format=torch.contiguous_format))


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
    rows[:, :-1] = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][rows[:, :-1]]
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def select(hidden: Tensor) -> Tensor:
        return hidden[rows] if hidden.shape[:2] == rows.shape else hidden

    compiled = hasattr(model, "_orig_mod")  # a hook would break its graph
    with nullcontext() if compiled else head_input(model, select):
        output = model(**inputs, use_cache=False)
    logits = output.logits
    return ResponseLogits(logits if logits.dim() == 2 else logits[rows], targets, router_loss(model, output))


def hidden_rows(model: nn.Module, inputs: Mapping[str, Any], places: Tensor) -> tuple[Tensor, Any]:
    """What the output projection would multiply at some places, and the model's output without logits.

    Gradients flow. The model is called as a whole, so that every wrapper does its own work; the output projection gets
    no rows to project, and its logits of no rows are part of the result's graph, which tells wrappers that wait for
    the model's own output that backward has begun.

    Args:
        model: the model as the trainer wraps it, or bare; not compiled.
        inputs: what the model takes.
        places: [T] int64, in the flattened [batch, length].

    Returns:
        Hidden states [T, d] in the dtype that they would be multiplied in, which under autocast is its own, and the
        output.

    Raises:
        ConfigError: a model that does not use its output projection once.
    """
    caught: list[Tensor] = []

    def catch(hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)
        device = rows.device.type
        cast = torch.is_autocast_enabled(device) and rows.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if cast else rows.dtype
        caught.append(rows[places].to(dtype))
        return rows[:0]

    with head_input(model, catch):
        output = model(**inputs, use_cache=False)
    if len(caught) != 1:
        raise ConfigError(f"{type(unwrap(model)).__name__}: its output projection ran {len(caught)} times, not once")
    hidden = caught[0]
    if hidden.requires_grad:
        hidden = hidden + output.logits.sum().to(hidden.dtype)  # the sum of nothing
    return hidden, output


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
