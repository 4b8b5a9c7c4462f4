"""The protocol of embedders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Embedder(Protocol):
    """Turns texts into points."""

    @property
    def name(self) -> str:
        """Identifies the model with its weights: equal names embed a text alike, so caches go by it."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The texts as [texts, d] float32 on the CPU."""
