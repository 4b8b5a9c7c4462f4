"""Writes that are whole or not there: a reader, or a run resumed after a kill, never sees half a file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from cit_fast.errors import RunError


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary neighbour and one rename; folders are made as needed.

    Text becomes UTF-8, lone surrogates as ``\\udXXX``, which is how JSON spells them.

    Raises:
        RunError: the disk is full or the place cannot be written; an earlier file is left as it was.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN is an error, not a word no other reader knows."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def sync_tree(folder: Path) -> None:
    """Flush every file below ``folder`` to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def link_tree(source: Path, target: Path) -> None:
    """Make ``target`` the same tree of files as ``source``: hard links, or copies where there are none.

    For files that are replaced as a whole or not at all, as everything here is written.
    """

    def link(one: str, other: str) -> str:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)
        return other

    shutil.copytree(source, target, copy_function=link)


def commit_folder(temporary: Path, final: Path) -> None:
    """Make a finished temporary folder visible under its name by one rename.

    A folder already there is replaced; a kill between the two renames leaves no folder, never a mixture.
    """
    sync_tree(temporary)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        old = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.old")
        final.rename(old)
        shutil.rmtree(old)
    temporary.rename(final)
    _sync_folder(final.parent)


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, is a full disk (safetensors and torch wrap it in errors of their own)."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            return True
        text = str(current)
        if any(sign in text for sign in ("No space left", "os error 28", "Disk quota", "failed writing file")):
            return True
        current = current.__cause__ or current.__context__
    return False
