"""A record of a data set under the names of its format, and how records are read.

See :mod:`cit_fast.data.records` for the formats.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cit_fast.data.images import name_of, name_of_bytes
from cit_fast.errors import ConfigError, DataError

FIELDS_OF = {
    "super_ni": ("Definition", "Instances"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt_completion": ("prompt", "completion"),
    "trace": ("prompt", "answer"),
    "messages": ("messages", "system"),
    "conversations": ("conversations", "system"),
}
IMAGES = ("image", "images")
OTHER_MEDIA = ("video", "videos", "audio", "audios")
_COMMON_FIELDS = ("key_parts", *IMAGES, *OTHER_MEDIA)
ANSWER_OF = {"super_ni": "output", "alpaca": "output", "prompt_completion": "completion", "trace": "answer"}
FORMATS = tuple(FIELDS_OF)
"""Names of the formats of records."""
FIELDS = frozenset(_COMMON_FIELDS).union(*FIELDS_OF.values())


@dataclass(frozen=True)
class ReadOptions:
    """Options that say how records are read.

    Args:
        task: task name given to every example.
        format: one of :data:`FORMATS`, or ``None`` to tell it from the first record that shows it.
        columns: field of the format -> the records' own name for it, dots for nested fields
            (``{"input": "sentence", "output": "answers.text"}``).
        instruction: the instruction of every record, for data that has inputs and labels only (not for Super-NI files).
        instruction_part: where in a turn that holds more the instruction stands: ``"first-line"``, ``"last-line"`` (of
            those that are not blank), or ``{"regex": ...}``, whose first group, or else whole first match, it is.
            Nothing is cut from what is trained: grouping and distances read this part alone.
        key_parts: texts that are key parts of every instruction whose record gives no ``key_parts`` itself.
        key_part_markers: an opening and a closing mark, e.g. ``("[[", "]]")``. Text between them becomes a
            key part and the marks are removed. Without this option marks are ordinary text.
        images: the folder that paths of images start from; otherwise the data file's own. (LLaVA, CoIN and UCIT lay
            images elsewhere.)
        positive_examples: how many of a Super-NI file's ``Positive Examples`` to append to its definition.
        skip_unanswered: leave out records without an answer (absent, null, NaN, blank, or a class label of -1), with a
            warning that counts them, instead of raising an error. (Published data has such records.)

    Raises:
        ConfigError: an unknown format, a column the format does not have, or unusable markers.
    """

    task: str = ""
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    instruction: str | None = None
    instruction_part: str | dict[str, str] | None = None
    key_parts: tuple[str, ...] = ()
    key_part_markers: tuple[str, str] | None = None
    images: str | None = None
    positive_examples: int = 0
    skip_unanswered: bool = False

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise ConfigError(f"format {self.format!r} is unknown; choose one of {', '.join(FORMATS)}")
        fields = [FIELDS_OF[self.format]] if self.format else FIELDS_OF.values()
        known = {name for names in fields for name in names}.union(_COMMON_FIELDS)
        for name in self.columns:
            if name not in known:
                raise ConfigError(
                    f"columns: {name!r} is no field of {self.format or 'any format'}; "
                    f"map from one of {', '.join(sorted(known))} to the data's own name"
                )
        if self.key_part_markers is not None and not all(self.key_part_markers):
            raise ConfigError(f"key_part_markers: both marks must be non-empty, not {self.key_part_markers}")
        self._check_instruction_part()
        if self.positive_examples < 0:
            raise ConfigError(f"positive_examples must be 0 or more, not {self.positive_examples}")

    def _check_instruction_part(self) -> None:
        part = self.instruction_part
        if part is None or part in ("whole", "first-line", "last-line"):
            return
        if not isinstance(part, dict) or set(part) != {"regex"}:
            raise ConfigError(
                f"instruction_part: {part!r} is unknown; expected whole, first-line, last-line or {{regex: ...}}"
            )
        try:
            re.compile(part["regex"])
        except re.error as error:
            raise ConfigError(f"instruction_part.regex: {part['regex']!r}: {error}") from None


class Fields:
    """A record under the format's field names, with errors that say where it is."""

    def __init__(self, record: Mapping[str, Any], options: ReadOptions, source: str) -> None:
        self.record, self.options, self.source = record, options, source

    def get(self, name: str) -> Any:
        """The field's value; ``None`` where it is absent or a missing value (null, NaN)."""
        value = self._value(name)
        return None if isinstance(value, float) and math.isnan(value) else value

    def has(self, name: str) -> bool:
        """Whether the record has such a field at all."""
        return self._value(name) is not None or self._column(name).partition(".")[0] in self.record

    def _column(self, name: str) -> str:
        return self.options.columns.get(name, name)

    def _value(self, name: str) -> Any:
        value: Any = self.record
        column = self._column(name)
        if column in self.record:
            return self.record[column]
        for part in column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    def required(self, name: str) -> Any:
        """The field's value, or the error that it is missing."""
        value = self.get(name)
        if value is None:
            raise self.error(self.missing(name))
        return value

    def missing(self, name: str) -> str:
        """What to say where it is missing."""
        there = ", ".join(map(repr, self.record)) or "none"
        empty = " with a value" if self.has(name) else ""
        return f"missing field {self._column(name)!r}{empty}; the record has {there}"

    def text(self, name: str) -> str:
        """The field's text."""
        return self.as_text(self.required(name), name)

    def as_text(self, value: Any, name: str) -> str:
        """A value of the field as a text."""
        if isinstance(value, str):
            return value
        if isinstance(value, bool):  # as JSON writes it
            return "true" if value else "false"
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(f"{name!r} is {value}, which is no text; write what is meant in quotes")
        if isinstance(value, (int, float, decimal.Decimal, datetime.date, datetime.time)):
            return str(value)
        raise self.error(f"{name!r} must be a text, not {kind_of(value)}")

    def texts(self, name: str) -> tuple[str, ...]:
        """The texts of a field that may have several."""
        value = self.required(name)
        values = value if isinstance(value, list) else [value]
        return tuple(self.as_text(one, name) for one in values)

    def answers(self, name: str) -> tuple[str, ...]:
        """The answers that say something; none where the field is absent or empty."""
        value = self.get(name)
        values = value if isinstance(value, list) else [value]
        there = (one for one in values if one is not None and not (isinstance(one, float) and math.isnan(one)))
        return tuple(text for one in there if (text := self.as_text(one, name)).strip())

    def images(self) -> tuple[str, ...]:
        """The names of the images in the record's own fields."""
        return tuple(self.image(value, name) for name, value in self._several(IMAGES))

    def image(self, value: Any, name: str) -> str:
        """The name of an image, as examples have it; of bytes and a path the path only where it is of this machine."""
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(content, bytes):
            return name_of(self._place(value, name), self.options.images or "")
        path = value.get("path") if isinstance(value, Mapping) else None
        return path if isinstance(path, str) and _is_file_here(path) else name_of_bytes(content)

    def other_media(self) -> tuple[str, ...]:
        """The names of videos and recordings in the record's own fields."""
        return tuple(self.medium(value, name) for name, value in self._several(OTHER_MEDIA))

    def medium(self, value: Any, name: str) -> str:
        """Path or address of a video or a recording; of one without, a digest of its bytes."""
        content = value.get("bytes") if isinstance(value, Mapping) else None
        if isinstance(content, bytes) and not any(isinstance(value.get(key), str) for key in ("path", "url", name)):
            return f"sha256:{hashlib.sha256(content).hexdigest()[:32]}"
        return self._place(value, name)

    def _several(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        for name in names:
            value = self.get(name)
            values = value if isinstance(value, list) else [value]
            yield from ((name, one) for one in values if one is not None and one != "")

    def _place(self, value: Any, name: str) -> str:
        if not isinstance(value, Mapping):
            return self.as_text(value, name)
        place = next((value[key] for key in ("path", "url", name) if isinstance(value.get(key), str)), None)
        if place is None:
            raise self.error(f"{name!r} must be a path, or an object with 'path' or 'bytes'")
        return str(place)

    def error(self, message: str) -> DataError:
        """An error that says where the record is."""
        return DataError(f"{self.source}: {message}")


def _is_file_here(path: str) -> bool:
    try:
        return Path(path).is_absolute() and Path(path).is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a null character
        return False


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
