"""The picture of ``cit-fast score``: the gains of each task as a histogram, one below the other on one scale."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from cit_fast.analysis.key_part_gains import Scores, counts
from cit_fast.report.figures import BACKGROUND, DPI, FAINT, RUN_COLOURS, TEXT, png, short

BINS = 24
"""Bins of a task's histogram, at most."""

_MOST_TASKS = 40  # rows that can be read on one picture; those with the lowest gain
_ROW = 0.46  # inches


def score_picture(scores: Scores) -> bytes:
    """A PNG: a histogram per task, the task with the lowest mean gain on top, its mean as a dot."""
    tasks = scores.tasks[:_MOST_TASKS]
    bins = scores.edges(BINS)
    edges = np.array(bins)
    figure = Figure(
        figsize=(8.4, 1.35 + _ROW * max(len(tasks), 2)), dpi=DPI, facecolor=BACKGROUND, layout="constrained"
    )
    ax = figure.add_subplot()
    ax.set_facecolor(BACKGROUND)
    colour, warm = RUN_COLOURS[0], RUN_COLOURS[1]
    for row, task in enumerate(tasks):
        heights = np.array(counts(task.values, bins), dtype=float)
        # Each histogram has its own height: what matters is where a task's gains lie, not how many they are.
        heights = heights / heights.max() * 0.8
        low = edges[1:] <= scores.threshold + 1e-9
        for some, fill in ((low, warm), (~low, colour)):
            ax.bar(
                edges[:-1][some], heights[some], np.diff(edges)[some], bottom=-row, align="edge", color=fill, alpha=0.75
            )
        ax.plot([task.mean], [0.06 - row], "o", color=TEXT, markersize=5.5, zorder=4, clip_on=False,
                markeredgecolor=BACKGROUND)  # fmt: skip
        ax.axhline(-row, color=FAINT, linewidth=0.8, zorder=0)
    ax.axvline(0, color=TEXT, linewidth=0.9, zorder=1)
    ax.axvline(scores.threshold, color=warm, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    ax.set_ylim(-len(tasks) + 0.9, 1.0)
    pad = 0.02 * (edges[-1] - edges[0])
    ax.set_xlim(edges[0] - pad, edges[-1] + pad)
    ax.set_yticks([0.3 - row for row in range(len(tasks))], [short(task.task, 34) for task in tasks])
    right = ax.secondary_yaxis("right")
    right.set_yticks(
        [0.3 - row for row in range(len(tasks))],
        [f"{task.mean:.3f}   {task.below(scores.threshold):4.0%} low" for task in tasks],
    )
    for axis in (ax, right):
        axis.tick_params(axis="y", length=0, labelsize=9, colors=TEXT)
        for spine in axis.spines.values():
            spine.set_visible(False)
    ax.tick_params(axis="x", labelsize=8.5, colors=TEXT)
    ax.set_xlabel(
        f"information gain of the key parts, at most {scores.limit:.2f} (alpha {scores.alpha:g});  "
        f"dot: mean;  orange: below {scores.threshold:g}",
        fontsize=9,
        color=TEXT,
    )
    left_out = len(scores.tasks) - len(tasks)
    figure.suptitle(
        f"{short(scores.model, 50)}: does it listen to the words that define the task?"
        + (f"\n({left_out} tasks with higher gains not shown)" if left_out else ""),
        x=0.01,
        ha="left",
        fontsize=11,
        color=TEXT,
    )
    return png(figure)
