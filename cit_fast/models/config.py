"""The sections ``model`` and ``data`` of a configuration."""

from __future__ import annotations

import datetime
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from cit_fast.data.sources import TaskSource
from cit_fast.values import Section

_RESERVED_TEMPLATE = {
    "messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "tools",
    "documents", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "strftime_now",
}  # fmt: skip


class ModelConfig(Section):
    """Which language model, and how it is loaded."""

    name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "auto"
    trust_remote_code: bool = False


class DataConfig(Section):
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
