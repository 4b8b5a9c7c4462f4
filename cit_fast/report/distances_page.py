"""The picture of all distances between tasks, and the HTML page about it."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from cit_fast.analysis.distances import Matrix, TaskDistances, extremes, how_measured
from cit_fast.report import figures
from cit_fast.report.figures import BACKGROUND, FAINT, TEXT, ink, short
from cit_fast.report.html import data_address, template

_SCRIPT = Path(__file__).with_name("distances.js")

_WHOLE = 7.0, 14.0, 40.0  # inches of the heat map: of a few tasks, of a hundred, and the most that can be drawn
_CELL = 0.16, 0.095  # inches of a cell up to a hundred tasks, and the smallest whose name can still be read
NEIGHBOURS = 3
_MOST_WRITTEN = 20  # tasks whose distances are written into the cells
_MOST_BELOW = 60  # tasks that are named below the columns too; beyond, the order of the rows must do
_MOST_IN_TABLE = 60  # tasks whose matrix the page has as a table too
_NAME_LENGTH = 44


@dataclass(frozen=True)
class _Box:
    """Where the cells are in the picture: shares of its width and height from the left and from the top."""

    left: float
    top: float
    width: float
    height: float


class Pages(NamedTuple):
    """The page and the picture of all distances."""

    html: str
    png: bytes


def draw_distances(result: TaskDistances) -> Pages:
    """The heat map with its dendrogram as a PNG file, and one HTML page that needs no network and no other file: in it
    a cell tells its pair and distance under the pointer, and a table the neighbours of every task.
    """
    figure, box = _heat_map(result)
    width, height = (round(inches * 96) for inches in figure.get_size_inches())
    picture = figures.png(figure, all_colours=True)
    script = _SCRIPT.read_text(encoding="utf-8")
    order = result.order
    html = template("distances.html.j2").render(
        result=result,
        summary=_summary(result),
        measured=how_measured(result),
        picture=data_address(picture),
        width=width,
        height=height,
        extremes=extremes(result),
        rows=[_row(result, task) for task in order],
        neighbours=NEIGHBOURS,
        matrix=len(order) <= _MOST_IN_TABLE,
        data=_data(result, box),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )
    return Pages(html, picture)


def _summary(result: TaskDistances) -> str:
    near, far = result.pairs[0], result.pairs[-1]
    if len(result.pairs) == 1:
        return f"{result.names[0]} and {result.names[1]} are {result.number(result.distances[0, 1])} apart."
    return (
        f"Closest are {result.names[near[0]]} and {result.names[near[1]]} ({result.number(result.distances[near])}), "
        f"farthest {result.names[far[0]]} and {result.names[far[1]]} ({result.number(result.distances[far])})."
    )


def _row(result: TaskDistances, task: int) -> dict[str, object]:
    """What the page's table says of one task."""
    others = result.neighbours(task)
    return {
        "index": task,
        "name": result.names[task],
        "instructions": result.instructions[task],
        "examples": result.examples[task],
        "mean": float(result.mean[task]),
        "near": [(result.names[j], float(result.distances[task, j])) for j in others[:NEIGHBOURS]],
        "far": (result.names[others[-1]], float(result.distances[task, others[-1]])),
    }


def _data(result: TaskDistances, box: _Box) -> str:
    """What the script needs, as JSON that cannot end the element it stands in: the tasks in the picture's order and,
    row by row, the distances right of the diagonal.
    """
    order = np.array(result.order)
    i, j = np.triu_indices(len(order), k=1)
    content = {
        "names": [result.names[k] for k in order],
        "distances": [float(result.number(value)) for value in result.distances[order[i], order[j]]],
        "decimals": len(result.number(0.0).partition(".")[2]),
        "box": [box.left, box.top, box.width, box.height],
    }
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _heat_map(result: TaskDistances) -> tuple[Figure, _Box]:
    """The heat map in the order of the tree: tree on the left, names on the right, colours explained on top."""
    count = len(result.names)
    whole = min(max(_WHOLE[0], min(_CELL[0] * count, _WHOLE[1]), _CELL[1] * count), _WHOLE[2])
    cell = whole / count
    font = min(9.5, 0.74 * 72 * cell)
    names = [short(result.names[k], _NAME_LENGTH) for k in result.order]
    named = cell >= 0.99 * _CELL[1]
    text = (0.0085 * font * max(len(name) for name in names) + 0.1) if named else 0.1  # inches
    below = text if named and count <= _MOST_BELOW else 0.15
    large = max(1.0, whole / 10)  # what explains the colours grows with a picture that will be looked at from afar
    tree, above = max(1.1, 0.11 * whole), 0.62 * large
    width, height = 0.1 + tree + whole + max(text, 0.8), above + whole + below
    figure = Figure(figsize=(width, height), dpi=figures.DPI, facecolor=BACKGROUND)
    box = _Box((0.1 + tree) / width, above / height, whole / width, whole / height)

    ax = figure.add_axes((box.left, 1 - box.top - box.height, box.width, box.height))
    values = result.distances[np.ix_(result.order, result.order)].copy()
    apart = values[~np.eye(count, dtype=bool)]
    low, high = float(apart.min()), float(apart.max())
    high = max(high, low + 1e-9)
    np.fill_diagonal(values, np.nan)
    colours = mpl.colormaps["viridis"]
    ax.set_facecolor(FAINT)  # the diagonal: a task and itself
    image = ax.imshow(
        np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    if count <= _MOST_WRITTEN:
        for i, j in zip(*np.nonzero(~np.eye(count, dtype=bool)), strict=True):
            shade = ink(colours((values[i, j] - low) / (high - low)))
            size = min(9.5, 72 * cell / 3.1)
            ax.text(j, i, result.number(values[i, j]), ha="center", va="center", fontsize=size, color=shade)
    ax.yaxis.tick_right()
    ax.set_yticks(range(count) if named else [], names if named else [])
    under = range(count) if named and count <= _MOST_BELOW else []
    ax.set_xticks(under, names if under else [], rotation=90)
    ax.tick_params(length=0, pad=2, colors=TEXT, labelsize=font)
    ax.spines[:].set_visible(False)

    left = figure.add_axes((0.1 / width, 1 - box.top - box.height, (tree - 0.04) / width, box.height))
    left.add_collection(LineCollection(_branches(result), colors=TEXT, linewidths=1.2))
    left.set_ylim(count - 0.5, -0.5)
    left.set_xlim(1.02 * max(float(result.tree[:, 2].max()), 1e-9), 0)
    left.set_axis_off()

    across = min(4.0 * large, 0.6 * whole)
    scale = figure.add_axes((box.left, 1 - 0.3 * large / height, across / width, 0.13 * large / height))
    bar = figure.colorbar(image, cax=scale, orientation="horizontal")
    bar.outline.set_visible(False)
    scale.tick_params(colors=TEXT, labelsize=8.5 * large, length=2 * large)
    scale.text(1.03, 0.5, "distance", transform=scale.transAxes, ha="left", va="center", fontsize=9 * large, color=TEXT)
    return figure, box


def _branches(result: TaskDistances) -> list[Matrix]:
    """The tree as lines (height of a merge, position among the leaves)."""
    count = len(result.names)
    places = {task: (0.0, float(rank)) for rank, task in enumerate(result.order)}
    lines = []
    for node, (first, second, height, _) in enumerate(result.tree, count):
        (a, above), (b, below) = places[int(first)], places[int(second)]
        lines.append(np.array([(a, above), (height, above), (height, below), (b, below)]))
        places[node] = (float(height), (above + below) / 2)
    return lines
