"""The comparison of runs as a table for the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cit_fast.report.collect import COLUMNS, Runs, RunView, collect, coverage


def comparison_table(runs: Runs | Sequence[Path]) -> RenderableType:
    """One row per run on the same tasks: AP, New.ACC, forgetting, BWT, FWT, relative gain, V-score, P- and V-score of
    held-out tasks, balance weights, replayed examples, minutes; a column that no run has a value for is left out. In a
    narrow terminal transfer and gain, the V-score, what is held out and the balance weights stand in a table of their
    own below.

    The best value of a column is bold with a star, if two complete continual runs or more compete; joint runs
    are the upper bound and do not compete. The caption says what was left out and what is still running.

    Args:
        runs: what :func:`cit_fast.report.collect` read, or run folders.

    Raises:
        RunError: no run there, or damaged records.
    """
    return _Comparison(runs if isinstance(runs, Runs) else collect(runs))


class _Comparison:
    """The comparison, as one table where that fits and as two, one below the other, where it does not."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        notes = [*self._runs.notes, *filter(None, [coverage(self._runs)])]
        caption = Text("\n".join(notes)) if notes else None
        # A column that no run has a value for would only push the others off a narrow terminal.
        shown = [any(column.value(view) is not None for view in self._runs.compared) for column in COLUMNS]
        below = [here and (column.answers or column.aside) for here, column in zip(shown, COLUMNS, strict=True)]
        whole = self._table(shown, caption)
        if not any(below) or Measurement.get(console, options.update_width(1000), whole).maximum <= options.max_width:
            yield whole
            return
        yield self._table([here and not second for here, second in zip(shown, below, strict=True)], None, "\n")
        yield Text()
        yield self._table(below, None)
        if caption is not None:
            yield caption  # as wide as the terminal, not as the table

    def _table(self, shown: Sequence[bool], caption: Text | None, arrow: str = "") -> Table:
        # A line break before the arrow: rich itself takes single letters off any column.
        table = plain_table(None, caption)
        table.add_column("Method", overflow="fold", min_width=13)
        for column in itertools.compress(COLUMNS, shown):
            table.add_column(
                column.title + arrow + column.arrow.lstrip() if arrow else column.title + column.arrow, justify="right"
            )
        for view, cells in comparison_rows(self._runs):
            label = Text(view.label + (" (joint)" if view.is_joint and view.record.method_name != "joint" else ""))
            if not view.is_complete:
                label.append(" …")
            table.add_row(
                label,
                *(
                    Text(text + ("*" if best else ""), "bold green" if best else "")
                    for text, best in itertools.compress(cells, shown)
                ),
            )
        return table


def comparison_rows(runs: Runs) -> list[tuple[RunView, list[tuple[str, bool]]]]:
    """For every compared run its values as text, each with whether it is the best of its column."""
    best = [
        None
        if column.highest is None or (column.held_out and not runs.same_held_out)
        else runs.best(column.value, highest=column.highest)
        for column in COLUMNS
    ]
    rows = []
    for view in runs.compared:
        competes = view.is_complete and not view.is_joint
        cells = []
        for column, top in zip(COLUMNS, best, strict=True):
            value = column.value(view)
            is_best = competes and top is not None and value is not None and round(value, 1) == top
            cells.append((column.text(view), is_best))
        rows.append((view, cells))
    return rows


def plain_table(title: str | None, caption: Text | None = None) -> Table:
    """An empty table without vertical rules, with narrow gaps and headers that wrap: it fits 80 columns."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption=caption,
        caption_justify="left",
    )
