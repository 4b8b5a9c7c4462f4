"""What the site takes from the package itself, as Markdown: presets, commands, and the keys of a configuration."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from peft import LoraConfig
from transformers import TrainingArguments

from cit_fast.cli import app
from cit_fast.methods import config as methods
from cit_fast.methods.registry import PARTS
from cit_fast.run.arguments import TRAINING_DEFAULTS
from cit_fast.run.schema import config_schema

Schema = Mapping[str, Any]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(each.replace("|", r"\|") for each in line) + " |" for line in lines) + "\n"


# -- presets ---------------------------------------------------------------------------------------------------------


def presets() -> str:
    """Every preset, in its own words."""
    sources = methods.sources()
    rows = [(f"`{name}`", says, sources[name]) for name, says in methods.descriptions().items()]
    return table(("preset", "what it does", "whose"), rows)


def preset_parts() -> str:
    """What each preset is made of."""
    kinds = ("router", "replay", "objective", "update")

    def cell(part: Any) -> str:
        if part is None:
            return ""
        name, options = (part, {}) if isinstance(part, str) else (part["name"], dict(part))
        options.pop("name", None)
        given = ", ".join(f"{key}: {json.dumps(value)}".replace('"', "") for key, value in options.items())
        return f"`{name}`" + (f", `{given}`" if given else "")

    rows = [
        (f"`{name}`", *(cell(parts.get(kind)) for kind in kinds))
        for name, parts in methods.presets().items()
        if any(parts.get(kind) for kind in kinds)
    ]
    return table(("preset", *kinds), rows)


# -- commands --------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its arguments and options, as ``--help`` has them."""
    return "\n".join(_command(name, command) for name, command in typer.main.get_command(app).commands.items())


def _command(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=f"cit-fast {name}")
    arguments = [_argument(each) for each in command.params if each.param_type_name == "argument"]
    options = ["[OPTIONS]"] if len(command.params) > len(arguments) else []
    usage = " ".join(["cit-fast", name, *arguments, *options])
    found = [(each.param_type_name, each.get_help_record(context)) for each in command.params]
    # Arguments first; of an option "-o, --output PATH" the names and the kind are code.
    rows = [
        (f"`{record[0]}`", _markdown(record[1])) for kind, record in sorted(found, key=lambda each: each[0]) if record
    ]
    example = (command.epilog or "").removeprefix("Example: ")
    return "\n".join(
        [
            f"## {name}\n",
            f"{_markdown(command.help or '')}\n",
            f"```text\n{usage}\n```\n",
            *([table(("argument or option", "what it is"), rows)] if rows else []),
            f"```bash\n{example}\n```\n",
        ]
    )


def _argument(argument: Any) -> str:
    """As it stands in the line of usage: what may be left out in brackets."""
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


# -- configuration ---------------------------------------------------------------------------------------------------

SECTIONS = {
    "methods": "MethodConfig",
    "model": "ModelConfig",
    "data": "DataConfig",
    "evaluation": "EvaluationConfig",
    "stages": "StageSettings",
    "gate": "GateConfig",
    "memory": "MemoryConfig",
}
INNER = {"data": ("TaskSource",), "evaluation": ("Sample", "HarnessConfig", "EngineConfig", "JudgeConfig")}


def configuration() -> str:
    """Every key with its type, default and description: the sections, then the options of each part."""
    schema = config_schema()
    kinds = schema["$defs"]
    found = ["## The whole\n", _keys(schema, "")]
    for section, kind in SECTIONS.items():
        own = kinds[kind] if "properties" in kinds[kind] else kinds[kind]["anyOf"][-1]
        found += [f"## {section}\n", f"{_text(own)}\n", _keys(own, section)]
        for inner in INNER.get(section, ()):
            found += [f"### {inner}\n", f"{_first(_text(kinds[inner]))}\n", _keys(kinds[inner], inner)]
    found += [
        "## training\n",
        TRAINING,
        _fields(TrainingArguments, schema["properties"]["training"], TRAINING_DEFAULTS),
    ]
    adapter = next(each for each in schema["properties"]["adapter"]["anyOf"] if "properties" in each)
    found += [
        "## adapter\n",
        ADAPTER,
        _fields(LoraConfig, adapter, {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}),
    ]
    for kind, names in PARTS.items():
        found.append(f"## {kind}\n\n{PART_OF[kind]}\n")
        for name, dotted in names.items():
            own = next(each for each in kinds[kind]["anyOf"] if _constant(each) == name)
            properties = {key: value for key, value in own["properties"].items() if key != "name"}
            found.append(f"### {kind}: {name}\n\n{{class}}`{dotted}`\n")
            found.append(
                _keys({"properties": properties, "required": ()}, "") if properties else "It has no options.\n"
            )
    return "\n".join(found)


PART_OF = {
    "router": "Which adapter set a task trains, and which one answers a prompt.",
    "replay": "Which earlier examples come back when a new task is trained.",
    "objective": "How the loss of a batch is computed.",
    "update": "What happens to the weights at each optimizer step, and at the end of a stage.",
}
TRAINING = """\
Keys of `transformers.TrainingArguments`, with its own words for them. Those that a run sets by itself (its folder,
seeds, evaluation, upload) are refused, and the message says which key of the configuration is meant instead.
"""
ADAPTER = """\
Keys of PEFT's `LoraConfig`, with its own words for them; with `peft_type: ...` those of another PEFT configuration.
`null` trains the model itself.
"""


def _constant(schema: Schema) -> Any:
    return schema.get("properties", {}).get("name", {}).get("const")


def _keys(schema: Schema, section: str) -> str:
    rows = []
    for key, own in schema["properties"].items():
        default = "required" if key in schema.get("required", ()) else _default(own)
        says = _text(own)
        rows.append((f"`{key}`", _type(own), default, says[:1].upper() + says[1:]))
    return table(("key", "type", "default", "what it is"), rows)


def _fields(kind: type, schema: Schema, ours: Mapping[str, Any]) -> str:
    """The keys of another library's dataclass, with the defaults that they have in a run."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    rows = []
    for key, own in schema["properties"].items():
        theirs = fields[key].default if key in fields and fields[key].default is not dataclasses.MISSING else None
        value = ours.get(key, theirs)
        default = "" if value is None else f"`{_plain(value)}`"
        rows.append((f"`{key}`", _type(own), default, _first(_text(own))))
    return table(("key", "type", "default", "what it is"), rows)


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return str(getattr(value, "value", value))


def _default(schema: Schema) -> str:
    if "default" not in schema or isinstance(schema["default"], dict) or schema["default"] in (None, [], ""):
        return ""
    value = schema["default"]
    return f"`{value if isinstance(value, str) else json.dumps(value)}`" if len(str(value)) < 60 else "see there"


def _type(schema: Schema) -> str:
    return " or ".join(dict.fromkeys(_types(schema)))


def _types(schema: Schema) -> Iterator[str]:
    """In words, each kind that a key may have."""
    for each in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _types(each)
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        heading = {kind: section for section, kind in SECTIONS.items()}.get(name, name)
        yield f"[{heading}](#{heading.lower()})"
    elif "const" in schema and str(schema["const"]):
        yield "name" if "description" in schema else f"`{schema['const']}`"
    elif "enum" in schema:
        values = [f"`{each}`" for each in schema["enum"]]
        yield ", ".join(values) if len(values) < 12 else "name"
    elif schema.get("type") == "array":
        items = schema.get("items", {})
        yield f"list of {_type(items)}" if isinstance(items, dict) and items else "list"
    elif "type" in schema and schema["type"] != "null":
        limits = [f"{sign} {schema[key]:.10g}" for key, sign in LIMITS.items() if key in schema]
        yield NAMES[schema["type"]] + (f" {', '.join(limits)}" if limits else "")


NAMES = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "mapping",
}
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _first(text: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", text, maxsplit=1)[0]


def _text(schema: Schema) -> str:
    return _markdown(str(schema.get("description", "")))


def _markdown(text: str) -> str:
    """Plain text as Markdown: names of the package between backticks are links, and nothing else is markup."""
    text = " ".join(text.split())
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        _code(part[1:-1]) if part.startswith("`") and part.endswith("`") else _escaped(part) for part in parts
    )


def _code(text: str) -> str:
    return f"{{py:obj}}`{text}`" if re.fullmatch(r"cit_fast(\.\w+)+", text) else f"`{text}`"


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_<>{}\[\]$`#])", r"\\\1", text)
