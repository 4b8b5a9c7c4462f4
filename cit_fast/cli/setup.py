"""Commands for who begins: a configuration, and its schema for editors."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cit_fast.cli.app import app
from cit_fast.errors import ConfigError


@app.command(epilog="Example: cit-fast init my.yaml --data data/support --data data/refunds --goal one-model")
def init(
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The YAML file to write.")] = Path("run.yaml"),
    model: Annotated[str | None, typer.Option(help="Folder or hub name of a causal language model.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="A task: a folder, a file or a built-in name; may be repeated, in order.")
    ] = None,
    goal: Annotated[
        Literal["one-model", "per-task", "compare"] | None,
        typer.Option(help="One adapter for all tasks, one for each with a router, or all beside each other."),
    ] = None,
    machine: Annotated[
        Literal["cpu", "gpu"] | None, typer.Option(help="What trains it; by default what this machine has.")
    ] = None,
) -> None:
    """Write a commented configuration to FILE, and its schema beside it. What is not given is asked for where there is
    a terminal; else it is the quickstart's.
    """
    import torch

    from cit_fast.run.new_config import GOALS, new_config, write_new_config

    asks = sys.stdin.isatty()
    if model is None:
        model = "HuggingFaceTB/SmolLM2-135M-Instruct"
        model = typer.prompt("Model (folder or hub name)", default=model) if asks else model
    if not data:
        given = (
            typer.prompt("Tasks, in order (folders, files, built-in names)", default="units intents") if asks else ""
        )
        data = given.split() or ["units", "intents"]
    if goal is None and asks:
        for name, says in GOALS.items():
            typer.echo(f"  {name}: {says}")
        answer = typer.prompt("Goal", default="one-model")
        goal = next((name for name in GOALS if name == answer), None)
        if goal is None:
            raise ConfigError(f"goal: {answer!r} is unknown; known: {', '.join(GOALS)}")
    machine = machine or ("gpu" if torch.cuda.is_available() else "cpu")
    run = re.sub(r"[^\w.+-]+", "-", output.stem).strip("-.") or "run"
    write_new_config(output, new_config(model, data, goal or "one-model", machine, run))
    typer.echo(f"{output}: written. Next: cit-fast run {output} --plan")


@app.command(epilog="Example: cit-fast schema > cit-fast.schema.json")
def schema() -> None:
    """Print the JSON schema of configurations, with which editors complete and check them: `cit-fast schema >
    cit-fast.schema.json`, and `# yaml-language-server: $schema=cit-fast.schema.json` as the first line of the YAML.
    """
    from cit_fast.run.schema import config_schema

    typer.echo(json.dumps(config_schema(), indent=1))
