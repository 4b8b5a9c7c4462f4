"""A commented configuration for who begins: ``cit-fast init``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cit_fast.data.builtin import builtin_task_names, is_builtin_task
from cit_fast.data.sources import TaskSource
from cit_fast.errors import ConfigError, RunError
from cit_fast.files import write_file
from cit_fast.run.config import validated
from cit_fast.run.schema import config_schema
from cit_fast.run.yaml_file import read_yaml

Goal = Literal["one-model", "per-task", "compare"]
GOALS: dict[Goal, str] = {
    "one-model": "one adapter that keeps all tasks, to be merged or served anywhere",
    "per-task": "an adapter for each task, and a router that sends every prompt to its own",
    "compare": "plain tuning, replay and both of the others beside each other, on your data",
}
Machine = Literal["cpu", "gpu"]
SCHEMA = "cit-fast.schema.json"

_ONE = """\
  - preset: merge
    replay: {fraction: 0.1}  # of every earlier task's examples, trained again with a new one
"""
_PER_TASK = """\
  - preset: switch-tokens
    router: {start: previous}  # a new task's adapter starts from the last one's
"""
_METHODS: dict[Goal, str] = {
    "one-model": _ONE,
    "per-task": _PER_TASK,
    "compare": "  - sequential  # what is forgotten without any method\n  - random-replay\n" + _ONE + _PER_TASK,
}
_TRAINING: dict[Machine, str] = {
    "cpu": """\
  per_device_train_batch_size: 8
  num_train_epochs: 1
  learning_rate: 1.0e-3
""",
    "gpu": """\
  per_device_train_batch_size: 16
  num_train_epochs: 1
  learning_rate: 2.0e-4
  # gradient_checkpointing: true  # less memory, a third slower
""",
}


def task_entry(given: str) -> str | dict[str, Any]:
    """A task of a configuration, as ``data.tasks`` has it.

    Raises:
        ConfigError: neither a built-in task nor a file or folder that is there.
    """
    if is_builtin_task(given):
        return given
    if not Path(given).exists():
        known = ", ".join(builtin_task_names())
        raise ConfigError(f"data: {given!r} is no file or folder, and no built-in task ({known})")
    TaskSource(path=given)
    return given


def new_config(model: str, tasks: Sequence[str], goal: Goal, machine: Machine, name: str) -> str:
    """The text of a commented YAML configuration.

    Args:
        model: folder or hub name. ``tasks``: folders, files or built-in names, in the order in which they are learned.
        goal: one of :data:`GOALS`. ``machine``: what trains it.
        name: of the run.

    Raises:
        ConfigError: no tasks, or one that is not there.
    """
    if not tasks:
        raise ConfigError("data: name at least one task: a folder, a file or a built-in name")
    listed = "\n".join(f"    - {json.dumps(task_entry(task), ensure_ascii=False)}" for task in tasks)
    limits = "" if any(not is_builtin_task(task) for task in tasks) else "  train: 240\n  test: 16\n"
    return f"""\
# yaml-language-server: $schema={SCHEMA}
# `cit-fast run THIS --plan` says what it would do and how long that takes; `cit-fast run THIS` does it, and goes on
# where it was interrupted. `cit-fast learn RUN TASK` teaches a finished run more.
version: 1
name: {name}
seed: 0
methods:  # `cit-fast presets` lists them all; several are compared
{_METHODS[goal]}\
model:
  name: {json.dumps(model, ensure_ascii=False)}  # a folder or hub name of any causal language model
adapter:  # fields of a PEFT configuration; null trains the model itself
  {{r: 16, lora_alpha: 32, target_modules: all-linear}}
data:
  tasks:  # in this order
{listed}
{limits}\
  max_length: 512  # tokens of prompt and answer; a longer input is cut at its end
training:  # keys of transformers.TrainingArguments
{_TRAINING[machine]}\
  save_steps: 50
evaluation:
  tasks: seen  # after every stage the tasks learned so far
  max_new_tokens: 64
memory:  # what the run keeps, so that it can learn on without the earlier data
  {{per_task: 200}}
# gate: {{forgetting: 5}}  # a stage that forgets more is kept aside, and `cit-fast run` ends with exit code 3
"""


def write_new_config(path: Path, text: str) -> None:
    """Write a configuration, and its schema beside it.

    Raises:
        RunError: there is something already. ConfigError: what it says does not fit together.
    """
    if path.exists():
        raise RunError(f"{path}: is there already; name another file")
    write_file(path, text)
    try:
        validated(read_yaml(path), str(path))
    except ConfigError:
        path.unlink()
        raise
    write_file(path.with_name(SCHEMA), json.dumps(config_schema(), indent=1) + "\n")
