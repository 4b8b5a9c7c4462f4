"""Embeddings kept on disk by content, for any embedder and any number of processes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from cit_fast.files import write_file

if TYPE_CHECKING:
    from cit_fast.embeddings.embedder import Embedder

_log = logging.getLogger(__name__)
_KEY_BYTES = 32
_ROWS_PER_FILE = 1024


class CachedEmbedder:
    """Wraps an embedder so that it embeds each text once.

    A text's key is the BLAKE2b digest of the embedder's name and of the text. Files hold up to 1024 keys and points
    each, in a folder per embedder, and are called by the digest of their own content: processes that write at the same
    time cannot get into each other's way, and damage shows. What is damaged is dropped and embedded anew. The work of
    a call that is killed is kept up to its last full file.

    Args:
        embedder: what embeds.
        folder: of the cache; made as needed, and shared by any number of embedders and processes.
    """

    def __init__(self, embedder: Embedder, folder: str | Path) -> None:
        self._embedder, self.name = embedder, embedder.name
        self._folder = Path(folder) / hashlib.blake2b(self.name.encode(), digest_size=16).hexdigest()
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._known: set[Path] = set()

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The texts as [texts, d] float32 on the CPU, from the cache where they are in it.

        Raises:
            RunError: the cache cannot be written.
            DataError: as the embedder raises; an index is that among the texts which are not in the cache.
        """
        if not texts:
            return self._embedder.embed(texts)
        keys = [self._key(text) for text in texts]
        self._find_new_files()
        points = self._read(keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in points}
        order = list(missing)
        for start in range(0, len(order), _ROWS_PER_FILE):
            some = order[start : start + _ROWS_PER_FILE]
            rows = self._embedder.embed([missing[key] for key in some])
            self._write(some, rows)
            points.update(zip(some, rows.unbind(), strict=True))
        return torch.stack([points[key] for key in keys])

    def _key(self, text: str) -> bytes:
        content = f"{self.name}\0{text}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()

    def _find_new_files(self) -> None:
        for path in sorted(set(self._folder.glob("[!.]*.safetensors")) - self._known):
            self._known.add(path)
            try:
                with safe_open(path, "pt") as file:
                    keys = file.get_tensor("keys")
            except (OSError, SafetensorError) as error:
                self._drop(path, f"{error}")
            else:
                self._places.update((bytes(key), (path, row)) for row, key in enumerate(keys.numpy()))

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        wanted: dict[Path, list[tuple[bytes, int]]] = {}
        for key in dict.fromkeys(keys):
            if key in self._places:
                path, row = self._places[key]
                wanted.setdefault(path, []).append((key, row))
        points: dict[bytes, Tensor] = {}
        for path, rows in wanted.items():
            try:
                content = path.read_bytes()
            except OSError as error:
                self._drop(path, f"{error}")
                continue
            if _digest(content) != path.stem:
                self._drop(path, "its content is not what its name says")
                continue
            stored = load(content)["points"]
            points.update((key, stored[row]) for key, row in rows)
        return points

    def _write(self, keys: Sequence[bytes], rows: Tensor) -> None:
        packed = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, _KEY_BYTES)
        content = save({"keys": packed, "points": rows.contiguous()})
        path = self._folder / f"{_digest(content)}.safetensors"
        write_file(path, content)
        self._known.add(path)
        self._places.update((key, (path, row)) for row, key in enumerate(keys))

    def _drop(self, path: Path, reason: str) -> None:
        _log.warning("%s: damaged, its embeddings are made anew (%s)", path, reason)
        with contextlib.suppress(OSError):  # the folder may be another user's
            path.unlink()
        self._known.discard(path)
        self._places = {key: place for key, place in self._places.items() if place[0] != path}


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
