"""Losses that compare the model in training with the one before the stage: their batches, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cit_fast.errors import ConfigError
from cit_fast.key_parts.head import Head, whole_head
from cit_fast.key_parts.hidden import pair_hidden
from cit_fast.key_parts.layout import GroupingCollator
from cit_fast.key_parts.pairs import EncodedPair, PairCollator
from cit_fast.key_parts.teacher import TeacherStates
from cit_fast.models.forward import per_item
from cit_fast.ops import linear_cross_entropy


@dataclass(frozen=True)
class FrozenPairCollator:
    """Pairs with what M_{t-1} said about them.

    Args:
        pairs: makes the batch of the pairs themselves.
        frozen: has every pair that is to be compared.
        temperature: one for all; ``None``: 2 - min(G, 1) of each example.
        width: of the hidden states, for a batch in which nothing is compared.
    """

    ADDED = ("frozen", "temperature", "compared")

    pairs: PairCollator | GroupingCollator
    frozen: TeacherStates
    temperature: float | None
    width: int

    def __call__(self, features: Sequence[EncodedPair]) -> dict[str, Any]:
        """A batch of :class:`PairCollator`, and of its T labelled tokens those C that are compared.

        Returns:
            Beside the pairs' own tensors ``compared`` [C] int64, their places among the T; ``frozen`` [C, d], the
            hidden states of M_{t-1} in its dtype; ``temperature`` [C] float32.
        """
        batch = self.pairs(features)
        offsets = batch["offsets"].tolist()
        rows: list[Tensor] = []
        temperatures: list[Tensor] = []
        compared: list[Tensor] = []
        for feature, start, end in zip(features, offsets[:-1], offsets[1:], strict=True):
            if feature.index not in self.frozen.places:
                continue
            rows.append(self.frozen.rows(feature.index))
            beta = 2 - min(self.frozen.gains[feature.index], 1.0) if self.temperature is None else self.temperature
            temperatures.append(torch.full((end - start,), beta, dtype=torch.float32))
            compared.append(torch.arange(start, end))
        if not rows:
            none = torch.zeros(0)
            rows, temperatures, compared = [torch.zeros(0, self.width)], [none], [none.long()]
        added = dict(zip(self.ADDED, (rows, temperatures, compared), strict=True))
        return {**batch, **{name: torch.cat(parts) for name, parts in added.items()}}


class Compared(NamedTuple):
    """The C tokens of a batch that are compared, and the heads of both models."""

    full: Tensor
    """[C, d]: hidden states of the live model after the full instruction; they carry gradients."""
    masked: Tensor
    """[C, d]: the same tokens after the masked instruction, where there is one."""
    frozen: Tensor
    """[C, d]: those of the earlier model."""
    targets: Tensor
    """[C] int64: the tokens themselves."""
    head: Head
    before: Head


def with_divergence(
    model: nn.Module,
    batch: Mapping[str, Any],
    num_items: Tensor | int | None,
    frozen_head: Head | None,
    divergence: Callable[[Compared, Tensor], Tensor],
    name: str,
) -> Tensor:
    """Cross-entropy of a batch of :class:`FrozenPairCollator` plus a divergence of its compared tokens, per token.

    Args:
        model, batch, num_items: see :class:`cit_fast.methods.objectives.Objective`.
        frozen_head: of the earlier model, where it is not the live one's.
        divergence: of the compared tokens and their temperatures [C], a sum over them.
        name: of the objective.

    Raises:
        ConfigError: the head is split over the processes.
    """
    tensors = dict(batch)
    frozen, temperature, compared = (tensors.pop(key) for key in FrozenPairCollator.ADDED)
    hidden = pair_hidden(model, tensors)
    head = whole_head(model, hidden.full.shape[1])
    if head is None:
        raise ConfigError(
            f"objective {name}: the output projection is split over the processes (ZeRO-3), and its loss needs all of "
            "it; use ZeRO-2, FSDP or DDP"
        )
    head = head.beside(hidden.full)
    every = torch.ones(len(hidden.targets), device=hidden.full.device)
    loss = linear_cross_entropy(hidden.full, head.weight, hidden.targets, every, bias=head.bias, **head.options)
    if len(compared):
        full, masked, targets = hidden.full, hidden.masked, hidden.targets
        if len(compared) < len(every):
            full, masked, targets = full[compared], masked[compared], targets[compared]
        side = Compared(full, masked, frozen.to(full.dtype), targets, head, (frozen_head or head).beside(full))
        loss = loss + divergence(side, temperature)
    return per_item(loss, len(every), num_items, hidden.router_loss)


def copied_head(head: Head) -> Head | None:
    """A copy of a head that is trained, as it is before the stage; ``None`` where it stays what it is."""
    if not (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)):
        return None
    bias = None if head.bias is None else head.bias.detach().clone()
    return head._replace(weight=head.weight.detach().clone(), bias=bias)
