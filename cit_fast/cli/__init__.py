"""The command line ``cit-fast``; ``cit-fast --help`` lists its commands."""

from __future__ import annotations

import contextlib
import signal
import traceback
import warnings
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cit_fast.cli.app import app, gate_table
from cit_fast.errors import CitFastError, GateError

# Each puts its commands into app, in this order.
from cit_fast.cli import setup, runs, results, data  # noqa: F401  # isort: skip

_debug = False


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error comes from.")] = False,
) -> None:
    """Continual instruction tuning that forgets less and costs almost nothing extra."""
    global _debug  # noqa: PLW0603  # an option of every command, read where errors are printed
    _debug = debug


class _Interrupted(BaseException):
    """Ctrl-C under a name that typer does not take for itself."""


@contextlib.contextmanager
def _interrupt_as_our_own() -> Iterator[None]:
    def interrupted(_signal: int, _frame: object) -> None:
        raise _Interrupted

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Run the command line; an error a user can act on is one line and exit code 2, a stage that broke the gate a table
    and exit code 3.
    """
    # Hide deprecation warnings of transformers, PEFT and Accelerate: a user of the command cannot act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|accelerate")
    try:
        with _interrupt_as_our_own():
            app()
    except CitFastError as error:
        console = Console(stderr=True, soft_wrap=True)
        if isinstance(error, GateError):
            console.print(gate_table(error.record))
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
        if _debug:
            traceback.print_exception(error)
        elif error.__cause__ is not None:
            console.print("(cit-fast --debug shows where it comes from)", style="dim", highlight=False)
        raise SystemExit(3 if isinstance(error, GateError) else 2) from None
    except _Interrupted:
        Console(stderr=True).print("Stopped. The same command goes on from the last checkpoint.")
        raise SystemExit(130) from None
