"""What a configuration would do, as tables: stages, steps, tokens, time and memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from cit_fast.run.config import RunConfig
from cit_fast.run.pace import Paces, duration
from cit_fast.run.plan import plan_run


def print_plan(settings: RunConfig, console: Console) -> None:
    """Print a table for each method, how long all takes and in how much memory, and what is not here yet.

    Raises:
        ConfigError, DataError: as :func:`cit_fast.run.plan.plan_run`.
    """
    planned, paces = plan_run(settings), Paces(settings)
    counts = ("examples", "replayed at most", "steps", "tokens" if planned.exact else "tokens (guessed)", "prompts")
    total: list[float | None] = []
    for method in settings.methods:
        stages, pace = planned.stages[method.name], paces.of(method)
        table = Table(title=method.name, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for column in ("stage", "task", *counts, "time"):
            table.add_column(column, justify="left" if column == "task" else "right")
        rows = [(each.examples, each.replayed, each.steps, each.tokens, each.prompts) for each in stages]
        seconds = [None if pace is None else pace.seconds(each) for each in stages]
        for number, (stage, row, time) in enumerate(zip(stages, rows, seconds, strict=True), 1):
            task = stage.tasks[0] if len(stage.tasks) == 1 else f"all {len(stage.tasks)} tasks"
            table.add_row(str(number), task, *map(_count, row), _about(time))
        sums = [_count(_sum(column)) for column in zip(*rows, strict=True)]
        table.add_row("", "in all", *sums, _about(_sum(seconds)), style="dim")
        console.print(table)
        console.print()
        total.append(_sum(seconds))
    known = [pace for method in settings.methods if (pace := paces.of(method)) is not None]
    if len(known) < len(settings.methods):
        console.print("How long it takes is not known: no stage of such a run has ended on this machine.")
    elif None not in total:
        memory = max(pace.memory for pace in known)
        console.print(f"All of it takes {_about(_sum(total))} here and {memory / 1e9:.1f} GB, going by earlier stages.")
    for what in planned.missing:
        console.print(f"Not here: {what}", highlight=False, markup=False, soft_wrap=True)
    if not planned.missing:
        console.print("Everything that the run needs is here.", highlight=False)


def _sum(values: Iterable[Any]) -> Any:
    """Of numbers; ``None`` where one is unknown."""
    values = list(values)
    return None if None in values else sum(values)


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _about(seconds: float | None) -> str:
    return "?" if seconds is None else f"about {duration(seconds)}"
