"""An adapter set that grows with every task: what it was is frozen and stays active, and a new part beside it trains.

With the set's earlier factors A, B and those of its new part A', B', of one scaling c,

    y = W x + c B A x + c B' A' x = W x + c [B, B'] [A; A'] x

so when the part is trained the two are one plain set again, of their ranks' sum: it is saved, mixed, merged and served
like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from peft import PeftModel

from cit_fast.errors import ConfigError
from cit_fast.models.adapter_bank import is_plain_lora
from cit_fast.models.rewritten_base import append_factors, lora_layers


class GrowingAdapter:
    """The part that an adapter set grows by, made and active beside it; it alone has gradients.

    Args:
        model: with the set ``name``.
        config: PEFT's, of the part.

    Raises:
        ConfigError: the set is no plain LoRA, or its new part would be scaled otherwise.
    """

    def __init__(self, model: PeftModel, name: str, config: Any) -> None:
        if not (is_plain_lora(config) and is_plain_lora(model.peft_config[name])):
            raise ConfigError("router: stacked grows plain LoRA sets; leave out DoRA, modules_to_save and the like")
        self.name, self.part = name, f"{name}-new-part"
        model.add_adapter(self.part, config)
        activate(model, [self.part, name], [self.part])
        for path, layer in lora_layers(model, self.part):
            if name in layer.scaling and layer.scaling[name] != layer.scaling[self.part]:
                raise ConfigError(
                    f"router: stacked: the set's scaling of {path} is {layer.scaling[name]:g} and its new part's "
                    f"{layer.scaling[self.part]:g}; keep adapter.lora_alpha / adapter.r"
                )

    def undo(self, model: PeftModel, name: str) -> PeftModel:
        """The model with set and part as one set, ``name``, and the only one active."""
        of_part = dict(lora_layers(model, self.part))
        extra = {
            path: (layer.lora_A[self.part].weight, layer.lora_B[self.part].weight) for path, layer in of_part.items()
        }
        for path, layer in lora_layers(model, name):
            own, added = layer.lora_B[name].bias, of_part[path].lora_B[self.part].bias
            if own is not None:
                own.data += added.data
        config = model.peft_config[name]
        append_factors(model, name, extra, Fraction(config.r + model.peft_config[self.part].r, config.r))
        activate(model, [name], [name])
        model.delete_adapter(self.part)
        activate(model, [name], [name])
        return model


def activate(model: PeftModel, active: Sequence[str], trained: Sequence[str]) -> None:
    """Make sets active together, the first of them the one that PEFT and the Trainer call the active one.

    Args:
        trained: those of them that have gradients.
    """
    model.set_adapter(active[0])
    if len(active) > 1:
        model.base_model.set_adapter(list(active))
    for _, layer in lora_layers(model):
        for factors in (layer.lora_A, layer.lora_B):
            for name, module in factors.items():
                if name in active:
                    module.requires_grad_(name in trained)


def trained_sets(model: PeftModel) -> list[str]:
    """The active sets that have gradients."""
    training = {
        name for _, layer in lora_layers(model) for name, module in layer.lora_A.items() if module.weight.requires_grad
    }
    active = list(model.active_adapters)
    return [name for name in active if name in training] if len(active) > 1 else active


@contextmanager
def keeping_active(model: Any) -> Iterator[None]:
    """Afterwards those sets are active, and have gradients, that are so now."""
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    trained = trained_sets(model) if len(active) > 1 else []
    try:
        yield
    finally:
        if len(active) > 1:
            activate(model, active, trained)
