"""What a run has learned when, what is left of it, and what it takes on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cit_fast.evaluation.continual import continual_metrics, first_trained
from cit_fast.evaluation.records import GeneralRecord
from cit_fast.evaluation.run_files import read_run, read_stage, read_stages
from cit_fast.files import tree_bytes
from cit_fast.report.table import plain_table
from cit_fast.run.gate import said
from cit_fast.run.rollback import retired_stages
from cit_fast.run.run_folder import CANDIDATES

AT_RISK = 10.0
"""Points of a fall from which on a task is at risk."""


def status(folder: str | Path) -> dict[str, Any]:
    """A run's state as plain JSON values.

    Returns:
        ``method``, ``model``, ``status`` and ``stages`` (of how many ``planned``); ``tasks``, in order of arrival: each
        with its ``stage`` and ``adapter``, its score ``untrained``, right after that stage (``then``) and ``now``, the
        ``best`` since, the ``fall`` from it, how many of its examples came back since (``replayed``), and what was set
        differently from that stage or an earlier one on (``settings``); a task that is still to come has ``stage:
        null``. ``held_out``: score ``untrained`` and ``now``, of tasks that are never trained. ``AP``, ``forgetting``
        and ``New.ACC``. ``general``: general abilities ``untrained`` and ``now``, by skill (``probes``), how far
        predictions have moved (``divergence``), and the main metric of each benchmark (``benchmarks``), or ``null``.
        ``candidate``: a stage that broke the gate, its tasks and what it broke in words, or ``null``. ``retired``:
        stages that rollbacks have kept aside. ``bytes``: of the whole folder, a file with several names once.

    Raises:
        RunError: no run there, or damaged records.
    """
    folder = Path(folder)
    run, stages = read_run(folder), read_stages(folder)
    rows = [stage for stage in stages if stage.index > 0]
    before = stages[0].scores if stages and stages[0].index == 0 else {}
    now = {task: score for stage in rows for task, score in stage.scores.items()}  # as last measured
    tasks = []
    for task, row in zip(run.tasks, first_trained(run, stages), strict=True):
        learned = row < len(rows)
        scores = [stage.scores[task] for stage in rows[row:] if task in stage.scores]
        best = max(scores, default=None)
        tasks.append(
            {
                "task": task,
                "stage": rows[row].index if learned else None,
                "adapter": rows[row].adapter if learned else None,
                "untrained": before.get(task),
                "then": rows[row].scores.get(task) if learned else None,
                "best": best,
                "now": now.get(task) if learned else None,
                "fall": best - now[task] if learned and best is not None and task in now else None,
                "settings": rows[row].settings if learned else [],
                "replayed": sum(stage.replayed.get(task, 0) for stage in rows[row:]),
            }
        )
    metrics = continual_metrics(run, stages) if rows else None
    measured = [stage.general for stage in stages if stage.general is not None]
    joint = run.method.get("schedule") == "joint"
    return {
        "run": str(folder),
        "method": run.method_name,
        "model": run.model,
        "status": run.status,
        "stages": len(rows),
        "planned": 1 if joint else len(run.tasks),
        "tasks": tasks,
        "held_out": {task: {"untrained": before.get(task), "now": now.get(task)} for task in run.held_out_tasks},
        "AP": metrics.average_performance if metrics else None,
        "forgetting": metrics.forgetting if metrics else None,
        "New.ACC": metrics.new_accuracy if metrics else None,
        "adapters": sorted({stage.adapter for stage in rows}),
        "general": _general(measured) if measured else None,
        "candidate": _candidate(folder),
        "retired": retired_stages(folder),
        "bytes": tree_bytes(folder),
    }


def status_table(found: dict[str, Any]) -> RenderableType:
    """What :func:`status` gives, for a terminal."""
    head = Text(
        f"{found['run']}: {found['method']} on {found['model']}, {found['status']}, "
        f"{found['stages']} of {found['planned']} stages, {len(found['adapters'])} adapter set(s), "
        f"{found['bytes'] / 1e6:.1f} MB"
    )
    table = plain_table(None, None)
    table.add_column("task", overflow="fold")
    for column in ("stage", "adapter", "untrained", "then", "best", "now", "fall", "replayed"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for task in found["tasks"]:
        fall = task["fall"]
        style = "bold red" if fall is not None and fall >= AT_RISK else None
        cells = [_number(task[name]) for name in ("untrained", "then", "best", "now", "fall")]
        stage = "–" if task["stage"] is None else str(task["stage"])
        table.add_row(task["task"], stage, task["adapter"] or "–", *cells, str(task["replayed"]), style=style)
    for task, scores in found["held_out"].items():
        table.add_row(task, "held out", "", _number(scores["untrained"]), "", "", _number(scores["now"]), "", "")
    lines: list[RenderableType] = [head, table]
    if found["general"]:
        lines.append(Text(_general_words(found["general"])))
    if found["candidate"]:
        stage, tasks, broken = (found["candidate"][name] for name in ("stage", "tasks", "broken"))
        lines.append(Text(f"Stage {stage} ({', '.join(tasks)}) is a candidate: {'; '.join(broken)}", style="bold red"))
    if found["retired"]:
        lines.append(Text(f"{found['retired']} stage(s) kept aside by rollback; cit-fast prune deletes them"))
    if found["AP"] is not None:
        named = ", ".join(
            f"{name} {found[name]:.1f}" for name in ("AP", "forgetting", "New.ACC") if found[name] is not None
        )
        lines.append(Text(named))
    falls = sorted(
        (task for task in found["tasks"] if task["fall"] is not None and task["fall"] >= AT_RISK),
        key=lambda task: -task["fall"],
    )
    if falls:
        lines.append(Text("At risk: " + ", ".join(f"{task['task']} (-{task['fall']:.1f})" for task in falls)))
    return Group(*lines)


def _general(measured: list[GeneralRecord]) -> dict[str, Any]:
    first, last = measured[0], measured[-1]
    return {
        "untrained": first.score,
        "now": last.score,
        "probes": {skill: [first.probes[skill], score] for skill, score in last.probes.items()},
        "divergence": last.divergence,
        "benchmarks": {task: [first.main.get(task), score] for task, score in last.main.items()},
    }


def _general_words(general: dict[str, Any]) -> str:
    moved = ", ".join(f"{value:.3f} on {name} prompts" for name, value in general["divergence"].items())
    fallen = [f"{skill} {now - was:+.1f}" for skill, (was, now) in general["probes"].items() if was - now >= AT_RISK]
    beside = [f"{task} {_number(was)}, now {now:.1f}" for task, (was, now) in general["benchmarks"].items()]
    words = (
        f"General abilities {general['untrained']:.1f}, now {general['now']:.1f}"
        f"{' (' + ', '.join(fallen) + ')' if fallen else ''}"
    )
    away = [f"nats a token away from the base model: {moved}"] if moved else []
    return "; ".join([words, *away, *beside])


def _candidate(folder: Path) -> dict[str, Any] | None:
    for path in sorted((folder / CANDIDATES).glob("[0-9]*")):
        stage = read_stage(path)
        broken = [] if stage.gate is None else [said(one) for one in stage.gate.broken]
        return {"stage": stage.index, "tasks": stage.trained, "broken": broken}
    return None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
