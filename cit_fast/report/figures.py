"""The pictures of a report, on a light ground; Matplotlib's objects, no pyplot state.

Colours are those of Okabe & Ito and viridis: both can be told apart without full colour vision, and lines
differ in marker and dash as well.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cit_fast.evaluation.continual import Matrix
from cit_fast.evaluation.records import StageRecord
from cit_fast.report.collect import COLUMNS, RunView, number
from cit_fast.report.routing import confusion
from cit_fast.text import short_name

DPI = 150
_LEAST_ROOM = 11  # characters; a name cut shorter than that says nothing
_MARKERS = "osD^vPX*"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
BACKGROUND, TEXT, FAINT = "#ffffff", "#1f2328", "#d5dae0"
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", TEXT)


def png(figure: Figure, *, all_colours: bool = False) -> bytes:
    """The figure as a PNG file of at most 256 colours, a third of the size of one in full colour.

    Args:
        all_colours: keep every colour, for a picture whose rare colours are its largest values.
    """
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes in the picture; the page spells it out.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    if not all_colours:
        image = image.quantize(256, dither=Image.Dither.NONE)
    image.save(buffer, "png", optimize=True, dpi=(DPI, DPI))
    return buffer.getvalue()


def score_matrix_figure(view: RunView) -> Figure:
    """Heat map of the scores: the untrained row on top, one row per stage, just-trained tasks framed."""
    rows = np.vstack([view.untrained, view.matrix])
    trained = [set(), *(set(stage.trained) for stage in view.trained)]
    framed = [(i, j) for i, names in enumerate(trained) for j, task in enumerate(view.record.tasks) if task in names]
    names = ["untrained", *(f"after {name}" for name in view.stage_names)]
    texts = [[number(value) for value in row] for row in rows]
    return _heat_map(rows, texts, names, view.record.tasks, 100.0, "score", framed)


def replay_figure(view: RunView) -> Figure:
    """How many examples of each earlier task each stage replayed."""
    counts = np.full((len(view.trained), len(view.record.tasks)), np.nan)
    for i, stage in enumerate(view.trained):
        for j, task in enumerate(view.record.tasks):
            if stage.replayed.get(task):
                counts[i, j] = stage.replayed[task]
    texts = [["" if math.isnan(value) else f"{value:.0f}" for value in row] for row in counts]
    names = [f"during {name}" for name in view.stage_names]
    return _heat_map(counts, texts, names, view.record.tasks, float(np.nanmax(counts)), "examples", [])


def distance_figure(view: RunView) -> Figure:
    """How far each earlier task was from the new one, as the replay policy of each stage measured it."""
    measured = [stage.replay.distances if stage.replay else {} for stage in view.trained]
    return _measured_figure(view, measured, "to", "distance")


def gain_figure(view: RunView) -> Figure:
    """What the key parts of each earlier task told the model when a new one arrived; framed are the replayed tasks."""
    measured = [stage.replay.gains if stage.replay else {} for stage in view.trained]
    return _measured_figure(view, measured, "before", "information gain", framed=True)


def _measured_figure(
    view: RunView, by_stage: Sequence[Mapping[str, float]], before_name: str, meaning: str, *, framed: bool = False
) -> Figure:
    """A number per earlier task (columns) and stage (rows); a frame marks the tasks that were replayed."""
    values = np.full((len(view.trained), len(view.record.tasks)), np.nan)
    for i, found in enumerate(by_stage):
        for j, task in enumerate(view.record.tasks):
            values[i, j] = found.get(task, math.nan)
    measured = [i for i, row in enumerate(values) if not np.isnan(row).all()]
    rows = values[measured]
    top = float(np.nanmax(rows))
    # Three digits of the largest: a cosine distance may be far below one.
    digits = min(max(2, 2 - math.floor(math.log10(top))), 6) if top > 0 else 2
    texts = [["" if math.isnan(value) else f"{value:.{digits}f}" for value in row] for row in rows]
    names = [f"{before_name} {view.stage_names[i]}" for i in measured]
    frames = []
    if framed:
        frames = [
            (row, j)
            for row, i in enumerate(measured)
            for j, task in enumerate(view.record.tasks)
            if view.trained[i].replayed.get(task)
        ]
    return _heat_map(rows, texts, names, view.record.tasks, top, meaning, frames)


def routing_figure(view: RunView) -> Figure:
    """Which adapter set answered the prompts of each task, in per cent; a frame where they belong."""
    shares, texts, tasks, sets, framed = confusion(view)
    return _heat_map(shares, texts, tasks, sets, 100.0, "% of prompts", framed)


def task_curves_figure(views: Sequence[RunView]) -> Figure:
    """Score of each task over the stages, a panel per task, a line per run; joint runs are horizontal
    lines.
    """
    tasks = views[0].record.tasks
    columns = 2 if len(tasks) <= 4 else 3
    lines = math.ceil(len(tasks) / columns)
    figure, axes = _subplots(lines, columns, (3.3 if columns == 2 else 2.4, 1.9))
    stages = max(len(view.matrix) for view in views)
    for panel, (task, ax) in enumerate(zip(tasks, axes, strict=False)):
        ax.set_title(short(task, 34 if columns == 2 else 25), fontsize=9.5, color=TEXT)
        for k, view in enumerate(views):
            j = view.record.tasks.index(task)
            colour, marker, dash = _style(k)
            if view.is_joint:
                ax.axhline(view.matrix[-1, j], color=colour, linestyle=(0, (4, 3)), linewidth=1.6)
                continue
            # Stage 0 is the untrained model; the mark that is filled is the stage that trained the task.
            scores = np.concatenate([view.untrained[j : j + 1], view.matrix[:, j]])
            ax.plot(range(len(scores)), scores, color=colour, linestyle=dash, linewidth=1.8)
            hollow, at = BACKGROUND, view.trained_at[j] + 1
            for stage, value in enumerate(scores):
                big = stage == at
                ax.plot([stage], [value], marker, color=colour, markersize=7 if big else 4, clip_on=False,
                        markerfacecolor=colour if big else hollow, markeredgewidth=1.2, zorder=3)  # fmt: skip
        ax.set_ylim(-2, 104)
        ax.set_yticks([0, 25, 50, 75, 100])
        ax.set_xlim(-0.2, max(stages, 1) + 0.2)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        ax.label_outer()
        if panel >= len(tasks) - columns:
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("stage (0 = untrained)", fontsize=9, color=TEXT)
    for ax in axes[len(tasks) :]:
        ax.set_axis_off()
    if len(views) > 1:
        _legend(figure, views)
    return figure


def comparison_figure(views: Sequence[RunView]) -> Figure:
    """A panel per measure, a bar per run, faded for a run under way; measures that no run has are left out."""
    shown = [column for column in COLUMNS if any(column.value(view) is not None for view in views)]
    columns = 4 if len(shown) > 6 else min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, axes = _subplots(lines, columns, (1.95, 0.55 + 0.27 * len(views)), extra_width=0.9)
    for panel, (ax, column) in enumerate(zip(axes, shown, strict=False)):
        values = [column.value(view) for view in views]
        known = [value for value in values if value is not None]
        for k, (view, value) in enumerate(zip(views, values, strict=True)):
            if value is not None:
                ax.barh(k, value, height=0.66, color=_style(k)[0], alpha=1.0 if view.is_complete else 0.4)
            # A number stands outside its bar, on the side the bar points to.
            left = value is not None and value < 0
            ax.annotate(column.text(view), (value or 0.0, k), (-3 if left else 3, 0), textcoords="offset points",
                        ha="right" if left else "left", va="center", fontsize=9, color=TEXT)  # fmt: skip
        low, high = min(0.0, *known, 0.0), max(0.0, *known, 0.0)
        room = 0.42 * ((high - low) or 1.0)
        ax.set_xlim(low - room if low < 0 else 0.0, high + room if high > 0 or low == 0 else room * 0.2)
        ax.axvline(0, color=TEXT, linewidth=0.8)
        ax.set_title(column.title + column.arrow, fontsize=10, color=TEXT)
        ax.set_ylim(len(views) - 0.45, -0.55)
        ax.set_yticks(range(len(views)), [short(view.label, 24) for view in views] if panel % columns == 0 else [])
        ax.tick_params(axis="y", length=0)
        ax.set_xticks([])
        ax.grid(visible=False)
        ax.spines[["left", "bottom"]].set_visible(False)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    return figure


def general_figure(view: RunView) -> Figure:
    """General abilities beside the mean score of the tasks seen so far, over the stages; below, the divergence."""
    stages = [stage.index for stage in view.stages if stage.general is not None]
    figure, (above, below) = _subplots(2, 1, (6.8, 1.7), ratios=(2.0, 1.0))
    for ax in (above, below):
        ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    lines = {"general abilities": (stages, [record.score for record in view.general])}
    known = [(k, value) for k, value in enumerate(view.metrics.mean_instantaneous, start=1) if value is not None]
    if known:
        lines["tasks seen so far"] = ([k for k, _ in known], [value for _, value in known])
    for name in view.general[-1].main:
        lines[name] = (stages, [record.main.get(name, math.nan) for record in view.general])
    for k, (name, (places, values)) in enumerate(lines.items()):
        colour, marker, dash = _style(k)
        above.plot(places, values, color=colour, linestyle=dash, marker=marker, markersize=5, linewidth=1.8, label=name)
    above.set_ylim(-2, 104)
    above.set_ylabel("score", fontsize=9, color=TEXT)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, labelcolor=TEXT, fontsize=8.5)
    for k, name in enumerate(("general", "stream")):
        colour, marker, dash = _style(k + len(lines))
        moved = [record.divergence.get(name, math.nan) for record in view.general]
        below.plot(
            stages,
            moved,
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=4,
            linewidth=1.6,
            label=f"{name} prompts",
        )
    below.set_ylim(bottom=0)
    below.set_ylabel("nats a token", fontsize=9, color=TEXT)
    below.set_xlabel("stage (0 = untrained)", fontsize=9, color=TEXT)
    below.legend(frameon=False, labelcolor=TEXT, fontsize=8.5, ncols=2)
    above.tick_params(labelbottom=False)
    return figure


def balance_weight_figure(view: RunView) -> Figure:
    """Balance weight alpha over optimizer steps: mean with the band from smallest to largest, and fallback
    fraction.
    """
    rows = np.array(
        [(start + step, *rest) for start, stage in _starts(view) for step, *rest in stage.balance_weights], dtype=float
    )
    figure, (above, below) = _subplots(2, 1, (6.8, 1.7), ratios=(2.0, 1.0))
    steps, mean, low, high, fallback = rows.T
    colour, warm = RUN_COLOURS[0], RUN_COLOURS[1]
    above.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0, label="smallest to largest")
    above.plot(steps, mean, color=colour, linewidth=1.6, label="mean")
    positive = low[low > 0]
    if positive.size and np.nanmax(high) / positive.min() > 50:
        above.set_yscale("log")
        above.minorticks_off()
    figure.legend(loc="outside upper right", ncols=2, frameon=False, labelcolor=TEXT, fontsize=8.5)
    above.set_ylabel("balance weight", fontsize=9, color=TEXT)
    below.plot(steps, 100 * fallback, color=warm, linewidth=1.4)
    below.set_ylim(-4, 104)
    below.set_yticks([0, 50, 100])
    below.set_ylabel("fallback %", fontsize=9, color=TEXT)
    below.set_xlabel("optimizer step", fontsize=9, color=TEXT)
    for ax in (above, below):
        _stage_marks(ax, view, named=ax is above)
    above.tick_params(labelbottom=False)
    return figure


def loss_figure(view: RunView) -> Figure:
    """Training loss as logged, over the optimizer steps of all stages."""
    figure, (ax,) = _subplots(1, 1, (6.8, 2.3))
    for start, stage in _starts(view):
        if stage.losses:
            steps, losses = zip(*stage.losses, strict=True)
            marker = "o" if len(steps) < 12 else ""
            ax.plot(np.array(steps) + start, losses, color=RUN_COLOURS[0], linewidth=1.5, marker=marker, markersize=3)
    ax.set_ylabel("training loss", fontsize=9, color=TEXT)
    ax.set_xlabel("optimizer step", fontsize=9, color=TEXT)
    highest = max(loss for stage in view.trained for _, loss in stage.losses)
    ax.set_ylim(0, 1.08 * highest if 0 < highest < math.inf else None)
    _stage_marks(ax, view, named=True)
    return figure


def _starts(view: RunView) -> list[tuple[int, StageRecord]]:
    """Each trained stage with the number of optimizer steps before it."""
    starts, total = [], 0
    for stage in view.trained:
        starts.append((total, stage))
        total += stage.steps
    return starts


def _stage_marks(ax: Any, view: RunView, *, named: bool) -> None:
    """A line where each stage begins; above, its name, or its number where names do not fit."""
    starts = _starts(view)
    end = max(sum(stage.steps for stage in view.trained), 1)
    ax.set_xlim(0, end)
    rooms = [int(88 * stage.steps / end) for stage in view.trained]
    names = view.stage_names if min(rooms) >= _LEAST_ROOM else [f"{stage.index}" for stage in view.trained]
    for (start, stage), name, room in zip(starts, names, rooms, strict=True):
        if start:
            ax.axvline(start, color=TEXT, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.7)
        if named:
            middle = start + stage.steps / 2
            ax.annotate(short(name, max(room, _LEAST_ROOM)), (middle, 1), (0, 3), textcoords="offset points",
                        xycoords=("data", "axes fraction"), ha="center", va="bottom",
                        fontsize=8.5, color=TEXT)  # fmt: skip


def _heat_map(
    values: Matrix,
    texts: list[list[str]],
    row_names: list[str],
    column_names: list[str],
    top: float,
    meaning: str,
    framed: list[tuple[int, int]],
) -> Figure:
    rows, columns = values.shape
    longest = max(len(short(name, 26)) for name in column_names)
    cell = max(0.58, min(1.4, 5.6 / columns))
    slanted = longest * 0.083 > cell
    figure = Figure(
        figsize=(2.6 + cell * columns, 0.55 + 0.36 * rows + (0.07 * longest if slanted else 0.25)),
        dpi=DPI,
        layout="constrained",
        facecolor=BACKGROUND,
    )
    ax = figure.add_subplot()
    ax.set_facecolor(BACKGROUND)
    colours = mpl.colormaps["viridis"]
    image = ax.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=max(top, 1e-9), aspect="auto")
    for i in range(rows):
        for j in range(columns):
            empty = math.isnan(values[i, j])
            shade = TEXT if empty else ink(colours(max(values[i, j], 0.0) / max(top, 1e-9)))
            ax.text(j, i, texts[i][j], ha="center", va="center", fontsize=9.5, color=shade)
    for i, j in framed:
        # Two outlines, one of which shows on any colour.
        ax.add_patch(Rectangle((j - 0.46, i - 0.43), 0.92, 0.86, fill=False, edgecolor="#000000", linewidth=3.2))
        ax.add_patch(Rectangle((j - 0.46, i - 0.43), 0.92, 0.86, fill=False, edgecolor="#ffffff", linewidth=1.4))
    ax.set_xticks(range(columns), [short(name, 26) for name in column_names])
    if slanted:
        for label in ax.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(rows), [short(name, 32) for name in row_names])
    ax.tick_params(length=0, colors=TEXT, labelsize=9.5)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=TEXT, labelsize=8.5, length=2)
    bar.set_label(meaning, color=TEXT, fontsize=9)
    return figure


def ink(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever reads better on the colour (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "#000000" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 else "#ffffff"


def _subplots(
    rows: int,
    columns: int,
    size: tuple[float, float],
    *,
    extra_width: float = 0.0,
    ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[Any]]:
    """A figure with panels of ``size`` inches, row by row."""
    figure = Figure(
        figsize=(size[0] * columns + extra_width, size[1] * rows + 0.35),
        dpi=DPI,
        layout="constrained",
        facecolor=BACKGROUND,
    )
    axes = list(figure.subplots(rows, columns, squeeze=False, height_ratios=ratios).flat)
    for ax in axes:
        ax.set_facecolor(BACKGROUND)
        ax.tick_params(colors=TEXT, labelsize=8.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FAINT)
        ax.grid(color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _style(index: int) -> tuple[str, str, Any]:
    """Colour, marker and dash of a run; no two of the first 56 are alike."""
    count = len(RUN_COLOURS)
    return RUN_COLOURS[index % count], _MARKERS[index % len(_MARKERS)], _DASHES[index // count % len(_DASHES)]


def _legend(figure: Figure, views: Sequence[RunView]) -> None:
    handles = []
    for k, view in enumerate(views):
        colour, marker, dash = _style(k)
        joint = {"linestyle": (0, (4, 3)), "marker": ""}
        handles.append(
            Line2D([], [], color=colour, **(joint if view.is_joint else {"linestyle": dash, "marker": marker}))
        )
    # Matplotlib leaves out labels that start with an underscore; a thin space in front keeps such a name.
    labels = ["\u2009" + short(view.label, 30) for view in views]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(views)), frameon=False,
                  labelcolor=TEXT, fontsize=9.5)  # fmt: skip


def short(name: str, most: int) -> str:
    """A name that fits, and is never read as a formula."""
    return short_name(name, most).replace("$", r"\$")
