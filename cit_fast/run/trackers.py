"""Experiment trackers: one run of each for one run folder, with one step count over all its stages.

    <run>/trackers.json    which runs they are, and how far they have got

A resumed, grown or rolled-back run goes on in the same tracker runs. Steps are counted over everything that was ever
trained here, so that what a rollback took back stays visible and no step has two values.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.continual import continual_metrics
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.evaluation.violations import task_set_scores
from cit_fast.files import read_checked_json, write_checked_json
from cit_fast.text import first_line

OURS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Trackers that get one run over all stages; transformers starts any other anew in every stage."""
FILE = "trackers.json"
_LOGGED = ("loss", "learning_rate", "grad_norm", "epoch")
_log = logging.getLogger(__name__)


@dataclass
class _Place:
    """How far the trackers have got.

    Args:
        last: step up to which training was logged.
        stage: that is, or was last, trained, and ``offset``: steps before it; ``None`` after a rollback or before a
            retry: the next stage is another one than the tracker has seen under its number.
        reported: the last stage whose results were logged.
        runs: tracker -> what its run is called there.
    """

    last: int = 0
    stage: int | None = None
    offset: int = 0
    reported: int = -1
    runs: dict[str, str] = field(default_factory=dict)


class RunTrackers:
    """The trackers of one run folder; of no tracker on any process but the first.

    Args:
        names: of those that were asked for; ``run``: the folder.
    """

    def __init__(self, names: Sequence[str], run: Path) -> None:
        self.names, self.run = names, run
        self._open: dict[str, GeneralTracker] = {}
        self._place = _read(run) if names else _Place()

    # -- from the first stage to the last --------------------------------------------------------------------------

    def begin(self, record: RunRecord, stages: Sequence[StageRecord]) -> None:
        """Start or go on with the runs, and log the results of stages that were committed and not logged.

        Raises:
            ConfigError: a tracker cannot be started.
        """
        for name in self.names:
            known = self._place.runs.get(name)
            try:
                self._open[name] = _started(name, self.run, record, known)
                self._place.runs[name] = known or _identity(name, self._open[name])
                if known is None:
                    _describe(self._open[name], record)
            except Exception as error:  # whatever a package makes of its server, its account or its own settings
                self.finish()
                raise ConfigError(f"training.report_to: {name} cannot be started: {first_line(error)}") from error
        if self.names:
            self._keep()
        for number, stage in enumerate(stages):
            if stage.index > self._place.reported:
                for step, loss in stage.losses:
                    self.training(stage.index, step, {"loss": loss})
                self.stage(record, stages[: number + 1])

    def finish(self) -> None:
        """Close the runs; they can be gone on with."""
        for name in list(self._open):
            tracker = self._open.pop(name)
            try:
                tracker.finish()
            except Exception as error:  # noqa: BLE001  # it has lost its server; what was trained is not its to lose
                _log.warning("%s: %s", name, first_line(error))

    # -- what is logged ----------------------------------------------------------------------------------------------

    def training(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        """What was measured at an optimizer step of a stage; a step that an interrupted run has logged is left out."""
        if not self.names:
            return
        self._at(stage)
        step += self._place.offset
        if step > self._place.last:
            self._log({f"train/{name}": value for name, value in values.items()} | {"train/stage": stage}, step)
            self._place.last = step
            self._keep()

    def stage(self, record: RunRecord, stages: Sequence[StageRecord]) -> None:
        """The results of the last of ``stages``, which is committed."""
        if not self.names:
            return
        last = stages[-1]
        if last.index:
            self._at(last.index)
            self._place.last = max(self._place.last, self._place.offset + last.steps)
        self._log(results(record, stages), self._place.last if last.index else 0)
        self._place.reported = last.index
        self._keep()

    def _at(self, stage: int) -> None:
        """A stage that was not begun before begins where the one before it ended."""
        if self._place.stage != stage:
            self._place.stage, self._place.offset = stage, self._place.last

    def _log(self, values: Mapping[str, float], step: int) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for name in list(self._open):
            named = {re.sub(r"[^\w\-./ ]", "_", key): value for key, value in finite.items()}
            try:
                self._open[name].log(named, step=step)
            except Exception as error:  # noqa: BLE001  # hours of training are worth more than a curve
                _log.warning("%s: %s; the run goes on without it", name, first_line(error))
                del self._open[name]

    def _keep(self) -> None:
        write_checked_json(self.run / FILE, dataclasses.asdict(self._place))


def another_course(run: Path) -> None:
    """Note that the stage to come is not the one that the trackers may have seen under its number.

    Raises:
        RunError: the file is damaged.
    """
    if (run / FILE).is_file():
        place = _read(run)
        stages = [int(path.name) for path in (run / "stages").glob("[0-9]*")]
        place.stage, place.reported = None, max(stages, default=-1)
        write_checked_json(run / FILE, dataclasses.asdict(place))


def results(record: RunRecord, stages: Sequence[StageRecord]) -> dict[str, float]:
    """What a tracker is told of a stage, by name: the metrics of the run so far, every task's score and violations,
    general abilities and how they have changed, replayed examples, and prompts by the set that answered them.
    """
    last, before = stages[-1], stages[0]
    metrics = continual_metrics(record, stages)
    learned = {task for stage in stages for task in stage.trained}
    sets = task_set_scores([task for task in record.tasks if task in learned], last.scores, last.violations)
    found = {
        "stage/number": last.index,
        "stage/AP": metrics.average_performance if last.index else None,
        "stage/forgetting": metrics.forgetting,
        "stage/New.ACC": metrics.new_accuracy if last.index else None,
        "stage/V": sets.v,
        "stage/train_seconds": last.train_seconds,
        "stage/evaluate_seconds": last.evaluate_seconds,
        **{f"score/{task}": score for task, score in last.scores.items()},
        **{f"replayed/{task}": count for task, count in last.replayed.items()},
    }
    if last.general is not None:
        found |= {f"general/{skill}": score for skill, score in last.general.probes.items()}
        found["general/mean"] = last.general.score
        if before.general is not None:
            found["general/change"] = last.general.score - before.general.score
        for task, values in last.general.benchmarks.items():
            found |= {f"benchmark/{task}/{metric}": value for metric, value in values.items()}
        found |= {f"divergence/{name}": value for name, value in last.general.divergence.items()}
    if last.routing is not None:
        answered: dict[str, int] = {}
        for counts in last.routing.answers.values():
            for name, count in counts.items():
                answered[name] = answered.get(name, 0) + count
        found |= {f"routed/{name}": count for name, count in answered.items()}
        found["stage/routing_accuracy"] = last.routing.accuracy
    return {name: value for name, value in found.items() if value is not None}


def training_values(logs: Mapping[str, Any], balance: Sequence[float] | None) -> dict[str, float]:
    """Of what the Trainer logs, with the balance weights of the step beside.

    Args:
        balance: ``(step, mean, minimum, maximum, fallback fraction)``.
    """
    found = {name: float(logs[name]) for name in _LOGGED if name in logs}
    if balance is not None:
        names = ("mean", "minimum", "maximum", "fallback")
        found |= {f"balance_weight_{name}": value for name, value in zip(names, balance[1:], strict=True)}
    return found


def _read(run: Path) -> _Place:
    try:
        return _Place(**read_checked_json(run / FILE))
    except FileNotFoundError:
        return _Place()
    except TypeError:
        raise RunError(f"{run / FILE}: damaged; without it the trackers start new runs") from None


# -- what differs between trackers -----------------------------------------------------------------------------------


def _started(name: str, run: Path, record: RunRecord, known: str | None) -> GeneralTracker:
    """A tracker that has started; ``known``: its run, if it has one.

    Projects are called as W&B, MLflow and Trackio say in their own environment variables, or else like the run.
    """
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    title = f"{record.method_name}-seed{record.seed}"
    if name == "tensorboard":
        tracker = kind(run_name="logs", logging_dir=str(run))
    elif name == "wandb":
        project = os.environ.get("WANDB_PROJECT", record.name)
        tracker = kind(run_name=project, name=title, id=known or uuid.uuid4().hex[:8], resume="allow", reinit=True)
    elif name == "mlflow":
        import mlflow

        nested = mlflow.active_run() is not None
        tracker = kind(experiment_name=record.name, run_name=title, run_id=known, nested_run=nested)
    else:
        project = os.environ.get("TRACKIO_PROJECT", record.name)
        tracker = kind(run_name=project, name=known or f"{title}-{uuid.uuid4().hex[:8]}", resume="allow")
    tracker.start()
    return tracker


def _identity(name: str, tracker: GeneralTracker) -> str:
    """By what a tracker's run is found again."""
    run: Any = tracker.tracker
    if name == "mlflow":
        return str(run.info.run_id)
    return {"wandb": lambda: str(run.id), "trackio": lambda: str(run.name)}.get(name, lambda: "logs")()


def _describe(tracker: GeneralTracker, record: RunRecord) -> None:
    """What the run is, without any text of its data."""
    config = record.config
    about = {
        "model": record.model,
        "seed": record.seed,
        "tasks": ", ".join(record.tasks),
        **dict(_flat({name: config.get(name) for name in ("method", "adapter", "training", "evaluation", "memory")})),
    }
    if tracker.name == "tensorboard":  # its table of hyperparameters would be another run beside ours
        tracker.log({"configuration": "\n".join(f"    {name}: {value}" for name, value in about.items())}, step=0)
    else:
        tracker.store_init_configuration(about)


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        elif value not in (None, [], ()):
            yield f"{path}{name}", value if isinstance(value, int | float | str) else str(value)
