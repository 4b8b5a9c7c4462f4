"""The continual run: a stream of tasks goes through router, replay, objective and update, stage by stage.

TaskStream --task t--> Router.assign -> ReplayPolicy.select -> Trainer(Objective, Update) -> evaluate -> commit
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape

from cit_fast.data import Task, TaskStream
from cit_fast.data.kept_task import RecalledTask
from cit_fast.data.streams import check_stream
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.files import is_disk_full
from cit_fast.methods.config import MethodConfig
from cit_fast.methods.registry import build_parts
from cit_fast.models.adapters import load_encoder, loading_whole
from cit_fast.models.osf import is_osf
from cit_fast.models.pretrained import resolve_model
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run import media
from cit_fast.run.arguments import training_arguments
from cit_fast.run.config import HarnessConfig, RunConfig, load_config, validated
from cit_fast.run.harness import check_harness
from cit_fast.run.memory import quick_collections, release_memory
from cit_fast.run.method_run import MethodRun
from cit_fast.run.outside_engine import outside_engine
from cit_fast.run.pace import Paces, TimeLeft
from cit_fast.run.plan import plan_stages
from cit_fast.run.run_folder import RunFolder
from cit_fast.run.stage_settings import method_at, training_at
from cit_fast.run.tasks import check_held_out, check_task, load_held_out, load_tasks
from cit_fast.run.trial import skeleton, try_adapter, try_arguments, try_base, try_batches, try_lengths


class ContinualTrainer:
    """Runs every method of a configuration on its stream of tasks, and resumes what was interrupted.

    Args:
        config: a :class:`RunConfig`, the path of a YAML file, or a mapping of its keys.
        stream: tasks to use instead of ``config.data.tasks``.
        held_out: tasks to use instead of ``config.evaluation.held_out``.
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
        held_out: Sequence[Task] | None = None,
        router: Any = None,
        replay: Any = None,
        objective: Any = None,
        update: Any = None,
        console: Console | None = None,
    ) -> None:
        if isinstance(config, (str, Path)):
            config = load_config(config)
        elif not isinstance(config, RunConfig):
            config = validated(config, "configuration")
        self.config = config
        given = {"router": router, "replay": replay, "objective": objective, "update": update}
        self._own = {kind: part for kind, part in given.items() if part is not None}
        # All of them now: a misspelt part should not wait for the methods before it.
        self._parts = {method.name: build_parts(method, config.training, self._own) for method in config.methods}
        for method in config.methods:
            for entry in config.stages:
                training = training_at(config.training, config.stages, entry.from_)
                now = method_at(method, config.stages, entry.from_)
                router = build_parts(now, training, self._own)["router"]
                before = method_at(method, config.stages, entry.from_ - 1).router
                begins = entry.from_ > 1 and now.router != before and "router" not in self._own
                if begins and getattr(router, "adopts", "nothing") == "nothing":
                    raise ConfigError(
                        f"stages: from {entry.from_}: router {now.router.name} cannot begin in a later stage"
                    )
        for method in config.methods:
            adapter = method.adapter or config.adapter
            later = (method_at(method, config.stages, entry.from_).router.name for entry in config.stages)
            router = next((name for name in (method.router.name, *later) if name != "shared"), None)
            if (adapter is None or is_osf(adapter)) and router is not None:
                what = "null" if adapter is None else "OSF"
                raise ConfigError(
                    f"method {method.name!r}: router: {router!r} grows adapter sets, and adapter: {what} "
                    "trains the model itself; give an adapter, or router: shared"
                )
        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.console = console or Console(quiet=not self._state.is_main_process)
        if stream is None and config.data.stream is not None and config.data.root is not None:
            check_stream(config.data.stream, config.data.root)
        self.stream = stream or load_tasks(config)
        splits = {config.evaluation.split, (config.gate and config.gate.on) or config.evaluation.split}
        for task in self.stream:
            for split in splits:
                where = "data.tasks" if split == config.evaluation.split else "gate.on"
                check_task(task, split, where, config.evaluation.judge is not None)
            if not task.train and not isinstance(task, RecalledTask):
                raise DataError(f"data.tasks: task {task.name!r} has no training examples")
        self.held_out = load_held_out(config, from_config=stream is None) if held_out is None else tuple(held_out)
        check_held_out(self.held_out, self.stream, config.evaluation.split, config.evaluation.judge is not None)

    def run(self) -> list[Path]:
        """Run, or go on with, every method; returns their folders, in order.

        Raises:
            RunError: a folder is in use, belongs to another configuration, or the disk is full.
        """
        self._try()
        clock = self._clock()
        with quick_collections():
            return [self._run(number, method, clock) for number, method in enumerate(self.config.methods)]

    def _run(self, number: int, method: MethodConfig, clock: TimeLeft) -> Path:
        folder = self.config.folder / method.name
        with _disk_full_as_run_error(folder), _only_our_progress_bars():
            parts_of, where = functools.partial(build_parts, given=self._own), RunFolder(folder)
            clock.begin(number)
            MethodRun(self.config, method, parts_of, self.stream, where, self.console, self.held_out, clock).run()
        release_memory()  # the next method has a model of its own
        return folder

    def _look(self, encoder: PromptEncoder) -> None:
        """See that the model takes what the examples have beside their texts, and that their images can be read.

        Raises:
            DataError: it does not, or an image cannot be read and ``data.on_bad_image`` is error.
        """
        seen = encoder.images is not None
        tasks, notes = media.looked_at([*self.stream, *self.held_out], seen, self.config)
        for note in notes:
            self.console.print(f"  {escape(note)}", highlight=False)
        self.stream, self.held_out = TaskStream(tasks[: len(self.stream)]), tasks[len(self.stream) :]

    def _clock(self) -> TimeLeft:
        """What knows how long all methods still take."""
        arguments = training_arguments(self.config.training, self.config.seed, self.config.folder)
        tasks = {task.name: task for task in self.stream}
        paces = Paces(self.config)
        return TimeLeft(
            [
                plan_stages(method, self._parts[method.name]["replay"], tasks, {}, arguments, self.config)
                for method in self.config.methods
            ],
            [paces.of(method) for method in self.config.methods],
        )

    def _try(self) -> None:
        """See that the run can be set up, before anything is written.

        Raises:
            ConfigError: PEFT or transformers refuse what the configuration gives them, or the model lacks tokens.
        """
        config = self.config
        with self._state.main_process_first():  # one process fetches or converts, the others find it done
            folder = resolve_model(config.model)
        encoder = load_encoder(folder, config.model, config.data)
        self._look(encoder)
        adapters = [config.adapter if method.adapter is None else method.adapter for method in config.methods]
        try_base(folder, config.model, adapters)
        with loading_whole():
            bare = skeleton(folder, config.model)
            if bare is not None:
                encoder.fit_to(bare)
                for adapter in _distinct(adapters):
                    try_adapter(copy.deepcopy(bare), adapter)
        engine = outside_engine(config, "", encoder)
        if engine is not None:
            engine.check()
        try_lengths(encoder, self.stream.tasks, self.held_out, config)
        if isinstance(config.evaluation.general, HarnessConfig):
            check_harness(config.evaluation.general)
        arguments = training_arguments(config.training, config.seed, config.folder)
        try_arguments(arguments)
        if any(method.schedule != "joint" for method in config.methods):
            try_batches(arguments, [task for task in self.stream if not isinstance(task, RecalledTask)])


def _distinct(adapters: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Those that are not alike."""
    found: list[dict[str, Any]] = []
    for adapter in adapters:
        if adapter is not None and adapter not in found:
            found.append(adapter)
    return found


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
