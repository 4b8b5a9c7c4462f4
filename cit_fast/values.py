"""Values of a configuration: checked by declared types, looked up by dotted path, and the base class of sections."""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from cit_fast.errors import ConfigError


class Section(BaseModel):
    """A section of the configuration: frozen, and nothing in it that it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), use_attribute_docstrings=True
    )


def choices(given: str, known: Iterable[str]) -> str:
    """What could have been meant: the nearest of the known names, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def imported(path: str, where: str, kind: typing.Literal["class", "function"]) -> Callable[..., Any]:
    """The callable at a dotted path, ``package.module.name`` or ``package.module:name``.

    Args:
        where: beginning of an error's message.
        kind: what is wanted, for an error's message; anything callable but a module is taken.

    Raises:
        ConfigError: no dotted path, a module that cannot be imported, or no callable there.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not all(word.isidentifier() for word in (*module_name.split("."), name)):
        raise ConfigError(f"{where} is no dotted path; write package.module.{kind}")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever a module of the user's own raises when it is imported
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{where} cannot be imported: {reason}") from error
    if not callable(found) or inspect.ismodule(found):
        raise ConfigError(f"{where} is a {type(found).__name__}, not a {kind}")
    return typing.cast("Callable[..., Any]", found)


def checked_value(key: str, value: Any, hints: Mapping[str, Any], *, open_ended: bool = False) -> Any:
    """``value`` as ``hints[key]`` wants it: ``"false"`` for a boolean is false, ``1e1`` for an integer is 10.

    Args:
        open_ended: a text that is none of those that a ``Literal`` lists is left to its owner, who may know more (PEFT
            annotates ``pissa_niter_[number of iters]``).

    Raises:
        ValueError: an unknown key or a wrong type, in one line that starts with the key.
    """
    if key not in hints:
        raise ValueError(f"{key}: unknown key; {choices(key, hints)}")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError, ValueError):
        return value  # a hint only its own library understands: that library will check it
    try:
        read = adapter.validate_python(value)
    except ValidationError as error:
        if open_ended and isinstance(value, str) and _lists_texts(hints[key]):
            return value
        raise ValueError(f"{key}: {error.errors()[0]['msg']} (it is {value!r})") from None
    # What the field wants (true, not "n"), where it is a plain value; else as it was given.
    return read if isinstance(read, (bool, int, float, str)) and not isinstance(read, Enum) else value


def _lists_texts(hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return any(isinstance(choice, str) for choice in typing.get_args(hint))
    return any(_lists_texts(inner) for inner in typing.get_args(hint))
