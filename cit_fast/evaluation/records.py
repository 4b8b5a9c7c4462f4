"""What a run leaves on disk for evaluation and report, as plain dataclasses read from and written to JSON::

    <run>/run.json                          RunRecord: what was run, where, and whether it is finished
    <run>/stages/00/stage.json              StageRecord of the untrained model (row "untrained" of the score matrix)
    <run>/stages/01/stage.json ...          StageRecord after each training stage, in order
    <run>/stages/NN/predictions/<task>.jsonl  one object per test example: prompt, prediction, references, score
    <run>/stages/NN/adapters/<set>/         the adapter set that the stage trained; the others are where they were
                                            trained last (:func:`cit_fast.evaluation.run_files.adapter_sets`)

A stage folder is committed by one rename, so a stage that exists is whole. Records carry a checksum of themselves, and
a stage's record those of its files: what has changed since is an error that names it, never another result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict

FORMAT_VERSION = 2
_STRICT = ConfigDict(extra="forbid")


@dataclass
class RankedInstruction:
    """An instruction of an earlier task, as InsCL ranked it.

    Args:
        task: whose; ``instruction``: its beginning.
        insinfo: the rarer its tags, the higher; ``tags``: after similar ones were merged.
        drawn: of its ``available`` examples so many are replayed.
    """

    __pydantic_config__ = _STRICT

    task: str
    instruction: str
    insinfo: float
    tags: list[str]
    drawn: int
    available: int


@dataclass
class ReplayRecord:
    """Why a replay policy chose what it chose.

    Args:
        budgets: earlier task -> examples it was given.
        distances: earlier task -> its distance to the new task (InsCL).
        gains: earlier task -> mean information gain of its key parts (KPIG); ``scored``: of how many examples.
        instructions: those with the highest InsInfo, highest first; of ``instruction_count`` in all.
        notes: sentences for whoever reads the report; ``details``: plain values of a policy of one's own.
    """

    __pydantic_config__ = _STRICT

    budgets: dict[str, int] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    scored: dict[str, int] = field(default_factory=dict)
    instructions: list[RankedInstruction] = field(default_factory=list)
    instruction_count: int = 0
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class ObjectiveRecord:
    """What an objective found out about the examples of a stage.

    Args:
        gains: task -> mean information gain of the key parts of its examples, before the stage (KPIG).
        compared: examples whose loss compares with the earlier model; ``without_key_parts``: those that cannot be.
        wordings: task -> instructions that its examples were drawn from.
        seconds: of the pass of the earlier model.
        notes: sentences for whoever reads the report; ``details``: plain values of an objective of one's own.
    """

    __pydantic_config__ = _STRICT

    gains: dict[str, float] = field(default_factory=dict)
    compared: int = 0
    without_key_parts: int = 0
    wordings: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class UpdateRecord:
    """What an update decided at the end of a stage.

    Args:
        coefficient: share of the new weights in a merge, in [0, 1].
        losses: ``(coefficient, mean negative log-likelihood of answers in nats)`` of those that were tried.
        notes: sentences for whoever reads the report; ``details``: plain values of an update of one's own.
    """

    __pydantic_config__ = _STRICT

    coefficient: float | None = None
    losses: list[tuple[float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Assignment:
    """Which adapter set a router gave a new task, and why.

    Args:
        adapter: name of the set; one not given before means a new set.
        scores: earlier set -> its score for the new task, the highest ones; ``threshold``: from which a set is reused.
        start_from: the set whose weights a new set starts from; ``None``: as ``adapter`` configures it.
        grows: whether a set that is there stays what it is, and grows by a part that is trained.
        notes: sentences for whoever reads the report; ``details``: plain values of a router of one's own.
    """

    __pydantic_config__ = _STRICT

    adapter: str
    scores: dict[str, float] = field(default_factory=dict)
    threshold: float | None = None
    start_from: str | None = None
    grows: bool = False
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Learned:
    """What a router learned from a task that has trained its set.

    Args:
        reject_below: scores below it go to the base model; ``None``: none do.
        examples: prompts the switch network was trained on; ``retained``: prompts kept for the tasks to come.
        accuracy: share of the prompts set aside that the switch network sends to their own set, in [0, 1].
        truncated: prompts too long to be read whole.
        notes: sentences for whoever reads the report; ``details``: plain values of a router of one's own.
    """

    __pydantic_config__ = _STRICT

    reject_below: float | None = None
    examples: int = 0
    retained: int = 0
    accuracy: float | None = None
    truncated: int = 0
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class RoutingRecord:
    """What the router decided in a stage, and how its answers did.

    Args:
        new: whether the stage's adapter set was made for it, not reused.
        assignment, learned: what the router returned.
        answers: task -> set -> prompts that it answered, ``__base__`` for the base model.
        accuracy: share of the trained tasks' prompts that their own set answered, in [0, 1]; ``to_base``: share of the
            other tasks' prompts that the base model answered. ``None`` where there are no such prompts.
        seconds: of choosing.
    """

    __pydantic_config__ = _STRICT

    new: bool
    assignment: Assignment
    learned: Learned
    answers: dict[str, dict[str, int]] = field(default_factory=dict)
    accuracy: float | None = None
    to_base: float | None = None
    seconds: float = 0.0

    @property
    def notes(self) -> list[str]:
        """Those of both decisions."""
        return [*self.assignment.notes, *self.learned.notes]


@dataclass
class Broken:
    """A limit of the gate that a stage broke.

    Args:
        limit: ``forgetting``, ``task_fall``, ``new_task`` or ``general``; ``task``: whose, ``None`` of a mean.
        at: the limit, in points; ``found``: what was measured.
    """

    __pydantic_config__ = _STRICT

    limit: str
    task: str | None
    at: float
    found: float


@dataclass
class GateRecord:
    """What the gate measured after a stage.

    Args:
        split: that it judged by; ``scores``: task -> score on it.
        falls: earlier task -> points below its best score since it was trained.
        broken: the limits that the stage broke; where there are some, it was a candidate and has been accepted.
    """

    __pydantic_config__ = _STRICT

    split: str
    scores: dict[str, float] = field(default_factory=dict)
    falls: dict[str, float] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)


@dataclass
class GeneralRecord:
    """General abilities after a stage.

    Args:
        probes: skill -> per cent of its questions that the model answers rightly.
        divergence: ``general`` and ``stream`` -> KL(base || tuned) on such prompts, in nats a token.
        benchmarks: task of lm-evaluation-harness -> metric -> value, of accuracies and exact matches in per cent.
        main_metrics: task -> the first of its metrics of which more is better; tasks that have none are absent.
    """

    __pydantic_config__ = _STRICT

    probes: dict[str, float] = field(default_factory=dict)
    divergence: dict[str, float] = field(default_factory=dict)
    benchmarks: dict[str, dict[str, float]] = field(default_factory=dict)
    main_metrics: dict[str, str] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Mean over the skills."""
        return sum(self.probes.values()) / len(self.probes)

    @property
    def main(self) -> dict[str, float]:
        """The value of the main metric of every benchmark that has one."""
        return {task: self.benchmarks[task][name] for task, name in self.main_metrics.items()}


@dataclass
class StageRecord:
    """One stage of a run: what was trained, on what, and how every task scored afterwards.

    Args:
        index: 0 for the untrained model, then 1, 2, ...
        trained: names of the tasks this stage trained (empty for index 0, all tasks for a joint run).
        scores: task name, held-out or not -> score in [0, 100] after this stage; a task that was not evaluated is
            absent.
        adapter: name of the adapter set that was trained.
        train_examples: examples of the new task(s), without replay.
        replayed: earlier task -> examples replayed in this stage, of those that had some.
        replay, objective, update, routing: what the parts of the method decided; ``None`` where there was nothing to
            decide (no earlier task to replay, one adapter set for all).
        steps: optimizer steps; ``train_seconds`` and ``evaluate_seconds``: wall time (summed over resumed parts).
        losses: ``(step, training loss)`` as logged.
        balance_weights: per optimizer step ``(step, mean, minimum, maximum, fallback fraction)`` of the balance
            weight alpha over parameter tensors; empty where the update keeps no average.
        truncated: examples whose input was shortened to fit the length limit.
        skipped: examples left out because the user asked to skip what cannot fit.
        test_truncated, test_skipped: the same of the test examples that were answered.
        taken_over: how many answers are those of an earlier stage: the prompt's adapter set had not changed.
        taken_from: task -> the stage whose file holds its predictions, where all of them were taken over.
        chosen: how many of the other answers are the likeliest of their task's labels (``evaluation.decode: labels``).
        violations: task name, held-out or not -> kind of violation that applies to it -> share of its answers in per
            cent (:mod:`cit_fast.evaluation.violations`); of every task that was evaluated, empty for one that declares
            no constraint.
        notes: sentences for whoever reads the record: media that were not seen, layers that did not move.
        untrained: scores of the untrained model on the tasks that have joined the stream since the stage before;
            ``untrained_violations``: how often it broke what they ask, as ``violations``.
        settings: what changed in this stage or before it, as ``stages`` of the configuration has it.
        gate: what the gate measured, if there is one.
        general: general abilities, if they are measured.
        files: path of every other file in the stage's folder -> its SHA-256, filled in when the stage is committed.
    """

    __pydantic_config__ = _STRICT

    index: int
    trained: list[str]
    scores: dict[str, float]
    adapter: str = "shared"
    train_examples: int = 0
    replayed: dict[str, int] = field(default_factory=dict)
    replay: ReplayRecord | None = None
    objective: ObjectiveRecord | None = None
    update: UpdateRecord | None = None
    routing: RoutingRecord | None = None
    steps: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    balance_weights: list[tuple[int, float, float, float, float]] = field(default_factory=list)
    truncated: int = 0
    skipped: int = 0
    test_truncated: int = 0
    test_skipped: int = 0
    taken_over: int = 0
    taken_from: dict[str, int] = field(default_factory=dict)
    chosen: int = 0
    violations: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    untrained: dict[str, float] = field(default_factory=dict)
    untrained_violations: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: list[dict[str, Any]] = field(default_factory=list)
    gate: GateRecord | None = None
    general: GeneralRecord | None = None
    files: dict[str, str] = field(default_factory=dict)


@dataclass
class RunRecord:
    """One method on one stream.

    Args:
        name: name of the run; ``method``: resolved method (its preset's name under ``name``, and its four parts).
        tasks: task names in order of arrival; ``metrics``: task name -> metric name, of the held-out tasks too.
        held_out_tasks: names of the tasks that are evaluated but never trained.
        retired_tasks: names of the tasks that a rollback has taken back; scores of theirs from before do not count.
        dropped_tasks: names of the tasks whose texts have been removed; they are not measured any more.
        constraints: task name, held-out or not -> what it declares of its answers (see
            :meth:`cit_fast.data.constraints.Constraints.to_record`).
        model: model name or path; ``seed``; ``status``: "running" or "finished".
        config: the whole resolved configuration.
        environment: versions, hardware, thread count, effective batch size.
        task_parts: task name, held-out or not -> size and digest of each of its splits when it joined the run, and a
            digest of what it declares.
        experts: task name -> score of a model trained on that task alone (for Relative Gain); may be empty.
    """

    __pydantic_config__ = _STRICT

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
    retired_tasks: list[str] = field(default_factory=list)
    dropped_tasks: list[str] = field(default_factory=list)
    constraints: dict[str, dict[str, Any]] = field(default_factory=dict)
    task_parts: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def every_task(self) -> list[str]:
        """The tasks of the stream, then the held-out ones."""
        return [*self.tasks, *self.held_out_tasks]

    @property
    def method_name(self) -> str:
        """The preset's name, or the name the user gave the method."""
        return str(self.method["name"])
