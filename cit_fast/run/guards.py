"""What a stage must not do, and what it should have done: base weights as they were, trained ones moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cit_fast.errors import RunError

_NAMED = 3  # layers in a note


class FrozenWeights:
    """Every weight as it was before a stage's adapter set was made, to see what a stage has changed.

    Args:
        model: with the adapter sets of earlier stages.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self._before = {id(p): (p, _sums(p)) for p in model.parameters()}

    @torch.no_grad()
    def check(self, model: nn.Module, where: str) -> None:
        """See that nothing has changed what is not trained.

        Raises:
            RunError: the first weight that is another one.
        """
        for name, parameter in model.named_parameters():
            _, before = self._before.get(id(parameter), (None, None))
            if before is not None and not parameter.requires_grad and not _equal(before, _sums(parameter)):
                raise RunError(
                    f"{where}: {name}, which is not trained, has changed; other adapter sets and the base model would "
                    "answer differently, so this kind of adapter cannot be used here"
                )


class TrainedWeights:
    """Every weight that trains as it was before the first step."""

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self._before = {name: _sums(p) for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def notes(self, model: nn.Module) -> list[str]:
        """One sentence where layers have not moved: they had no gradients, or the learning rate is 0."""
        now = dict(model.named_parameters())
        moved: dict[str, bool] = {}
        for name, before in self._before.items():
            layer = name.partition(".lora_")[0]  # one factor of LoRA moves later than the other
            moved[layer] = moved.get(layer, False) or not _equal(before, _sums(now[name]))
        still = [layer for layer, has in moved.items() if not has]
        if not still:
            return []
        named = ", ".join(still[:_NAMED]) + (", ..." if len(still) > _NAMED else "")
        return [f"{len(still)} of {len(moved)} trained layers have not moved: {named}."]


def _sums(parameter: Any) -> Tensor:
    """[2] float64: changes when training changes the tensor."""
    tensor = parameter.detach()
    if not tensor.is_floating_point():  # packed bits of quantised weights
        tensor = tensor.float()
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.stack([tensor.sum(dtype=torch.float64), torch.linalg.vector_norm(tensor, dtype=wide).double()])


def _equal(before: Tensor, now: Tensor) -> bool:
    return torch.equal(before.to(now.device), now) or bool((before.isnan() & now.isnan()).all())
