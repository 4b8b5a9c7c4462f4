"""Distances between tasks as tables for a terminal, and as files: CSV, Parquet, a picture and a page."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from cit_fast.analysis.distances import TaskDistances, extremes
from cit_fast.files import write_file
from cit_fast.report.distances_page import NEIGHBOURS, draw_distances
from cit_fast.report.table import plain_table
from cit_fast.text import short_name

MOST_IN_A_MATRIX = 8
"""Tasks whose matrix still fits a terminal; more are told by their neighbours."""

_NAME_ROOM = 26  # characters within which most task names can be told apart

# -- the terminal --------------------------------------------------------------------------------------------------


def distance_tables(result: TaskDistances, width: int = 80) -> list[Table]:
    """The matrix of a few tasks; of many, the neighbours of each, one line a task, and the extremes.

    Args:
        width: characters of the terminal; a wider one shows more neighbours.
    """
    if len(result.names) <= MOST_IN_A_MATRIX:
        return [_matrix(result)]
    return [_neighbours(result, width), _extremes(result)]


def _matrix(result: TaskDistances) -> Table:
    table = plain_table("Distances between tasks")
    table.add_column("Task", overflow="fold", min_width=12)
    for position in range(1, len(result.names) + 1):
        table.add_column(f"{position}", justify="right", no_wrap=True)
    for rank, i in enumerate(result.order, 1):
        cells = ["-" if i == j else result.number(result.distances[i, j]) for j in result.order]
        table.add_row(Text(f"{rank} {result.names[i]}"), *cells)
    return table


def _neighbours(result: TaskDistances, width: int) -> Table:
    number = 2 + max(len(result.number(float(value))) for value in (result.distances.max(), result.mean.max()))
    room = width - 8 - number  # without the columns of instructions and means; a gap is two wide
    shown = max(1, min(NEIGHBOURS, (room - _NAME_ROOM) // (_NAME_ROOM + number)))
    room = max(_NAME_ROOM // 2, min(48, (room - shown * number) // (1 + shown) - 2))
    table = plain_table("Nearest tasks of each; close tasks side by side")
    table.add_column("Task", no_wrap=True)
    table.add_column("Instr.", justify="right", no_wrap=True)
    table.add_column("Mean", justify="right", no_wrap=True)
    for rank in range(shown):
        table.add_column(("Nearest", "Second", "Third")[rank], no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    for i in result.order:
        cells: list[str | Text] = [
            Text(short_name(result.names[i], room)),
            f"{result.instructions[i]:,}",
            result.number(result.mean[i]),
        ]
        for j in result.neighbours(i)[:shown]:
            cells += [Text(short_name(result.names[j], room)), result.number(result.distances[i, j])]
        table.add_row(*cells)
    return table


def _extremes(result: TaskDistances) -> Table:
    table = plain_table("Extremes")
    table.add_column("", no_wrap=True)
    table.add_column("Distance", justify="right", no_wrap=True)
    table.add_column("Tasks", overflow="fold")
    for what, distance, names in extremes(result):
        table.add_row(what, distance, Text(names))
    return table


# -- files ---------------------------------------------------------------------------------------------------------


def write_distances(result: TaskDistances, folder: Path) -> Path:
    """Write ``distances.csv`` (the matrix), ``.parquet`` (a row per pair, with bounds), ``.png`` and ``.html``.

    Equal distances give equal files. Returns the path of the page.

    Raises:
        RunError: the folder cannot be written.
    """
    write_file(folder / "distances.csv", _csv(result))
    write_file(folder / "distances.parquet", _parquet(result))
    html, picture = draw_distances(result)
    write_file(folder / "distances.png", picture)
    page = folder / "distances.html"
    write_file(page, html.encode("utf-8", "xmlcharrefreplace"))
    return page


def _csv(result: TaskDistances) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", *result.names])
    for name, row in zip(result.names, result.distances.tolist(), strict=True):
        writer.writerow([name, *row])
    return text.getvalue()


def _parquet(result: TaskDistances) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    i, j = np.triu_indices(len(result.names), k=1)
    table = pa.table(
        {
            "task_a": pa.array([result.names[k] for k in i]),
            "task_b": pa.array([result.names[k] for k in j]),
            "distance": result.distances[i, j],
            "lower": result.lower[i, j],
            "upper": result.upper[i, j],
            "iterations": result.iterations[i, j],
            "marginal_error": result.marginal_error[i, j],
        },
        metadata={name: getattr(result, name) for name in ("metric", "method", "weights", "embedder")},
    )
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()
