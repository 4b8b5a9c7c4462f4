"""The sections ``model`` and ``data`` of a configuration."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError, field_validator, model_validator

from cit_fast.data.sources import TaskSource
from cit_fast.data.streams import find_stream
from cit_fast.errors import ConfigError
from cit_fast.models.loading import checked_loading, checked_quantization
from cit_fast.values import Section

_RESERVED_TEMPLATE = {
    "messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "tools",
    "documents", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "strftime_now",
}  # fmt: skip


TINY_VISION = "cit-fast/tiny-vision"
"""What ``model.name`` calls the tiny model that sees (:mod:`cit_fast.models.tiny_vision`)."""


class ModelConfig(Section):
    """Which language model, and how it is loaded."""

    name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A folder, or a name on the model hub."""
    revision: str | None = None
    """A branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: the dtype in which the weights are stored, or float32 on an x86 processor that does not multiply that
    one, where the weights in float32 fit into a quarter of the memory."""
    attn_implementation: str = "auto"
    """A name that transformers takes; ``auto``: the newest flash attention that runs on the device, else ``sdpa``."""
    trust_remote_code: bool = False
    """Whether code that lies beside the weights may run."""
    quantization: dict[str, Any] | None = None
    """Fields of transformers' quantisation configurations (``load_in_4bit: true``), for adapters over a quantised base
    (QLoRA)."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Other options of ``from_pretrained``, and fields of the model's own configuration (``rope_parameters``)."""
    fuse_lora: bool = True
    """LoRA layers as one op each instead of PEFT's path."""
    fuse_norms: bool = True
    """On a CPU, RMSNorm in one pass."""

    @field_validator("quantization")
    @classmethod
    def _quantization_fields(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else checked_quantization(value)

    @field_validator("kwargs")
    @classmethod
    def _loading_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        return checked_loading(value)


class DataConfig(Section):
    """Which tasks in which order, how many examples of each, and how they become tokens."""

    stream: str | None = None
    """A stream file instead of tasks (``superni-15/order-1``, see ``cit-fast streams``); options that are not given are
    the stream's."""
    root: str | None = None
    """The folder that holds the stream's data."""
    tasks: tuple[str | TaskSource, ...] | None = None
    """In the order in which they are learned: names of built-in tasks, files, folders, or sources with options."""
    train: PositiveInt | None = None
    """Training examples of a task, at most; without it all of them."""
    dev: int | None = Field(default=None, ge=0)
    """Development examples of a task, at most."""
    test: PositiveInt | None = None
    """Test examples of a task, at most."""
    max_length: int = Field(default=512, ge=8, le=2**24)
    """Tokens of prompt and answer together, at most."""
    system_prompt: str | None = None
    """The system turn of examples that bring none. Without it the chat template may write a text of its own; an empty
    one keeps that out."""
    on_overflow: Literal["truncate", "error", "skip"] = "truncate"
    """An example that is too long has the end of its input cut off. Where that is not enough, ``truncate`` is an error
    and ``skip`` leaves it out. ``error`` refuses every example that is too long."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An image that cannot be read is an error, or its example is left out and counted (``skip``)."""
    ignore_media: bool = False
    """Train on the texts alone where examples have images, videos or recordings that the model does not take; without
    it, they are an error."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template (``enable_thinking: false``)."""
    date: datetime.date = Field(default_factory=datetime.date.today)
    """What the chat template takes for today, where it writes the date; without one, the day on which the run began,
    also when it is resumed or serves."""

    @model_validator(mode="before")
    @classmethod
    def _tasks_of_the_stream(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("stream") is None:
            if isinstance(value, Mapping) and value.get("root") is not None:
                raise ValueError("root: the folder of a stream's data, and no stream is named")
            return value
        try:
            stream, order = find_stream(str(value["stream"]))
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if not isinstance(value.get("root"), str):
            raise ValueError(f"root: name the folder that holds the data of {stream.name}: {stream.where}")
        sources = stream.sources(order, value["root"])
        if value.get("tasks") is not None:
            try:  # a resolved configuration has both
                given = TypeAdapter(tuple[TaskSource, ...]).validate_python(value["tasks"])
            except ValidationError:
                given = ()
            if given != sources:
                raise ValueError("tasks: they are those of the stream; leave out tasks, or stream and root")
        return {**stream.data, **value, "tasks": sources}

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
