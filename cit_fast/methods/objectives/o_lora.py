"""O-LoRA: every task learns in a subspace of its own, orthogonal to those of the tasks before.

Source: Wang et al., Findings of EMNLP 2023, arXiv 2310.14152, and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from cit_fast.errors import ConfigError
from cit_fast.evaluation.records import ObjectiveRecord
from cit_fast.methods.objectives.cross_entropy import CrossEntropy
from cit_fast.methods.stage import Stage, StageInputs
from cit_fast.models.parked_sets import parked
from cit_fast.models.prompts import IGNORED
from cit_fast.models.rewritten_base import lora_layers


class OLoRA:
    """Cross-entropy with a penalty on the overlap of the trained factors A' with those of all other adapter sets::

        L = L_CE + lambda sum_layers sum_ij |A A'^T|_ij + l2 sum_factors ||.||_2

    With the router ``stacked`` the others are the earlier tasks' parts, frozen and active, as published; with a router
    of several sets they are the other sets, of which one alone answers, and the record says so.

    Args:
        lambda_: weight of the overlap, >= 0 and finite (0.5 in the authors' scripts).
        l2: weight of the norms of the trained A' and B', >= 0 and finite (0 for most of the authors' tasks).

    Raises:
        ConfigError: an option out of range.
    """

    needs_whole_weights = True

    def __init__(self, lambda_: float = 0.5, l2: float = 0.0) -> None:
        for name, value in (("lambda_", lambda_), ("l2", l2)):
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name}: {value} is negative or not finite")
        self.lambda_, self.l2 = lambda_, l2
        self._plain = CrossEntropy()
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._trained: list[nn.Parameter] = []

    def prepare(self, stage: Stage) -> StageInputs:
        """The stage's examples for cross-entropy, and the factors of each layer.

        Raises:
            ConfigError: nothing that trains is a LoRA factor.
        """
        self._pairs, self._trained = [], []
        apart: set[str] = set()
        for path, layer in lora_layers(stage.model):
            beside = parked(stage.model).updates.get(path, {})
            trained = [name for name, module in layer.lora_A.items() if module.weight.requires_grad]
            others = [module.weight.detach() for name, module in layer.lora_A.items() if name not in trained]
            others = [*(update.a for update in beside.values()), *others]
            apart.update([*beside, *(name for name in layer.lora_A if name not in layer.active_adapters)])
            for name in trained:
                self._trained += [layer.lora_A[name].weight, layer.lora_B[name].weight]
                if others:
                    self._pairs.append((layer.lora_A[name].weight, torch.cat(others)))
        if not self._trained:
            raise ConfigError("objective o-lora: no LoRA factor trains; it needs adapter, of plain LoRA")
        inputs = self._plain.prepare(stage)
        if not apart:
            return inputs
        note = (
            f"The sets {', '.join(sorted(apart))} are not active beside the one in training: this keeps sets apart, "
            "and is O-LoRA only with router: stacked."
        )
        return replace(inputs, record=ObjectiveRecord(notes=[note]))

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """See :class:`cit_fast.methods.objectives.Objective`; a micro-batch bears its tokens' share of the penalty."""
        loss = self._plain(model, batch, num_items)
        terms = [self.lambda_ * (other @ own.T).abs().sum() for own, other in self._pairs if self.lambda_]
        terms += [self.l2 * torch.linalg.vector_norm(factor) for factor in self._trained if self.l2]
        if not terms:
            return loss
        tokens = (batch["labels"][:, 1:] != IGNORED).sum()
        share = 1.0 if num_items is None else tokens / num_items
        return loss + (share * torch.stack(terms).sum()).to(loss.dtype)
