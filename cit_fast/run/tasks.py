"""The tasks of a run, checked before anything is trained, and those that are held out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from cit_fast.data import Task, TaskStream, load_task
from cit_fast.data.builtin import builtin_task_names
from cit_fast.data.constraints import Constraints
from cit_fast.data.kept_task import RecalledTask, read_kept
from cit_fast.data.sources import TaskSource, is_gone, origin, possible_names
from cit_fast.errors import CitFastError, ConfigError, DataError
from cit_fast.evaluation.metrics import JUDGE, score
from cit_fast.evaluation.run_files import read_run, read_stage, read_stages
from cit_fast.evaluation.violations import violation_rates
from cit_fast.run.config import EvaluationConfig, RunConfig
from cit_fast.run.run_folder import CANDIDATES
from cit_fast.run.task_memory import TaskMemory

_Task = TypeVar("_Task")


def check_task(task: Task, split: str, where: str, judged: bool = False) -> None:
    """See that a task can be evaluated: a wrong name should not wait until a stage is trained.

    Args:
        split: the one that is evaluated. ``where``: the configuration's key, for error messages. ``judged``: whether
            there is a judge for the metric ``judge``.

    Raises:
        ConfigError: no examples in the split, or a metric that is unknown.
        DataError: answers that the metric cannot score, or a pattern, format or labels that fit none of them.
    """
    if isinstance(task, RecalledTask) and task.dropped:
        return
    examples = getattr(task, split)
    if not examples:
        raise ConfigError(
            f"{where}: task {task.name!r} has no {split} examples to evaluate on (evaluation.split, gate.on)"
        )
    references = [example.references for example in examples]
    first = [answers[0] for answers in references]
    if task.metric == JUDGE and judged:
        return
    try:
        score(
            task.metric,
            first,
            references,
            labels=task.labels,
            inputs=[example.input or example.instruction for example in examples],
        )
    except CitFastError as error:
        raise type(error)(f"{where}: task {task.name!r}: metric: {error}") from None
    declared = Constraints.of(task)
    rates = violation_rates(declared, first, references, [example.input for example in examples])
    for kind, names in {"WFR": ("answer_pattern", "answer_format"), "OOS": ("labels",)}.items():
        if rates.get(kind) == 100.0:
            given = " and ".join(f"{name} {getattr(task, name)!r}" for name in names if getattr(task, name))
            raise DataError(f"{where}: task {task.name!r}: {given} fits none of its answers, for example {first[0]!r}")


def answered_tasks(
    tasks: Sequence[_Task], index: int, count: int, config: EvaluationConfig, seed: int, joint: bool = False
) -> list[_Task]:
    """The tasks that are answered after stage ``index`` of ``count``, as ``evaluation.tasks`` asks."""
    if joint or config.tasks == "all":
        return list(tasks)
    seen = list(tasks[:index])
    if config.tasks == "seen" or index == count:
        return seen
    drawn = random.Random(f"{seed}/{index}/evaluation").sample(  # noqa: S311  # a seed, not a secret
        range(index - 1), min(config.tasks.sample, index - 1)
    )
    return [*(seen[k] for k in sorted(drawn)), seen[-1]]


def load_tasks(config: RunConfig) -> TaskStream:
    """The tasks of ``data.tasks``; one whose data is gone as a run's memory has it.

    Raises:
        DataError: one cannot be loaded.
        RunError: the memory is damaged.
    """
    sources: Sequence[TaskSource | str] = config.data.tasks or builtin_task_names()
    sizes = {split: getattr(config.data, split) for split in ("train", "dev", "test")}
    return TaskStream(tuple(_loaded(source, config, sizes) for source in sources))


def _loaded(source: TaskSource | str, config: RunConfig, sizes: Mapping[str, int | None]) -> Task:
    """A task, or what the first run that has learned it remembers, where its files are gone or it cannot be fetched."""
    if not is_gone(source):
        try:
            return load_task(source, seed=config.seed, **sizes)
        except CitFastError:
            if not (isinstance(source, TaskSource) and source.dataset is not None):
                raise
            known = _recalled(source, config)
            if known is None:
                raise
            return known
    return _recalled(source, config) or load_task(source, seed=config.seed, **sizes)


def _recalled(source: TaskSource | str, config: RunConfig) -> RecalledTask | None:
    """A task as the first of the runs has it that has learned it, be it in a candidate, or holds it out."""
    if config.memory is None:
        return None
    for method in config.methods:
        run = config.folder / method.name
        memory = TaskMemory(run, config.memory)
        for name in possible_names(source):
            if not memory.has(name):
                continue
            waiting = [read_stage(path.parent) for path in run.glob(f"{CANDIDATES}/[0-9]*/stage.json")]
            trained = {task for stage in (*read_stages(run), *waiting) for task in stage.trained}
            if name in trained or name in read_run(run).held_out_tasks:
                return read_kept(memory.path(name))
    return None


def load_held_out(config: RunConfig, *, from_config: bool) -> tuple[Task, ...]:
    """The tasks of ``evaluation.held_out``, without training examples; one whose data is gone as a run has it.

    Args:
        from_config: whether the trained tasks are those of ``data.tasks``, and not given from Python.

    Raises:
        DataError: one of them reads from where a trained task reads, or cannot be loaded.
    """
    trained = {origin(source) for source in config.data.tasks or ()} if from_config else set()
    tasks = []
    for source in config.evaluation.held_out:
        if origin(source) in trained:
            raise DataError(
                f"evaluation.held_out: {origin(source)[1]!r} is in data.tasks as well; train it or hold it out"
            )
        sizes = {"train": 0, "dev": config.data.dev, "test": config.data.test}
        tasks.append(_loaded(source, config, sizes))
    return tuple(tasks)


def check_held_out(tasks: Sequence[Task], stream: TaskStream, split: str, judged: bool = False) -> None:
    """See that held-out tasks can be evaluated and are told apart from each other and from those of the stream.

    Raises:
        ConfigError, DataError: as :func:`check_task`; two tasks of one name, trained or held out.
    """
    for index, task in enumerate(tasks):
        if task.name in stream.names:
            raise DataError(
                f"evaluation.held_out: task {task.name!r} is trained as well; train it or hold it out, "
                "or give one of two different tasks another name"
            )
        if task.name in {other.name for other in tasks[:index]}:
            raise DataError(f"evaluation.held_out: two tasks are called {task.name!r}; give one of them another name")
        check_task(task, split, "evaluation.held_out", judged)
