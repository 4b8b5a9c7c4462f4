"""Scores, continual metrics, violations, and the predictions and records that a run leaves."""

from __future__ import annotations

from cit_fast.data.constraints import Constraints
from cit_fast.evaluation.continual import ContinualMetrics, continual_metrics, score_matrix
from cit_fast.evaluation.metrics import METRICS, Score, resolve_metric, score
from cit_fast.evaluation.predictions import (
    Prediction,
    Rescored,
    predictions_after,
    predictions_path,
    read_predictions,
    rescore,
    write_predictions,
)
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.evaluation.run_files import read_run, read_stages
from cit_fast.evaluation.violations import TaskSetScores, task_set_scores, violation_rates

__all__ = [
    "METRICS",
    "Constraints",
    "ContinualMetrics",
    "Prediction",
    "Rescored",
    "RunRecord",
    "Score",
    "StageRecord",
    "TaskSetScores",
    "continual_metrics",
    "predictions_after",
    "predictions_path",
    "read_predictions",
    "read_run",
    "read_stages",
    "rescore",
    "resolve_metric",
    "score",
    "score_matrix",
    "task_set_scores",
    "violation_rates",
    "write_predictions",
]
