"""The section ``methods`` of a configuration: a method is a choice of four parts, most often a preset."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from cit_fast.values import Section, choices

_REMOVED = {
    "lcia-paper": "its rule was not the paper's; lcia-always has equation (45)",
    "lcia-ema-paper": "its rule was not the paper's; lcia-ema with update: {rule: paper} has equation (45)",
}


class Part(Section):
    """One of the four parts of a method: a built-in name or a dotted path, and its options."""

    name: str
    """A built-in name, or ``package.module.Class``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor; in YAML they stand beside the name."""

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


class MethodConfig(Section):
    """A method: a preset, or parts of one's own over a preset."""

    name: str = Field(pattern=r"^[\w][\w.+-]*$")
    """Of the run's folder; by default the preset's."""
    schedule: Literal["sequential", "joint"] = "sequential"
    """One task after another, or all at once."""
    router: Part = Part(name="shared")
    """Which adapter set a task trains, and which one answers a prompt."""
    replay: Part = Part(name="none")
    """Which earlier examples come back when a new task is trained."""
    objective: Part = Part(name="cross-entropy")
    """How the loss of a batch is computed."""
    update: Part = Part(name="plain")
    """What happens to the weights at each optimizer step, and at the end of a stage."""
    adapter: dict[str, Any] | None = None
    """In the place of the run's own."""

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
            return {key: part_over(key, None, part) for key, part in value.items()}
        preset = value.pop("preset", "sequential")
        known = presets()
        if isinstance(preset, str) and preset in _REMOVED:
            raise ValueError(f"preset {preset!r} was removed: {_REMOVED[preset]}")
        if not isinstance(preset, str) or preset not in known:
            raise ValueError(f"unknown preset {preset!r}; {choices(str(preset), known)}")
        merged: dict[str, Any] = {"name": preset, **known[preset]}
        for key, part in value.items():
            merged[key] = part_over(key, merged.get(key), part)
        return merged


def part_over(key: str, base: Any, given: Any) -> Any:
    """``given`` over the part that was there: options without a name refine that part."""
    if key in {"router", "replay", "objective", "update"} and isinstance(given, Mapping) and "name" not in given:
        if base is None:
            raise ValueError(f"{key}: give the part's name, for example {key}: {{name: ...}}")
        base = {"name": base} if isinstance(base, str) else dict(base)
        return {**base, **given}
    return given


def presets() -> dict[str, dict[str, Any]]:
    """The presets that cit-fast ships: name -> parts."""
    about = {"says", "source"}
    return {name: {key: part for key, part in keys.items() if key not in about} for name, keys in _shipped().items()}


def descriptions() -> dict[str, str]:
    """What each preset does, in one sentence: name -> sentence."""
    return {name: keys["says"] for name, keys in _shipped().items()}


def sources() -> dict[str, str]:
    """Whose method each preset is: a paper's, or ours: name -> words."""
    return {name: keys["source"] for name, keys in _shipped().items()}


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")
    return typing.cast("dict[str, dict[str, Any]]", yaml.safe_load(text))
