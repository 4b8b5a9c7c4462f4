"""Commands that train, and that look after a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cit_fast.cli.app import Run, app
from cit_fast.errors import ConfigError


@app.command(epilog="Example: cit-fast run my.yaml --set training.learning_rate=1e-3 --plan")
def run(
    config: Annotated[Path, typer.Argument(help="The YAML configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override one key; may be repeated.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be trained and what is not here yet; train nothing.")
    ] = False,
) -> None:
    """Train every method of CONFIG on its stream of tasks, or go on where an earlier call stopped. `cit-fast presets`
    lists the methods, `cit-fast streams` the streams of papers.
    """
    from cit_fast.report import collect, comparison_table, write_report
    from cit_fast.report.plan import print_plan
    from cit_fast.run.config import load_config
    from cit_fast.run.loop import ContinualTrainer

    settings = load_config(config, overrides or [])
    if plan:
        print_plan(settings, Console())
        return
    trainer = ContinualTrainer(settings)
    folders = trainer.run()
    if int(os.environ.get("RANK", "0")) != 0:
        return
    runs = collect(folders)
    report_path = write_report(runs, settings.folder / "report.html", title=settings.name)
    trainer.console.print(comparison_table(runs))
    trainer.console.print(f"Report: {report_path}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: cit-fast learn runs/support/random-replay data/refunds --set replay.fraction=0.2")
def learn(
    run: Run,
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Task folders, data files or built-in names.", metavar="TASK")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change this from the next stage on; may be repeated."),
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Take the stage that broke the gate as it is.")] = False,
    retry: Annotated[
        list[str] | None,
        typer.Option("--retry", metavar="KEY.PATH=VALUE", help="Train that stage again with this; may be repeated."),
    ] = None,
) -> None:
    """Train more TASKs in a run that has ended or was interrupted, with its own method and settings. The data of its
    earlier tasks must still be there, unless it has a memory; the result is that of a run that had all tasks from the
    start. Exit code 3: a stage broke the run's gate.
    """
    from cit_fast.report import collect, comparison_table
    from cit_fast.run.learn import learn as learn_tasks

    console = Console()
    folder = learn_tasks(run, tasks or [], console, settings=settings or [], accept=accept, retry=retry or [])
    if int(os.environ.get("RANK", "0")) == 0:
        console.print(comparison_table(collect([folder])))


@app.command(epilog="Example: cit-fast status runs/support/random-replay")
def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a run has learned when, each task's score then and now, what has fallen, and the disk that it takes."""
    from cit_fast.report.status import status as of_run
    from cit_fast.report.status import status_table

    found = of_run(run)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        Console().print(status_table(found))


@app.command(epilog="Example: cit-fast memory runs/support/random-replay --drop refunds")
def memory(
    run: Run,
    drop: Annotated[str | None, typer.Option("--drop", metavar="TASK", help="Remove this task's texts.")] = None,
) -> None:
    """Show what RUN keeps of the tasks that it has learned, or remove a task's texts from it; learning goes on."""
    from cit_fast.cache import cache_folder
    from cit_fast.report.table import plain_table
    from cit_fast.run.forget import drop as drop_task
    from cit_fast.run.forget import remembered

    console = Console()
    if drop is not None:
        changed = drop_task(run, drop)
        console.print(
            f"{run}: the texts of {drop} are gone, {changed} files changed. Reports that were written before, and the "
            f"cache shared by all runs ({cache_folder()}), may still hold some.",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    table = plain_table(None, None)
    table.add_column("task", overflow="fold")
    for column in ("examples kept", "of", "bytes", "to evaluate"):
        table.add_column(column, justify="right")
    for task in remembered(run):
        cells = [task["kept"], task["size"], task["bytes"], "dropped" if task["dropped"] else task["evaluation"]]
        table.add_row(task["task"], *map(str, cells))
    console.print(table)


@app.command(epilog="Example: cit-fast rollback runs/support/random-replay --to 3")
def rollback(
    run: Run,
    to: Annotated[int | None, typer.Option("--to", min=1, help="The stage to go back to.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take the last rollback back.")] = False,
) -> None:
    """Make an earlier stage of RUN the current one; learning goes on from it. The later ones are kept aside."""
    from cit_fast.run.rollback import rollback as roll_back
    from cit_fast.run.rollback import undo_rollback

    if undo == (to is not None):
        raise ConfigError("rollback: say --to STAGE, or --undo")
    tasks = roll_back(run, to) if to is not None else undo_rollback(run)
    typer.echo(f"{run}: {'back are' if undo else f'stage {to} is the current one; taken back:'} {', '.join(tasks)}")


@app.command(epilog="Example: cit-fast prune runs/support/random-replay")
def prune(run: Run) -> None:
    """Delete what rollbacks of RUN have kept aside."""
    from cit_fast.run.rollback import prune as delete

    typer.echo(f"{run}: {delete(run) / 1e6:.1f} MB freed")
