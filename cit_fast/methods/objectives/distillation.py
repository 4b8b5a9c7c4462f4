"""Distillation from the model before the stage: learning without forgetting, and its form that leaves the target free.

Sources: learning without forgetting (Li and Hoiem, arXiv 1606.09282), with the model's predictions of the new task's
own answers in the place of an image classifier's old outputs; mask the target (Xu et al., arXiv 2605.29498).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cit_fast.errors import ConfigError
from cit_fast.evaluation.records import ObjectiveRecord
from cit_fast.key_parts.head import Head, head_of
from cit_fast.key_parts.hidden import pair_collator
from cit_fast.key_parts.layout import GroupingCollator
from cit_fast.key_parts.pairs import encode_pairs
from cit_fast.key_parts.teacher import teacher_states
from cit_fast.methods.objectives.cross_entropy import CrossEntropy
from cit_fast.methods.objectives.earlier_model import Compared, FrozenPairCollator, copied_head, with_divergence
from cit_fast.methods.stage import Stage, StageInputs
from cit_fast.methods.updates.update import When, due, when_checked
from cit_fast.models.forward import evaluating
from cit_fast.ops import linear_kl_divergence


class Distillation:
    """Cross-entropy, and the divergence of the model's predictions from those of the model before the stage::

        L = L_CE + lambda T^2 KL(M_{t-1} || M_t)

    Both are means over response tokens, the predictions of the second at temperature T. No logits are kept: M_{t-1} is
    asked once, and its hidden states are what the loss takes.

    Args:
        lambda_: weight of the divergence, >= 0 and finite.
        temperature: T, > 0 and finite.
        compare: the tokens of ``"all"`` examples, of the ``"new"`` ones (learning without forgetting), or of the
            ``"replayed"`` ones.
        without_target: compare the predictions of the tokens that are not the target, so that what is to be learned is
            not held back (mask the target).
        when: the stages that compare, as for an update: ``"always"``, ``"retrained"`` or ``"from-second"``. Before the
            first, and for a new adapter set, the earlier model is the base model.
        share_prefix: see :func:`cit_fast.key_parts.hidden.pair_collator`.
        batch_size: examples at a time in the pass of the earlier model.

    Raises:
        ConfigError: an option out of range or unknown.
    """

    def __init__(
        self,
        lambda_: float = 1.0,
        temperature: float = 2.0,
        compare: Literal["all", "new", "replayed"] = "all",
        without_target: bool = False,
        when: When = "from-second",
        share_prefix: bool | Literal["auto"] = "auto",
        batch_size: int = 16,
    ) -> None:
        if not (lambda_ >= 0 and math.isfinite(lambda_)):
            raise ConfigError(f"lambda_: {lambda_} is negative or not finite")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ConfigError(f"temperature: {temperature}; expected a positive number")
        if compare not in ("all", "new", "replayed"):
            raise ConfigError(f"compare: {compare!r} is unknown; expected all, new or replayed")
        when_checked(when)
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is below 1")
        self.lambda_, self.temperature, self.compare, self.without_target = (
            lambda_,
            temperature,
            compare,
            without_target,
        )
        self.when, self.share_prefix, self.batch_size = when, share_prefix, batch_size
        self._plain = CrossEntropy(share_prefix=share_prefix)
        self._frozen_head: Head | None = None

    def prepare(self, stage: Stage) -> StageInputs:
        """The stage's examples, and what M_{t-1} says about those that are compared.

        Raises:
            ConfigError: a model whose head is not understood.
            DataError: an answer without a token of its own.
        """
        if not (self.lambda_ and due(self.when, stage)):
            return self._plain.prepare(stage)
        model, encoder = stage.model, stage.encoder
        unmarked = [replace(example, key_parts=()) for example in stage.examples]
        encoded = encode_pairs(encoder, unmarked)
        new = {task.name for task in stage.tasks}
        chosen = [
            pair
            for pair in encoded.pairs
            if self.compare == "all" or (unmarked[pair.index].task in new) == (self.compare == "new")
        ]
        if not chosen:
            return self._plain.prepare(stage)
        collate = pair_collator(model, encoder.pad_token_id, self.share_prefix)
        with evaluating(model):
            head = head_of(model)  # which tries the model: before anything is wrapped around it
        self._frozen_head = copied_head(head)
        frozen = teacher_states(
            *(model, chosen, collate),
            alpha=None,
            context="full",
            batch_size=self.batch_size,
            folder=stage.scratch,
        )
        collator = FrozenPairCollator(GroupingCollator(collate), frozen, float(self.temperature), head.weight.shape[1])
        record = ObjectiveRecord(compared=len(chosen), seconds=frozen.seconds)
        return StageInputs(encoded.pairs, collator, encoded.truncated, encoded.skipped, frozen.seconds, record)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | int | None) -> Tensor:
        """See :class:`cit_fast.methods.objectives.Objective`; both terms are sums over response tokens."""
        if "frozen" not in batch:
            return self._plain(model, batch, num_items)

        def divergence(side: Compared, temperature: Tensor) -> Tensor:
            return (self.lambda_ * self.temperature**2) * linear_kl_divergence(
                *(side.full, side.frozen, side.head.weight, side.before.weight, temperature),
                torch.ones_like(temperature),
                side.targets if self.without_target else None,
                bias_live=side.head.bias,
                bias_frozen=side.before.bias,
                **side.head.options,
            )

        return with_divergence(model, batch, num_items, self._frozen_head, divergence, "distillation")
