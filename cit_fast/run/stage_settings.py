"""Settings that change from a stage on: another learning rate for later tasks, less replay, another objective."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator

from cit_fast.errors import ConfigError
from cit_fast.methods.config import MethodConfig, Part, part_over
from cit_fast.run.arguments import checked_training, learning_rate_of, over
from cit_fast.values import Section

PARTS = ("router", "replay", "objective", "update")


class StageSettings(Section):
    """What changes from a stage on, until a later entry changes it again."""

    from_: PositiveInt = Field(alias="from")
    """Number of the first stage, from 1."""
    preset: str | None = None
    """All four parts are those of a preset."""
    router: str | dict[str, Any] | None = None
    """Options over the router that is there, or another one by its name. Another router gets to know the earlier tasks,
    from what there is of their examples, with the sets that they have trained; ``shared`` goes on with the set that was
    trained last."""
    replay: str | dict[str, Any] | None = None
    """Options over the replay that is there, or another one by its name."""
    objective: str | dict[str, Any] | None = None
    """Options over the objective that is there, or another one by its name."""
    update: str | dict[str, Any] | None = None
    """Options over the update that is there, or another one by its name."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Keys of TrainingArguments."""
    learning_rate_by_stage: Literal["1", "1/k", "1/sqrt(k)"] | None = None
    """The learning rate of stage k is the configured one times this."""

    @field_validator("training")
    @classmethod
    def _training_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return checked_training(value)

    def plain(self) -> dict[str, Any]:
        """What was given, as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def method_at(method: MethodConfig, stages: Sequence[StageSettings], index: int) -> MethodConfig:
    """The method as it is in stage ``index``.

    Raises:
        ConfigError: parts that do not go together.
    """
    parts: dict[str, Any] = {kind: _flat(getattr(method, kind)) for kind in PARTS}
    for entry in _until(stages, index):
        if entry.preset is not None:
            parts = {kind: _flat(getattr(_preset(entry), kind)) for kind in PARTS}
        for kind in PARTS:
            given = getattr(entry, kind)
            if given is not None:
                parts[kind] = part_over(kind, parts[kind], given)
    plain = {**method.model_dump(exclude={*PARTS}), **parts}
    try:
        # All four parts are spelt out; a method may be called like a preset.
        return MethodConfig.model_validate({"preset": "sequential", **plain})
    except ValidationError as error:
        raise ConfigError(f"stages: from {index}: {error.errors()[0]['msg']}") from None


def _preset(entry: StageSettings) -> MethodConfig:
    """The method of an entry's preset.

    Raises:
        ConfigError: there is none of this name, or it is not a choice of parts alone.
    """
    try:
        method = MethodConfig.model_validate({"preset": entry.preset})
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"stages: from {entry.from_}: {message}") from None
    if method.schedule == "joint" or method.adapter is not None:
        raise ConfigError(f"stages: from {entry.from_}: preset {entry.preset!r} cannot begin in the middle of a run")
    return method


def training_at(training: Mapping[str, Any], stages: Sequence[StageSettings], index: int) -> dict[str, Any]:
    """The TrainingArguments of stage ``index``."""
    found, rule = dict(training), "1"
    for entry in _until(stages, index):
        found = over(found, entry.training)
        rule = entry.learning_rate_by_stage or rule
    scale = {"1": 1.0, "1/k": 1 / index, "1/sqrt(k)": 1 / math.sqrt(index)}[rule]
    return found if scale == 1.0 else {**found, "learning_rate": learning_rate_of(found) * scale}


def settings_at(stages: Sequence[StageSettings], index: int) -> list[dict[str, Any]]:
    """The entries that a stage has taken up, for its record."""
    return [entry.plain() for entry in _until(stages, index)]


def stages_of(config: Mapping[str, Any]) -> tuple[StageSettings, ...]:
    """The entries of a recorded configuration."""
    return tuple(map(StageSettings.model_validate, config.get("stages", ())))


def _until(stages: Sequence[StageSettings], index: int) -> list[StageSettings]:
    return [entry for entry in stages if entry.from_ <= index]


def _flat(part: Part) -> dict[str, Any]:
    return {"name": part.name, **part.options}
