"""The folder of one run: its lock, its committed stages, and the checkpoints inside the stage being trained."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cit_fast.errors import RunError
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.evaluation.run_files import MOVING, read_run, read_stages, write_record
from cit_fast.files import (
    commit_folder,
    damaged_files,
    read_checked_json,
    sync_tree,
    tree_checksums,
    write_checked_json,
)
from cit_fast.processes import from_rank_zero
from cit_fast.run.config import RunConfig
from cit_fast.run.identity import digest, what_changed
from cit_fast.run.trackers import FILE as TRACKERS
from cit_fast.run.trackers import another_course

_log = logging.getLogger(__name__)
_MARKER = "complete.json"
CANDIDATES = "candidates"
"""Folder of stages that broke a limit of the gate."""


def _same_but_for_tasks(was: RunRecord, now: RunRecord) -> bool:
    """Whether two records of a run that learns task by task differ in their tasks alone, and in what changes from a
    stage on.
    """

    def rest(record: RunRecord) -> dict[str, Any]:
        data = {key: value for key, value in record.config["data"].items() if key not in ("tasks", "stream", "root")}
        return {**record.config, "data": data, "stream": None, "stages": None}

    return was.method.get("schedule") != "joint" and not any(_differences(rest(was), rest(now)))


def _another_task(found: RunRecord, record: RunRecord, at: int) -> str:
    """What is wrong with the task at a place where the run has learned from another one."""
    was, now = found.tasks[at], record.tasks[at]
    if was != now:
        return (
            f"task {now!r} (number {at + 1}) is another one than {was!r} that this run has learned from; new tasks "
            "come after the known ones"
        )
    changed = what_changed(found.task_parts.get(was, {}), record.task_parts.get(was, {}))
    return (
        f"task {was!r} (number {at + 1}) is no longer what this run has learned from: "
        f"{changed or 'its examples, its metric or its constraints have changed'}; put its data back, or give the new "
        "data another name"
    )


def _differences(was: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(set(was) | set(now)):
            yield from _differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif was != now:
        yield f"{path} was {was!r}, now {now!r}"


class RunFolder:
    """State of one run on disk. Stages appear by one rename; checkpoints count only with their marker.

    Args:
        path: the folder; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[int, StageRecord] = {}

    @contextlib.contextmanager
    def locked(self, wait: bool = False) -> Iterator[None]:
        """Hold the folder for this process; the lock goes with the process, however it ends.

        Args:
            wait: for the process that holds it now, instead of refusing.

        Raises:
            RunError: another process is running in this folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise RunError(f"{self.path}: a file is in the way; choose another output folder") from None
        except OSError as error:
            raise RunError(f"{self.path}: cannot be made ({error.strerror}); choose another output folder") from error
        lock = FileLock(self.path / ".lock", blocking=wait)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"{self.path}: another cit-fast run is working in this folder; wait for it or choose another output"
            ) from None
        try:
            self._finish_moving()
            yield
        finally:
            lock.release()

    def begin(self, record: RunRecord) -> RunRecord:
        """Write a new run's record, or take up the one that is there.

        A run of another configuration that never trained anything gives way: so a corrected file is accepted at once.
        One that differs in nothing but new tasks at the end of its stream goes on with these.

        Raises:
            RunError: the folder holds a run of another configuration, or something that is no run.
        """
        self.tidy()
        if not (self.path / "run.json").exists():
            strangers = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")]
            if strangers:
                raise RunError(
                    f"{self.path}: not empty and not a cit-fast run ({strangers[0]!r} is there); choose another output"
                )
            self.write(record)
            return record
        found = read_run(self.path)
        known, given = found.config.get("stream"), record.config["stream"]
        if known == digest(given):  # as it was written before runs could take new tasks
            known = found.config["stream"] = given
        record = self._with_stages(found, record)
        trackers = record.config["training"].get("report_to")
        if found.config["training"].get("report_to") != trackers:  # who watches decides nothing
            found.config["training"] = {**found.config["training"], "report_to": trackers or "none"}
            record.config["training"] = {**record.config["training"], "report_to": trackers or "none"}
            self.write(found)
        engines = [each.config["evaluation"].get("engine") for each in (found, record)]
        if all(isinstance(engine, dict) for engine in engines) and engines[0] != engines[1]:  # nor does the address
            found.config["evaluation"] = {**found.config["evaluation"], "engine": engines[1]}
            self.write(found)
        changed = list(_differences(found.config, record.config))
        if known == given:  # the same tasks, wherever they lie now and whatever has been dropped of them
            changed = [one for one in changed if not one.startswith("data.tasks was")]
        if changed and self._has_trained() and isinstance(known, list) and _same_but_for_tasks(found, record):
            at = next((k for k, (was, now) in enumerate(zip(known, given, strict=False)) if was != now), None)
            if at is not None:
                raise RunError(f"{self.path}: {_another_task(found, record, at)}")
            if len(given) < len(known):
                raise RunError(
                    f"{self.path}: has {len(known)} tasks, of which this configuration names the first {len(given)}; "
                    "name them all, or choose another output"
                )
            if len(given) > len(known) or found.config.get("stages") != record.config.get("stages"):
                kept = ("experts", "retired_tasks", "dropped_tasks")
                record.task_parts = {
                    name: parts or found.task_parts.get(name, {}) for name, parts in record.task_parts.items()
                }
                grown = dataclasses.replace(record, **{name: getattr(found, name) for name in kept})
                self.write(grown)
                return grown
        if changed and not self._has_trained():
            for name in ("stages", "checkpoints", "replay", "logs"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / TRACKERS).unlink(missing_ok=True)
            self.write(record)
            return record
        if changed:
            changed = [one for one in changed if not one.startswith("stream was")] or ["its tasks are others"]
            names = [name for name in found.held_out_tasks if found.held_out_tasks == record.held_out_tasks]
            parts = (
                (name, what_changed(found.task_parts.get(name, {}), record.task_parts.get(name, {}))) for name in names
            )
            held_out = [f"held-out task {name!r}: {words}" for name, words in parts if words]
            changed = [*held_out, *(one for one in changed if not (held_out and one.startswith("held_out was")))]
            raise RunError(
                f"{self.path}: holds a run of another configuration ({'; '.join(changed[:3])}"
                f"{'; ...' if len(changed) > 3 else ''}); choose another output, or delete the folder"
            )
        return found

    def _with_stages(self, found: RunRecord, record: RunRecord) -> RunRecord:
        """The record with what has changed in stages that are trained as it was then, and in later ones as it is given.

        Raises:
            RunError: what is given says something else of stages that are trained.
        """
        trained = max((int(path.parent.name) for path in self.path.glob("stages/[0-9]*/stage.json")), default=0)
        under_way = any(self.checkpoints(trained + 1).glob(f"checkpoint-*/{_MARKER}"))
        known, given = found.config.get("stages", []), record.config.get("stages", [])
        fixed, own = ([each for each in some if each["from"] <= trained + under_way] for some in (known, given))
        if own and own != fixed:
            raise RunError(
                f"{self.path}: stages: other settings than those that stages 1 to {trained + under_way} were trained "
                f"with ({fixed}); settings can change from stage {trained + under_way + 1} on"
            )
        stages = [*fixed, *(each for each in given if each["from"] > trained + under_way)]
        config = {key: value for key, value in record.config.items() if key != "stages"}
        return dataclasses.replace(record, config={**config, "stages": stages} if stages else config)

    def tidy(self) -> None:
        """Remove what a killed process left: half-written files, and checkpoints of stages that are committed."""
        left = ("stages/.*", ".*.tmp", "replay/**/.*.tmp", "memory/.*.tmp")
        for leftover in [path for pattern in left for path in self.path.glob(pattern)]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for stage in self.path.glob("stages/[0-9]*/stage.json"):
            shutil.rmtree(self.path / "checkpoints" / stage.parent.name, ignore_errors=True)
        self._remove_empty()

    def _remove_empty(self) -> None:
        for name in ("checkpoints", CANDIDATES):
            with contextlib.suppress(OSError):  # not there, or not empty
                (self.path / name).rmdir()

    def move(self, last: int, moves: dict[str, str], records: dict[str, RunRecord], remove: str | None = None) -> None:
        """Put stages, and what belongs to them, aside or back. One file decides it (:data:`MOVING`); a process that is
        killed afterwards leaves the rest to the next one that works in the folder.

        Args:
            last: the stage that is the last one until all is done.
            moves: new place of every file and folder that moves, by its place; what is not there is left out.
            records: that are written, by their place.
            remove: a folder that is deleted in the end.
        """
        written = {name: dataclasses.asdict(record) for name, record in records.items()}
        write_checked_json(self.path / MOVING, {"stage": last, "moves": moves, "records": written, "remove": remove})
        self._finish_moving()

    def _finish_moving(self) -> None:
        try:
            todo = read_checked_json(self.path / MOVING)
        except FileNotFoundError:
            return
        moves = [(self._inside(place), self._inside(target)) for place, target in todo["moves"].items()]
        records = [(self._inside(place), record) for place, record in todo["records"].items()]
        removed = todo["remove"] and self._inside(todo["remove"])
        for place, target in moves:
            rename(place, target)
        another_course(self.path)
        for place, record in records:
            write_checked_json(place, record)
        if removed:
            shutil.rmtree(removed, ignore_errors=True)
        (self.path / MOVING).unlink()

    def _inside(self, name: str) -> Path:
        """A place below the folder; a run folder may come from somebody else.

        Raises:
            RunError: it is not below it.
        """
        path = self.path / name
        if path.resolve() == self.path.resolve() or not path.resolve().is_relative_to(self.path.resolve()):
            raise RunError(f"{self.path / MOVING}: damaged ({name!r} is not below the run's folder)")
        return path

    def _has_trained(self) -> bool:
        """Whether a stage was trained, or some of its steps are in a checkpoint."""
        trained = any(path.parent.name.strip("0") for path in self.path.glob("stages/[0-9]*/stage.json"))
        return trained or any(self.path.glob(f"checkpoints/*/checkpoint-*/{_MARKER}"))

    def write(self, record: RunRecord) -> None:
        """Write ``run.json``."""
        write_record(self.path / "run.json", record)

    def stages(self) -> list[StageRecord]:
        """The committed stages, in order; each is read once, for what is committed stays as it is.

        Raises:
            RunError: a stage in the middle is gone.
        """
        stages = read_stages(self.path, known=self._known)
        for index, stage in enumerate(stages):
            if stage.index != index:
                raise RunError(f"{self.path}: stage {index:02d} is missing although stage {stage.index:02d} is there")
        self._known = {stage.index: stage for stage in stages}
        return stages

    def stage_path(self, index: int) -> Path:
        """Folder of a committed stage."""
        return self.path / "stages" / f"{index:02d}"

    def commit(self, record: StageRecord, fill: Callable[[Path], None]) -> None:
        """Commit a stage: ``fill`` writes its files into a temporary folder, then one rename makes it exist; one that
        broke a limit of the gate as a candidate.
        """
        temporary = self.path / "stages" / f".{record.index:02d}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            record.files = tree_checksums(temporary)
            write_record(temporary / "stage.json", record)
            broken = record.gate is not None and record.gate.broken
            commit_folder(
                temporary, self.path / CANDIDATES / temporary.name[1:3] if broken else self.stage_path(record.index)
            )
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(self.checkpoints(record.index), ignore_errors=True)
        self._remove_empty()

    def checkpoints(self, index: int) -> Path:
        """Where the Trainer keeps its checkpoints of the stage being trained."""
        return self.path / "checkpoints" / f"{index:02d}"

    def last_checkpoint(self, index: int) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint of a stage with what its marker says; others are removed.

        A checkpoint without its marker was not written to its end, and one whose files have changed since is damaged.
        """
        found: tuple[int, Path, dict[str, Any]] | None = None
        for folder in self.checkpoints(index).glob("checkpoint-*"):
            try:
                progress = read_checked_json(folder / _MARKER)
                step, damaged = int(progress["step"]), damaged_files(folder, progress["files"])
            except (OSError, RunError, KeyError, TypeError, ValueError, AttributeError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            if damaged:
                name, reason = next(iter(damaged.items()))
                _log.warning("%s: damaged (%s); the stage goes on from before it", folder / name, reason)
                shutil.rmtree(folder, ignore_errors=True)
            elif found is None or step > found[0]:
                found = step, folder, progress
        return None if found is None else found[1:]


def rename(path: Path, target: Path) -> None:
    """Give what is at ``path`` a new place; nothing happens where nothing is there."""
    if path.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def of_one_date(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration with the date of the day on which the run in ``folder`` began, unless it gives one itself."""

    def date() -> datetime.date:
        if "date" in config.data.model_fields_set or not (folder.path / "run.json").is_file():
            return config.data.date
        began = read_run(folder.path).config.get("data", {}).get("date")
        try:
            return datetime.date.fromisoformat(began)
        except (TypeError, ValueError):
            raise RunError(f"{folder.path / 'run.json'}: damaged (config.data.date is {began!r})") from None

    data = config.data.model_copy(update={"date": from_rank_zero(date)})
    return config.model_copy(update={"data": data})


def mark_complete(checkpoint: Path, progress: dict[str, Any]) -> None:
    """Declare a checkpoint whole, once all of its files are on the disk."""
    sync_tree(checkpoint)
    (checkpoint / _MARKER).unlink(missing_ok=True)
    write_checked_json(checkpoint / _MARKER, {**progress, "files": tree_checksums(checkpoint)})
