"""Folders of data: which of their files is which split, and what counts as one task."""

from __future__ import annotations

import glob
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cit_fast.data.readers import kind, stem, text_of_file
from cit_fast.errors import DataError

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "dev": ("dev", "eval", "validation", "valid", "val"),
    "test": ("test",),
}
_LABELS = "labels.json"
_SAVED = ("dataset_dict.json", "state.json")  # marks of a dataset saved by save_to_disk
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # file suffix -> builder of `datasets`
_KINDS = {".json", ".jsonl", ".csv", ".tsv", *_TABLES}
_SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?$")  # train-00000-of-00002.parquet


def tasks_below(path: Path) -> list[Path]:
    """The path itself where it is one task, else the files and folders in it that are tasks.

    Raises:
        DataError: a folder without data, or a link in it to a file that is gone.
    """
    if not path.is_dir() or _is_task_folder(path):
        return [path]
    inside = sorted(path.iterdir())
    tasks = [each for each in inside if _is_data_file(each) or (each.is_dir() and _is_task_folder(each))]
    _check_links(tasks)
    if not tasks:
        raise DataError(
            f"{path}: no tasks in it: no data files ({', '.join(sorted(_KINDS))}), no folders with a train file"
        )
    return tasks


def split_files(folder: Path, splits: Mapping[str, str]) -> dict[str, list[Path]]:
    """Split -> its file in a folder, or its shards in their order.

    Args:
        folder: with one file or one set of shards per split, itself or in its sub-folder ``data``.
        splits: split -> the stem of its file; of a split without one the usual names.

    Raises:
        DataError: no file for a split that is asked for, two that could be one, none at all, a shard that is missing,
            or a link to a file that is gone.
    """
    there = _data_files(folder)
    found: dict[str, list[Path]] = {}
    for split, names in wanted(splits).items():
        by_name = {name: [f for f in there if _split_name(f) == name.lower()] for name in names}
        matches = [files for files in by_name.values() if files]
        alike = [file for files in matches for file in files if _SHARD.search(stem(file)) is None]
        if len(matches) > 1 or len(alike) > 1:
            one, other = (matches[0][0], matches[1][0]) if len(matches) > 1 else alike[:2]
            raise DataError(
                f"{folder}: both {one.name} and {other.name} could be the {split} split; "
                "name one with splits, or remove one"
            )
        if matches:
            _check_links(matches[0])
            _check_shards(matches[0])
            found[split] = matches[0]
        elif split in splits:
            raise DataError(f"{folder}: no file {splits[split]!r} for the {split} split; {_listing(there)}")
    if not found:
        raise DataError(f"{folder}: no train.json, dev.json or test.json (or .jsonl); {_listing(there)}")
    return found


def wanted(splits: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Split -> the names it may have: the one that is asked for, else the usual ones that are not asked for."""
    given: dict[str, tuple[str, ...]] = {split: (name,) for split, name in splits.items()}
    taken = {name.lower() for name in splits.values()}
    usual = {split: tuple(name for name in names if name not in taken) for split, names in _SPLIT_NAMES.items()}
    return given | {split: names for split, names in usual.items() if split not in given}


def labels_file(task: Path) -> tuple[str, ...]:
    """The closed set of answers that a task's ``labels.json`` names; none without that file.

    It lies in the task's folder, or beside its file. Beside several files that are a task each it is nobody's.

    Raises:
        DataError: it is no list of texts.
    """
    folder = task if task.is_dir() else task.parent
    path = folder / _LABELS
    if not path.exists() or not (folder == task or _is_task_folder(folder) or _has_one_file(folder)):
        return ()
    try:
        labels = json.loads(text_of_file(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:1: broken JSON: {str(error) or 'nested too deep'}") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise DataError(f"{path}:1: the labels must be a list of texts")
    return tuple(labels)


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk`` of the package ``datasets``."""
    return any((folder / mark).exists() for mark in _SAVED)


def load_saved(folder: Path) -> Any:
    """A dataset that ``save_to_disk`` wrote.

    Raises:
        DataError: it is damaged, or refers to files outside the folder.
    """
    import datasets

    if (folder / _SAVED[0]).exists():
        parts = [folder / _inside(folder, name) for name in _listed(folder / _SAVED[0], "splits")]
    else:
        parts = [folder]
    for part in parts:
        for entry in _listed(part / _SAVED[1], "_data_files"):
            name = _inside(part, entry.get("filename") if isinstance(entry, dict) else None)
            if not (part / name).is_file():
                raise DataError(f"{part / name}: no such file; the saved dataset is damaged")
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets and pyarrow raise many kinds for a damaged file
        raise DataError(f"{folder}: a saved dataset that cannot be loaded: {_root_cause(error)}") from error


def load_tables(path: Path, files: Mapping[str, Sequence[Path]], kinds: set[str]) -> Any:
    """Parquet or Arrow files as a ``DatasetDict``.

    Raises:
        DataError: files of several kinds, or one that cannot be read.
    """
    import datasets

    if len(kinds) > 1:
        raise DataError(f"{path}: its splits are of different kinds ({', '.join(sorted(kinds))}); use one")
    for file in (file for shards in files.values() for file in shards):
        if not file.is_file():
            raise DataError(f"{file}: cannot be read (no regular file)")
    # A path with [ or * in it is no pattern.
    named = {split: [glob.escape(str(file)) for file in shards] for split, shards in files.items()}
    try:
        return datasets.load_dataset(_TABLES[next(iter(kinds))], data_files=named)
    except Exception as error:  # datasets and pyarrow raise many kinds for a damaged file
        raise DataError(f"{path}: cannot be loaded: {_root_cause(error)}") from error


def _is_data_file(path: Path) -> bool:
    """Whether it is data by its name: no file ``._name``, in which macOS keeps what is no data of a file ``name``."""
    by_name = kind(path) in _KINDS and path.name != _LABELS and not path.name.startswith("._")
    return by_name and (path.is_file() or _is_broken_link(path))


def _has_one_file(folder: Path) -> bool:
    return sum(map(_is_data_file, folder.iterdir())) == 1


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _check_links(files: Sequence[Path]) -> None:
    for file in filter(_is_broken_link, files):
        raise DataError(f"{file}: a link to {file.readlink()}, which is not there; mend or remove the link")


def _check_shards(files: Sequence[Path]) -> None:
    """Shards are all there: their names say of how many each is one. Some count from 0, some from 1."""
    numbered = [(file, match) for file in files if (match := _SHARD.search(stem(file)))]
    there: dict[str, set[int]] = defaultdict(set)
    for _, match in numbered:
        there[match[2]].add(int(match[1]))
    for file, match in numbered:
        found, count = there[match[2]], int(match[2])
        start = 0 if 0 in found or count not in found else 1
        number = next((number for number in range(start, start + count) if number not in found), None)
        if number is not None:
            width, name = len(match[1]), stem(file)
            missing = f"{name[: match.start()]}-{number:0{width}}-of-{match[2]}{file.name[len(name) :]}"
            raise DataError(f"{file.with_name(missing)}: no such file, though {file.name} is one of {count} shards")


def _is_task_folder(folder: Path) -> bool:
    known = {name for names in _SPLIT_NAMES.values() for name in names}
    return is_saved_dataset(folder) or any(_split_name(file) in known for file in _data_files(folder))


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder, sorted; if it has none, those of its sub-folder ``data``."""
    here = sorted(file for file in folder.iterdir() if _is_data_file(file))
    below = folder / "data"
    return here or (sorted(file for file in below.iterdir() if _is_data_file(file)) if below.is_dir() else [])


def _split_name(path: Path) -> str:
    """The split that a file's name suggests: its stem in small letters, without a shard's number."""
    return _SHARD.sub("", stem(path)).lower()


def _listing(files: Sequence[Path]) -> str:
    return "it has " + (", ".join(file.name for file in files[:8]) or "no data files")


def _listed(path: Path, key: str) -> list[Any]:
    try:
        content = json.loads(text_of_file(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged: {str(error) or 'nested too deep'}") from None
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise DataError(f"{path}: damaged: it lists no {key}")
    return list(content[key])


def _inside(folder: Path, name: Any) -> str:
    if not isinstance(name, str) or not name or Path(name).name != name or name in (".", ".."):
        raise DataError(f"{folder}: the saved dataset names a file outside its folder or none at all ({name!r})")
    return name


def _root_cause(error: BaseException) -> str:
    """The message of the first error of a chain; the later ones only say where it passed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
