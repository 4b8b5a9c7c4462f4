"""LoRA layers of a PEFT model through :func:`cit_fast.ops.lora_linear`: same weights, same files, fewer passes.

PEFT computes ``result + lora_B(lora_A(dropout(x))) * scaling``, with the input copied to the adapter's dtype and the
sum copied back. The layers here are PEFT's own with another forward pass. What they do not compute themselves (DoRA, a
quantised base, a merged or disabled adapter, a mixed batch) goes PEFT's way, call by call.

Layers of one module that read the same input (:data:`SIBLINGS`) are computed together when the first of them is
called; the others then give what is there, if they are called with that input and nothing has changed. One backward
pass is theirs together: who calls them one by one, outside their module, and takes a gradient of each, calls
:func:`unfuse_lora` first.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from cit_fast.models.wrappers import unwrap
from cit_fast.ops import lora_linear, lora_linears

logger = logging.getLogger(__name__)
_SAID: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()  # of each base model

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Names of layers that read the same input, in the order in which models call them."""


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
        if not isinstance(module, LoraLayer):
            continue
        plain = isinstance(module, Linear) and type(module) in (Linear, FusedLoraLinear)
        reason = _never(module) if plain else f"they are {type(module).__module__}.{type(module).__name__}"
        if reason is None:
            module.__class__ = FusedLoraLinear
            fused += 1
        else:
            kept[reason] += 1
    _introduce(model)
    said = _SAID.setdefault(unwrap(model), set())
    for reason, count in kept.items():
        if reason not in said:
            logger.info("%d LoRA layers keep PEFT's path: %s", count, reason)
            said.add(reason)
    return fused


def unfuse_lora(model: nn.Module) -> int:
    """Give the layers that :func:`fuse_lora` changed PEFT's forward pass back; returns how many they were."""
    fused = [module for module in model.modules() if type(module) is FusedLoraLinear]
    for module in fused:
        module.__class__ = Linear
        module.siblings = None
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
            if module.siblings is not None:
                module.siblings.forget()


class FusedLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA on a linear layer, with the update in one op where it is plain LoRA."""

    cast: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] | None = None
    """A and B of sets in dtypes, while they do not change; see :func:`adapters_cast_once`."""
    siblings: Siblings | None = None
    """The layers that read the same input as this one, itself among them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, up to rounding."""
        names = [] if args or kwargs or self.disable_adapters or self.merged else self._plain_adapters(x)
        if not names:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        if self.siblings is not None and not torch.compiler.is_compiling():
            found = self.siblings.output(self, x)
            if found is not None:
                return found
        # Under autocast the base layer would cast its input as well.
        x = x.to(self.base_layer.weight.dtype)
        a, b, bias, scaling = self._update(names, x.dtype)
        dropout = _dropout(self.lora_dropout[names[0]])
        return lora_linear(x, self.base_layer.weight, a, b, bias, scaling=scaling, dropout=dropout)

    def _update(self, names: Sequence[str], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """A, B, bias and scaling of these sets; several at once are one of their ranks' sum."""
        bias = self.base_layer.bias
        for name in names:
            extra = self.lora_B[name].bias
            if extra is not None:
                update = (extra * self.scaling[name]).to(dtype)
                bias = update if bias is None else bias + update
        if len(names) == 1:
            return *self._factors(names[0], dtype), bias, self.scaling[names[0]]
        a = torch.cat([self.lora_A[name].weight for name in names])
        b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in names], dim=1)
        return a, b, bias, 1.0

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


class Siblings:
    """Layers of one module that read the same input, computed together.

    What is computed and not yet asked for belongs to the thread that computed it. The layers are known weakly: they
    live as long as their module does.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: Sequence[FusedLoraLinear]) -> None:
        self.__setstate__({"layers": layers, "apart": False})

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": [layer() for layer in self._layers], "apart": self._apart}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layers = tuple(map(weakref.ref, state["layers"]))
        self._apart: bool = state["apart"]
        self._pending = _Pending()

    def forget(self) -> None:
        """Let go of what nobody has asked for."""
        self._pending.input, self._pending.outputs = None, {}

    def output(self, layer: FusedLoraLinear, x: Tensor) -> Tensor | None:
        """What a layer gives for ``x``; ``None`` where it has to compute it alone."""
        layers = [each() for each in self._layers]
        at = next((k for k, each in enumerate(layers) if each is layer), None)  # none: a replica of it
        if self._apart or at is None:
            return None
        pending = self._pending
        if at == 0:
            self.forget()
            found = self._together([each for each in layers if each is not None], x)
            if found is None:
                return None
            pending.input, pending.outputs = weakref.ref(x), dict(enumerate(found))
            pending.states = [_state(each, x) for each in layers if each is not None]
        elif pending.input is not None and pending.input() is not x:
            self._apart = True  # they do not read the same input after all
            self.forget()
        elif pending.outputs and pending.states[at] != _state(layer, x):
            self.forget()
        return pending.outputs.pop(at, None)

    def _together(self, layers: Sequence[FusedLoraLinear], x: Tensor) -> tuple[Tensor, ...] | None:
        if len(layers) < len(self._layers):
            return None
        of_each, dtype = [], layers[0].base_layer.weight.dtype
        for layer in layers:
            if layer is not layers[0] and (_watched(layer) or layer.disable_adapters or layer.merged):
                return None
            names = layer._plain_adapters(x)
            if not names or any(_dropout(layer.lora_dropout[name]) for name in names):
                return None  # each has a dropout of its own
            of_each.append((layer.base_layer.weight, *layer._update(names, dtype)))
        weights, a, b, biases, scalings = zip(*of_each, strict=True)
        if len({each.dtype for each in (*a, *b)}) > 1 or len({each.device for each in (*weights, *a, x)}) > 1:
            return None
        return lora_linears(x.to(dtype), weights, a, b, biases, scalings=scalings)


class _Pending(threading.local):
    """The input of the last call of the first layer, and the outputs that the others have not asked for."""

    def __init__(self) -> None:
        self.input: weakref.ref[Tensor] | None = None
        self.outputs: dict[int, Tensor] = {}
        self.states: list[tuple[Any, ...]] = []
        """Of each layer, see :func:`_state`."""


def _state(layer: FusedLoraLinear, x: Tensor) -> tuple[Any, ...]:
    """What a layer's output depends on, beside which input it is."""
    if layer.cast is not None:  # nobody changes anything meanwhile, and a step of generation is short
        return None if x.is_inference() else x._version, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    tensors = [x, layer.base_layer.weight, layer.base_layer.bias]
    for name in names:
        tensors += [layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_B[name].bias]
    versions = [None if each is None or each.is_inference() else each._version for each in tensors]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), layer.training
    scalings = [layer.scaling[name] for name in names]
    return (names, scalings, list(map(id, tensors)), versions, modes, layer.disable_adapters, bool(layer.merged))


def _introduce(model: nn.Module) -> None:
    """Let the fused layers of each module know those that read the same input."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    apart = any(getattr(config, "is_encoder_decoder", False) for config in configs)
    for path, module in model.named_modules():
        layers = {name: child for name, child in module.named_children() if isinstance(child, FusedLoraLinear)}
        for layer in layers.values():
            layer.siblings = None
        # Cross-attention reads two inputs; a layer that takes keys and values from another does not call its own.
        if apart or "cross" in path.lower() or getattr(module, "is_kv_shared_layer", False):
            continue
        for names in SIBLINGS:
            found = [layers[name] for name in names if name in layers]
            if len(found) > 1 and len({layer.in_features for layer in found}) == 1:
                siblings = Siblings(found)
                for layer in found:
                    layer.siblings = siblings


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
    """Whether somebody waits for this module to be called: a hook, or who replaced its forward pass (offloading)."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__ or hasattr(module, "_hf_hook")


def _dropout(module: nn.Module) -> float:
    return float(module.p) if isinstance(module, nn.Dropout) and module.training else 0.0
