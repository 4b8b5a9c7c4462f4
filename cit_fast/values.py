"""Options checked against the types that a class or function declares for them; the base of every configuration."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
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


class Section(BaseModel):
    """A section of the configuration: frozen, and nothing in it that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


def choices(given: str, known: Iterable[str]) -> str:
    """What could have been meant: the nearest of the known names, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


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
