"""One method on one stream of tasks, stage by stage, in one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from cit_fast.cache import cache_folder
from cit_fast.data import TaskStream
from cit_fast.data.constraints import Constraints
from cit_fast.data.example import Task
from cit_fast.data.kept_task import RecalledTask
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.predictions import Prediction, write_stage_predictions
from cit_fast.evaluation.records import Assignment, Learned, RoutingRecord, RunRecord, StageRecord
from cit_fast.evaluation.run_files import adapter_sets, check_files, read_run, set_folder, stage_folder
from cit_fast.methods.config import MethodConfig
from cit_fast.methods.registry import PARTS, build_parts, part_name
from cit_fast.methods.routing import SharedRouter, routing_record
from cit_fast.methods.stage import Selection, Stage
from cit_fast.methods.updates import stream_wide
from cit_fast.models.adapters import load_encoder, load_weights, loading_whole, save_weights, train_adapter
from cit_fast.models.digests import model_identity
from cit_fast.models.osf import of_stage
from cit_fast.models.parked_sets import parked
from cit_fast.models.pretrained import load_model, resolve_model
from cit_fast.run.answer import Evaluated
from cit_fast.run.cached_scores import CachedScores
from cit_fast.run.candidates import refuse_candidate, refused
from cit_fast.run.config import RunConfig
from cit_fast.run.environment import describe_environment
from cit_fast.run.guards import FrozenWeights
from cit_fast.run.identity import digest, plain_options, task_digest, task_parts
from cit_fast.run.live_weights import save_live_weights
from cit_fast.run.memory import release_memory
from cit_fast.run.pace import Paces, TimeLeft
from cit_fast.run.parts import Parts
from cit_fast.run.run_folder import RunFolder, of_one_date
from cit_fast.run.stage_evaluation import StageEvaluation
from cit_fast.run.stage_parts import StageParts
from cit_fast.run.stage_settings import method_at, settings_at, stages_of, training_at
from cit_fast.run.stage_training import StageTraining
from cit_fast.run.task_memory import TaskMemory

_Returned = TypeVar("_Returned")
_SAMPLED = 256  # examples of a task, for how long one is


class MethodRun:
    """One method on one stream, in one folder.

    Args:
        config: of the run; ``method``: one of its methods.
        parts_of: router, replay, objective and update of the method, as they are in a stage; they are copied.
        stream: the tasks, in order; ``held_out``: tasks that are answered and never trained.
        folder: of the run.
        console: where progress is printed.
        clock: knows how long the whole run still takes.
    """

    def __init__(
        self,
        config: RunConfig,
        method: MethodConfig,
        parts_of: Callable[[MethodConfig, Mapping[str, Any]], Mapping[str, Any]],
        stream: TaskStream,
        folder: RunFolder,
        console: Console,
        held_out: Sequence[Task] = (),
        clock: TimeLeft | None = None,
    ) -> None:
        self.clock, self.method, self.folder, self.config = clock, method, folder, of_one_date(config, folder)
        self.memory = None if config.memory is None else TaskMemory(folder.path, config.memory)
        self.stream = TaskStream(tuple(map(self._or_tombstone, stream)))
        self.held_out = list(map(self._or_tombstone, held_out))
        if method.adapter is not None:
            self.config = self.config.model_copy(update={"adapter": method.adapter})
        self.console = console
        self.state = PartialState()
        self.parts = Parts(parts_of(method, config.training), self._say)
        with self.state.main_process_first():  # one process fetches or converts, the others find it done
            self.model_path = resolve_model(config.model)
        self.encoder = load_encoder(self.model_path, config.model, self.config.data)
        self.identity = model_identity(self.model_path, config.model.name)
        self.cached = CachedScores(self.config, method, self.encoder, self.identity)
        self.stage_parts = StageParts(self.config, method, self.parts, parts_of, folder, self.encoder, self._say)
        joint = method.schedule == "joint"
        self.evaluation = StageEvaluation(
            *(self.config, joint, self.parts, self.stream, self.held_out, folder, self.encoder),
            lambda: self._load(None),
            self.identity,
        )
        self.training = StageTraining(self.config, method.name, self.parts, folder, self._load, self._say, clock)

    def _or_tombstone(self, task: Task) -> Task:
        """The task, or what is left of it where its texts have been removed from this run."""
        if self.memory is None or not self.memory.has(task.name):
            return task
        known = self.memory.kept(task.name)
        return known if known.dropped or isinstance(task, RecalledTask) else task

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self, wait: bool = False) -> None:
        """Train and evaluate every stage that is not committed yet.

        Args:
            wait: for another process that works in the folder, instead of refusing (an expert may be in the making).
        """
        with self.folder.locked(wait) if self.state.is_main_process else contextlib.nullcontext():
            try:
                self._run()
            finally:
                self.training.trackers.finish()

    def _run(self) -> None:
        refuse_candidate(self.folder.path)
        record = self._begin()
        self.config = self.config.model_copy(update={"stages": stages_of(record.config)})
        self.training.config = self.stage_parts.config = self.config
        groups = [list(self.stream)] if self.method.schedule == "joint" else [[task] for task in self.stream]
        stages = self.folder.stages()
        self.state.wait_for_everyone()  # all have read the same stages before one of them commits another
        if record.status == "finished" and len(stages) == len(groups) + 1:
            self._say(
                f"[bold]{self.method.name}[/bold]: already finished, nothing to do ({escape(str(self.folder.path))})"
            )
            return
        self._say(f"[bold]{self.method.name}[/bold]: {len(self.stream)} tasks, {escape(str(self.folder.path))}")
        self.training.track(record, stages)
        if stages:
            self._say(f"  going on after stage {stages[-1].index} of {len(groups)}")
        if self.memory is not None and self.state.is_main_process:
            self.memory.shrink([task for task in self.stream[: max(0, len(stages) - 1)] if self.memory.has(task.name)])
        for task in (task for group in groups[max(0, len(stages) - 1) :] for task in group):
            if isinstance(task, RecalledTask) and len(task.train) < task.size:
                raise RunError(f"{self.folder.path}: task {task.name!r} is still to be trained, and its data is gone")
        model: Any = None
        joined: StageRecord | None = None
        if not stages:
            model = self._load(None)
            self._untrained_stage(model)
            self.training.trackers.stage(record, self.folder.stages())
        else:
            joined = self._joined([task for task in self.stream if _joins(task, record, stages)])
        for index, group in enumerate(groups, start=1):
            if index < len(stages):
                continue
            if model is None:
                model = self._load(self._checked(stages[:index]) if index > 1 else None)
                self.stage_parts.take_up_router(index - 1, model)
            self.stage_parts.take_up_settings(index, model, self.stream, self._seen)
            model = self._stage(model, index, len(groups), group, joined)
            joined = None
            self.training.trackers.stage(record, self.folder.stages())
            release_memory()
        if self.config.evaluation.experts and len(record.experts) < len(self.stream):
            record.experts = self._experts(record.experts)
        record.status = "finished"
        if self.state.is_main_process:
            self.folder.write(record)

    def _begin(self) -> RunRecord:
        resolved = self.config.resolved(self.method)
        for kind in PARTS:  # an object given from Python is part of what the run is
            name = part_name(kind, getattr(self.method, kind).name, getattr(self.parts, kind))
            if name != resolved["method"][kind]["name"]:
                resolved["method"][kind] = {"name": name, "options": plain_options(vars(getattr(self.parts, kind)))}
        arguments, first = self.training.arguments(1), training_at(self.config.training, self.config.stages, 1)
        record = RunRecord(
            name=self.config.name,
            method=resolved["method"],
            tasks=list(self.stream.names),
            metrics={task.name: task.metric for task in [*self.stream, *self.held_out]},
            model=self.config.model.name,
            seed=self.config.seed,
            config={
                **resolved,
                "stream": [task_digest(task) for task in self.stream],
                **({"held_out": digest([task_digest(task) for task in self.held_out])} if self.held_out else {}),
                "weights": self.identity,
                "processes": self.state.num_processes,
            },
            environment={
                **describe_environment(),
                **_effective_batch(first.get("tokens_per_batch"), arguments, self.state.num_processes),
            },
            held_out_tasks=[task.name for task in self.held_out],
            constraints={task.name: Constraints.of(task).to_record() for task in [*self.stream, *self.held_out]},
            task_parts={task.name: task_parts(task) for task in [*self.stream, *self.held_out]},
        )
        if self.state.is_main_process:
            self.folder.begin(record)
            if self.memory is not None:
                self.memory.held_out(self.held_out)
        self.state.wait_for_everyone()
        return read_run(self.folder.path)  # what every process has to agree on

    def _untrained_stage(self, model: Any) -> None:
        """Row zero of the score matrix, and the held-out tasks beside it."""
        general = self.evaluation.general(model, 0)
        if not self.config.evaluation.untrained:
            self._commit(StageRecord(index=0, trained=[], scores={}, general=general), None, {})
            return
        stage, folder = self.cached.untrained(model, list(self.stream))
        folders = [folder]
        if self.held_out:
            held_out, folder = self.cached.untrained(model, self.held_out)
            folders.append(folder)
            stage.scores, stage.violations = stage.scores | held_out.scores, stage.violations | held_out.violations
            for name in ("evaluate_seconds", "test_truncated", "test_skipped", "chosen"):
                setattr(stage, name, getattr(stage, name) + getattr(held_out, name))

        def fill(path: Path) -> None:
            for folder in folders:
                shutil.copytree(folder / "predictions", path / "predictions", dirs_exist_ok=True)

        stage.general = general
        if self.state.is_main_process:
            self.folder.commit(stage, fill)
        self.state.wait_for_everyone()
        self._say_scores("untrained", stage)

    def _joined(self, tasks: list[Task]) -> StageRecord | None:
        """What the untrained model makes of tasks that have joined the run; the next stage's record keeps it."""
        if not tasks or not self.config.evaluation.untrained:
            return None
        stage, _ = self.cached.untrained(self._load(None), tasks)
        self._say_scores("untrained", stage)
        return stage

    # -- a stage, step by step -----------------------------------------------------------------------------------

    def _stage(self, model: Any, index: int, count: int, tasks: list[Task], joined: StageRecord | None) -> Any:
        """Assign, select, train, learn, answer, and record what came of it; returns the model as it is then."""
        joint = self.method.schedule == "joint"
        title = f"{self.method.name} [{index}/{count}] {'all tasks' if joint else tasks[0].name}"
        stage = Stage(
            model,
            self.encoder,
            index,
            tasks=tuple(tasks),
            seen=() if joint else self._seen(index),
            compiled=any(value for key, value in self.config.training.items() if key.startswith("torch_compile")),
            seed=f"{self.config.seed}/{index}",
            kept=self.folder.path / "replay",
            scratch=self.folder.checkpoints(index),
            cache=cache_folder(),
        )
        assignment, new_set = self._assign(stage)
        frozen = FrozenWeights(model)
        # Replay and objective look at the model with the set that will be trained, as a resumed run finds it.
        model, rewritten = train_adapter(
            model,
            of_stage(self.config.adapter, index, count),
            assignment.adapter,
            self.config.seed,
            assignment.start_from,
            fuse=self.config.model.fuse_lora,
            grow=assignment.grows,
        )
        stage = dataclasses.replace(stage, model=model, new_set=new_set)
        selection = self._select(stage)
        fresh = [example for task in tasks for example in task.train]
        stage = dataclasses.replace(stage, examples=(*fresh, *selection.examples))
        trained = self.training.train(stage, assignment.adapter, title, frozen, rewritten)
        stage = dataclasses.replace(stage, model=trained.model)
        learned = self.parts.learn(stage)
        if self.memory is not None and not joint:
            kept = self.memory.learned(stage, self.memory.recall(self.stream[: index - 1]))
            if self.state.is_main_process:
                self.memory.write(kept)
        found, seconds = self.evaluation.answer(trained.model, index, count, title, assignment.adapter)
        general = self.evaluation.general(trained.model, index)
        seen = {task.name for task in stage.seen}
        record = StageRecord(
            index=index,
            trained=[task.name for task in tasks],
            scores=found.scores,
            violations=found.violations,
            adapter=assignment.adapter,
            train_examples=len(fresh),
            replayed=dict(Counter(example.task for example in selection.examples if example.task in seen)),
            replay=selection.record if stage.seen or selection.examples or selection.record.notes else None,
            objective=trained.inputs.record,
            update=trained.finished.record,
            routing=self._routing(stage, assignment, learned, new_set, found),
            steps=trained.steps,
            train_seconds=trained.seconds,
            evaluate_seconds=seconds,
            losses=trained.losses,
            balance_weights=trained.balance_weights,
            truncated=trained.inputs.truncated,
            skipped=len(trained.inputs.skipped),
            test_truncated=found.truncated,
            test_skipped=found.skipped,
            taken_over=found.taken_over,
            taken_from=found.taken_from,
            chosen=found.chosen,
            notes=trained.notes,
            untrained=joined.scores if joined else {},
            untrained_violations=joined.violations if joined else {},
            settings=settings_at(self.config.stages, index),
            general=general,
            gate=self.evaluation.gate(trained.model, index, found, [task.name for task in tasks], title, general),
        )
        own = {task: entries for task, entries in found.predictions.items() if task not in found.taken_from}
        self._commit(record, trained.model, own, trained.finished.live)
        if record.gate is not None and record.gate.broken:
            self._say_scores(title, record)
            raise refused(self.folder.path, record)
        if self.memory is not None and not joint and self.state.is_main_process:
            self.memory.shrink(self.stream[:index])
        self._keep_pace(stage, record, sum(map(len, found.predictions.values())) - found.taken_over)
        self._say_scores(title, record)
        if record.skipped or record.test_skipped:
            self._say(f"  left out for their length: {record.skipped} training and {record.test_skipped} test examples")
        return trained.model

    def _seen(self, index: int) -> tuple[Task, ...]:
        """The tasks before stage ``index``: as the memory has them, where there is one."""
        before: tuple[Task, ...] = tuple(self.stream[: index - 1])
        if self.memory is None:
            return before
        known = self.memory.recall(before)
        objective = method_at(self.method, self.config.stages, index).objective.name
        if known and not known[-1].train and objective == "ewc":
            raise ConfigError(
                f"memory: nothing is kept of {known[-1].name!r}, and objective ewc needs some of it; keep more"
            )
        return tuple(task for task in known if task.train)  # others have nothing to replay

    def _keep_pace(self, stage: Stage, record: StageRecord, answered: int) -> None:
        """How long the stage took, for plans and for the time left."""
        if not self.state.is_main_process:
            return
        some = [example for task in stage.tasks for example in task.train[:_SAMPLED]]
        lengths = list(map(len, self.encoder.encode_all(some).encoded))
        Paces(self.config).keep(self.method, record, sum(lengths) / max(1, len(lengths)), answered)
        if self.clock is not None:
            self.clock.answered(record.evaluate_seconds, answered)

    def _assign(self, stage: Stage) -> tuple[Assignment, bool]:
        """The set that the new task trains, the same on every process, and whether it is new."""
        before = {each.adapter for each in self.folder.stages()[1 : stage.index]}
        chosen = [self.parts.assign(stage)]
        broadcast_object_list(chosen)
        if chosen[0].grows and stream_wide(self.parts.update):
            raise ConfigError("update.scope: stream cannot go on with an adapter set that grows (router stacked)")
        new = chosen[0].adapter not in before
        if not isinstance(self.parts.router, SharedRouter):
            what = "a new adapter set" if new else "reuses the adapter set"
            self._say(f"  {stage.task.name}: {what} {chosen[0].adapter}")
        return chosen[0], new

    def _select(self, stage: Stage) -> Selection:
        """The earlier examples that come back."""
        if stage.seen or getattr(self.parts.replay, "from_first", False):
            return self.parts.select(stage)
        return Selection([])

    def _routing(
        self, stage: Stage, assignment: Assignment, learned: Learned, new: bool, found: Evaluated
    ) -> RoutingRecord | None:
        """What the stage's record says about routing; nothing where there is one set for all."""
        if isinstance(self.parts.router, SharedRouter):
            return None
        trained_by = {task: each.adapter for each in self.folder.stages()[: stage.index] for task in each.trained}
        trained_by.update((task.name, assignment.adapter) for task in stage.tasks)
        return routing_record(
            assignment,
            learned,
            new=new,
            trained_by=trained_by,
            answers=found.answered_by,
            seconds=found.routing_seconds,
        )

    def _commit(
        self,
        stage: StageRecord,
        model: Any,
        predictions: dict[str, list[Prediction]],
        live: dict[str, Tensor] | None = None,
    ) -> None:
        def fill(path: Path) -> None:
            if model is not None:
                save_weights(model, path, self.config.model.name, trained=stage.adapter)
                save_live_weights(path, stage.adapter, live)
                self.stage_parts.save_router(path / "router", stage.index)
            write_stage_predictions(path, predictions)

        if self.state.is_main_process:
            self.folder.commit(stage, fill)
        self.state.wait_for_everyone()

    # -- the model -----------------------------------------------------------------------------------------------

    def _checked(self, stages: Sequence[StageRecord]) -> Path | dict[str, Path]:
        """The weights to go on from after the last of these stages, when their files have been looked at: the folder of
        a model that was trained whole, or those of the adapter sets by name.
        """
        last = stages[-1]
        folder = self.folder.stage_path(last.index)
        for below in ("model/", "router/"):
            check_files(folder, last, below)
        for stage in stages[:-1]:
            check_files(stage_folder(self.folder.path, stage), stage, "router/prompts-")
        if (folder / "model").is_dir():
            return folder / "model"
        found = {}
        for name, stage in adapter_sets(stages).items():
            for below in (f"adapters/{name}/", f"live/{name}."):
                check_files(stage_folder(self.folder.path, stage), stage, below)
            found[name] = set_folder(self.folder.path, stage)
        return found

    def _load(self, weights: Path | Mapping[str, Path] | None) -> Any:
        """The model on this process's device, with the weights of a stage."""
        with loading_whole():
            model = load_model(self.model_path, self.config.model)
            self.encoder.fit_to(model)
            if weights is not None:
                model = load_weights(model, weights, trainable=True)
        parked(model).to(self.state.device)
        model = model.to(self.state.device)
        if self.encoder.images is not None:
            self.encoder.images.check_fits(model)
        return model

    def _experts(self, known: dict[str, float]) -> dict[str, float]:
        """U_j: the score of a model trained on task j alone."""
        sequential = MethodConfig.model_validate("sequential")
        scores = dict(known)
        for task in self.stream:
            if task.name in scores or isinstance(task, RecalledTask):  # of which there are some examples only
                continue
            config, folder = self.cached.expert(task)
            run = MethodRun(config, sequential, build_parts, TaskStream((task,)), folder, Console(quiet=True))
            self._say(f"  expert for {task.name}")
            run.run(wait=True)
            scores[task.name] = folder.stages()[-1].scores[task.name]
        return scores

    # -- words ---------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def _say_scores(self, title: str, stage: StageRecord) -> None:
        trained = {task: score for task, score in stage.scores.items() if task in self.stream.names}
        held_out = {task: score for task, score in stage.scores.items() if task not in trained}
        lines = {title.rsplit("] ", maxsplit=1)[-1]: trained, "  held out": held_out}
        for name, scores in lines.items():
            if scores or not name.startswith(" "):
                listed = "  ".join(f"{task} [bold]{score:.1f}[/bold]" for task, score in scores.items())
                self._say(f"  {name}: {listed}")


def _effective_batch(tokens: int | None, arguments: Any, processes: int) -> dict[str, int]:
    """What a step learns from: examples, or the tokens that its batches have room for."""
    batches = arguments.gradient_accumulation_steps * processes
    if tokens is None:
        return {"effective_batch_size": arguments.train_batch_size * batches}
    return {"effective_batch_tokens": tokens * batches}


def _joins(task: Task, record: RunRecord, stages: Sequence[StageRecord]) -> bool:
    """Whether a task has joined the run since the untrained model was measured, for the first time or after a rollback,
    maybe with other examples.
    """
    if isinstance(task, RecalledTask) and task.dropped:
        return False
    if task.name not in record.retired_tasks:
        return task.name not in stages[0].scores
    return not any(task.name in stage.trained or task.name in stage.untrained for stage in stages)
