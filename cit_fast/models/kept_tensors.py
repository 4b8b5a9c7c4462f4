"""Tensors that a stage leaves for its resumed part or a later stage: a safetensors file that knows what it is of."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from cit_fast.files import replacing

_log = logging.getLogger(__name__)


def write_tensors(path: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, whole or not at all.

    Args:
        key: a digest of all that decides them.
    """
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={"key": key, "content": _content(plain)})


def read_tensors(path: Path, key: str | None, check: bool = False) -> dict[str, Tensor] | None:
    """The tensors, mapped from the file; ``None``: no file, a damaged one, or one of something else.

    Args:
        key: what they were written with; ``None``: whatever it was.
        check: compare what is there with what was written; for a file that this process did not write itself.
    """
    try:
        with safe_open(path, "pt") as file:
            written = file.metadata() or {}
            if key is not None and written.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            if check and _content(tensors) != written.get("content"):
                raise SafetensorError("its content has changed")
            return tensors
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        _log.warning("%s: damaged, made anew (%s)", path, error)
        return None


def _content(tensors: Mapping[str, Tensor]) -> str:
    """Digest of all tensors' names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(uint8).numpy().data)
    return digest.hexdigest()
