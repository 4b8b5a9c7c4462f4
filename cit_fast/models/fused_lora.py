"""LoRA layers of a PEFT model through :func:`cit_fast.ops.lora_linear`: same weights, same files, fewer passes.

PEFT computes ``result + lora_B(lora_A(dropout(x))) * scaling``, with the input copied to the adapter's dtype and the
sum copied back. The layers here are PEFT's own with another forward pass. What they do not compute themselves (DoRA, a
quantised base, a merged or disabled adapter, a mixed batch) goes PEFT's way, call by call.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from cit_fast.ops import lora_linear

logger = logging.getLogger(__name__)


def fuse_lora(model: nn.Module) -> int:
    """Let every plain LoRA layer of a PEFT model run as one op; undone by :func:`unfuse_lora`.

    Parameters, their names, state dicts, saving, merging and adding adapters stay PEFT's. Call it again after
    ``add_adapter`` if the new set reaches layers that had none. Layers that keep PEFT's path are logged once.

    Args:
        model: any module that holds PEFT's LoRA layers; changed in place.

    Returns:
        How many layers are fused.
    """
    kept: Counter[str] = Counter()
    fused = 0
    for module in model.modules():
        if not isinstance(module, Linear) or type(module) not in (Linear, FusedLoraLinear):
            continue
        reason = _never(module)
        if reason is None:
            module.__class__ = FusedLoraLinear
            fused += 1
        else:
            kept[reason] += 1
    for reason, count in kept.items():
        logger.info("%d LoRA layers keep PEFT's path: %s", count, reason)
    return fused


def unfuse_lora(model: nn.Module) -> int:
    """Give the layers that :func:`fuse_lora` changed PEFT's forward pass back; returns how many they were."""
    fused = [module for module in model.modules() if type(module) is FusedLoraLinear]
    for module in fused:
        module.__class__ = Linear
    return len(fused)


@contextmanager
def adapters_cast_once(model: nn.Module) -> Iterator[None]:
    """Inside, fused layers keep A and B in the dtype of their input; nobody may change or train a set meanwhile.

    A step of generation otherwise spends a seventh of its time on casting them.
    """
    fused = [module for module in model.modules() if isinstance(module, FusedLoraLinear)]
    for module in fused:
        module.cast = {}
    try:
        yield
    finally:
        for module in fused:
            module.cast = None


class FusedLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA on a linear layer, with the update in one op where it is plain LoRA."""

    cast: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] | None = None
    """A and B of sets in dtypes, while they do not change; see :func:`adapters_cast_once`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, up to rounding."""
        names = [] if args or kwargs or self.disable_adapters or self.merged else self._plain_adapters(x)
        if not names:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base = self.base_layer
        # Under autocast the base layer would cast its input as well.
        x = x.to(base.weight.dtype)
        bias = base.bias
        for name in names:
            extra = self.lora_B[name].bias
            if extra is not None:
                update = (extra * self.scaling[name]).to(x.dtype)
                bias = update if bias is None else bias + update
        first = names[0]
        if len(names) == 1:
            (a, b), scaling = self._factors(first, x.dtype), self.scaling[first]
        else:
            # Several sets at once are one of their ranks' sum.
            a = torch.cat([self.lora_A[name].weight for name in names])
            b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in names], dim=1)
            scaling = 1.0
        dropout = _dropout(self.lora_dropout[first])
        return lora_linear(x, base.weight, a, b, bias, scaling=scaling, dropout=dropout)

    def _factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if self.cast is None:
            return a, b
        if (name, dtype) not in self.cast:
            self.cast[name, dtype] = a.to(dtype), b.to(dtype)
        return self.cast[name, dtype]

    def _plain_adapters(self, x: Tensor) -> list[str]:
        """The active sets of this layer, if the op computes what PEFT would; else none."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        if not names or type(base) is not nn.Linear or _watched(base) or base.weight.requires_grad:
            return []
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if base.weight.dtype != dtype or not x.is_floating_point() or x.numel() == 0:
            return []
        for name in names:
            down, up = self.lora_A[name], self.lora_B[name]
            if name in self.lora_variant or _watched(down) or _watched(up):
                return []
            if hasattr(down.weight, "ds_id"):  # DeepSpeed ZeRO-3 gathers weights as their module is called
                return []
        # Several sets draw one after the other, each its own dropout.
        return names if len(names) == 1 or not any(_dropout(self.lora_dropout[name]) for name in names) else []


def _never(layer: Linear) -> str | None:
    """Why no call of this layer can be fused."""
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return f"their base is {type(base).__name__}"
    if not base.weight.is_floating_point():
        return f"their base's weights are {str(base.weight.dtype).removeprefix('torch.')}"
    variants = {type(variant).__name__ for variant in layer.lora_variant.values()}
    if variants and set(layer.lora_variant) >= set(layer.lora_A):
        return f"{', '.join(sorted(variants))}"
    return None


def _watched(module: nn.Module) -> bool:
    """Whether somebody waits for this module to be called: a hook, or offloading, which replaces its forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or hasattr(module, "_hf_hook")


def _dropout(module: nn.Module) -> float:
    return float(module.p) if isinstance(module, nn.Dropout) and module.training else 0.0
