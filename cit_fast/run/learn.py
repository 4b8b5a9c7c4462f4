"""A finished or interrupted run takes more tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from cit_fast.data import TaskStream, load_task
from cit_fast.data.builtin import builtin_task_names, is_builtin_task
from cit_fast.data.kept_task import read_kept
from cit_fast.data.sources import TaskSource
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.records import RunRecord
from cit_fast.evaluation.run_files import read_run, read_stages
from cit_fast.processes import from_rank_zero
from cit_fast.run.candidates import accept as accept_candidate
from cit_fast.run.candidates import discard, has_candidate
from cit_fast.run.config import RunConfig, validated
from cit_fast.run.loop import ContinualTrainer
from cit_fast.run.stage_settings import StageSettings
from cit_fast.run.task_memory import FOLDER, TaskMemory
from cit_fast.run.yaml_file import set_key


def learn(
    run: str | Path,
    tasks: Sequence[str | dict[str, Any]] = (),
    console: Console | None = None,
    *,
    settings: Sequence[str] = (),
    accept: bool = False,
    retry: Sequence[str] = (),
) -> Path:
    """Train more tasks in a run folder, with its own method and settings; the data of the earlier ones must still be
    there, unless the run has a memory.

    Router, replay, averages and random streams go on, so that the result is what one run with all of these tasks from
    the start would have left, bit for bit on a CPU. An interrupted call goes on where it was, and a run that was
    interrupted is finished first.

    Args:
        run: the folder.
        tasks: each as in ``data.tasks``; those that the run has already need not be named, and may be.
        console: where progress is printed.
        settings: what changes from the next stage on, as ``key.path=value``: keys of
            :class:`~cit_fast.run.stage_settings.StageSettings` (``training.learning_rate=1e-4``,
            ``replay.fraction=0.05``). The stages' records keep it.
        accept: whether the stage that broke the gate is taken as it is.
        retry: settings with which that stage is trained again, and from which the run goes on.

    Returns:
        The folder.

    Raises:
        ConfigError: a task that cannot be read, or of a name that the run has already, or a setting that cannot change.
        GateError: a stage breaks a limit of the run's gate.
        RunError: no run there, another process works in it, or an earlier task's data has changed, or is gone and the
            run has no memory of it.
    """
    run = Path(run)
    if not (tasks or settings or accept or retry):
        raise ConfigError("learn: name at least one task")
    if accept and retry:
        raise ConfigError("learn: accept the candidate, or train it again with other settings")
    record = read_run(run)
    settings = [*settings, *retry]
    if (accept or retry) and not _can_go_on(run, record):
        from_rank_zero(lambda: accept_candidate(run) if accept else discard(run))
        return run  # and the caller goes on with the tasks that only Python has
    entry = _entry(run, settings, accept)
    config = grown(run, record, tasks, entry)
    trainer = ContinualTrainer(config, stream=_stream(run, record, config, tasks), console=console)
    repeated = entry in record.config.get("stages", [])  # a call that was killed has brought its settings already

    def settle() -> None:
        if accept:
            accept_candidate(run)
        elif retry and (has_candidate(run) or not repeated):
            discard(run)

    from_rank_zero(settle)  # what cannot be set up is known by now, and the candidate was still there
    (folder,) = trainer.run()
    return folder


def _can_go_on(run: Path, record: RunRecord) -> bool:
    """Whether the tasks of a run can be had without Python."""
    if record.config["data"]["tasks"] is not None or record.tasks == list(builtin_task_names()):
        return True
    return record.config.get("memory") is not None and all(
        (run / FOLDER / f"{name}.json").is_file() for name in record.tasks
    )


def _entry(run: Path, settings: Sequence[str], accept: bool) -> dict[str, Any] | None:
    """What changes from the next stage on, as the configuration's ``stages`` has it."""
    changes: dict[str, Any] = {}
    for setting in settings:
        set_key(changes, setting, lambda _, text: {"name": text})
    if not changes:
        return None
    first = max(1, len(read_stages(run)) + accept)
    try:
        return StageSettings.model_validate({"from": first, **changes}).plain()
    except ValidationError:
        return {"from": first, **changes}  # the configuration says what is wrong, in one line


def _stream(
    run: Path, record: RunRecord, config: RunConfig, tasks: Sequence[str | dict[str, Any]]
) -> TaskStream | None:
    """The tasks of a run that got them from Python and remembers them, and the new ones; ``None`` for any other run."""
    if config.data.tasks is not None or config.memory is None:
        return None
    memory = TaskMemory(run, config.memory)
    sizes = {split: getattr(config.data, split) for split in ("train", "dev", "test")}
    sources = [TaskSource(**_plain(task)) for task in tasks]
    return TaskStream(
        (
            *(read_kept(memory.path(name)) for name in record.tasks),
            *(load_task(source, seed=config.seed, **sizes) for source in sources),
        )
    )


def grown(
    run: Path, record: RunRecord, tasks: Sequence[str | dict[str, Any]], entry: dict[str, Any] | None = None
) -> RunConfig:
    """The configuration of a run with more tasks, and with other settings from its next stage on."""
    config = {key: value for key, value in record.config.items() if key in RunConfig.model_fields}
    data = {key: value for key, value in config["data"].items() if key not in ("stream", "root")}
    known = data["tasks"]
    from_python = known is None and record.tasks != list(builtin_task_names())
    if known is None:
        if from_python and config.get("memory") is None:
            raise RunError(
                f"{run}: its tasks were given from Python, so only Python has them: ContinualTrainer(config, "
                "stream=...) with the new ones behind the known"
            )
        known = list(builtin_task_names())
    given = [task for task in map(_plain, tasks) if task not in [_plain(each) for each in known]]
    if record.method_name != run.absolute().name:
        raise RunError(f"{run}: the run of method {record.method_name!r}, under another name; give it that name back")
    stages = list(config.get("stages", ()))
    if entry is not None and entry not in stages:  # a call that was interrupted has brought it already
        stages.append(entry)
    return validated(
        {
            **config,
            "stages": stages,
            "name": record.name,
            "output": str(run.absolute().parent),
            "methods": [{"preset": "sequential", **record.method}],  # all four parts are spelt out
            "data": {**data, "tasks": None if from_python else [*known, *given]},
        },
        f"{run / 'run.json'}: config",
    )


def _plain(task: str | dict[str, Any]) -> dict[str, Any]:
    """A task as ``data.tasks`` spells it out."""
    if isinstance(task, str):
        return {"builtin": task} if is_builtin_task(task) else {"path": task}
    return {key: value for key, value in task.items() if value not in (None, False, 0, [], (), {})}
