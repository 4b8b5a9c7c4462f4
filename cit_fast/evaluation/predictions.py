"""Stored predictions: written once after a stage, read to score again without the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cit_fast.errors import RunError
from cit_fast.evaluation.metrics import METRICS, score
from cit_fast.evaluation.record import StageRecord, read_run, read_stages
from cit_fast.files import write_file, write_json


@dataclass(frozen=True)
class Prediction:
    """One test example as it was answered; ``score`` in [0, 100]."""

    prompt: str
    prediction: str
    references: tuple[str, ...]
    score: float


def predictions_path(run_folder: Path, stage: int, task: str) -> Path:
    """Where the predictions of a task after a stage are: ``<run>/stages/NN/predictions/<task>.jsonl``."""
    return Path(run_folder) / "stages" / f"{stage:02d}" / "predictions" / f"{task}.jsonl"


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write one JSON object per line, atomically.

    Raises:
        RunError: the file cannot be written.
    """
    lines = "".join(json.dumps(dataclasses.asdict(each), ensure_ascii=False) + "\n" for each in predictions)
    write_file(Path(path), lines)


def read_predictions(path: Path) -> list[Prediction]:
    """Read what :func:`write_predictions` wrote.

    Raises:
        RunError: no file, or a line that is no prediction; the message starts with ``file:line``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{path}: cannot be read ({reason})") from None
    predictions = []
    # Not splitlines(): it would also cut at U+2028 and its kin, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            predictions.append(_prediction(line, f"{path}:{number}"))
    return predictions


def _prediction(line: str, where: str) -> Prediction:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise RunError(f"{where}: broken JSON ({error.msg})") from None
    kinds = {"prompt": str, "prediction": str, "references": list, "score": (int, float)}
    if not isinstance(raw, dict) or set(raw) != set(kinds):
        raise RunError(f"{where}: an object with the keys {', '.join(kinds)} was expected")
    for key, kind in kinds.items():
        if not isinstance(raw[key], kind):  # type: ignore[arg-type]
            raise RunError(f"{where}: {key} has the wrong type ({type(raw[key]).__name__})")
    return Prediction(raw["prompt"], raw["prediction"], tuple(map(str, raw["references"])), float(raw["score"]))


@dataclass(frozen=True)
class Rescored:
    """A task's score after a stage: as the run ``recorded`` it and as ``recomputed`` from the stored
    predictions.

    Either is ``None`` where it is missing: nothing recorded, or no predictions stored (``examples`` is 0).
    """

    stage: int
    task: str
    metric: str
    recorded: float | None
    recomputed: float | None
    examples: int

    @property
    def agrees(self) -> bool:
        """Whether the stored predictions give the recorded score, up to rounding in the last digits."""
        if self.recorded is None or self.recomputed is None:
            return False
        return abs(self.recorded - self.recomputed) < 1e-6


def rescore(run_folder: Path, *, write: bool = False, allow_custom_metrics: bool = False) -> list[Rescored]:
    """Compute every score of a run again from its stored predictions, without the model.

    Args:
        run_folder: a run's folder; a run under way is taken as far as it is.
        write: put the recomputed scores into ``stage.json`` and the prediction files, each file atomically;
            otherwise nothing is changed.
        allow_custom_metrics: import and call a metric that the run names by dotted path. Only for a run you trust:
            the path is read from the run's own record.

    Returns:
        One entry per stage and task that has a score or predictions, in order of stage and task.

    Raises:
        RunError: no run there, or a damaged file; with ``write``, nothing of the stage at hand has been
            changed then.
        ConfigError, DataError: a metric that is not known here, or predictions it cannot score.
    """
    run_folder = Path(run_folder)
    run = read_run(run_folder)
    results = []
    for stage in read_stages(run_folder):
        rescored: dict[str, tuple[float, list[Prediction]]] = {}
        for task in run.tasks:
            path = predictions_path(run_folder, stage.index, task)
            stored = read_predictions(path) if path.exists() else []
            recorded = stage.scores.get(task)
            if task not in run.metrics:
                raise RunError(f"{run_folder / 'run.json'}: metrics names none for task {task!r}")
            metric = run.metrics[task]
            if metric not in METRICS and {".", ":"} & set(metric) and not allow_custom_metrics:
                raise RunError(
                    f"{run_folder / 'run.json'}: task {task!r} is scored by {metric!r}, which is not one of ours; "
                    "allow custom metrics if you trust the run"
                )
            if stored:
                # No labels needed: with a closed set, equality with a reference is all that accuracy asks.
                value = score(metric, [each.prediction for each in stored], [each.references for each in stored])
                rescored[task] = (
                    value.value,
                    [
                        dataclasses.replace(each, score=points)
                        for each, points in zip(stored, value.per_example, strict=True)
                    ],
                )
            if stored or recorded is not None:
                recomputed = rescored[task][0] if stored else None
                results.append(Rescored(stage.index, task, metric, recorded, recomputed, len(stored)))
        if write and rescored:
            _update(run_folder, stage, rescored)
    return results


def _update(run_folder: Path, stage: StageRecord, rescored: dict[str, tuple[float, list[Prediction]]]) -> None:
    # Predictions first: were the process killed in between, the next call would find the difference and go
    # on.
    for task, (_, predictions) in rescored.items():
        write_predictions(predictions_path(run_folder, stage.index, task), predictions)
    scores = stage.scores | {task: value for task, (value, _) in rescored.items()}
    record = dataclasses.asdict(dataclasses.replace(stage, scores=scores))
    path = run_folder / "stages" / f"{stage.index:02d}" / "stage.json"
    write_json(path, record)
