"""The configuration of a run: YAML in, validated and typed sections out.

Every error is one line: the file, the path of the key, what was wrong and what would be right.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, PositiveInt, ValidationError, field_validator, model_validator

from cit_fast.data.builtin import is_builtin_task
from cit_fast.data.sources import TaskSource
from cit_fast.errors import ConfigError
from cit_fast.methods.config import MethodConfig
from cit_fast.models.chat import check_address
from cit_fast.models.config import DataConfig, ModelConfig
from cit_fast.models.osf import is_osf
from cit_fast.run.arguments import checked_adapter, checked_training
from cit_fast.run.gate import GateConfig
from cit_fast.run.judge import JudgeConfig
from cit_fast.run.stage_settings import StageSettings, method_at
from cit_fast.run.task_memory import MemoryConfig
from cit_fast.run.yaml_file import check_plain, read_yaml, set_key
from cit_fast.values import Section, choices

VERSION = 1


class Sample(Section):
    """Earlier tasks of which so many are answered again after a stage, drawn by chance."""

    sample: int = Field(ge=0)
    """So many of the earlier tasks."""


class HarnessConfig(Section):
    """Benchmarks of lm-evaluation-harness beside the probes."""

    lm_eval: tuple[str, ...] = Field(min_length=1)
    """Names of the harness's tasks, or of those in ``include_path``; the harness fetches their data where it is not
    there yet."""
    include_path: str | None = None
    """A folder with tasks of your own."""
    limit: PositiveInt | None = None
    """Examples of each."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Shots, by default the task's own."""


class EngineConfig(Section):
    """A server that answers test prompts."""

    openai: str
    """Its address, up to and with ``/v1``."""
    model: str | None = None
    """The base model's name there, by default the first that it lists."""
    folder: str | None = None
    """Where adapter sets are written, which the server must see under the same path; by default in the cache folder."""
    key_variable: str = "CIT_FAST_ENGINE_API_KEY"
    """The environment variable that holds its key, if it wants one."""
    concurrency: PositiveInt = 64
    """Requests that are under way at a time."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds until a request that got no answer has failed."""
    attempts: PositiveInt = 5
    """Requests for a prompt, at most."""

    @field_validator("openai")
    @classmethod
    def _with_its_version(cls, value: str) -> str:
        if not value.rstrip("/").endswith("/v1"):
            raise ValueError("openai: expected an address like http://localhost:8001/v1")
        try:
            check_address(value)
        except ConfigError as error:
            raise ValueError(str(error).replace("base_url", "openai")) from None
        return value.rstrip("/")


class EvaluationConfig(Section):
    """What is measured after every stage."""

    split: Literal["test", "dev"] = "test"
    """The examples that are answered."""
    tasks: Literal["all", "seen"] | Sample = "all"
    """All of the stream, those seen so far, or ``{sample: K}``: what the stage trained and K of the earlier ones, and
    all after the last stage."""
    untrained: bool = True
    """Whether the untrained model is measured, too."""
    experts: bool = False
    """Whether a model of its own is trained on each task, for the relative gain of InsCL."""
    held_out: tuple[str | TaskSource, ...] = ()
    """Tasks that are answered but never trained."""
    held_out_after: Literal["last", "all"] = "last"
    """Held-out tasks are answered by the untrained model and after the last stage, or after every one."""
    decode: Literal["greedy", "labels"] = "greedy"
    """With ``labels`` the answer to a task that has labels is the one of them which the model finds most likely, so it
    never breaks their format; other tasks are answered greedily."""
    max_new_tokens: PositiveInt = 64
    """Tokens of an answer, at most."""
    batch_size: PositiveInt = 16
    """Prompts that are answered together."""
    batch_tokens: PositiveInt | None = None
    """No more prompts together than have so many tokens, padding and the longest answers counted."""
    engine: Literal["transformers"] | EngineConfig = "transformers"
    """Who answers: the model here, or a server that has the base model and loads adapter sets (vLLM, SGLang)."""
    judge: JudgeConfig | None = None
    """Who marks the answers of tasks whose metric is ``judge``."""
    general: bool | HarnessConfig = False
    """Whether general abilities are measured, too, on the untrained model and after every stage; ``{lm_eval: [...]}``:
    with benchmarks beside."""


class RunConfig(Section):
    """A whole run. ``training`` holds transformers.TrainingArguments, ``tokens_per_batch``, the tokens that a batch
    holds at most, and ``projector_learning_rate``, that of a vision-language model's projector; ``adapter`` a PEFT
    configuration (or null).

    Read one with :func:`load_config`, or build it from keyword arguments or a dictionary
    (``RunConfig.model_validate({...})``).
    """

    version: int = VERSION
    """Of the configuration's format."""
    name: str = Field(default="run", pattern=r"^[\w][\w.+-]*$")
    """Of the run."""
    output: str | None = None
    """Folder of the runs, one below it for each method; by default ``runs/NAME``."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of everything that is drawn by chance."""
    methods: tuple[MethodConfig, ...] = Field(
        default_factory=lambda: (MethodConfig.model_validate("sequential"),), min_length=1
    )
    """Each is trained on the whole stream: a preset's name, or a preset with options."""
    model: ModelConfig = ModelConfig()
    """The language model."""
    adapter: dict[str, Any] | None = Field(
        default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    )
    """Keys of a PEFT configuration; null trains the model itself."""
    data: DataConfig = Field(default_factory=DataConfig)
    """The tasks."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Keys of transformers.TrainingArguments."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured, and how prompts are answered."""
    stages: tuple[StageSettings, ...] = ()
    """What changes from a stage on."""
    gate: GateConfig | None = None
    """Limits that a stage must keep to become the current one."""
    memory: MemoryConfig | None = None
    """What the run keeps of the tasks that it has learned; without it nothing, their data is read where it lies."""

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
        return tuple(_with_checked_adapter(method) for method in value)

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
    def _room_to_train(self) -> RunConfig:
        for training in (self.training, *(entry.training for entry in self.stages)):
            budget = training.get("tokens_per_batch")
            if budget is not None and budget < self.data.max_length:
                raise ValueError(
                    f"training.tokens_per_batch: {budget} tokens do not hold an example of data.max_length "
                    f"({self.data.max_length})"
                )
        return self

    @model_validator(mode="after")
    def _room_to_answer(self) -> RunConfig:
        if self.evaluation.max_new_tokens >= self.data.max_length:
            raise ValueError(
                f"evaluation.max_new_tokens ({self.evaluation.max_new_tokens}) leaves no room for a prompt in "
                f"data.max_length ({self.data.max_length})"
            )
        return self

    @field_validator("stages")
    @classmethod
    def _ascending(cls, value: tuple[StageSettings, ...]) -> tuple[StageSettings, ...]:
        starts = [entry.from_ for entry in value]
        if starts != sorted(starts):
            raise ValueError("stages: entries must be in the order of their stages (from)")
        return value

    @model_validator(mode="after")
    def _methods_of_later_stages(self) -> RunConfig:
        for method in self.methods:
            for entry in self.stages:
                method_at(method, self.stages, entry.from_)
        return self

    @model_validator(mode="after")
    def _engine_can_answer(self) -> RunConfig:
        if self.evaluation.engine == "transformers":
            return self
        from peft import get_peft_config

        from cit_fast.models.adapter_bank import served_elsewhere

        if self.evaluation.decode == "labels":
            raise ValueError("evaluation.decode: labels needs the model's own predictions; leave it out, or engine")
        for method in self.methods:
            adapter = method.adapter or self.adapter
            if adapter is None or is_osf(adapter):
                raise ValueError(
                    f"evaluation.engine: a server can load adapter sets, and method {method.name!r} trains the model "
                    "itself; leave it out"
                )
            if not served_elsewhere(get_peft_config({"task_type": "CAUSAL_LM", **adapter})):
                raise ValueError(
                    "evaluation.engine: servers load LoRA of one rank and one alpha, without biases or whole modules; "
                    f"the adapter of method {method.name!r} is more than that"
                )
        return self

    @model_validator(mode="after")
    def _general_is_measured(self) -> RunConfig:
        if self.gate is not None and self.gate.general is not None and not self.evaluation.general:
            raise ValueError("gate: general needs evaluation: {general: true}")
        return self

    @model_validator(mode="after")
    def _something_to_replay(self) -> RunConfig:
        if self.memory is None or self.memory.keep != "none":
            return self
        for method in self.methods:
            own_prompts = {"anchor", "generated"} & {key for key, value in method.replay.options.items() if value}
            if method.replay.name == "on-policy" and own_prompts:
                continue
            later = [method_at(method, self.stages, entry.from_) for entry in self.stages]
            for part in (part for own in (method, *later) for part in (own.replay.name, own.objective.name)):
                if part not in ("none", "cross-entropy", "distillation", "o-lora", "sdft"):
                    raise ValueError(
                        f"memory: none keeps no examples, and {part} of method {method.name!r} needs some of the "
                        "tasks before; keep some, or leave it out"
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
        plain["stages"] = [entry.plain() for entry in self.stages]
        for name in ("general", "batch_tokens"):
            if not plain["evaluation"][name]:
                del plain["evaluation"][name]
        if self.evaluation.engine == "transformers":
            del plain["evaluation"]["engine"]
        for name in ("quantization", "kwargs"):
            if not plain["model"][name]:
                del plain["model"][name]
        for name in ("memory", "stages", "gate"):  # as it was before there was such a section
            if not plain[name]:
                del plain[name]
        own = plain["method"].pop("adapter")
        if own is not None:
            plain["adapter"] = own
        return typing.cast("dict[str, Any]", json.loads(json.dumps(plain)))


def _with_checked_adapter(method: MethodConfig) -> MethodConfig:
    if method.adapter is None:
        return method
    try:
        return method.model_copy(update={"adapter": checked_adapter(method.adapter)})
    except ValueError as error:
        raise ValueError(f"method {method.name!r}: adapter.{error}") from None


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
    return {"builtin" if is_builtin_task(text) else "path": text}


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
