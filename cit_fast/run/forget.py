"""What a run remembers of its tasks, and how a task's texts are removed from its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from cit_fast.data.kept_task import RecalledTask, bytes_of, hash_of, read_kept, write_kept
from cit_fast.data.sources import TaskSource, possible_names
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.evaluation.run_files import read_run, read_stage, write_record
from cit_fast.files import write_file
from cit_fast.methods.config import MethodConfig
from cit_fast.methods.routing.router import read_router_file, routing_text, without_texts
from cit_fast.run.rollback import RETIRED
from cit_fast.run.run_folder import CANDIDATES, RunFolder
from cit_fast.run.stage_settings import method_at, stages_of
from cit_fast.run.task_memory import FOLDER

_DROPPED = "[dropped {}]"


def remembered(run: str | Path) -> list[dict[str, Any]]:
    """What the memory of a run holds: of each ``task`` how many of its ``size`` training examples are ``kept``, their
    ``bytes``, its ``evaluation`` examples, and whether it was ``dropped``; in the order of arrival.

    Raises:
        RunError: no run there, one without a memory, or a damaged one.
    """
    run, record = Path(run), read_run(Path(run))
    _check_memory(run, record)
    found = []
    for name in record.every_task:
        path = run / FOLDER / f"{name}.json"
        if path.is_file():
            task = read_kept(path)
            found.append(
                {
                    "task": name,
                    "kept": len(task.train),
                    "size": task.full_size,
                    "evaluation": len(task.dev) + len(task.test),
                    "bytes": sum(map(bytes_of, task.train)),
                    "dropped": task.dropped,
                }
            )
    return found


def drop(run: str | Path, name: str) -> int:
    """Remove a task's texts from a run: examples, predictions, instructions in records and in the router's state.

    The run goes on without them: the task is neither replayed nor evaluated any more, and what the weights have learned
    stays. What numbers a router keeps (features, an average) stay as well, and so does what other folders hold: the
    report, the cache shared by all runs.

    Args:
        run: the folder. ``name``: the task.

    Returns:
        How many files were changed or deleted.

    Raises:
        RunError: no run there, one without a memory, another process works in it, a stage is under way, or the next
            stage needs the task.
        ConfigError: a task that the run has not learned.
    """
    folder = RunFolder(Path(run))
    _check_memory(folder.path, read_run(folder.path))
    with folder.locked():
        folder.tidy()
        record, stages = read_run(folder.path), folder.stages()
        path = folder.path / FOLDER / f"{name}.json"
        places = [folder.path, *sorted(folder.path.glob(f"{RETIRED}/[0-9]*"))]
        if not path.is_file() and any((place / FOLDER / path.name).is_file() for place in places):
            raise RunError(
                f"{folder.path}: {name!r} was taken back by a rollback; cit-fast prune {folder.path} deletes it"
            )
        if not path.is_file() or read_kept(path).dropped:
            known = [task["task"] for task in remembered(folder.path) if not task["dropped"]]
            raise ConfigError(f"{folder.path}: has no task {name!r} in its memory; there are {', '.join(known)}")
        if (folder.path / "checkpoints").exists():
            raise RunError(
                f"{folder.path}: stage {len(stages)} is under way and may replay {name!r}; finish it, or roll back"
            )
        trained = [task for stage in stages for task in stage.trained]
        if name not in [*trained, *record.held_out_tasks]:
            raise RunError(f"{folder.path}: {name!r} is a candidate's task; accept the stage first, or roll back")
        method = MethodConfig.model_validate({"preset": "sequential", **record.method})
        objective = method_at(method, stages_of(record.config), max(1, len(stages))).objective.name
        if objective == "ewc" and trained[-1:] == [name]:
            raise RunError(f"{folder.path}: the next stage needs {name!r} (objective ewc); drop it after that")
        task = read_kept(path)
        changed = sum(_without(place, task) for place in places)
        for place in places[1:]:
            (place / FOLDER / path.name).unlink(missing_ok=True)
        # The tombstone last: until it is there, the same call goes on.
        write_kept(
            path,
            dataclasses.replace(
                task, train=(), dev=(), test=(), labels=(), answer_pattern=None, extractive=False, dropped=True
            ),
        )
        return changed + 1


def _check_memory(run: Path, record: RunRecord) -> None:
    if not record.config.get("memory"):
        raise RunError(f"{run}: keeps no memory of its tasks; a run has one from its beginning (memory: in its YAML)")


def _without(place: Path, task: RecalledTask) -> int:
    """Remove a task's texts from the record, the stages and the caches in a folder; returns how many files changed."""
    texts = {*task.instruction_hashes, *_hashes(task)}
    changed = 0
    if (place / "run.json").is_file():
        run = read_run(place)
        run.constraints.pop(task.name, None)
        data = run.config["data"]
        run.config["data"] = {**data, "tasks": _without_instruction(data.get("tasks"), task.name)}
        run.dropped_tasks = sorted({*run.dropped_tasks, task.name})
        write_record(place / "run.json", run)
    for stage in sorted((*place.glob("stages/[0-9]*"), *place.glob(f"{CANDIDATES}/[0-9]*"))):
        record, edited = read_stage(stage), False
        predictions = stage / "predictions" / f"{task.name}.jsonl"
        for path in [predictions] if predictions.is_file() else []:
            path.unlink()
            changed, edited = changed + 1, True
        edited |= record.files.pop(f"predictions/{task.name}.jsonl", None) is not None
        scrubbed = {path: text for path in sorted(stage.glob("router/*.json")) if (text := _scrubbed(path, texts))}
        for path, text in scrubbed.items():
            record.files[path.relative_to(stage).as_posix()] = hash_of(text)
            changed, edited = changed + 1, True
        edited |= _forget_instructions(record, task.name)
        if edited:
            write_record(stage / "stage.json", record)
        # After the record: a process that is killed in between finds the texts again.
        for path, text in scrubbed.items():
            write_file(path, text)
    for path in sorted((place / "replay").rglob("*.json")):
        if _scrubbed(path, texts):  # what was worked out for the task, and is worked out again if it is needed
            path.unlink()
            changed += 1
    if place.parent.name == RETIRED:
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
    return changed


def _without_instruction(sources: list[Any] | None, name: str) -> list[Any] | None:
    """The sources of a configuration, that of a task without the instruction that it gives."""
    if sources is None:
        return None

    def scrubbed(source: Any) -> Any:
        if not isinstance(source, dict) or not source.get("instruction"):
            return source
        plain: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in source.items()}
        if name not in possible_names(TaskSource(**plain)):
            return source
        return {**source, "instruction": _DROPPED.format(hash_of(source["instruction"])[:16])}

    return list(map(scrubbed, sources))


def _hashes(task: RecalledTask) -> Iterable[str]:
    """Of every text of the examples that are kept."""
    for example in (*task.train, *task.dev, *task.test):
        texts = [example.instruction, example.input, *example.references, *(text for _, text in example.messages)]
        yield from (hash_of(text) for text in (*texts, routing_text(example), example.task_instruction) if text)


def _forget_instructions(record: StageRecord, task: str) -> bool:
    """Take the task's ranked instructions out of a record of replay."""
    if record.replay is None or not any(each.task == task for each in record.replay.instructions):
        return False
    record.replay.instructions = [each for each in record.replay.instructions if each.task != task]
    return True


def _scrubbed(path: Path, texts: Collection[str]) -> str | None:
    """A JSON file with hashes in the place of the texts that have these hashes; ``None`` where it has none of them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if isinstance(content, dict):
        content.pop("checksum", None)
    plain: Any = _replaced(content, texts)
    if path.name == "router.json":
        with contextlib.suppress(RunError):  # of a router of one's own, all of whose words may be texts
            plain = without_texts(read_router_file(path), lambda value: _replaced(value, texts))
    if plain == content:
        return None
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def _replaced(value: Any, texts: Collection[str]) -> Any:
    if isinstance(value, str):
        known = hash_of(value)
        return _DROPPED.format(known[:16]) if known in texts else value
    if isinstance(value, list):
        return [_replaced(each, texts) for each in value]
    if isinstance(value, dict):
        return {_replaced(key, texts): _replaced(each, texts) for key, each in value.items()}
    return value
