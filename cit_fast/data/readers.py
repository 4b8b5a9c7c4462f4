"""Readers: JSON and CSV files and ``datasets`` datasets as examples, in the formats of ``records.py``.

=========================  =============================================================================
``.json``                  an array of records, a Super-NI task file, or one record per line
``.jsonl``                 one record per line
``.csv``, ``.tsv``         a header and one record per row; every cell is the text that stands there
``.parquet``, ``.arrow``   tables, by the package ``datasets`` (see :mod:`cit_fast.data.sources`)
=========================  =============================================================================

Each of the first four may be compressed (``.gz``).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cit_fast.data.column_values import answer_names, plain_value, read_columns
from cit_fast.data.example import Example
from cit_fast.data.record_fields import ANSWER_OF, ReadOptions
from cit_fast.data.records import read_records, tell_format
from cit_fast.errors import DataError

_DELIMITERS = (",", ";", "\t")
_ROWS_AT_A_TIME = 1000
_PICTURES_AT_A_TIME = 50  # rows, whose bytes are in memory more than once while they are read


def read_file(path: str | Path, options: ReadOptions | None = None) -> list[Example]:
    """Read one ``.json``, ``.jsonl``, ``.csv`` or ``.tsv`` file (UTF-8, byte-order mark and CRLF accepted).

    A CSV file may have commas, semicolons or tabs between its cells, and blanks after them if its header has. The name
    ``.tsv`` means tabs where the header has one.

    Args:
        path: the file; one of another name is read as JSON.
        options: how to understand the records; the file's stem is the task name where it names none, and images lie
            beside the file where it says nothing else.

    Returns:
        The examples in file order, at least one; ``source`` of each says where it came from.

    Raises:
        DataError: the file is missing, empty or broken, or a record lacks a field or has one of a wrong type.
    """
    path = Path(path)
    options = options or ReadOptions()
    options = replace(options, task=options.task or stem(path), images=options.images or str(path.parent))
    return read_records(_records_of_file(path), options, where=str(path))


def kind(path: Path) -> str:
    """A data file's kind: its suffix in small letters, without a ``.gz`` behind it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else path.suffix.lower()


def stem(path: Path) -> str:
    """A file's name without the suffix that tells its kind, nor ``.gz`` behind it."""
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def read_dataset(
    dataset: Any, options: ReadOptions, *, where: str, indices: Sequence[int] | None = None
) -> list[Example]:
    """Bring rows of a ``datasets.Dataset`` to examples; class labels become their names, -1 no answer.

    Args:
        dataset: one split.
        options: how to understand the rows; images that are paths start from the working directory where it says
            nothing else.
        where: the dataset's name and split, for ``Example.source``.
        indices: the rows to read, in this order; ``None`` for all.

    Raises:
        DataError: no rows, or one that cannot be read.
    """
    return read_records(_records_of_dataset(dataset, options, where, indices), options, where=where)


def answer_labels(dataset: Any, options: ReadOptions, where: str) -> tuple[str, ...]:
    """The closed set of answers of a ``datasets.Dataset``: the classes of the column that its format answers from."""
    names = answer_names(dataset.features, options)
    if not names or not len(dataset):
        return names.get("output", ())
    data_format, _ = tell_format(_records_of_dataset(dataset, options, where), options)
    return names.get(ANSWER_OF.get(data_format, ""), ())


def _records_of_dataset(
    dataset: Any, options: ReadOptions, where: str, indices: Sequence[int] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a ``datasets.Dataset`` as records, each with its source; see :func:`read_dataset`."""
    features = read_columns(dataset.features, options)
    # As stored: images are not decoded before a model is shown them.
    stored = dataset.with_format("arrow")
    wanted = range(len(dataset)) if indices is None else indices
    size = _PICTURES_AT_A_TIME if "binary" in str(stored.features.arrow_schema) else _ROWS_AT_A_TIME
    for start in range(0, len(wanted), size):
        chunk = wanted[start : start + size]
        for index, row in zip(chunk, _rows(stored, chunk, where), strict=True):
            source = f"{where}: record {index + 1}"
            for column, feature in features.items():
                row[column] = plain_value(row[column], feature, f"{source}: {column!r}")
            yield source, row


def _rows(stored: Any, indices: Sequence[int], where: str) -> list[dict[str, Any]]:
    import pyarrow

    try:
        rows: list[dict[str, Any]] = stored[list(indices)].to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{where}: damaged ({' '.join(str(error).split())})") from error
    return rows


# -------------------------------------------------------------------------------------------------------- JSON


def _records_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    text = text_of_file(path)
    if not text.strip():
        raise DataError(f"{path}:1: the file is empty")
    if kind(path) in (".csv", ".tsv"):
        yield from _records_of_csv(path, text)
        return
    lines = text.split("\n")  # not splitlines: a JSON text may hold U+2028 and the like
    if kind(path) != ".jsonl":
        try:
            content = _json(text)
        except json.JSONDecodeError as error:
            first = next(line for line in lines if line.strip())
            if not (error.msg == "Extra data" and _is_object(first)):
                raise _broken_json(path, error.lineno, error) from None
            # One object per line under the name .json: read as lines below.
        except (ValueError, RecursionError) as error:
            raise _broken_json(path, 1, error) from None
        else:
            single = not isinstance(content, list)
            records = [content] if single else content
            yield from ((f"{path}: record {number}", record) for number, record in enumerate(records, 1))
            return
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = _json(line)
            except (ValueError, RecursionError) as error:
                raise _broken_json(path, number, error) from None
            yield f"{path}:{number}", record


def _json(text: str) -> Any:
    """A JSON value with its decimals as they are spelt, and NaN, which is no JSON, as the missing value that it is."""

    def constant(name: str) -> None:
        if name != "NaN":
            raise ValueError(f"{name} is no JSON value; write what is meant in quotes")

    return json.loads(text, parse_float=str, parse_constant=constant)


def text_of_file(path: Path) -> str:
    """The text of a regular UTF-8 file, unpacked if it ends in ``.gz``.

    Raises:
        DataError: no such file, a folder, pipe or device, or bytes that are no UTF-8.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may never end
            what = "a folder" if path.is_dir() else "no regular file"
            raise DataError(f"{path}:1: cannot be read ({what})")
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except FileNotFoundError:
        raise DataError(f"{path}:1: no such file") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}:1: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}:{line}: a null character, as of UTF-16; save the file as UTF-8")
    return text


def _broken_json(path: Path, line: int, error: Exception) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        return DataError(f"{path}:{line}: broken JSON at column {error.colno}: {error.msg}")
    reason = "nested too deep" if isinstance(error, RecursionError) else str(error).partition(";")[0]
    return DataError(f"{path}:{line}: cannot be read: {reason}")


def _is_object(line: str) -> bool:
    try:
        return isinstance(_json(line), dict)
    except (ValueError, RecursionError):
        return False


# --------------------------------------------------------------------------------------------------------- CSV


def _records_of_csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """One record per row; cells are texts, as they stand in the file."""
    delimiter, blanks = _dialect(text, kind(path))
    before = csv.field_size_limit(len(text) + 1)  # a cell may be as long as the file
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=blanks, strict=True)
        rows = _numbered(path, reader)
        header = next(rows)[1]
        named = [name for name in header if name]  # pandas writes the index under no name
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise DataError(f"{path}:1: two columns are called {twice[0]!r}; rename one")
        found = list(rows)
    finally:
        csv.field_size_limit(before)
    for line, cells in found:
        if len(cells) != len(header):
            raise DataError(
                f"{path}:{line}: {len(cells)} cells, but the header has {len(header)}; a cell that holds "
                f"{delimiter!r} or a new line must stand in double quotes"
            )
        yield f"{path}:{line}", {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _numbered(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its first line."""
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken CSV: {error}") from None


def _dialect(text: str, suffix: str) -> tuple[str, bool]:
    """The delimiter of the header, and whether blanks follow it."""
    header = next(line for line in text.split("\n") if line.strip())
    tabs = suffix == ".tsv" and "\t" in header
    delimiter = "\t" if tabs else max(_DELIMITERS, key=header.count)
    cells = header.split(delimiter)[1:]
    return delimiter, bool(cells) and all(cell.startswith(" ") for cell in cells)
