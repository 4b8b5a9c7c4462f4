"""What table, page and pictures show of runs: read once from their folders, named uniquely, grouped by their
tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cit_fast.errors import RunError
from cit_fast.evaluation.continual import (
    ContinualMetrics,
    Matrix,
    continual_metrics,
    first_trained,
    score_matrix,
)
from cit_fast.evaluation.records import GeneralRecord, RunRecord, StageRecord
from cit_fast.evaluation.run_files import read_run, read_stages
from cit_fast.evaluation.violations import TaskSetScores, task_set_scores


@dataclass(frozen=True)
class RunView:
    """A run as it is shown.

    Args:
        label: unique among the runs shown together; ``folder``: where it was read.
        record, stages, metrics: as stored and computed; ``trained``: the stages after the untrained one (S).
        untrained: ``[T]``; ``matrix``: ``[S, T]``, NaN where nothing was evaluated; ``trained_at``: ``[T]``
            row that trained each task first, S if none did.
    """

    label: str
    folder: Path
    record: RunRecord
    stages: list[StageRecord]
    trained: list[StageRecord]
    untrained: Matrix
    matrix: Matrix
    trained_at: list[int]
    metrics: ContinualMetrics

    @property
    def replayed(self) -> int:
        """Examples replayed in all stages together."""
        return sum(sum(stage.replayed.values()) for stage in self.trained)

    @property
    def general(self) -> list[GeneralRecord]:
        """General abilities of the untrained model and after each stage, where they were measured."""
        return [stage.general for stage in self.stages if stage.general is not None]

    @property
    def minutes(self) -> float:
        """Wall time of training and evaluation."""
        return sum(stage.train_seconds + stage.evaluate_seconds for stage in self.stages) / 60

    @property
    def seen(self) -> TaskSetScores:
        """P- and V-score after the last stage, of the tasks trained so far."""
        tasks = [task for task, row in zip(self.record.tasks, self.trained_at, strict=True) if row < len(self.trained)]
        return self._scores_of(tasks)

    @property
    def held_out(self) -> TaskSetScores:
        """The same of the held-out tasks."""
        return self._scores_of(self.record.held_out_tasks)

    def _scores_of(self, tasks: Sequence[str]) -> TaskSetScores:
        last = self.stages[-1] if self.trained else StageRecord(0, [], {})
        return task_set_scores(tasks, last.scores, last.violations, self.record.metrics)

    @property
    def is_joint(self) -> bool:
        """Whether one stage trains several tasks at once: nothing can be forgotten, an upper bound."""
        return len(self.trained) == 1 and len(self.trained[0].trained) > 1

    @property
    def is_complete(self) -> bool:
        """Finished, with every task trained."""
        return not self.incomplete

    @property
    def incomplete(self) -> str:
        """What is missing, in words; empty for a complete run."""
        missing = [
            task for task, row in zip(self.record.tasks, self.trained_at, strict=True) if row >= len(self.trained)
        ]
        count = len(self.record.tasks)
        if self.record.status != "finished":
            return f"still running: {count - len(missing)} of {count} tasks trained"
        return f"lacks the stages of {', '.join(missing)}" if missing else ""

    @property
    def stage_names(self) -> list[str]:
        """A name for each trained stage: the tasks it trained."""
        return ["all tasks" if self.is_joint else " + ".join(stage.trained) for stage in self.trained]


@dataclass(frozen=True)
class Runs:
    """Runs in the order given, without repetitions; ``compared``: those on the same tasks; ``notes``: what
    was left out.
    """

    views: list[RunView]
    compared: list[RunView]
    notes: list[str]

    @property
    def same_held_out(self) -> bool:
        """Whether the compared runs that hold tasks out hold out the same ones."""
        return len({frozenset(view.record.held_out_tasks) for view in self.compared} - {frozenset()}) < 2

    def best(self, value: Callable[[RunView], float | None], *, highest: bool) -> float | None:
        """The best shown value (one decimal) among comparable runs, unless all are equal.

        Runs under way and joint runs do not compete: the ones cover fewer tasks, the others never had to
            remember.
        """
        values = [value(view) for view in self.compared if view.is_complete and not view.is_joint]
        known = [round(each, 1) for each in values if each is not None]
        if len(set(known)) < 2:
            return None
        return max(known) if highest else min(known)


def collect(folders: Sequence[Path]) -> Runs:
    """Read the runs in these folders.

    A folder given twice counts once. Compared are the runs on the same tasks with the same metrics, in
    whatever order; with several such groups the largest one (the first among equals).

    Raises:
        RunError: no folder given, a folder without a run, or damaged records.
    """
    if not folders:
        raise RunError("no run folders given; name at least one")
    notes, read = [], {}
    for folder in map(Path, folders):
        key = folder.resolve()
        if key in read:
            notes.append(f"{folder} was given twice and is shown once.")
        else:
            record = read_run(folder)
            if not isinstance(record.method, dict) or "name" not in record.method:
                raise RunError(f"{folder / 'run.json'}: method has no name")
            read[key] = (folder, record, read_stages(folder))
    labels = _labels([(folder, record) for folder, record, _ in read.values()])
    views = []
    for label, (folder, record, stages) in zip(labels, read.values(), strict=True):
        untrained, matrix = score_matrix(record, stages)
        views.append(
            RunView(
                label=label,
                folder=folder,
                record=record,
                stages=stages,
                trained=[stage for stage in stages if stage.index > 0],
                untrained=untrained,
                matrix=matrix,
                trained_at=first_trained(record, stages),
                metrics=continual_metrics(record, stages),
            )
        )
    # Scores compare only on the same tasks by the same metrics; the order of arrival may differ.
    groups: dict[frozenset[tuple[str, str | None]], list[RunView]] = {}
    for view in views:
        key_tasks = frozenset((task, view.record.metrics.get(task)) for task in view.record.tasks)
        groups.setdefault(key_tasks, []).append(view)
    compared = max(groups.values(), key=len)
    notes += [
        f"{view.label} is left out of the comparison: it is on other tasks or metrics ({_first(view.record.tasks)})."
        for view in views
        if view not in compared
    ]
    notes += [f"{view.label}: {view.incomplete}." for view in views if view.incomplete]
    runs = Runs(views, compared, notes)
    if not runs.same_held_out:
        held_out = (f"{view.label} {_first(view.record.held_out_tasks)}" for view in compared)
        notes.append(f"Held-out values do not compare; the runs hold out different tasks: {'; '.join(held_out)}.")
    return runs


def coverage(runs: Runs) -> str:
    """Of how many tasks the V-scores speak, in a sentence; empty where it is all of them, or there is no V-score."""
    parts = []
    for which, found_by in (
        ("seen", [view.seen for view in runs.compared]),
        ("held-out", [view.held_out for view in runs.compared]),
    ):
        found = next((scores for scores in found_by if scores.v is not None), None)
        if found is not None and found.constrained < found.tasks:
            parts.append(f"{found.constrained} of {found.tasks} {which} tasks")
    return f"V is over {' and '.join(parts)}; the others declare nothing an answer could break." if parts else ""


def _first(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _labels(runs: Sequence[tuple[Path, RunRecord]]) -> list[str]:
    """The method's name; where several runs share it, with the seed, the run's name or the folder as well."""
    labels = [record.method_name for _, record in runs]
    ways: list[Callable[[Path, RunRecord], str]] = [
        lambda folder, record: f"{record.method_name}, seed {record.seed}",
        lambda folder, record: f"{record.method_name}, {record.name}",
        lambda folder, record: f"{record.method_name}, {folder.name}",
        lambda folder, record: f"{record.method_name}, {folder.resolve()}",
    ]
    for way in ways:
        shared = Counter(labels)
        # Every run of a method is renamed together, or one of them would keep the bare name.
        ambiguous = {record.method_name for label, (_, record) in zip(labels, runs, strict=True) if shared[label] > 1}
        labels = [
            way(folder, record) if record.method_name in ambiguous else label
            for label, (folder, record) in zip(labels, runs, strict=True)
        ]
    return labels


def number(value: float | None, *, sign: bool = False) -> str:
    """A value with one decimal and a real minus sign; a dash where there is none."""
    if value is None or value != value:
        return "–"
    # + 0.0 turns the -0.0 that rounding makes of small negatives into 0.0.
    rounded = round(float(value), 1) + 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.1f}".replace("-", "\u2212")


@dataclass(frozen=True)
class Column:
    """A column of the comparison: its ``title`` and how to get it; ``highest``: whether more is better, if
    judged; ``answers``: whether it says how well answers keep to their instructions; ``held_out``: whether it speaks of
    the held-out tasks; ``aside``: whether it gives way to the others in a narrow terminal.
    """

    title: str
    meaning: str
    value: Callable[[RunView], float | None]
    highest: bool | None = None
    sign: bool = False
    whole: bool = False
    answers: bool = False
    held_out: bool = False
    aside: bool = False
    digits: int = 1

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {True: " ↑", False: " ↓", None: ""}[self.highest]

    def text(self, view: RunView) -> str:
        """The value as shown."""
        value = self.value(view)
        if self.whole and value is not None:
            return f"{value:.0f}"
        if self.digits != 1 and value is not None:
            return f"{value:.{self.digits}f}"
        return number(value, sign=self.sign)


COLUMNS = (
    Column("AP", "average performance: mean score over all tasks after the last stage (the P-score of the seen tasks)",
           lambda view: view.metrics.average_performance, highest=True),
    Column("New.ACC", "mean score of each task right after the stage that trained it",
           lambda view: view.metrics.new_accuracy, highest=True),
    Column("Forgetting", "mean drop of earlier tasks from their best score since they were trained to their last",
           lambda view: view.metrics.forgetting, highest=False),
    Column("BWT", "backward transfer: mean change of a task's score since it was trained",
           lambda view: view.metrics.backward_transfer, highest=True, sign=True),
    Column("FWT", "forward transfer: mean change of a task's score before it is trained, over the untrained model",
           lambda view: view.metrics.forward_transfer, highest=True, sign=True, aside=True),
    Column("Rel. gain %", "relative gain: share of a single-task expert's score kept on earlier tasks (mean of stages)",
           lambda view: view.metrics.relative_gain_mean, highest=True, aside=True),
    Column("P by metric", "mean over metrics of the mean score of the tasks that have it, where they have several",
           lambda view: view.seen.p_by_metric if len(set(view.record.metrics.values())) > 1 else None,
           highest=True, aside=True),
    Column("V", "V-score: how often answers break the format, scope or length their task declares, all tasks together",
           lambda view: view.seen.v, highest=False, answers=True),
    Column("Held-out P", "P-score of tasks that were never trained: their mean score after the last stage",
           lambda view: view.held_out.p, highest=True, answers=True, held_out=True),
    Column("Held-out V", "V-score of tasks that were never trained",
           lambda view: view.held_out.v, highest=False, answers=True, held_out=True),
    Column("General", "change of the general abilities that no task asks for, over the untrained model's, in points",
           lambda view: view.general[-1].score - view.general[0].score if len(view.general) > 1 else None,
           highest=True, sign=True, aside=True),
    Column("Divergence", "KL(base || tuned) of the predictions on general prompts, nats a token",
           lambda view: view.general[-1].divergence.get("general") if len(view.general) > 1 else None,
           highest=False, aside=True, digits=3),
    Column("Balance α", "mean share of the new weights that the average took in a step",
           lambda view: view.metrics.balance_weight, aside=True, digits=3),
    Column("Fell back %", "how often that share was the rule's constant, for the gradients gave none",
           lambda view: view.metrics.fallback_share, aside=True),
    Column("Replayed", "examples of earlier tasks trained on again, all stages together",
           lambda view: view.replayed, whole=True),
    Column("Minutes", "wall time of training and evaluation", lambda view: view.minutes),
)  # fmt: skip
