"""An earlier stage of a run becomes the current one; the later ones are kept aside until they are pruned.

    <run>/retired/1/run.json, stages/NN ...   what the first rollback took back

One file decides it: once ``<run>/moving.json`` is there, its earlier stage is the current one for every reader, and
whoever next works in the folder makes the renames that it lists (``cit_fast.run.run_folder.RunFolder.locked``).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from cit_fast.data.builtin import builtin_task_names
from cit_fast.errors import RunError
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.evaluation.run_files import read_run
from cit_fast.files import tree_bytes
from cit_fast.run.run_folder import CANDIDATES, RunFolder
from cit_fast.run.task_memory import FOLDER as MEMORY

RETIRED = "retired"
_UNDER_WAY = ("checkpoints", CANDIDATES)


def rollback(run: str | Path, to: int) -> list[str]:
    """Make stage ``to`` of a run the current one: it answers, serves, and learning goes on from it.

    The tasks of later stages leave the run's stream, so that they may be learned again, with other settings too.

    Args:
        run: the folder. ``to``: a stage that was trained, from 1.

    Returns:
        The tasks that were taken back.

    Raises:
        RunError: no run there, another process works in it, or it has no such stage or none after it.
    """
    folder = RunFolder(_there(run))
    with folder.locked():
        folder.tidy()
        record, stages = read_run(folder.path), folder.stages()
        last = stages[-1].index if stages else 0
        pending = len(record.tasks) > len(_trained(stages))
        if not 1 <= to <= last or (to == last and not pending):
            raise RunError(
                f"{folder.path}: its stages are 1 to {last}; roll back to an earlier one than the last"
                if last > 1
                else f"{folder.path}: has {last} trained stage(s), so there is none to roll back to"
            )
        if record.method.get("schedule") == "joint":
            raise RunError(f"{folder.path}: a joint run has one stage; there is none to roll back to")
        aside = f"{RETIRED}/{max(_numbers(folder.path), default=0) + 1}"
        kept = _trained(stages[: to + 1])
        later = (f"stages/{stage.index:02d}" for stage in stages[to + 1 :])
        texts = (f"{MEMORY}/{task}.json" for task in record.tasks if task not in kept)
        moves = {name: f"{aside}/{name}" for name in (*_UNDER_WAY, *later, *texts)}
        folder.move(to, moves, {f"{aside}/run.json": record, "run.json": _cut(record, kept, to)})
        return [task for task in record.tasks if task not in kept]


def undo_rollback(run: str | Path) -> list[str]:
    """Take back the last rollback, if nothing has been trained since; returns the tasks that are back.

    Raises:
        RunError: no run there, another process works in it, nothing to take back, or a stage has been trained since.
    """
    folder = RunFolder(_there(run))
    with folder.locked():
        folder.tidy()
        numbers = _numbers(folder.path)
        if not numbers:
            raise RunError(f"{folder.path}: no rollback to take back")
        aside = folder.path / RETIRED / str(numbers[-1])
        record, before = read_run(folder.path), read_run(aside)
        stages, retired = folder.stages(), sorted((aside / "stages").glob("[0-9]*"))
        current = _trained(stages)
        if record.tasks != before.tasks and (record.tasks != current or before.tasks[: len(current)] != current):
            raise RunError(f"{folder.path}: has begun other tasks since the rollback, which cannot be taken back")
        if retired and int(retired[0].name) != len(stages):
            raise RunError(
                f"{folder.path}: has trained stage {len(stages) - 1} since the rollback; it cannot be taken back"
            )
        back = [*_UNDER_WAY, *(f"{MEMORY}/{path.name}" for path in (aside / MEMORY).glob("*.json"))]
        for path in retired:
            back += [f"logs/{path.name}", f"stages/{path.name}"]  # of before there was one log for all
        name = f"{RETIRED}/{aside.name}"
        for each in back:
            if (aside / each).exists() and (folder.path / each).exists():
                raise RunError(
                    f"{folder.path}: {each} is there again, of a stage that was begun since the rollback, which cannot "
                    "be taken back"
                )
        folder.move(len(stages) - 1, {f"{name}/{each}": each for each in back}, {"run.json": before}, remove=name)
        return [task for task in before.tasks if task not in current]


def prune(run: str | Path) -> int:
    """Delete what rollbacks have kept aside; returns how many bytes that frees.

    Raises:
        RunError: no run there, or another process works in it.
    """
    folder = RunFolder(_there(run))
    with folder.locked():
        before = tree_bytes(folder.path)
        shutil.rmtree(folder.path / RETIRED, ignore_errors=True)
        return before - tree_bytes(folder.path)


def retired_stages(run: Path) -> int:
    """How many stages rollbacks have kept aside."""
    return sum(1 for _ in run.glob(f"{RETIRED}/*/stages/[0-9]*"))


def _there(run: str | Path) -> Path:
    """The folder, which is not made where it is missing."""
    read_run(Path(run))
    return Path(run)


def _trained(stages: list[StageRecord]) -> list[str]:
    return [task for stage in stages for task in stage.trained]


def _numbers(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / RETIRED).glob("*") if path.name.isdigit())


def _cut(record: RunRecord, tasks: list[str], to: int) -> RunRecord:
    """The record of a run that has these tasks, the first of its own, and ends with stage ``to``."""
    known = record.config["stream"]  # of runs from before they could grow, one digest of all tasks
    config: dict[str, Any] = {**record.config, "stream": known[: len(tasks)] if isinstance(known, list) else known}
    config["stages"] = [entry for entry in config.pop("stages", []) if entry["from"] <= to]
    if not config["stages"]:
        del config["stages"]
    sources = config["data"]["tasks"]
    if sources is None and record.tasks == list(builtin_task_names()):
        sources = record.tasks
    data = {**config["data"], "stream": None, "root": None}
    config["data"] = {**data, "tasks": None if sources is None else sources[: len(tasks)]}
    known = [*tasks, *record.held_out_tasks]
    return RunRecord(
        **{
            **vars(record),
            "tasks": tasks,
            "metrics": {task: record.metrics[task] for task in known},
            "constraints": {task: record.constraints[task] for task in known if task in record.constraints},
            "task_parts": {task: record.task_parts[task] for task in known if task in record.task_parts},
            "experts": {task: score for task, score in record.experts.items() if task in tasks},
            "dropped_tasks": [task for task in record.dropped_tasks if task in [*tasks, *record.held_out_tasks]],
            "retired_tasks": sorted({*record.retired_tasks, *record.tasks} - {*tasks}),
            "config": config,
            "status": "finished",
        }
    )
