"""The picture of a comparison on the test bed: how much each method forgets, against what it costs.

The cost is the processor time of a run on one core, answering the tests included, which other work on the machine does
not lengthen.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import bootstrap

from cit_fast.files import write_file
from cit_fast.report.figures import FAINT, RUN_COLOURS, TEXT, png

OURS = ("cit-fast", "switch-tokens", "grouping-ema", "lcia-ema", "replay-ema")


def picture(title: str, found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Forgetting with its 95 % bootstrap interval over the median cost; what cannot forget is left out.

    Args:
        found: method -> figures of its runs, one per seed.
        path: of the PNG file.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    points = []
    for name, runs in found.items():
        values = [run["forgetting"] for run in runs]
        if None not in values:
            points.append((name, statistics.median(run["cpu minutes"] for run in runs), values))
    width = 1.45 * max(x for _, x, _ in points)
    height = max(20.0, *(max(values) for *_, values in points))
    labels: list[tuple[float, float]] = []
    for name, x, values in sorted(points, key=lambda point: -point[1]):
        y = statistics.mean(values)
        low, high = _interval(values)
        # A label that would lie on another one goes above it.
        above = sum(abs(x - a) < 0.3 * width and abs(y - b) < 0.06 * height for a, b in labels)
        labels.append((x, y))
        colour = RUN_COLOURS[1] if name.startswith(OURS) else RUN_COLOURS[0]
        axes.errorbar(x, y, [[y - low], [high - y]], fmt="o", color=colour, capsize=3, markersize=6)
        axes.annotate(name, (x, y), xytext=(8, 4 + 11 * above), textcoords="offset points", color=TEXT, fontsize=9)
    axes.set_xlabel("processor minutes of a run, median of the seeds")
    axes.set_ylabel("forgetting (points; lower is better)")
    axes.set_title(f"{title}, {len(next(iter(found.values())))} seeds", loc="left", fontsize=10)
    axes.set_xlim(0, width)
    axes.set_ylim(-0.04 * height, 1.1 * height)
    axes.grid(color=FAINT)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    write_file(path, png(figure))


def _interval(values: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean; of one value the value itself."""
    if len(values) < 2 or np.ptp(values) == 0:
        return values[0], values[0]
    rng = np.random.default_rng(0)
    low, high = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=rng).confidence_interval
    return float(low), float(high)
