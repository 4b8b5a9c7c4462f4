"""Readers: JSON files and ``datasets`` datasets as examples, in the formats of ``records.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cit_fast.data.example import Example
from cit_fast.data.records import FIELDS, ReadOptions, read_records
from cit_fast.errors import DataError


def read_file(path: str | Path, options: ReadOptions | None = None) -> list[Example]:
    """Read one ``.json`` or ``.jsonl`` file (UTF-8, byte-order mark and CRLF accepted).

    Args:
        path: an array of records, one record per line, or a Super-NI task file.
        options: how to understand the records; the file's stem is the task name where it names none.

    Returns:
        The examples in file order, at least one; ``source`` of each says where it came from.

    Raises:
        DataError: the file is missing, empty or broken, or a record lacks a field or has one of a wrong type.
    """
    path = Path(path)
    options = options or ReadOptions()
    if not options.task:
        options = replace(options, task=path.stem)
    return read_records(_records_of_file(path), options, where=str(path))


def read_dataset(
    dataset: Any, options: ReadOptions, *, where: str, indices: Sequence[int] | None = None
) -> list[Example]:
    """Bring rows of a ``datasets.Dataset`` to examples; class labels become their names.

    Args:
        dataset: one split.
        options: how to understand the rows.
        where: the dataset's name and split, for ``Example.source``.
        indices: the rows to read, in this order; ``None`` for all.

    Raises:
        DataError: no rows, or one that cannot be read.
    """
    used = FIELDS.union(options.columns.values())  # another column may well be unlabelled
    names = {column: labels for column, labels in class_names(dataset).items() if column in used}

    def rows() -> Iterator[tuple[str, Any]]:
        for index in range(len(dataset)) if indices is None else indices:
            source, row = f"{where}: record {index + 1}", dict(dataset[index])
            for column, labels in names.items():
                if row[column] is not None and not 0 <= row[column] < len(labels):
                    raise DataError(f"{source}: {column!r} has no label ({row[column]}); is this split unlabelled?")
                row[column] = None if row[column] is None else labels[row[column]]
            yield source, row

    return read_records(rows(), options, where=where)


def class_names(dataset: Any) -> dict[str, tuple[str, ...]]:
    """The names of the classes of every class-label column of a ``datasets.Dataset``."""
    return {column: tuple(feature.names) for column, feature in dataset.features.items() if hasattr(feature, "int2str")}


def _records_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    text = _text_of_file(path)
    lines = text.split("\n")  # not splitlines: a JSON text may hold U+2028 and the like
    if not text.strip():
        raise DataError(f"{path}:1: the file is empty")
    if path.suffix != ".jsonl":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            if not (error.msg == "Extra data" and _is_object(lines[0])):
                raise _broken_json(path, error.lineno, error) from None
            # One object per line under the name .json: read as lines below.
        else:
            single = not isinstance(content, list)
            records = [content] if single else content
            yield from ((f"{path}: record {number}", record) for number, record in enumerate(records, 1))
            return
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise _broken_json(path, number, error) from None
            yield f"{path}:{number}", record


def _text_of_file(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}:1: no such file") from None
    except OSError as error:
        raise DataError(f"{path}:1: cannot be read ({error.strerror})") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _broken_json(path: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(f"{path}:{line}: broken JSON at column {error.colno}: {error.msg}")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False
