"""A run's records on disk: read, checked, written, and where what they tell of lies.

See :mod:`cit_fast.evaluation.records` for the layout of a run folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from cit_fast.errors import RunError
from cit_fast.evaluation.records import FORMAT_VERSION, RunRecord, StageRecord
from cit_fast.files import damaged_files, read_checked_json, write_checked_json

MOVING = "moving.json"
"""There while stages are put aside or back: which one is the last until then, and what is to be done."""
_Record = TypeVar("_Record")


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """Building one takes longer than reading with it."""
    return TypeAdapter(kind)


def _read(path: Path, kind: type[_Record], check: bool = True) -> _Record:
    try:
        raw = read_checked_json(path, check=check)
    except FileNotFoundError:
        what = (
            "the stage is damaged" if path.name == "stage.json" else f"is {path.parent} the folder of a cit-fast run?"
        )
        raise RunError(f"{path}: not there; {what}") from None
    return _record(path, raw, kind)


def _record(path: Path, raw: dict[str, Any], kind: type[_Record]) -> _Record:
    if isinstance(raw.get("routing"), dict):
        raw["routing"].pop("trained_by", None)  # older records repeat which set each task has trained
    version = raw.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise RunError(f"{path}: written in format version {version}; this cit-fast reads version {FORMAT_VERSION}")
    try:
        record: _Record = _adapter(kind).validate_python(raw)  # type: ignore[arg-type]
        return record
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = "unknown key" if first["type"] == "unexpected_keyword_argument" else first["msg"]
        raise RunError(f"{path}: damaged ({place}: {what[0].lower()}{what[1:]})") from None


def read_run(folder: Path) -> RunRecord:
    """Read ``run.json`` of a run folder.

    Raises:
        RunError: no run there, a damaged file, or another format version.
    """
    path = Path(folder) / MOVING
    if path.is_file():
        with contextlib.suppress(FileNotFoundError):  # it has been done in between
            return _record(path, read_checked_json(path)["records"]["run.json"], RunRecord)
    return _read(Path(folder) / "run.json", RunRecord)


def read_stage(folder: Path) -> StageRecord:
    """Read the record of one committed stage in its own folder.

    Raises:
        RunError: a damaged stage file.
    """
    return _read(folder / "stage.json", StageRecord)


def read_stages(
    folder: Path, *, check: bool = True, known: Mapping[int, StageRecord] | None = None
) -> list[StageRecord]:
    """Read every committed stage of a run, in order; stage 0 is the untrained model, scored on every task.

    Args:
        check: whether a record that has changed since it was written is an error.
        known: records that were read before, by index, which are taken as they were.

    Raises:
        RunError: a damaged stage file.
    """
    place = Path(folder) / "stages"
    try:
        with os.scandir(place) as entries:
            names = sorted((entry.name for entry in entries if entry.name.isdigit() and entry.is_dir()), key=int)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    with contextlib.suppress(FileNotFoundError):
        last = read_checked_json(Path(folder) / MOVING)["stage"] if names else 0
        names = [name for name in names if int(name) <= last]
    before = known or {}
    stages = [before.get(int(name)) or _read(place / name / "stage.json", StageRecord, check) for name in names]
    for name, stage in zip(names, stages, strict=True):
        if stage.index != int(name):
            raise RunError(f"{place / name / 'stage.json'}: damaged (it is the record of stage {stage.index})")
    for stage in stages:
        stages[0].scores |= stage.untrained  # of tasks that joined a run that had begun
        stages[0].violations |= stage.untrained_violations
    return stages


def adapter_sets(stages: Sequence[StageRecord]) -> dict[str, StageRecord]:
    """The adapter sets after the last of these stages, each with the stage that trained it last, in that order."""
    found: dict[str, StageRecord] = {}
    for stage in stages:
        if stage.index > 0:
            found.pop(stage.adapter, None)
            found[stage.adapter] = stage
    return found


def stage_folder(run: Path, stage: StageRecord) -> Path:
    """The folder of a committed stage."""
    return run / "stages" / f"{stage.index:02d}"


def stages_until(folder: Path) -> list[Path]:
    """A folder in a stage's folder (``.../stages/NN/<name>``), and before it those of this name in the stages before,
    in order; of any other folder, itself.
    """
    name, number = folder.name, folder.parent.name
    if not number.isdigit():
        return [folder]
    stages = (path for path in folder.parents[1].glob("[0-9]*") if path.name.isdigit())
    return sorted((path / name for path in stages if int(path.name) <= int(number)), key=lambda p: int(p.parent.name))


def set_folder(run: Path, stage: StageRecord) -> Path:
    """The folder of the adapter set that a committed stage has trained."""
    return stage_folder(run, stage) / "adapters" / stage.adapter


def write_record(path: Path, record: RunRecord | StageRecord) -> None:
    """Write a record with its checksum, atomically."""
    write_checked_json(path, dataclasses.asdict(record))


def check_files(folder: Path, stage: StageRecord, below: str = "") -> None:
    """See that the files of a stage are what was written.

    Args:
        folder: the stage's. ``below``: look only at paths that start with this.

    Raises:
        RunError: the first that is not.
    """
    for name, reason in damaged_files(folder, stage.files, below).items():
        raise RunError(f"{folder / name}: damaged ({reason})")
