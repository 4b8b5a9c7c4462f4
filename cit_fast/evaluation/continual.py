"""Continual-learning metrics from the score matrix ``R[i][j]``: score on task j after training stage i.

They are average performance, new accuracy (LCIA, arXiv 2410.10868), forgetting
(Chaudhry et al. 2018, arXiv 1801.10112), backward and forward transfer (Lopez-Paz & Ranzato 2017, arXiv
1706.08840), mean instantaneous accuracy and InsCL's relative gain (Wang et al. 2024, arXiv 2403.11435). They
are written for "stage i trains task i"; here ``trained_at[j]`` says which row trained task j first, so that a
stage may train several tasks (joint training: one row, ``trained_at`` all 0). A matrix with fewer rows than
tasks is a run under way: tasks not trained yet do not count.

A value is ``None`` where it has no term (one task, a joint run) or where one of its terms is missing (NaN): a
mean over fewer tasks than its name says would not be comparable. Scores, and all results, are in points from
0 to 100 (differences from -100 to 100); relative gain is a percentage of the experts' scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cit_fast.errors import RunError
from cit_fast.evaluation.records import RunRecord, StageRecord

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class ContinualMetrics:
    """Every metric of one run; ``None`` where it is undefined.

    Args:
        average_performance: AP, mean of the last row.
        new_accuracy: New.ACC, mean score of each task right after the stage that trained it first (plasticity).
        forgetting: F, mean drop from the best score since a task was trained; negative if earlier tasks improved.
        backward_transfer: BWT, mean change since the task was trained; forward_transfer: FWT, mean change
            over the untrained model just before the task is trained.
        mean_instantaneous: MA_i for every stage; ``relative_gains``: RG_i for every stage, in per cent.
        relative_gain: the last of ``relative_gains``; ``relative_gain_mean``, ``relative_gain_std``: over the stages,
            as the InsCL paper's tables have them (standard deviation of the sample, 0 of one stage).
        balance_weight: mean share of the new weights that an average took, over steps and parameter tensors of the
            averaged stages; ``fallback_share``: per cent of those shares that were the rule's constant. ``None``
            without an average.
    """

    average_performance: float | None
    new_accuracy: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    mean_instantaneous: tuple[float | None, ...]
    relative_gains: tuple[float | None, ...]
    relative_gain: float | None
    relative_gain_mean: float | None
    relative_gain_std: float | None
    balance_weight: float | None
    fallback_share: float | None


def continual_metrics(run: RunRecord, stages: Sequence[StageRecord]) -> ContinualMetrics:
    """All metrics of a run from its records, over the tasks whose texts it has; works on a run under way too (see the
    module's text).

    Raises:
        RunError: see :func:`score_matrix`.
    """
    untrained, matrix = score_matrix(run, stages)
    counted = [j for j, task in enumerate(run.tasks) if task not in run.dropped_tasks]
    untrained, matrix = untrained[counted], matrix[:, counted]
    trained_at = [first_trained(run, stages)[j] for j in counted]
    experts = [run.experts.get(run.tasks[j], math.nan) for j in counted]
    gains = relative_gain(matrix, experts, trained_at)
    defined = np.array([math.nan if gain is None else gain for gain in gains[1:]])
    mean_gain = _mean(defined)
    steps = np.array([step for stage in stages for step in stage.balance_weights], dtype=np.float64).reshape(-1, 5)
    return ContinualMetrics(
        average_performance=average_performance(matrix, trained_at),
        new_accuracy=new_accuracy(matrix, trained_at),
        forgetting=forgetting(matrix, trained_at),
        backward_transfer=backward_transfer(matrix, trained_at),
        forward_transfer=forward_transfer(matrix, untrained, trained_at),
        mean_instantaneous=tuple(mean_instantaneous(matrix, trained_at)),
        relative_gains=tuple(gains),
        relative_gain=gains[-1] if gains else None,
        relative_gain_mean=mean_gain,
        relative_gain_std=None if mean_gain is None else float(defined.std(ddof=min(1, len(defined) - 1))),
        balance_weight=_mean(steps[:, 1]),
        fallback_share=None if not len(steps) else 100 * float(steps[:, 4].mean()),
    )


def score_matrix(run: RunRecord, stages: Sequence[StageRecord]) -> tuple[Matrix, Matrix]:
    """The untrained row ``[T]`` and the matrix ``R [S, T]`` of a run, float64, NaN where nothing was
    evaluated.

    Args:
        run: T tasks in order of arrival. ``stages``: S training stages in order, before them the untrained
            stage (index 0), which may be absent.

    Raises:
        RunError: a stage missing between others or there twice, a task the run does not have, a score outside
            [0, 100].
    """
    indices = [stage.index for stage in stages]
    start = 0 if 0 in indices else 1
    if indices != list(range(start, start + len(indices))):
        raise RunError(f"run {run.name}: stages must be 0, 1, 2, ... without gaps, but are {indices}")
    column = {task: j for j, task in enumerate(run.tasks)}
    rows = np.full((len(stages) + start, len(run.tasks)), np.nan)
    for stage in stages:
        for task, value in stage.scores.items():
            if task not in run.every_task and task not in run.retired_tasks:
                raise RunError(f"run {run.name}, stage {stage.index}: scores a task {task!r} the run does not have")
            if not isinstance(value, int | float) or not 0.0 <= value <= 100.0:
                raise RunError(
                    f"run {run.name}, stage {stage.index}: score of {task} is {value!r}; scores lie in [0, 100]"
                )
            if task in column:  # and not held out
                rows[stage.index, column[task]] = value
    if not len(rows):
        rows = np.full((1, len(run.tasks)), np.nan)
    return rows[0], rows[1:]


def first_trained(run: RunRecord, stages: Sequence[StageRecord]) -> list[int]:
    """``trained_at``: for every task the row of R that trained it first; the number of rows if none did yet.

    Raises:
        RunError: a stage trained a task the run does not have.
    """
    rows = [stage for stage in stages if stage.index > 0]
    trained_at = dict.fromkeys(run.tasks, len(rows))
    for row, stage in enumerate(rows):
        for task in stage.trained:
            if task not in trained_at:
                raise RunError(f"run {run.name}, stage {stage.index}: trained a task {task!r} the run does not have")
            trained_at[task] = min(trained_at[task], row)
    return list(trained_at.values())


def average_performance(matrix: ArrayLike, trained_at: Sequence[int] | None = None) -> float | None:
    """AP = mean_j R[last][j].

    Args:
        matrix: R ``[S, T]``, points in [0, 100], NaN where missing.
        trained_at: ``[T]`` row in which each task was trained first; default: task j in row j.
    """
    R, at = _prepare(matrix, trained_at)
    return _mean(R[-1, at < len(R)]) if len(R) else None


def new_accuracy(matrix: ArrayLike, trained_at: Sequence[int] | None = None) -> float | None:
    """New.ACC = mean_j R[j][j], the row that trained task j first; arguments as above."""
    R, at = _prepare(matrix, trained_at)
    trained = np.flatnonzero(at < len(R))
    return _mean(R[at[trained], trained])


def forgetting(matrix: ArrayLike, trained_at: Sequence[int] | None = None) -> float | None:
    """F = mean_{j trained before the last row} ( max_{j<=i<last} R[i][j] - R[last][j] ); arguments as above.

    The maximum is over the rows from the one that trained the task: what it scored before, it had not learned. Rows in
    which a task was not evaluated do not enter it.
    """
    R, at = _prepare(matrix, trained_at)
    earlier = at < len(R) - 1
    if not earlier.any():
        return None
    since = np.where(np.arange(len(R))[:, None] >= at, R, np.nan)
    # fmax ignores NaN unless every row has it, and then the term is missing.
    return _mean(np.fmax.reduce(since[:-1, earlier], axis=0) - R[-1, earlier])


def backward_transfer(matrix: ArrayLike, trained_at: Sequence[int] | None = None) -> float | None:
    """BWT = mean_{j trained before the last row} ( R[last][j] - R[j][j] ); arguments as above."""
    R, at = _prepare(matrix, trained_at)
    earlier = np.flatnonzero(at < len(R) - 1)
    return _mean(R[-1, earlier] - R[at[earlier], earlier]) if len(earlier) else None


def forward_transfer(matrix: ArrayLike, untrained: ArrayLike, trained_at: Sequence[int] | None = None) -> float | None:
    """FWT = mean_{j not trained in row 0} ( R[j-1][j] - R0[j] ); ``untrained``: R0 ``[T]``, rest as above."""
    R, at = _prepare(matrix, trained_at)
    later = np.flatnonzero((at > 0) & (at < len(R)))
    return _mean(R[at[later] - 1, later] - _row(untrained, R)[later]) if len(later) else None


def mean_instantaneous(matrix: ArrayLike, trained_at: Sequence[int] | None = None) -> list[float | None]:
    """MA_i = mean_{j trained up to row i} R[i][j] for every row i; arguments as above."""
    R, at = _prepare(matrix, trained_at)
    return [_mean(R[i, at <= i]) for i in range(len(R))]


def relative_gain(matrix: ArrayLike, experts: ArrayLike, trained_at: Sequence[int] | None = None) -> list[float | None]:
    """RG_i = mean_{j trained before row i} 100 R[i][j] / U_j for every row i, in per cent.

    Args:
        experts: U ``[T]``, score of a model trained on task j alone; NaN where there is none. An expert that
            scores 0 leaves the gain undefined.
        matrix: as above. ``trained_at``: as above.
    """
    R, at = _prepare(matrix, trained_at)
    U = _row(experts, R)
    U = np.where(U > 1e-9, U, np.nan)
    return [_mean(100.0 * R[i, at < i] / U[at < i]) for i in range(len(R))]


def _prepare(matrix: ArrayLike, trained_at: Sequence[int] | None) -> tuple[Matrix, NDArray[np.int64]]:
    R = np.asarray(matrix, dtype=np.float64)
    if R.ndim != 2:
        raise ValueError(f"the score matrix must have two dimensions (stages, tasks), not shape {R.shape}")
    at = np.arange(R.shape[1]) if trained_at is None else np.asarray(trained_at, dtype=np.int64)
    if at.shape != (R.shape[1],):
        raise ValueError(f"trained_at has shape {at.shape}; the matrix has {R.shape[1]} tasks")
    return R, at


def _row(values: ArrayLike, matrix: Matrix) -> Matrix:
    row = np.asarray(values, dtype=np.float64)
    if row.shape != (matrix.shape[1],):
        raise ValueError(f"a row of shape {row.shape} does not fit a matrix with {matrix.shape[1]} tasks")
    return row


def _mean(terms: Matrix) -> float | None:
    return None if not terms.size or np.isnan(terms).any() else float(terms.mean())
