"""RMSNorm of a transformers model in one pass each on a CPU: same weights, same files, fewer passes.

The layers are transformers' own with another forward pass. Whether a class computes what :func:`cit_fast.ops.rms_norm`
computes is tried on a few rows, not read from its name. On other devices, under autocast and in compiled graphs the
layers run as they are: there others have kernels for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cit_fast.ops import rms_norm
from cit_fast.ops.backends import Backend, available_backends, forced_backend
from cit_fast.ops.rms_norm.native import DTYPES

_ROWS = 3
_NEAR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def fuse_norms(model: nn.Module) -> int:
    """Let the RMSNorms of a model run in one pass each; undone by :func:`unfuse_norms`.

    Args:
        model: any module, PEFT's wrappers included; changed in place, parameters and their names stay.

    Returns:
        How many are fused; 0 where the C++ kernels are not there.
    """
    if not available_backends()["native"].available:
        return 0
    fused: dict[type, type | None] = {}  # of every class in this model
    changed = 0
    for module in model.modules():
        if isinstance(module, FusedNorm) or not _may_be_norm(module):
            continue
        own = type(module)
        if own not in fused:
            tried = [_fused(own, from_one) for from_one in (False, True)]
            fused[own] = next((each for each in tried if _same(module, each)), None)
        found = fused[own]
        if found is not None:
            module.__class__ = found
            changed += 1
    return changed


def unfuse_norms(model: nn.Module) -> int:
    """Give the layers that :func:`fuse_norms` changed their own forward pass back; returns how many they were."""
    fused = [module for module in model.modules() if isinstance(module, FusedNorm)]
    for module in fused:
        module.__class__ = module.own
    return len(fused)


class FusedNorm(nn.Module):
    """Goes before a class of RMSNorm."""

    own: type
    from_one: bool
    weight: nn.Parameter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the class's own, within rounding."""
        if args or kwargs or not self._takes(x):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        return rms_norm(x, self.weight, _eps(self), from_one=self.from_one)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a module of its own class, fused again where it is read: no file can name a class that is made here."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _read, (self.own, self.from_one), *reduced[2:]

    def _takes(self, x: Tensor) -> bool:
        """Whether the C++ kernel takes this here."""
        return (
            not torch.compiler.is_compiling()
            and x.device.type == "cpu"
            and x.dtype in DTYPES
            and x.dtype == self.weight.dtype
            and x.shape[-1:] == self.weight.shape
            and type(x) is type(self.weight.data) is Tensor
            and not torch.is_autocast_enabled("cpu")
            and forced_backend() in (None, Backend.NATIVE)
        )


_classes: dict[tuple[type, bool], type] = {}


def _fused(own: type, from_one: bool) -> type:
    if (own, from_one) not in _classes:
        names = {"__module__": own.__module__, "own": own, "from_one": from_one}
        _classes[own, from_one] = type(f"Fused{own.__name__}", (FusedNorm, own), names)
    return _classes[own, from_one]


def _read(own: type, from_one: bool) -> nn.Module:
    """An empty module of a class, fused where the C++ kernels are there."""
    found: Any = _fused(own, from_one) if available_backends()["native"].available else own
    module: nn.Module = found.__new__(found)
    return module


def _eps(module: Any) -> float:
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


def _may_be_norm(module: Any) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (isinstance(weight, nn.Parameter) and isinstance(eps, float) and "RMSNorm" in type(module).__name__):
        return False
    alone = weight.dim() == 1 and weight.numel() > 0 and len(list(module.parameters())) == 1
    return alone and weight.device.type == "cpu" and weight.dtype in DTYPES


@torch.no_grad()
def _same(module: nn.Module, fused: type) -> bool:
    """Whether the module gives the same for a few rows with another class."""
    own = type(module)
    weight: Any = module.weight
    x = 2 * torch.randn(_ROWS, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        right = module(x)
        module.__class__ = fused
        found = module(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False  # it wants more than rows
    finally:
        module.__class__ = own
    if not isinstance(right, Tensor) or found.shape != right.shape or found.dtype != right.dtype:
        return False
    size = right.float().abs().amax().clamp(min=1e-6)
    return bool((found.float() - right.float()).abs().amax() <= _NEAR[right.dtype] * size)
