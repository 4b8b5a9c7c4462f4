"""A finished or interrupted run takes more tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cit_fast.data.builtin import builtin_task_names
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.records import RunRecord, read_run
from cit_fast.run.config import RunConfig, validated
from cit_fast.run.loop import ContinualTrainer


def learn(run: str | Path, tasks: Sequence[str | dict[str, Any]], console: Console | None = None) -> Path:
    """Train more tasks in a run folder, with its own method and settings; the earlier ones must still be there.

    Router, replay, averages and random streams go on, so that the result is what one run with all of these tasks from
    the start would have left, bit for bit on a CPU. An interrupted call goes on where it was, and a run that was
    interrupted is finished first.

    Args:
        run: the folder.
        tasks: each as in ``data.tasks``; those that the run has already need not be named, and may be.
        console: where progress is printed.

    Returns:
        The folder.

    Raises:
        ConfigError: a task that cannot be read, or of a name that the run has already.
        RunError: no run there, another process works in it, or an earlier task's data has changed or is gone.
    """
    run = Path(run)
    if not tasks:
        raise ConfigError("learn: name at least one task")
    config = grown(run, read_run(run), tasks)
    (folder,) = ContinualTrainer(config, console=console).run()
    return folder


def grown(run: Path, record: RunRecord, tasks: Sequence[str | dict[str, Any]]) -> RunConfig:
    """The configuration of a run with more tasks."""
    config = {key: value for key, value in record.config.items() if key in RunConfig.model_fields}
    data = {key: value for key, value in config["data"].items() if key not in ("stream", "root")}
    known = data["tasks"]
    if known is None:
        if record.tasks != list(builtin_task_names()):
            raise RunError(
                f"{run}: its tasks were given from Python, so only Python has them: ContinualTrainer(config, "
                "stream=...) with the new ones behind the known"
            )
        known = list(builtin_task_names())
    given = [task for task in map(_plain, tasks) if task not in [_plain(each) for each in known]]
    if record.method_name != run.absolute().name:
        raise RunError(f"{run}: the run of method {record.method_name!r}, under another name; give it that name back")
    return validated(
        {
            **config,
            "name": record.name,
            "output": str(run.absolute().parent),
            "methods": [{"preset": "sequential", **record.method}],  # all four parts are spelt out
            "data": {**data, "tasks": [*known, *given]},
        },
        f"{run / 'run.json'}: config",
    )


def _plain(task: str | dict[str, Any]) -> dict[str, Any]:
    """A task as ``data.tasks`` spells it out."""
    if isinstance(task, str):
        return {"builtin": task} if task in builtin_task_names() else {"path": task}
    return {key: value for key, value in task.items() if value not in (None, False, 0, [], (), {})}
