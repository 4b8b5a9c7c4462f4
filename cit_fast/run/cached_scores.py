"""Scores that runs of the same setting share, computed once: of the untrained model, and of experts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

import cit_fast
from cit_fast.cache import cache_folder
from cit_fast.data.example import Task
from cit_fast.evaluation.predictions import write_stage_predictions
from cit_fast.evaluation.records import FORMAT_VERSION, StageRecord
from cit_fast.evaluation.run_files import check_files, read_stages
from cit_fast.methods.config import MethodConfig
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run.answer import evaluate
from cit_fast.run.config import RunConfig
from cit_fast.run.identity import digest, task_digest
from cit_fast.run.outside_engine import outside_engine
from cit_fast.run.run_folder import RunFolder

# Versions are part of the keys of cached scores: of what computes them, and of the records they are kept in.
_VERSIONS = (cit_fast.__version__, FORMAT_VERSION, torch.__version__, transformers.__version__)


class CachedScores:
    """What a run finds in the cache shared by all runs, or computes and leaves there.

    Args:
        config: of the run; ``method``: one of its methods.
        encoder: makes the prompts.
        identity: of the model, see :func:`cit_fast.models.digests.model_identity`.
    """

    def __init__(self, config: RunConfig, method: MethodConfig, encoder: PromptEncoder, identity: str) -> None:
        self.config, self.method, self.encoder, self.identity = config, method, encoder, identity
        self.state = PartialState()

    def untrained(self, model: Any, tasks: list[Task]) -> tuple[StageRecord, Path]:
        """Record and folder of the untrained model on some tasks, which are the same for every method."""
        cached = RunFolder(cache_folder() / "untrained" / digest(["untrained, with violations", *self._key(tasks)]))
        with cached.locked(wait=True) if self.state.is_main_process else contextlib.nullcontext():
            there = [bool(read_stages(cached.path))]
            broadcast_object_list(there)  # the main process decides: others may look later
            if not there[0]:
                started = time.perf_counter()
                found = evaluate(
                    model,
                    self.encoder,
                    tasks,
                    self.config.evaluation,
                    title="untrained",
                    engine=outside_engine(self.config, self.identity, self.encoder),
                )
                stage = StageRecord(
                    index=0,
                    trained=[],
                    scores=found.scores,
                    evaluate_seconds=time.perf_counter() - started,
                    test_truncated=found.truncated,
                    test_skipped=found.skipped,
                    violations=found.violations,
                    chosen=found.chosen,
                )
                if self.state.is_main_process:
                    cached.commit(stage, lambda path: write_stage_predictions(path, found.predictions))
            self.state.wait_for_everyone()
        stage, folder = read_stages(cached.path)[0], cached.stage_path(0)
        check_files(folder, stage)
        return stage, folder

    def expert(self, task: Task) -> tuple[RunConfig, RunFolder]:
        """Configuration and folder of the run that trains one task alone.

        What an expert does not depend on (which other tasks there are, which are evaluated) does not tell them apart.
        """
        alone = {"experts": False, "untrained": False, "tasks": "all", "held_out": (), "general": False}
        evaluation = self.config.evaluation.model_copy(update={**alone, "held_out_after": "last"})
        data = self.config.data.model_copy(update={"tasks": None, "train": None, "dev": None, "test": None})
        plain = {"stages": (), "gate": None, "memory": None}
        unwatched = {key: value for key, value in self.config.training.items() if key != "report_to"}
        own = {"evaluation": evaluation, "data": data, "training": unwatched}
        config = self.config.model_copy(update={"name": "expert", **own, **plain})
        training = [self.config.adapter, unwatched, self.config.seed, self.state.num_processes]
        return config, RunFolder(cache_folder() / "experts" / digest(["expert", *self._key([task]), *training]))

    def _key(self, tasks: Sequence[Task]) -> list[Any]:
        """Everything that decides the scores of a model: the model itself, the tokens, the tasks, the settings."""
        plain = self.config.resolved(self.method)
        elsewhere = {"tasks", "train", "dev", "test", *(() if self.encoder.writes_date else ("date",))}
        data = {k: v for k, v in plain["data"].items() if k not in elsewhere}
        evaluation = {
            key: value
            for key, value in plain["evaluation"].items()
            if key not in {"experts", "untrained", "tasks", "held_out", "held_out_after", "general"}
        }
        if "engine" in evaluation:
            evaluation["engine"] = evaluation["engine"]["model"]
        return [
            self.identity,
            self.state.device.type,
            plain["model"],
            data,
            evaluation,
            [task_digest(task) for task in tasks],
            *_VERSIONS,
        ]
