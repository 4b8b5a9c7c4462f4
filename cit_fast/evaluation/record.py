"""What a run leaves on disk for evaluation and report, as plain dataclasses read from and written to JSON.

    <run>/run.json                          RunRecord: what was run, where, and whether it is finished
    <run>/stages/00/stage.json              StageRecord of the untrained model (row "untrained" of the score matrix)
    <run>/stages/01/stage.json ...          StageRecord after each training stage, in order
    <run>/stages/NN/predictions/<task>.jsonl  one object per test example: prompt, prediction, references, score

A stage folder is committed by one rename, so a stage that exists is whole. Records carry a checksum of themselves, and
a stage's record those of its files: what has changed since is an error that names it, never another result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cit_fast.errors import RunError
from cit_fast.files import damaged_files, read_checked_json, write_checked_json

FORMAT_VERSION = 1
_Record = TypeVar("_Record")


@dataclass
class StageRecord:
    """One stage of a run: what was trained, on what, and how every task scored afterwards.

    Args:
        index: 0 for the untrained model, then 1, 2, ...
        trained: names of the tasks this stage trained (empty for index 0, all tasks for a joint run).
        scores: task name -> score in [0, 100] after this stage; a task that was not evaluated is absent.
        adapter: name of the adapter set that was trained.
        train_examples: examples of the new task(s), without replay.
        replayed: earlier task -> examples replayed in this stage.
        replay: what the replay policy says about its choice; any plain values. The report shows ``distances`` and
            ``budgets`` (earlier task -> its distance to the new task, examples it was given), ``instructions`` (a list
            of ``{task, instruction, insinfo, tags, drawn, available}``, highest InsInfo first; of
            ``instruction_count`` in all), ``gains`` (earlier task -> mean information gain of its key parts) and
            ``notes`` (a list of sentences).
        objective: what the objective says about the stage; any plain values, ``notes`` as in ``replay``.
        routing: what the router decided and how it did; empty where there is one set for all. ``assigned`` (name of
            the set), ``new`` (made for this stage, not reused), ``scores`` (earlier set -> its score for the new task),
            ``threshold`` (from which a set is reused), ``reject_below`` (scores that go to the base model),
            ``trained_by`` (task -> its set, so far), ``answers`` (task -> set -> prompts answered by it, ``__base__``
            for the base model), ``accuracy`` (share of the trained tasks' prompts that their own set answered),
            ``to_base`` (share of the other tasks' prompts that the base model answered), ``seconds`` (of choosing),
            ``truncated`` (training prompts too long to be read whole), ``notes`` (sentences).
        steps: optimizer steps; ``train_seconds`` and ``evaluate_seconds``: wall time (summed over resumed parts).
        losses: ``(step, training loss)`` as logged.
        balance_weights: per optimizer step ``(step, mean, minimum, maximum, fallback fraction)`` of the balance
            weight alpha over parameter tensors; empty where the update keeps no average.
        truncated: examples whose input was shortened to fit the length limit.
        skipped: examples left out because the user asked to skip what cannot fit.
        test_truncated, test_skipped: the same of the test examples that were answered.
        held_out: held-out task -> score in [0, 100] after this stage; empty where none was evaluated.
        violations: task, held-out or not -> kind of violation that applies to it -> share of its answers, in [0, 1]
            (:mod:`cit_fast.evaluation.violations`); of every task that was evaluated, empty for one that declares no
            constraint.
        notes: sentences for whoever reads the record: media that were not seen, layers that did not move.
        files: path of every other file in the stage's folder -> its SHA-256, filled in when the stage is committed.
    """

    index: int
    trained: list[str]
    scores: dict[str, float]
    adapter: str = "shared"
    train_examples: int = 0
    replayed: dict[str, int] = field(default_factory=dict)
    replay: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    balance_weights: list[tuple[int, float, float, float, float]] = field(default_factory=list)
    truncated: int = 0
    skipped: int = 0
    test_truncated: int = 0
    test_skipped: int = 0
    held_out: dict[str, float] = field(default_factory=dict)
    violations: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


@dataclass
class RunRecord:
    """One method on one stream.

    Args:
        name: name of the run; ``method``: resolved method (its preset's name under ``name``, and its four parts).
        tasks: task names in order of arrival; ``metrics``: task name -> metric name, of the held-out tasks too.
        held_out_tasks: names of the tasks that are evaluated but never trained.
        constraints: task name, held-out or not -> what it declares of its answers (see
            :meth:`cit_fast.evaluation.violations.Constraints.to_record`).
        model: model name or path; ``seed``; ``status``: "running" or "finished".
        config: the whole resolved configuration.
        environment: versions, hardware, thread count, effective batch size.
        experts: task name -> score of a model trained on that task alone (for Relative Gain); may be empty.
    """

    name: str
    method: dict[str, Any]
    tasks: list[str]
    metrics: dict[str, str]
    model: str
    seed: int
    status: str = "running"
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    held_out_tasks: list[str] = field(default_factory=list)
    constraints: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def every_task(self) -> list[str]:
        """The tasks of the stream, then the held-out ones."""
        return [*self.tasks, *self.held_out_tasks]

    @property
    def method_name(self) -> str:
        """The preset's name, or the name the user gave the method."""
        return str(self.method["name"])


def _read(path: Path, kind: type[_Record], check: bool = True) -> _Record:
    try:
        raw = read_checked_json(path, check=check)
    except FileNotFoundError:
        what = (
            "the stage is damaged" if path.name == "stage.json" else f"is {path.parent} the folder of a cit-fast run?"
        )
        raise RunError(f"{path}: not there; {what}") from None
    version = raw.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise RunError(f"{path}: written in format version {version}; this cit-fast reads version {FORMAT_VERSION}")
    known = {entry.name for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(raw) - known)
    if unknown:
        raise RunError(f"{path}: unknown key {unknown[0]!r}")
    lists, objects = (
        {"tasks", "trained", "held_out_tasks", "notes"},
        {
            "metrics",
            "method",
            "config",
            "environment",
            "experts",
            "scores",
            "held_out",
            "violations",
            "constraints",
            "files",
        },
    )  # fmt: skip
    for key in sorted(lists | objects | {"replayed", "replay", "objective", "routing"}):
        wanted = list if key in lists else dict
        if key in raw and not isinstance(raw[key], wanted):
            raise RunError(f"{path}: damaged ({key} is no {'list' if wanted is list else 'object'})")
    try:
        return kind(**raw)
    except TypeError as error:
        raise RunError(f"{path}: damaged ({error})") from None


def read_run(folder: Path) -> RunRecord:
    """Read ``run.json`` of a run folder.

    Raises:
        RunError: no run there, a damaged file, or another format version.
    """
    return _read(Path(folder) / "run.json", RunRecord)


def read_stages(folder: Path, *, check: bool = True) -> list[StageRecord]:
    """Read every committed stage of a run, in order; stage 0 is the untrained model.

    Args:
        check: whether a record that has changed since it was written is an error.

    Raises:
        RunError: a damaged stage file.
    """
    found = [path for path in Path(folder).glob("stages/*") if path.name.isdigit() and path.is_dir()]
    folders = sorted(found, key=lambda path: int(path.name))
    stages = [_read(path / "stage.json", StageRecord, check) for path in folders]
    for path, stage in zip(folders, stages, strict=True):
        if stage.index != int(path.name):
            raise RunError(f"{path / 'stage.json'}: damaged (it is the record of stage {stage.index})")
    return stages


def write_record(path: Path, record: RunRecord | StageRecord) -> None:
    """Write a record with its checksum, atomically."""
    write_checked_json(path, dataclasses.asdict(record))


def check_files(folder: Path, stage: StageRecord, below: str = "") -> None:
    """See that the files of a stage are what was written.

    Args:
        folder: the stage's. ``below``: look only at paths that start with this.

    Raises:
        RunError: the first that is not.
    """
    for name, reason in damaged_files(folder, stage.files, below).items():
        raise RunError(f"{folder / name}: damaged ({reason})")
