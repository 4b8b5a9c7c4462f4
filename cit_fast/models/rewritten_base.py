"""Initialisations of LoRA that rewrite the base model (PiSSA, OLoRA), undone when their set is trained.

Such an initialisation takes the product of its own factors out of the weight, W' = W - c B0 A0, and training changes
the factors: y = W'x + c B A x. Every other adapter set, and the base model itself, would answer with W' instead of W.
With

    y = W x + c (B A - B0 A0) x = W x + c [B, -B0] [A; A0] x

the trained set is plain LoRA of twice the rank on the weight as it was, which is what is kept.

Source: PiSSA (Meng et al., arXiv 2404.02948), OLoRA (Buyukakyuz, 2406.01775); the conversion is PEFT's own
(``path_initial_model_for_weight_conversion``), done in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cit_fast.errors import ConfigError


def rewrites_base(adapter: Mapping[str, Any] | None) -> bool:
    """Whether an adapter configuration's initialisation rewrites weights of the base model."""
    init = str((adapter or {}).get("init_lora_weights", True)).lower()
    return init.startswith(("pissa", "olora"))


class RewrittenBase:
    """The base weights as they were, and the factors with which a new set began.

    Args:
        model: before the set is added.
    """

    def __init__(self, model: nn.Module) -> None:
        # Host memory for a copy of the weights that adapters can be on, until it is known which are rewritten.
        self._before = {id(p): p.detach().to("cpu", copy=True) for p in model.parameters() if p.dim() == 2}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def added(self, model: PeftModel, name: str) -> None:
        """Remember what the set ``name``, just added, began with."""
        rewritten: dict[int, Tensor] = {}
        for path, layer in lora_layers(model, name):
            weight = layer.get_base_layer().weight
            before = self._before[id(weight)]
            if not torch.equal(before, weight.detach().cpu()):
                rewritten[id(weight)] = before
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                self._factors[path] = a.detach().clone(), b.detach().clone()
        self._before = rewritten

    @torch.no_grad()
    def undo(self, model: PeftModel, name: str) -> PeftModel:
        """The model with the set ``name`` as plain LoRA, and the base weights what they were."""
        extra = {}
        for path, layer in lora_layers(model, name):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            first_a, first_b = self._factors.get(path) or (torch.zeros_like(a), torch.zeros_like(b))
            extra[path] = first_a, -first_b
            weight = layer.get_base_layer().weight
            if id(weight) in self._before:
                weight.data.copy_(self._before[id(weight)])
        append_factors(model, name, extra, Fraction(2))
        return model


@torch.no_grad()
def append_factors(model: PeftModel, name: str, extra: Mapping[str, tuple[Tensor, Tensor]], growth: Fraction) -> None:
    """Give the LoRA set ``name`` more rows of A and columns of B; its scaling stays.

    Args:
        extra: of each of its layers, A [r', in] and B [out, r'].
        growth: (r + r') / r, the same for all layers.
    """
    config = copy.copy(model.peft_config[name])
    factor = math.sqrt(growth) if config.use_rslora else float(growth)  # the scaling alpha / sqrt(r) or alpha / r
    for path, layer in lora_layers(model, name):
        a, b = layer.lora_A[name], layer.lora_B[name]
        more_a, more_b = extra[path]
        layer.lora_A[name] = _linear(torch.cat([a.weight, more_a]), a)
        layer.lora_B[name] = _linear(torch.cat([b.weight, more_b], dim=1), b)
        layer.r[name] = len(layer.lora_A[name].weight)
        layer.lora_alpha[name] *= factor
    config.r, config.lora_alpha = int(growth * config.r), _whole(factor * config.lora_alpha)
    config.init_lora_weights = True
    config.rank_pattern = {key: int(growth * rank) for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: _whole(factor * alpha) for key, alpha in (config.alpha_pattern or {}).items()}
    model.peft_config[name] = config


def _whole(alpha: float) -> float:
    """An integer where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def refuse_sharded() -> ConfigError:
    """The error for such an initialisation where the processes hold shards of the weights."""
    return ConfigError(
        "adapter.init_lora_weights: rewrites the base model, which cannot be undone where FSDP or DeepSpeed split it; "
        "use true, or DDP"
    )


def lora_layers(model: nn.Module, name: str | None = None) -> list[tuple[str, Any]]:
    """Paths and LoRA layers, of the set ``name`` or of any."""
    layers = ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))
    return [(path, layer) for path, layer in layers if name is None or name in layer.lora_A]


def _linear(weight: Tensor, like: nn.Linear) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=like.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
    if like.bias is not None:
        made.bias = like.bias
    return made
