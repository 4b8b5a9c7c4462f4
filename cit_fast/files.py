"""Atomic writes: a reader, or a run resumed after a kill, never sees half a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` for a library to write; it takes the path's place when the block is left.

    Raises:
        RunError: the disk is full or the place cannot be written; an earlier file is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN is an error, not a word no other reader knows."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


_CHECKSUM = "checksum"


def write_checked_json(path: Path, value: Mapping[str, Any]) -> None:
    """:func:`write_json` of an object, with a checksum of the rest under ``checksum``."""
    write_json(path, {**value, _CHECKSUM: _checksum(value)})


def read_checked_json(path: Path, *, check: bool = True) -> dict[str, Any]:
    """What :func:`write_checked_json` wrote. An object without a checksum is taken as it is.

    Args:
        check: whether a checksum that does not match is an error.

    Raises:
        FileNotFoundError: no such file.
        RunError: it cannot be read, is no JSON object, or is not what was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged ({str(error) or 'nested too deep'})") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: damaged (a JSON object was expected, not {type(value).__name__})")
    written = value.pop(_CHECKSUM, None)
    if check and written is not None and written != _checksum(value):
        raise RunError(
            f"{path}: damaged (its checksum is that of another content; where it was changed on purpose, remove the "
            f"key {_CHECKSUM!r})"
        )
    return value


def _checksum(value: Mapping[str, Any]) -> str:
    plain = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(json.dumps(json.loads(plain), sort_keys=True).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tree_checksums(folder: Path) -> dict[str, str]:
    """The checksum of every file below ``folder``, by its path there with ``/`` between the names."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_checksum(path) for path in files}


def damaged_files(folder: Path, checksums: Mapping[str, str], below: str = "") -> dict[str, str]:
    """Which files are not what was written, by their paths in ``folder``, with the reason.

    Args:
        checksums: as :func:`tree_checksums` gives them; where there are none, nothing is known to be damaged.
        below: look only at paths that start with this.
    """
    found = {}
    for name, checksum in checksums.items():
        if not name.startswith(below):
            continue
        try:
            if file_checksum(folder / name) != checksum:
                found[name] = "its content has changed"
        except FileNotFoundError:
            found[name] = "it is not there"
        except OSError as error:
            found[name] = error.strerror or str(error)
    return found


def tree_bytes(folder: Path) -> int:
    """Of all files below; one that has several names counts once."""
    sizes = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found = path.stat()
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def sync_tree(folder: Path) -> None:
    """Flush every file below ``folder`` to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` to fill; it appears under that name, whole, when the block is left.

    What killed processes left of their own such folders is removed: each is locked by who fills it.
    """
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError), _locked(leftover):
            shutil.rmtree(leftover)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        with _locked(temporary):
            yield temporary
            commit_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder until the block is left or the process ends; OSError where another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


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
