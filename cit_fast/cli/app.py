"""What the commands share: the application, kinds of arguments, and how progress and warnings are shown."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cit_fast.errors import LeftOutWarning, RunError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from cit_fast.evaluation.records import GateRecord

app = typer.Typer(
    name="cit-fast",
    help="Continual instruction tuning that forgets less and costs almost nothing extra.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OfStage = Annotated[int | None, typer.Option("--stage", min=1, help="Of this stage instead of the last.")]
Runs = Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold run folders.", metavar="RUN...")]
Run = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]


def gate_table(record: GateRecord) -> Table:
    """What the gate measured: each task's score, how far it has fallen, and which limit that breaks."""
    from cit_fast.report.table import plain_table

    table = plain_table(None, None)
    for column in ("task", record.split, "fall", "breaks"):
        table.add_column(column, justify="left" if column in ("task", "breaks") else "right")
    broken = {one.task: f"{one.limit} {one.at:g}" for one in record.broken}
    for task, score in record.scores.items():
        fall = f"{record.falls[task]:.1f}" if task in record.falls else "new"
        table.add_row(task, f"{score:.1f}", fall, broken.get(task, ""), style="bold red" if task in broken else None)
    for one in record.broken:
        if one.task is None:
            what = "general abilities" if one.limit == "general" else "on average"
            table.add_row(what, "", f"{one.found:.1f}", f"{one.limit} {one.at:g}", style="bold red")
    return table


def run_folders(paths: list[Path]) -> list[Path]:
    """Each path that is a run, and the runs directly below each that is none."""
    folders: list[Path] = []
    for path in paths:
        inner = sorted(child.parent for child in path.glob("*/run.json"))
        if (path / "run.json").exists() or not inner:
            folders.append(path)
        else:
            folders += inner
    return folders


def check_output(folder: Path) -> None:
    """Refuse an output that is a file before anything is measured."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: cannot be written (it is no folder)")


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows how far something has come: its name, how much is done, how much there is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        started: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in started:
                started[what] = bars.add_task(what)
            bars.update(started[what], completed=done, total=total)

        yield progress


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """What was left out, as one line each without the place in the code."""
    console, show_others = Console(stderr=True, soft_wrap=True), warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, LeftOutWarning):
            console.print(f"[bold yellow]warning:[/bold yellow] {escape(str(message))}", highlight=False)
        else:
            show_others(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", LeftOutWarning)
        warnings.showwarning = show
        yield
