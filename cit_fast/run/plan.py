"""What a run would do: stages, examples, steps, tokens, and what is not here yet. Nothing is trained or fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cit_fast.data import Task, load_task
from cit_fast.data.builtin import builtin_task_names
from cit_fast.data.example import Example
from cit_fast.data.sources import TaskSource
from cit_fast.data.streams import find_stream, missing_parts
from cit_fast.errors import CitFastError, DataError
from cit_fast.methods.config import MethodConfig
from cit_fast.methods.registry import build_parts
from cit_fast.methods.replay import KPIGReplay, NoReplay
from cit_fast.methods.replay.allocation import Budget
from cit_fast.models.adapters import load_encoder
from cit_fast.models.pretrained import local_model
from cit_fast.run.arguments import training_arguments
from cit_fast.run.config import RunConfig
from cit_fast.run.stage_settings import training_at
from cit_fast.run.tasks import answered_tasks

_CHARACTERS_A_TOKEN = 4  # where the tokenizer is not here


@dataclass(frozen=True)
class StagePlan:
    """One stage; ``None`` where the data is not here.

    Args:
        tasks: that it trains; ``examples``: of theirs; ``replayed``: earlier ones at most.
        steps: of the optimizer; ``tokens``: of the examples once, replayed ones left out; in a running run ``None``.
        prompts: test prompts that are answered afterwards; those of held-out tasks left out.
    """

    tasks: tuple[str, ...]
    examples: int | None = None
    replayed: int | None = None
    steps: int | None = None
    tokens: int | None = None
    prompts: int | None = None


@dataclass(frozen=True)
class RunPlan:
    """All methods of a configuration.

    Args:
        stages: method -> its stages.
        missing: what the run needs and is not here: parts of the data, and what would be fetched.
        exact: whether tokens are counted by the model's own tokenizer, or guessed from characters.
    """

    stages: dict[str, list[StagePlan]]
    missing: list[str] = field(default_factory=list)
    exact: bool = True


def plan_run(config: RunConfig) -> RunPlan:
    """See :class:`RunPlan`.

    Raises:
        ConfigError: a part that cannot be made with its options.
        DataError: data that is there and cannot be read.
    """
    parts = {method.name: build_parts(method, config.training) for method in config.methods}
    missing: list[str] = []
    tasks = _tasks(config, missing)
    folder = local_model(config.model)
    if folder is None:
        missing.append(f"model {config.model.name}{_at(config.model.revision)}: would be fetched from the hub")
    count = _tokens_by(folder, config)
    tokens = {name: None if task is None else count(task.train) for name, task in tasks.items()}
    arguments = training_arguments(config.training, config.seed, Path("unused"))
    stages = {
        method.name: plan_stages(method, parts[method.name]["replay"], tasks, tokens, arguments, config)
        for method in config.methods
    }
    return RunPlan(stages, missing, exact=folder is not None)


def plan_stages(
    method: MethodConfig,
    replay: Any,
    tasks: Mapping[str, Task | None],
    tokens: Mapping[str, int | None],
    arguments: Any,
    config: RunConfig,
) -> list[StagePlan]:
    """The stages of one method.

    Args:
        replay: its policy.
        tasks: by name, in order, ``None`` for one whose data is not here; ``tokens``: of their training examples.
        arguments: transformers.TrainingArguments. ``config``: of the run.
    """
    evaluation = config.evaluation
    joint = method.schedule == "joint"
    planned: list[StagePlan] = []
    sizes: list[int | None] = []  # of the tasks seen before
    for names in [list(tasks)] if joint else [[name] for name in tasks]:
        own = [tasks[name] for name in names]
        before = list(sizes)
        sizes += [None if task is None else len(task.train) for task in own]
        if None in sizes:
            planned.append(StagePlan(tuple(names)))
            continue
        examples = sum(len(task.train) for task in own if task is not None)
        replayed = _replayed(replay, before)
        budget = training_at(config.training, config.stages, len(planned) + 1).get("tokens_per_batch")
        tokens_each = sum(_guessed(task.train) for task in own if task is not None) / max(examples, 1)
        known = answered_tasks(list(tasks.values()), len(sizes), len(tasks), evaluation, config.seed, joint)
        there = [len(getattr(task, evaluation.split)) for task in known if task is not None]
        counted = [tokens.get(name) for name in names]
        if None not in counted:
            tokens_each = sum(count for count in counted if count is not None) / max(examples, 1)
        planned.append(
            StagePlan(
                tuple(names),
                examples,
                replayed,
                None if replayed is None else _steps(examples + replayed, arguments, budget, tokens_each),
                None if None in counted else sum(count for count in counted if count is not None),
                sum(there) if len(there) == len(known) else None,
            )
        )
    return planned


def _at(revision: str | None) -> str:
    return "" if revision is None else f"@{revision}"


def _tasks(config: RunConfig, missing: list[str]) -> dict[str, Task | None]:
    """The tasks by name, ``None`` for one whose data is not here."""
    sources: Sequence[TaskSource | str] = config.data.tasks or builtin_task_names()
    gone: dict[str, str] = {}
    if config.data.stream is not None and config.data.root is not None:
        stream, order = find_stream(config.data.stream)
        gone = missing_parts(stream, order, config.data.root)
        missing += [f"data {task}: {problem}" for task, problem in gone.items()]
        if gone:
            missing.append(f"the data of {stream.name} is to be had from {stream.where}")
    tasks: dict[str, Task | None] = {}
    for source in sources:
        name = source if isinstance(source, str) else source.name
        if name in gone:
            tasks[name] = None
        elif isinstance(source, TaskSource) and source.dataset is not None:
            missing.append(f"data {source.dataset}{_at(source.revision)}: would be fetched from the hub")
            tasks[name or source.dataset] = None
        else:
            sizes = {split: getattr(config.data, split) for split in ("train", "dev", "test")}
            task = load_task(source, seed=config.seed, **sizes)
            tasks[task.name] = task
    if not tasks:
        raise DataError("data.tasks: no tasks")
    return tasks


def _tokens_by(folder: Path | None, config: RunConfig) -> Any:
    """What counts the tokens of examples."""
    if folder is None:
        return _guessed
    encoder = load_encoder(folder, config.model, config.data)

    def count(examples: Sequence[Example]) -> int:
        try:
            return sum(len(each) for each in encoder.encode_all(examples).encoded)
        except CitFastError:  # what does not fit is said when the run begins
            return _guessed(examples)

    return count


def _guessed(examples: Sequence[Example]) -> int:
    return sum(len(_text(each)) for each in examples) // _CHARACTERS_A_TOKEN


def _text(example: Example) -> str:
    turns = "".join(text for _, text in example.messages)
    return turns or f"{example.instruction}{example.input}{example.references[0]}"


def _replayed(policy: Any, sizes: Sequence[int | None]) -> int | None:
    """How many examples come back at most; ``None`` for a policy of the user's own."""
    known = [size for size in sizes if size is not None]
    if isinstance(policy, NoReplay) or not known:
        return 0
    if isinstance(policy, KPIGReplay) and policy.instances is not None:
        count = min(policy.tasks or (len(known) + 1) // 2, len(known))
        return sum(min(policy.instances, size) for size in sorted(known)[-count:])
    if not (hasattr(policy, "fraction") and hasattr(policy, "per_task")):
        return None
    budget = Budget(policy.fraction, policy.per_task)
    return min(sum(budget.wanted(size) for size in known), sum(known))


def _steps(examples: int, arguments: Any, budget: int | None, tokens_each: float) -> int:
    """Of a stage. Batches of ``budget`` tokens are counted as if they were full, so there are a few more of them."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    if budget is not None:
        batches = math.ceil(examples * tokens_each / budget)
    else:
        batches = math.ceil(examples / arguments.train_batch_size)
    a_step: int = arguments.gradient_accumulation_steps
    steps: int = math.ceil(math.ceil(batches / a_step) * float(arguments.num_train_epochs))
    return steps
