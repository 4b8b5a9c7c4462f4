"""The values of a report as plain JSON, for scripts and spreadsheets."""

from __future__ import annotations

import dataclasses
from typing import Any

from cit_fast.report.collect import COLUMNS, Runs


def report_values(runs: Runs) -> dict[str, Any]:
    """Of every run: who it is, each column of the comparison, and P- and V-score of its seen and held-out tasks
    with the rate of each kind of violation (:class:`cit_fast.evaluation.violations.TaskSetScores`).

    Values are points from 0 to 100, ``null`` where undefined.
    """
    return {
        "runs": [
            {
                "label": view.label,
                "folder": str(view.folder),
                "method": view.record.method_name,
                "model": view.record.model,
                "seed": view.record.seed,
                "complete": view.is_complete,
                "compared": view in runs.compared,
                **{column.title: column.value(view) for column in COLUMNS},
                "relative_gain": {
                    "after_each_stage": list(view.metrics.relative_gains),
                    "mean": view.metrics.relative_gain_mean,
                    "std": view.metrics.relative_gain_std,
                },
                "seen": dataclasses.asdict(view.seen),
                "held_out": dataclasses.asdict(view.held_out) if view.record.held_out_tasks else None,
            }
            for view in runs.views
        ],
        "notes": runs.notes,
    }
