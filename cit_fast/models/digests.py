"""Digests of models, for what is kept under them.

:func:`model_identity` reads the files of a model that is not loaded. :func:`model_digest` reads every byte of a live
one. :func:`fingerprint` reads sums and norms only, on the model's device: cheap enough for every stage, and enough to
tell weights before from weights after a training.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 8192
"""Rows of a weight that are held at a time."""


def model_digest(model: Any, tokenizer: Any, settings: str = "") -> str:
    """Digest of a live model's weights and its tokenizer, and of further settings that decide what it gives."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
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


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Digest that changes when weights are trained: of each tensor its name, dtype, sum and norm."""
    digest = hashlib.blake2b(digest_size=16)
    names, numbers = [], []
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            names.append(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}")
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            numbers += [tensor.sum(dtype=torch.float64), torch.linalg.vector_norm(tensor, dtype=wide).double()]
    digest.update("\n".join(names).encode())
    values = torch.stack([number.to(numbers[0].device) for number in numbers]).tolist() if numbers else []
    digest.update(repr(["nan" if math.isnan(value) else value for value in values]).encode())
    return digest.hexdigest()


_BLOCK, _BLOCKS = 1 << 20, 64


def model_identity(folder: Path, name: str) -> str:
    """Digest that changes when a model changes: its weights, its configuration, its tokenizer or its chat template.

    Files up to 64 MiB count whole; of a larger one, its size and 64 blocks of a mebibyte spread evenly over it, its
    beginning and its end among them.
    """
    digest = hashlib.sha256(name.encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        starts = {k * max(size - _BLOCK, 0) // (_BLOCKS - 1) for k in range(_BLOCKS)}
        with path.open("rb") as file:
            for start in sorted(starts if size > _BLOCKS * _BLOCK else range(0, size, _BLOCK)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
