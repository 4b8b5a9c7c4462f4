"""Digests of live models and tokenizers: what embeddings are kept under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS = 8192
"""Rows of a weight that are held at a time."""


def model_digest(model: Any, tokenizer: Any) -> str:
    """Identifies a model with its weights and its tokenizer."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        hash_tensor(digest, value)
    digest.update(tokenizer_content(tokenizer))
    return digest.hexdigest()


def hash_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed a tensor's shape, dtype and bytes to a digest, :data:`ROWS` rows at a time."""
    digest.update(f"\0{list(tensor.shape)} {tensor.dtype}\0".encode())
    for rows in _blocks(tensor.detach()):
        digest.update(rows.cpu().contiguous().view(torch.uint8).numpy())


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(1) if tensor.dim() == 0 else tensor
    for start in range(0, len(flat), ROWS):
        yield flat[start : start + ROWS]


def tokenizer_content(tokenizer: Any) -> bytes:
    """The tokenizer's content as bytes, without the padding and truncation that its last call left."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        content = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")
        }
    return json.dumps(content, sort_keys=True).encode()
