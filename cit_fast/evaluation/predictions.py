"""Stored predictions: written once after a stage, read to score again without the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cit_fast.data.constraints import Constraints
from cit_fast.errors import DataError, RunError
from cit_fast.evaluation.metrics import JUDGE, METRICS, Score, score
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.evaluation.run_files import read_run, read_stages, write_record
from cit_fast.evaluation.violations import task_v_score, violation_rates
from cit_fast.files import damaged_files, file_checksum, write_file


@dataclass(frozen=True)
class Prediction:
    """One test example as it was answered; ``score`` in [0, 100].

    ``input`` is the example's, kept where its score is computed from it (an answer that has to be a span of it, SARI);
    elsewhere ``None``. ``adapter`` is the set that a router chose for the prompt; ``None`` where there is no choice.
    ``images``: their names, as :func:`cit_fast.data.images.recorded_name` gives them; ``None`` of a text alone.
    """

    prompt: str
    prediction: str
    references: tuple[str, ...]
    score: float
    input: str | None = None
    adapter: str | None = None
    images: tuple[str, ...] | None = None


def predictions_path(run_folder: Path, stage: int, task: str) -> Path:
    """Where a stage keeps the predictions of a task: ``<run>/stages/NN/predictions/<task>.jsonl``."""
    return Path(run_folder) / "stages" / f"{stage:02d}" / "predictions" / f"{task}.jsonl"


def predictions_after(run_folder: Path, stage: StageRecord, task: str) -> Path:
    """Where the predictions of a task after a stage are: in its own folder, or in that of an earlier stage where all of
    them are the same.
    """
    return predictions_path(run_folder, stage.taken_from.get(task, stage.index), task)


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write one JSON object per line, atomically.

    Raises:
        RunError: the file cannot be written.
    """
    plain = [{key: value for key, value in vars(each).items() if value is not None} for each in predictions]
    write_file(Path(path), "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in plain))


def write_stage_predictions(folder: Path, predictions: Mapping[str, Sequence[Prediction]]) -> None:
    """Write the predictions of each task into a stage's folder, where :func:`predictions_path` finds them."""
    for task, entries in predictions.items():
        write_predictions(Path(folder) / "predictions" / f"{task}.jsonl", entries)


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
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: broken JSON ({error})") from None
    kinds = {"prompt": str, "prediction": str, "references": list, "score": (int, float)}
    optional: dict[str, type] = {"input": str, "adapter": str, "images": list}
    if not isinstance(raw, dict) or set(raw) - set(optional) != set(kinds):
        raise RunError(f"{where}: an object with the keys {', '.join(kinds)} was expected")
    for key, kind in {**kinds, **{key: kind for key, kind in optional.items() if key in raw}}.items():
        if not isinstance(raw[key], kind):  # type: ignore[arg-type]
            raise RunError(f"{where}: {key} has the wrong type ({type(raw[key]).__name__})")
    return Prediction(
        raw["prompt"],
        raw["prediction"],
        tuple(map(str, raw["references"])),
        float(raw["score"]),
        raw.get("input"),
        raw.get("adapter"),
        tuple(map(str, raw["images"])) if "images" in raw else None,
    )


@dataclass(frozen=True)
class Rescored:
    """A task's score after a stage: as the run ``recorded`` it and as ``recomputed`` from the stored
    predictions.

    Either is ``None`` where it is missing: nothing recorded, or no predictions stored (``examples`` is 0).
    ``violations`` and ``violations_again`` are the task's rates, as recorded and as recomputed; ``None`` where missing,
    or where the run is older than they are. ``intact``: whether the predictions are those that were written.
    """

    stage: int
    task: str
    metric: str
    recorded: float | None
    recomputed: float | None
    examples: int
    violations: dict[str, float] | None = None
    violations_again: dict[str, float] | None = None
    intact: bool = True

    @property
    def agrees(self) -> bool:
        """Whether the stored predictions give what is recorded, up to rounding in the last digits."""
        return self.scores_agree and self.violations_agree and self.intact

    @property
    def scores_agree(self) -> bool:
        """Whether they give the recorded score."""
        if self.recorded is None or self.recomputed is None:
            return False
        return abs(self.recorded - self.recomputed) < 1e-6

    @property
    def v(self) -> float | None:
        """V-score of the task in points, as recorded; ``None`` where it declares no constraint, or is not judged."""
        return task_v_score(self.violations)

    @property
    def v_again(self) -> float | None:
        """The same as recomputed."""
        return task_v_score(self.violations_again)

    @property
    def violations_agree(self) -> bool:
        """Whether they give the recorded violations."""
        was, now = self.violations or {}, self.violations_again or {}
        return set(was) == set(now) and all(abs(was[kind] - now[kind]) < 1e-6 for kind in was)


def rescore(
    run_folder: Path, *, write: bool = False, allow_custom_metrics: bool = False, stage: int | None = None
) -> list[Rescored]:
    """Compute every score of a run again from its stored predictions, and what they violate, without the model.

    Args:
        run_folder: a run's folder; a run under way is taken as far as it is.
        write: put the recomputed values into ``stage.json`` and the prediction files, each file atomically;
            otherwise nothing is changed.
        allow_custom_metrics: import and call a metric that the run names by dotted path. Only for a run you trust:
            the path is read from the run's own record.
        stage: this one alone.

    Returns:
        One entry per stage and task that has a score or predictions, in order of stage and task; none of a task whose
        texts have been removed, or of the untrained model on one that joined later.

    Raises:
        RunError: no run there, or a damaged file; with ``write``, nothing of the stage at hand has been
            changed then.
        ConfigError, DataError: a metric that is not known here, or predictions it cannot score.
    """
    run_folder = Path(run_folder)
    run = read_run(run_folder)
    results: list[Rescored] = []
    stages = read_stages(run_folder, check=False)  # what it says is what is looked at here
    joined = {task for stage in stages for task in stage.untrained}  # whose answers of the untrained model are not here
    if stage is not None and stage not in {each.index for each in stages}:
        raise RunError(f"{run_folder}: has no stage {stage}; its stages are 0 to {stages[-1].index if stages else 0}")
    files: dict[int, Mapping[str, str]] = {each.index: each.files for each in stages}
    for each in stages:
        if stage in (None, each.index):
            results += _rescored(run_folder, run, each, files, joined, write, allow_custom_metrics)
    return results


def _rescored(
    run_folder: Path,
    run: RunRecord,
    stage: StageRecord,
    files: dict[int, Mapping[str, str]],
    joined: set[str],
    write: bool,
    allow_custom_metrics: bool,
) -> list[Rescored]:
    """:func:`rescore` of one stage; ``files``: of every stage, with their checksums."""
    results = []
    again: dict[str, _Again] = {}
    for task in run.every_task:
        if task in run.dropped_tasks or (stage.index == 0 and task in joined):
            continue
        path = predictions_after(run_folder, stage, task)
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
            again[task] = _score_again(metric, stored, _constraints(run_folder, run, task))
        if stored or recorded is not None:
            found = again.get(task, _Again(None, None, []))
            was = stage.violations.get(task)
            values = (recorded, found.score, len(stored), was, found.violations)
            holder = files.get(stage.taken_from.get(task, stage.index), {})
            intact = not damaged_files(path.parents[1], holder, f"predictions/{path.name}")
            results.append(Rescored(stage.index, task, metric, *values, intact))
    if write and again:
        files[stage.index] = _update(run_folder, stage, again)
    return results


@dataclass(frozen=True)
class _Again:
    """What the stored predictions of a task give."""

    score: float | None
    violations: dict[str, float] | None
    predictions: list[Prediction]


def _constraints(run_folder: Path, run: RunRecord, task: str) -> Constraints | None:
    """What the task declares; ``None`` in a run older than that."""
    if task not in run.constraints:
        return None
    try:
        return Constraints.from_record(run.constraints[task])
    except DataError as error:
        raise RunError(f"{run_folder / 'run.json'}: constraints of task {task!r}: {error}") from None


def _score_again(metric: str, stored: list[Prediction], constraints: Constraints | None) -> _Again:
    if metric == JUDGE:  # asks nobody again: the marks are what they were
        marks = [each.score for each in stored]
        value = Score(sum(marks) / len(marks), marks)
    else:
        # No labels needed: with a closed set, equality with a reference is all that accuracy asks.
        answers, references = [each.prediction for each in stored], [each.references for each in stored]
        value = score(metric, answers, references, inputs=[each.input or "" for each in stored])
    return _Again(
        value.value,
        None if constraints is None else judged(constraints, stored),
        [dataclasses.replace(each, score=points) for each, points in zip(stored, value.per_example, strict=True)],
    )


def judged(constraints: Constraints, predictions: Sequence[Prediction]) -> dict[str, float]:
    """The rates of violations among stored predictions; see :func:`.violations.violation_rates`."""
    return violation_rates(
        constraints,
        [each.prediction for each in predictions],
        [each.references for each in predictions],
        [each.input for each in predictions],
    )


def _update(run_folder: Path, stage: StageRecord, again: dict[str, _Again]) -> dict[str, str]:
    """Write what was computed again; returns the checksums of the stage's files as they are now."""
    folder = run_folder / "stages" / f"{stage.index:02d}"
    # Predictions first: were the process killed in between, the next call would find the difference and go
    # on.
    own = [task for task in again if task not in stage.taken_from]  # of the others, the stage that they are of
    for task in own:
        write_predictions(predictions_path(run_folder, stage.index, task), again[task].predictions)
    scores = {task: found.score for task, found in again.items() if found.score is not None}
    violations = {task: found.violations for task, found in again.items() if found.violations is not None}
    changed = dataclasses.replace(
        stage,
        scores=stage.scores | scores,
        violations=stage.violations | violations,
        files=stage.files
        | {
            path.relative_to(folder).as_posix(): file_checksum(path)
            for path in (predictions_path(run_folder, stage.index, task) for task in own)
        },
    )
    write_record(folder / "stage.json", changed)
    return changed.files
