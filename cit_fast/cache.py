"""JSON objects kept on disk by what they are of: answers of a chat model, key parts that were discovered, distances."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from cit_fast.errors import RunError
from cit_fast.files import read_checked_json, write_checked_json


def cache_folder() -> Path:
    """``$CIT_FAST_CACHE``, else ``$XDG_CACHE_HOME/cit-fast``, else ``~/.cache/cit-fast``."""
    if "CIT_FAST_CACHE" in os.environ:
        return Path(os.environ["CIT_FAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cit-fast"


class JsonCache:
    """A file per key, in a folder per setting. What is damaged, or of another key, is not there.

    Args:
        folder: shared by any number of caches and processes, made as needed; ``None``: nothing is kept.
        setting: all that decides a value beside its key, as plain JSON values.
    """

    def __init__(self, folder: Path | None, setting: Mapping[str, Any]) -> None:
        self.setting = dict(setting)
        self.folder = None if folder is None else folder / _digest(json.dumps(self.setting, sort_keys=True))

    def get(self, key: str) -> dict[str, Any] | None:
        """What was put there under this key."""
        if self.folder is None:
            return None
        try:
            found = read_checked_json(self._path(self.folder, key))
        except (OSError, RunError):
            return None
        return found if found.get("key") == key else None

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep an object of plain JSON values; its keys are not ``key`` and ``setting``.

        Raises:
            RunError: the folder cannot be written.
        """
        if self.folder is not None:
            write_checked_json(self._path(self.folder, key), {**value, "key": key, "setting": self.setting})

    def forget(self, key: str) -> None:
        """Keep it no longer."""
        if self.folder is not None:
            self._path(self.folder, key).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Of several processes that would work out the same, one does and the others find it.

        Raises:
            RunError: the folder cannot be made or locked.
        """
        if self.folder is None:
            yield
            return
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise RunError(f"{self.folder}: nothing can be kept there ({error.strerror or error})") from error
        try:
            yield
        finally:
            lock.release()

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / f"{_digest(key)}.json"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
