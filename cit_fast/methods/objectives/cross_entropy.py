"""Plain instruction tuning: cross-entropy on the response."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from cit_fast.errors import ConfigError
from cit_fast.key_parts.head import head_of, whole_head
from cit_fast.key_parts.hidden import can_share_prefixes, model_inputs, shortest_window
from cit_fast.key_parts.layout import PrefixCollator
from cit_fast.methods.objectives.objective import plain_inputs
from cit_fast.methods.stage import Stage, StageInputs
from cit_fast.models.collation import PaddingCollator
from cit_fast.models.forward import evaluating, hidden_rows, per_item, response_logits, router_loss
from cit_fast.models.prompts import IGNORED
from cit_fast.models.wrappers import unwrap
from cit_fast.ops import linear_cross_entropy
from cit_fast.ops.information_gain.reference import entropy_gates

_log = logging.getLogger(__name__)

MOST_LOGITS = 1 << 24
"""Logits that a batch may have, 64 MiB in float32 and as much for their gradient; of more, none are made."""


class CrossEntropy:
    """``L_CE``: mean negative log-likelihood of the response tokens, in nats; with a gate also EAFT's loss.

    Where the logits of a batch's response would be many, they are never made: the loss comes from the hidden states and
    the output projection (:func:`cit_fast.ops.linear_cross_entropy`). A small batch's are, which is faster.

    The examples of a task mostly begin with the same instruction. Where it is less work, a batch computes what its
    examples begin with once: the same loss and gradients within rounding.

    Args:
        label_smoothing: share of the target's weight that all tokens of the vocabulary have in equal parts, in [0, 1).
        entropy_gate: exponent of the entropy gate of EAFT, >= 0 and finite. A token counts min(1, H / ln 20)^exponent
            times, H the entropy of the model's prediction, so that what the model is sure of is not overwritten by
            force; 0: every token counts in full. See :func:`cit_fast.ops.linear_cross_entropy`.
        share_prefix: ``"auto"``: for models that honour an attention mask of four dimensions, where no chance and no
            other loss sees how often a token is computed (dropout, a router's balance, a compiled graph's shapes);
            True: or an error; False: never.

    Raises:
        ConfigError: an option outside that.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        share_prefix: bool | Literal["auto"] = "auto",
        entropy_gate: float = 0.0,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing: {label_smoothing} is outside [0, 1)")
        if share_prefix not in (True, False, "auto"):
            raise ConfigError(f"share_prefix: {share_prefix!r}; expected true, false or auto")
        if not (entropy_gate >= 0 and math.isfinite(entropy_gate)):
            raise ConfigError(f"entropy_gate: {entropy_gate} is negative or not finite")
        if entropy_gate and label_smoothing:
            raise ConfigError("entropy_gate: there is no gate for smoothed labels; leave label_smoothing out")
        self.label_smoothing, self.share_prefix, self.entropy_gate = label_smoothing, share_prefix, entropy_gate
        self._head_shape: tuple[int, int] | None = None  # vocabulary and width, where the op can stand for it

    def prepare(self, stage: Stage) -> StageInputs:
        """Prompts with their answers."""
        plain = not (self.label_smoothing or stage.compiled)
        self._head_shape = _head_shape(stage.model) if plain else None
        inputs = plain_inputs(stage, stage.examples)
        if not isinstance(inputs.collator, PaddingCollator):
            return inputs
        if self.share_prefix == "auto" and (stage.compiled or counts_matter(stage.model)):
            return inputs
        if not can_share_prefixes(stage.model, self.share_prefix):
            return inputs
        return replace(inputs, collator=PrefixCollator(inputs.collator, shortest_window(stage.model)))

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """See :class:`cit_fast.methods.objectives.Objective`."""
        inputs = model_inputs(model, batch)
        labels = batch["labels"]
        places = (labels[:, 1:] != IGNORED).nonzero()
        vocabulary, width = self._head_shape or (0, 0)
        # Before the model runs: where the head is split (ZeRO-3) there is none, and the model makes its logits.
        head = whole_head(model, width) if len(places) * vocabulary > MOST_LOGITS else None
        if head is not None:
            rows, output = hidden_rows(model, inputs, places[:, 0] * labels.shape[1] + places[:, 1])
            head = head.beside(rows)
            every = torch.ones(len(rows), device=rows.device)
            targets = labels[places[:, 0], places[:, 1] + 1]
            total = linear_cross_entropy(
                *(rows, head.weight, targets, every), bias=head.bias, entropy_gate=self.entropy_gate, **head.options
            )
            return per_item(total, len(every), num_items, router_loss(model, output))
        found = response_logits(model, {**inputs, "labels": labels})
        logits = found.logits.float()
        if self.entropy_gate:
            gates = entropy_gates(logits.detach().log_softmax(1), self.entropy_gate)
            total = gates @ F.cross_entropy(logits, found.targets, reduction="none")
        else:
            total = F.cross_entropy(logits, found.targets, reduction="sum", label_smoothing=self.label_smoothing)
        return per_item(total, found.targets.numel(), num_items, found.router_loss)


def _head_shape(model: nn.Module) -> tuple[int, int] | None:
    """Vocabulary and width of the output projection, if it is one that :func:`linear_cross_entropy` computes."""
    if isinstance(unwrap(model).get_output_embeddings(), BaseTunerLayer):  # type: ignore[operator]
        return None  # its weight would be made anew for every batch
    try:
        with evaluating(model):
            head = head_of(model)
    except ConfigError as error:
        _log.info("cross-entropy makes all logits: %s", error)
        return None
    return head.vocabulary, head.weight.shape[1]


def counts_matter(model: nn.Module) -> bool:
    """Whether it makes a difference how often the same token is computed: dropout, or a router's balance."""
    config: Any = unwrap(model).config
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    named = any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"))
    return dropout or named or bool(getattr(config.get_text_config(), "output_router_logits", False))
