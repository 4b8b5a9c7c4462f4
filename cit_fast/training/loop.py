"""The continual run: a stream of tasks goes through router, replay, objective and update, stage by stage.

TaskStream --task t--> Router.assign -> ReplayPolicy.select -> Trainer(Objective, Update) -> evaluate -> commit
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import ValidationError
from rich.console import Console

from cit_fast.data import TaskStream, load_stream
from cit_fast.data.builtin import builtin_task_names
from cit_fast.errors import CitFastError, ConfigError, DataError, RunError
from cit_fast.evaluation.metrics import score
from cit_fast.files import is_disk_full
from cit_fast.training.config import RunConfig, describe, load_config
from cit_fast.training.method_run import MethodRun
from cit_fast.training.parts import PARTS, build_part
from cit_fast.training.run_folder import RunFolder


class ContinualTrainer:
    """Runs every method of a configuration on its stream of tasks, and resumes what was interrupted.

    Args:
        config: a :class:`RunConfig`, the path of a YAML file, or a mapping of its keys.
        stream: tasks to use instead of ``config.data.tasks``.
        router, replay, objective, update: objects to use instead of every method's own part.
        console: where progress is printed; by default standard output, of the main process alone.

    Example::

        trainer = ContinualTrainer("examples/quickstart.yaml")
        folders = trainer.run()
    """

    def __init__(
        self,
        config: RunConfig | str | Path | Mapping[str, Any],
        *,
        stream: TaskStream | None = None,
        router: Any = None,
        replay: Any = None,
        objective: Any = None,
        update: Any = None,
        console: Console | None = None,
    ) -> None:
        if isinstance(config, (str, Path)):
            config = load_config(config)
        elif not isinstance(config, RunConfig):
            try:
                config = RunConfig.model_validate(dict(config))
            except ValidationError as error:
                raise ConfigError(describe(error, "configuration")) from None
        self.config = config
        given = {"router": router, "replay": replay, "objective": objective, "update": update}
        self._parts = {kind: part for kind, part in given.items() if part is not None}
        for method in config.methods:  # a misspelt part should not wait for the methods before it
            for kind in PARTS:
                if kind not in self._parts:
                    build_part(kind, getattr(method, kind), method.name)
            if config.adapter is None and method.router.name != "shared":
                raise ConfigError(
                    f"method {method.name!r}: router: {method.router.name!r} grows adapter sets, and adapter: null "
                    "trains the model itself; give an adapter, or router: shared"
                )
        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.console = console or Console(quiet=not self._state.is_main_process)
        self.stream = stream or load_stream(
            config.data.tasks if config.data.tasks is not None else builtin_task_names(),
            seed=config.seed,
            train=config.data.train,
            dev=config.data.dev,
            test=config.data.test,
        )
        for task in self.stream:
            split = getattr(task, config.evaluation.split)
            if not split:
                raise ConfigError(
                    f"evaluation.split: task {task.name!r} has no {config.evaluation.split} examples to evaluate on"
                )
            # A metric that is unknown, or answers it cannot score, should not wait until a stage is trained.
            answers = [example.references for example in split]
            try:
                score(task.metric, [right[0] for right in answers], answers, labels=task.labels)
            except CitFastError as error:
                raise type(error)(f"data.tasks: task {task.name!r}: metric: {error}") from None
            if not task.train:
                raise DataError(f"data.tasks: task {task.name!r} has no training examples")

    def run(self) -> list[Path]:
        """Run, or go on with, every method; returns their folders, in order.

        Raises:
            RunError: a folder is in use, belongs to another configuration, or the disk is full.
        """
        folders = []
        for method in self.config.methods:
            folder = self.config.folder / method.name
            with _disk_full_as_run_error(folder), _only_our_progress_bars():
                MethodRun(self.config, method, self._parts, self.stream, RunFolder(folder), self.console).run()
            folders.append(folder)
        return folders


@contextlib.contextmanager
def _disk_full_as_run_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise RunError(
                f"{folder}: the disk is full; everything completed so far is kept, "
                "so free some space and run the same command again"
            ) from error
        raise


@contextlib.contextmanager
def _only_our_progress_bars() -> Iterator[None]:
    """No bars of transformers for every file it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
