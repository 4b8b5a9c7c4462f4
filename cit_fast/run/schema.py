"""The configuration as a JSON schema, for editors that complete and check YAML.

It is made from what reads the configuration: the sections, the presets, the options of each part's constructor, and
the fields of transformers' and PEFT's own classes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema

from cit_fast.data.builtin import builtin_task_names, visual_task_names
from cit_fast.data.constraints import Constraints
from cit_fast.data.record_fields import ReadOptions
from cit_fast.data.sources import TaskSource
from cit_fast.methods.config import descriptions
from cit_fast.methods.registry import PARTS
from cit_fast.run.arguments import RESERVED_ADAPTER, RESERVED_TRAINING
from cit_fast.run.config import RunConfig
from cit_fast.values import imported

_Schema = dict[str, Any]


def config_schema() -> _Schema:
    """The JSON schema (draft 2020-12) of a run's configuration."""
    from peft import LoraConfig
    from transformers import TrainingArguments

    found: _Schema = RunConfig.model_json_schema()
    kinds: _Schema = found["$defs"]
    for kind, names in PARTS.items():
        kinds[kind] = _part(kind, names)
    method = kinds["MethodConfig"]
    presets = [{"const": name, "description": says} for name, says in descriptions().items()]
    properties = {
        "preset": {"description": "the method that the other keys refine", "oneOf": presets},
        **method["properties"],
        **{kind: {**_says(method["properties"][kind]), "$ref": f"#/$defs/{kind}"} for kind in PARTS},
    }
    kinds["MethodConfig"] = {"anyOf": [{"oneOf": presets}, {**method, "properties": properties, "required": []}]}
    del kinds["Part"]
    of_stage = kinds["StageSettings"]["properties"]
    for kind in PARTS:
        of_stage[kind] = {**_says(of_stage[kind]), "$ref": f"#/$defs/{kind}"}
    of_stage["preset"] = {**_says(of_stage["preset"]), "oneOf": presets}
    task: _Schema = {
        "anyOf": [
            {"enum": [*builtin_task_names(), *visual_task_names()]},
            {"type": "string"},
            {"$ref": "#/$defs/TaskSource"},
        ]
    }
    of_data = kinds["DataConfig"]["properties"]
    of_data["tasks"] = {**_says(of_data["tasks"]), "anyOf": [{"items": task, "type": "array"}, {"type": "null"}]}
    training = {
        "description": "keys of transformers.TrainingArguments",
        "type": "object",
        "properties": {
            **_fields(TrainingArguments, RESERVED_TRAINING),
            "tokens_per_batch": {
                "description": "tokens that a batch holds at most, padding counted, instead of a number of examples",
                "anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}],
            },
            "projector_learning_rate": {
                "description": "learning rate of a vision-language model's projector; without it, learning_rate",
                "anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}],
            },
        },
        "additionalProperties": False,
    }
    found["properties"]["training"] = of_stage["training"] = training
    lora = {**_fields(LoraConfig, RESERVED_ADAPTER), "peft_type": {"type": "string"}}
    found["properties"]["adapter"] = properties["adapter"] = {
        "description": "keys of a PEFT configuration: of LoraConfig, unless peft_type says otherwise",
        "anyOf": [{"type": "object", "properties": lora}, {"type": "null"}],
    }
    for reads in (TaskSource, ReadOptions, Constraints):
        for name, says in argument_texts(reads).items():
            if name in kinds["TaskSource"]["properties"]:
                kinds["TaskSource"]["properties"][name]["description"] = says
    found["properties"]["memory"]["anyOf"].append({"enum": ["all", "none"]})  # short for keep
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_without_markup(found),
        "title": "cit-fast",
        "description": "A continual run: which model learns which tasks in which order, and how it does not forget.",
    }


def _says(schema: _Schema) -> _Schema:
    """Its description, for what takes its place."""
    return {"description": schema["description"]}


def _part(kind: str, names: Mapping[str, str]) -> _Schema:
    """A part by its name, by a dotted path, as its name with options, or as options over the preset's."""
    options = {name: _options(imported(dotted, kind, "class")) for name, dotted in names.items()}
    keys = {key for of_name in options.values() for key in of_name}
    own = {"name": {"type": "string", "pattern": r"[.:]"}}
    return {
        "anyOf": [
            {"enum": list(names)},
            own["name"],
            *(_mapping({"name": {"const": name}, **of_name}, "name") for name, of_name in options.items()),
            {"type": "object", "properties": own, "required": ["name"]},
            _mapping({key: {} for key in sorted(keys)}),
        ]
    }


def _mapping(properties: _Schema, *required: str) -> _Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _options(factory: Any) -> _Schema:
    """The arguments of a constructor."""
    hints = typing.get_type_hints(factory.__init__)
    parameters = inspect.signature(factory).parameters.values()
    says = argument_texts(factory)
    found = {}
    for one in parameters:
        found[one.name] = _of_type(hints.get(one.name, Any))
        if one.default is not inspect.Parameter.empty and isinstance(one.default, (str, int, float, bool)):
            found[one.name] = {**found[one.name], "default": one.default}
        if one.name in says:
            found[one.name] = {**found[one.name], "description": says[one.name]}
    return found


def argument_texts(factory: type) -> dict[str, str]:
    """What the section ``Args`` of a class's docstring says of each argument of its constructor."""
    _, _, section = (inspect.getdoc(factory) or "").partition("\nArgs:\n")
    known = set(inspect.signature(factory).parameters)
    found: dict[str, str] = {}
    for item in re.findall(r"^    (\S.*(?:\n {8}.*)*)", section.partition("\n\n")[0], flags=re.MULTILINE):
        # "a, b: text; ``c``: text": names that share a text, and one whose text follows in the same item.
        names, _, text = re.sub(r"\s+", " ", item).partition(": ")
        first, *more = re.split(r"; ``(\w+)``: ", text)
        shared = dict.fromkeys(names.split(", "), first)
        shared |= dict(zip(more[::2], more[1::2], strict=True))
        found |= {name: says for name, says in shared.items() if name in known}
    return found


def _without_markup(value: Any) -> Any:
    """The schema with descriptions as plain text: no roles, and single backticks around code."""
    if isinstance(value, dict):
        return {
            key: re.sub(r"(?::\w+:`~?|``)([^`]+)``?", r"`\1`", " ".join(each.split()))
            if key == "description" and isinstance(each, str)
            else _without_markup(each)
            for key, each in value.items()
        }
    return [_without_markup(each) for each in value] if isinstance(value, list) else value


def _fields(kind: type, reserved: Mapping[str, str]) -> _Schema:
    """The fields of a dataclass that a configuration may set, with the help that their own library gives."""
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        if field.init and field.name not in reserved:
            says = " ".join(str(field.metadata.get("help", "")).split())
            found[field.name] = {**_of_type(hints[field.name]), **({"description": says} if says else {})}
    return found


def _of_type(hint: Any) -> _Schema:
    """What YAML may hold for a type; anything, for one that only its own library understands."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        schema = adapter.json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError, PydanticInvalidForJsonSchema, TypeError, ValueError):
        return {}
    return {} if "$defs" in schema else schema
