"""The configuration of a run: YAML in, validated and typed sections out.

Every error is one line: the file, the path of the key, what was wrong and what would be right.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from cit_fast.data.builtin import builtin_task_names
from cit_fast.data.sources import TaskSource
from cit_fast.errors import ConfigError
from cit_fast.training.arguments import checked_adapter, checked_training
from cit_fast.training.values import choices
from cit_fast.training.yaml_file import check_plain, read_yaml, set_key

VERSION = 1

_RESERVED_TEMPLATE = {
    "messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "tools",
    "documents", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "strftime_now",
}  # fmt: skip


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class Part(_Section):
    """One of the four parts of a method: a built-in name or a dotted path, and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "options" not in value:
            return {
                "name": value.get("name", ""),
                "options": {key: option for key, option in value.items() if key != "name"},
            }
        return value


class MethodConfig(_Section):
    """A method: a preset, or parts of one's own over a preset."""

    name: str = Field(pattern=r"^[\w][\w.+-]*$")
    schedule: Literal["sequential", "joint"] = "sequential"
    router: Part = Part(name="shared")
    replay: Part = Part(name="none")
    objective: Part = Part(name="cross-entropy")
    update: Part = Part(name="plain")

    @model_validator(mode="after")
    def _joint_replays_nothing(self) -> MethodConfig:
        if self.schedule == "joint" and self.replay.name != "none":
            raise ValueError("replay: a joint run trains all tasks at once, so there is nothing to replay")
        if self.schedule == "joint" and self.router.name != "shared":
            raise ValueError("router: a joint run trains all tasks at once, so there is one adapter set")
        return self

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        if "preset" not in value and isinstance(value.get("name"), str) and value["name"] in presets():
            raise ValueError(f"name: {value['name']!r} is a preset; write preset: {value['name']} instead")
        if "preset" not in value and "name" in value:
            return {key: _part_over(key, None, part) for key, part in value.items()}
        preset = value.pop("preset", "sequential")
        known = presets()
        if not isinstance(preset, str) or preset not in known:
            raise ValueError(f"unknown preset {preset!r}; {choices(str(preset), known)}")
        merged: dict[str, Any] = {"name": preset, **known[preset]}
        for key, part in value.items():
            merged[key] = _part_over(key, merged.get(key), part)
        return merged


def _part_over(key: str, base: Any, given: Any) -> Any:
    """``given`` over the preset's part: options without a name refine the preset's own part."""
    if key in {"router", "replay", "objective", "update"} and isinstance(given, Mapping) and "name" not in given:
        if base is None:
            raise ValueError(f"{key}: give the part's name, for example {key}: {{name: ...}}")
        base = {"name": base} if isinstance(base, str) else dict(base)
        return {**base, **given}
    return given


class ModelConfig(_Section):
    """Which language model, and how it is loaded."""

    name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "auto"
    trust_remote_code: bool = False


class DataConfig(_Section):
    """Which tasks in which order, how many examples of each, and how they become tokens.

    ``template_options`` are variables of the chat template (``enable_thinking: false``). ``date`` is what it takes for
    today, where it writes the date; without one, the day on which the run began, also when it is resumed or serves.
    """

    tasks: tuple[str | TaskSource, ...] | None = None
    train: PositiveInt | None = None
    dev: int | None = Field(default=None, ge=0)
    test: PositiveInt | None = None
    max_length: int = Field(default=512, ge=8, le=2**24)
    system_prompt: str | None = None
    on_overflow: Literal["truncate", "error", "skip"] = "truncate"
    template_options: dict[str, Any] = Field(default_factory=dict)
    date: datetime.date = Field(default_factory=datetime.date.today)

    @field_validator("template_options")
    @classmethod
    def _template_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if not key.isidentifier() or key in _RESERVED_TEMPLATE:
                raise ValueError(
                    f"{key}: {'set by cit-fast' if key in _RESERVED_TEMPLATE else 'no name of a variable'}"
                )
        return value

    @field_validator("tasks")
    @classmethod
    def _some_tasks(cls, value: Any) -> Any:
        if value is not None and not value:
            raise ValueError("the list is empty; name at least one task, or leave the key out for the built-in stream")
        return value


class EvaluationConfig(_Section):
    """What is measured after every stage. Tasks of ``held_out`` are answered but never trained: by the untrained model
    and after the last stage, or after every one (``held_out_after: all``).
    """

    split: Literal["test", "dev"] = "test"
    tasks: Literal["all", "seen"] = "all"
    untrained: bool = True
    experts: bool = False
    held_out: tuple[str | TaskSource, ...] = ()
    held_out_after: Literal["last", "all"] = "last"
    max_new_tokens: PositiveInt = 64
    batch_size: PositiveInt = 16


class RunConfig(_Section):
    """A whole run. ``training`` holds transformers.TrainingArguments, ``adapter`` a PEFT configuration (or null).

    Read one with :func:`load_config`, or build it from keyword arguments or a dictionary
    (``RunConfig.model_validate({...})``).
    """

    version: int = VERSION
    name: str = Field(default="run", pattern=r"^[\w][\w.+-]*$")
    output: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**31)
    methods: tuple[MethodConfig, ...] = Field(
        default_factory=lambda: (MethodConfig.model_validate("sequential"),), min_length=1
    )
    model: ModelConfig = ModelConfig()
    adapter: dict[str, Any] | None = Field(
        default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    )
    data: DataConfig = Field(default_factory=DataConfig)
    training: dict[str, Any] = Field(default_factory=dict)
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != VERSION:
            raise ValueError(f"configuration version {value}; this cit-fast reads version {VERSION}")
        return value

    @field_validator("methods")
    @classmethod
    def _distinct(cls, value: tuple[MethodConfig, ...]) -> tuple[MethodConfig, ...]:
        names = [method.name for method in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two methods are named {twice[0]!r}; give one of them another name")
        return value

    @field_validator("training")
    @classmethod
    def _training_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return checked_training(value)

    @field_validator("adapter")
    @classmethod
    def _adapter_fields(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else checked_adapter(value)

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, value: Any) -> Any:
        try:
            check_plain(value, "")
        except ConfigError as error:
            raise ValueError(f"{error}".removeprefix(": ")) from None
        return value

    @field_validator("output")
    @classmethod
    def _usable_path(cls, value: str | None) -> str | None:
        for part in Path(value or "").parts:
            if len(os.fsencode(part)) > 255:
                raise ValueError(f"the name {part[:20]!r}... is longer than a file's name can be (255 bytes)")
        return value

    @model_validator(mode="after")
    def _room_to_answer(self) -> RunConfig:
        if self.evaluation.max_new_tokens >= self.data.max_length:
            raise ValueError(
                f"evaluation.max_new_tokens ({self.evaluation.max_new_tokens}) leaves no room for a prompt in "
                f"data.max_length ({self.data.max_length})"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the runs of this configuration go, one sub-folder per method."""
        return Path(self.output) if self.output is not None else Path("runs") / self.name

    def resolved(self, method: MethodConfig) -> dict[str, Any]:
        """What decides the outcome of one method, as plain JSON values: no output folder, no other method."""
        plain = self.model_dump(mode="json", exclude={"output", "methods", "name"})
        plain["method"] = method.model_dump(mode="json")
        return typing.cast("dict[str, Any]", json.loads(json.dumps(plain)))


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """The presets that cit-fast ships: name -> parts."""
    text = Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")
    return typing.cast("dict[str, dict[str, Any]]", yaml.safe_load(text))


def describe(error: ValidationError, where: str) -> str:
    """A pydantic error as one line: ``where: key.path: what was wrong``."""
    # A union (a task is a name or a mapping) reports once per member: a mapping was meant unless it is no mapping.
    entries = error.errors()
    meant = [entry for entry in entries if "str" not in entry["loc"]]
    entries = meant or entries
    first = entries[0]
    path = [str(part) for part in first["loc"] if part not in {"str", "TaskSource"}]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        message = f"unknown key; {choices(path[-1], _keys_at(path[:-1]))}"
    elif first["type"] == "missing":
        message = "missing"
    elif first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]} (it is {first['input']!r})"
    inner, _, rest = message.partition(": ")
    if rest and inner.isidentifier() and first["type"] == "value_error":
        path, message = [*path, inner], rest
    # A list that lost its only item also complains of being too short: what the item's own error explains is no other.
    places = {entry["loc"][:2] for entry in entries}
    others = sum(place != first["loc"][: len(place)] for place in places)
    more = f" (and {others} more)" if others > 0 else ""
    return f"{where}: {'.'.join(path) or 'configuration'}: {message}{more}"


def _keys_at(path: Sequence[str]) -> list[str]:
    kind: Any = RunConfig
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
            if kind == tuple[MethodConfig, ...]:
                kind = MethodConfig
        elif not part.isdigit():
            return []
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [*kind.model_fields, "preset"] if kind is MethodConfig else list(kind.model_fields)
    return [field.name for field in dataclasses.fields(TaskSource)]


def _spelt_out(first_key: str, text: str) -> dict[str, Any]:
    """The mapping that a method or a task given by its name alone stands for."""
    if first_key == "methods":
        return {"preset": text}
    return {"builtin" if text in builtin_task_names() else "path": text}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML configuration.

    Args:
        path: the file.
        overrides: ``key.path=value`` strings; values are YAML, list items go by number
            (``methods.0.replay.fraction=0.2``).

    Raises:
        ConfigError: a missing file, broken YAML, an unknown key, a wrong type or another version, in one line.
    """
    path = Path(path)
    raw = read_yaml(path)
    for override in overrides:
        set_key(raw, override, _spelt_out)
    return validated(raw, str(path))


def validated(raw: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration that a mapping of keys is.

    Raises:
        ConfigError: an unknown key, a wrong type or another version, in one line that starts with ``where``.
    """
    try:
        return RunConfig.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(describe(error, where)) from None
