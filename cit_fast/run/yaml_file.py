"""A YAML file as plain values: texts, finite numbers, true, false, null and dates, in lists and mappings.

What no configuration means is refused here, with the key's path: anchors that contain themselves, values nested deeper
or longer than any reader could follow, infinite numbers, null characters, a key given twice.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cit_fast.errors import ConfigError
from cit_fast.text import first_line

_DEEPEST, _MOST_VALUES, _LARGEST = 32, 200_000, 2**63


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as all write it, the key ``on`` a text, a key given twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file.

    Raises:
        ConfigError: a missing file, broken YAML, or a value that no configuration can have.
    """
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() or not path.exists() else None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {first_line(error)}") from None
    if text is None:
        raise ConfigError(f"{path}: {'a folder' if path.is_dir() else 'no regular file'}; give the YAML file")
    raw = parse_yaml(text, f"{path}")
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a mapping of keys was expected, not {type(raw).__name__}")
    check_plain(raw, f"{path}")
    return raw


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: it is no YAML; the message starts with ``where`` and the line.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  # a safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{where}{place}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deep") from None
    except (ValueError, TypeError) as error:  # a number of thousands of digits, a date that is none, a list as a key
        raise ConfigError(f"{where}: not valid YAML: {first_line(error).partition(';')[0]}") from None


def check_plain(value: Any, where: str) -> None:
    """See that nested values are what a configuration can hold. Objects of Python's own making are left to others.

    Raises:
        ConfigError: the first one that is not, by its path.
    """
    for count, (path, one) in enumerate(_walk(value, [])):
        problem = _problem(one)
        if count > _MOST_VALUES:
            problem = "more values than a configuration can have (anchors that repeat each other?)"
        elif len(path) > _DEEPEST:
            problem = "nested too deep (an anchor that contains itself?)"
        if problem is not None:
            place = ".".join(path[:6]) or "configuration"
            raise ConfigError(f"{where}: {place}: {problem}")


def _walk(value: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Every value with its path, keys of mappings before what they name."""
    yield path, value
    if len(path) > _DEEPEST:
        return
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        inner = list(value.items())
    elif isinstance(value, (list, tuple)):
        inner = [(f"{number}", one) for number, one in enumerate(value)]
    for key, one in inner:
        below = [*path, f"{key}"[:80]]
        yield below, key if isinstance(key, str) else _NoText(key)
        yield from _walk(one, below)


class _NoText:
    """A key that is no text."""

    def __init__(self, key: Any) -> None:
        self.kind = type(key).__name__


def _problem(value: Any) -> str | None:
    if isinstance(value, _NoText):
        return f"a key must be a text, not {value.kind}; put it in quotes"
    if isinstance(value, str):
        if "\0" in value:
            return "a null character"
        if any("\ud800" <= character <= "\udfff" for character in value):
            return "invalid Unicode: a lone surrogate"
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no finite number"
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LARGEST:
        return f"a number of {value.bit_length()} bits; 63 are the most"
    elif isinstance(value, (bytes, set, frozenset, datetime.datetime)):
        return f"a {type(value).__name__} is no value of a configuration; write a text, a number or a list"
    return None


def set_key(raw: dict[str, Any], override: str, spelt_out: Callable[[str, str], dict[str, Any]]) -> None:
    """Set one key of a configuration in place.

    Args:
        raw: the configuration.
        override: ``key.path=value``; the value is YAML, list items go by number.
        spelt_out: of a text in a list (a method or a task given by its name alone) and the path's first key, the
            mapping that the text stands for.

    Raises:
        ConfigError: no such place, or no YAML value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key.path=value")
    value = parse_yaml(text, f"--set {key}={text}")
    check_plain(value, f"--set {key}")
    target: Any = raw
    # A name stands for a mapping of one key, so the path may go through it: replay.fraction over `replay: random`.
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        place = ".".join(parents[: depth + 1])
        if isinstance(target, list) and part.isdigit() and int(part) < len(target):
            if isinstance(target[int(part)], str):
                target[int(part)] = spelt_out(parents[0], target[int(part)])
            target = target[int(part)]
        elif isinstance(target, dict):
            if isinstance(target.get(part), str) and depth > 0:
                target[part] = {"name": target[part]}
            target = target.setdefault(part, {})
        else:
            raise ConfigError(f"--set {key}: there is no {place} to set a key of")
        if target is None:
            raise ConfigError(f"--set {key}: {place} is null")
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"--set {key}: there is no such place in the configuration")
