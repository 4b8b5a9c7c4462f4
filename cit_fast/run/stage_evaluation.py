"""What is measured after a stage: the test examples answered and scored, general abilities, and what the gate says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from cit_fast.data import TaskStream
from cit_fast.data.example import Task
from cit_fast.data.kept_task import RecalledTask
from cit_fast.evaluation.predictions import predictions_after, read_predictions
from cit_fast.evaluation.records import GateRecord, GeneralRecord
from cit_fast.evaluation.run_files import check_files
from cit_fast.methods.routing import SharedRouter
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run.answer import Before, Evaluated, evaluate
from cit_fast.run.config import HarnessConfig, RunConfig
from cit_fast.run.gate import judge, judge_general
from cit_fast.run.general import measure
from cit_fast.run.outside_engine import OutsideEngine, outside_engine
from cit_fast.run.parts import Parts
from cit_fast.run.run_folder import RunFolder
from cit_fast.run.tasks import answered_tasks


class StageEvaluation:
    """Evaluates the stages of one method's run.

    Args:
        config: of the run; ``joint``: whether all tasks are one stage; ``parts``: of the method.
        stream: the tasks, in order; ``held_out``: tasks that are answered and never trained.
        folder: of the run; ``encoder``: makes the prompts.
        load: the base model; ``identity``: digits that tell it apart.
    """

    def __init__(
        self,
        config: RunConfig,
        joint: bool,
        parts: Parts,
        stream: TaskStream,
        held_out: Sequence[Task],
        folder: RunFolder,
        encoder: PromptEncoder,
        load: Callable[[], Any],
        identity: str,
    ) -> None:
        self.config, self.joint, self.parts, self.stream = config, joint, parts, stream
        self.held_out, self.folder, self.encoder, self._load = held_out, folder, encoder, load
        self.identity = identity

    def answer(self, model: Any, index: int, count: int, title: str, trained: str) -> tuple[Evaluated, float]:
        """The test examples answered and scored, and how long that took."""
        started = time.perf_counter()
        known = answered_tasks(self.stream.tasks, index, count, self.config.evaluation, self.config.seed, self.joint)
        known = [task for task in known if not (isinstance(task, RecalledTask) and task.dropped)]
        held_out = self.held_out if index == count or self.config.evaluation.held_out_after == "all" else []
        held_out = [task for task in held_out if not (isinstance(task, RecalledTask) and task.dropped)]
        tasks, router = [*known, *held_out], self.parts.router
        before = None if isinstance(router, SharedRouter) else self._before(tasks, index, trained)
        found = evaluate(model, self.encoder, tasks, self.config.evaluation, router, title, before, self._engine())
        return found, time.perf_counter() - started

    def _engine(self) -> OutsideEngine | None:
        return outside_engine(self.config, self.identity, self.encoder)

    def general(self, model: Any, index: int) -> GeneralRecord | None:
        """General abilities after a stage, if they are measured."""
        config = self.config.evaluation
        if not config.general:
            return None
        tasks = [task for task in self.stream[:index] if not (isinstance(task, RecalledTask) and task.dropped)]
        router = None if index == 0 else self.parts.router
        return measure(
            *(model, self.encoder, tasks, config.split, router, self._load),
            untrained=index == 0,
            harness=config.general if isinstance(config.general, HarnessConfig) else None,
            batch_size=config.batch_size,
        )

    def gate(
        self, model: Any, index: int, found: Evaluated, new: list[str], title: str, general: GeneralRecord | None
    ) -> GateRecord | None:
        """What the gate says of a stage; ``found``: what was evaluated."""
        gate, split = self.config.gate, self.config.evaluation.split
        if gate is None:
            return None
        scores = {task: score for task, score in found.scores.items() if task in self.stream.names}
        if gate.on not in (None, split):
            tasks = [task for task in self.stream if task.name in scores]
            config = self.config.evaluation.model_copy(update={"split": gate.on})
            found = evaluate(
                model, self.encoder, tasks, config, self.parts.router, f"{title}: gate", engine=self._engine()
            )
            scores, split = found.scores, config.split
        stages = self.folder.stages()
        record = judge(gate, split, scores, new, stages[1:index])
        return judge_general(gate, record, stages[0].general, general)

    def _before(self, tasks: Sequence[Task], index: int, trained: str) -> Before:
        """What was answered last before stage ``index``, which has trained the set ``trained``."""
        stages = self.folder.stages()[1:index]
        predictions, holders, changed = {}, {}, {}
        for task in tasks:
            last = next((stage for stage in reversed(stages) if task.name in stage.scores), None)
            if last is None:
                continue
            path = predictions_after(self.folder.path, last, task.name)
            holders[task.name] = last.taken_from.get(task.name, last.index)
            check_files(path.parents[1], stages[holders[task.name] - 1], f"predictions/{path.name}")
            predictions[task.name] = read_predictions(path)
            changed[task.name] = {stage.adapter for stage in stages[last.index :]} | {trained}
        return Before(predictions, holders, changed)
