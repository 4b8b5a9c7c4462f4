"""Weights that training goes on from, where a stage answers with others: those of an average of the whole stream.

    <stage>/live/<adapter set>.safetensors

They lie with the stage that trained the set last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cit_fast.errors import RunError

_FOLDER = "live"


def save_live_weights(folder: Path, adapter: str, weights: dict[str, Tensor] | None) -> None:
    """Write the live weights of the set that a stage has trained."""
    if weights is None:
        return
    path = folder / _FOLDER / f"{adapter}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


@torch.no_grad()
def take_up_live_weights(model: Any, folder: Path, adapter: str) -> dict[str, Tensor] | None:
    """Put the live weights that an earlier stage kept of a set into the model.

    Args:
        folder: of the stage that trained the set last.

    Returns:
        What the model held instead, by name; ``None`` where nothing was kept.

    Raises:
        RunError: a damaged file, or one of another model.
    """
    path = folder / _FOLDER / f"{adapter}.safetensors"
    if not path.is_file():
        return None
    try:
        live = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{path}: damaged ({error})") from None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if {name: tensor.shape for name, tensor in live.items()} != {name: p.shape for name, p in trained.items()}:
        raise RunError(f"{path}: holds weights of other shapes or names than the model trains")
    averages = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        parameter.copy_(live[name])
    return averages
