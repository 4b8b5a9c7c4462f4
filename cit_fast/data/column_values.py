"""Values of typed columns of a ``datasets`` dataset as a record of a text file would have them, however deep they lie.

Class labels become their names, and -1, the usual mark of an example without a label, no value. Numbers of half and of
single precision become the shortest decimals that mean them: 0.1 in single precision is not 0.10000000149.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cit_fast.data.record_fields import ANSWER_OF, FIELDS, ReadOptions
from cit_fast.errors import DataError

_SHORT = ("float16", "float32")


def read_columns(features: Mapping[str, Any], options: ReadOptions) -> dict[str, Any]:
    """Column -> feature, of the columns that records are read from and whose values are not plain as they are stored.

    Another column may well be unlabelled. Of a structure that only a dotted name reaches, that part alone counts.
    """
    found: dict[str, Any] = {}
    for name in sorted(FIELDS):
        column = options.columns.get(name, name)
        parts = [column] if column in features else column.split(".")
        feature = _at(features, parts)
        if feature is None or not _to_change(feature):
            continue
        here = found
        for part in parts[:-1]:
            here = here.setdefault(part, {})
        here[parts[-1]] = feature
    return found


def answer_names(features: Mapping[str, Any], options: ReadOptions) -> dict[str, tuple[str, ...]]:
    """Field of the answer -> the names of its classes, of the formats whose answer is a column of class labels."""
    found: dict[str, tuple[str, ...]] = {}
    for name in ANSWER_OF.values():
        column = options.columns.get(name, name)
        feature = _at(features, [column] if column in features else column.split("."))
        while hasattr(feature, "feature"):  # a list of them
            feature = feature.feature
        if hasattr(feature, "int2str"):
            found[name] = tuple(feature.names)
    return found


def plain_value(value: Any, feature: Any, where: str) -> Any:
    """A value of a column as a text file would have it.

    Args:
        value: as it is stored.
        feature: what the column declares of it; ``None`` leaves it as it is.
        where: beginning of the message.

    Raises:
        DataError: a class label that is none of the classes.
    """
    if value is None or feature is None:
        return value
    if isinstance(value, list):
        return [plain_value(one, getattr(feature, "feature", feature), where) for one in value]
    if isinstance(value, dict):
        parts = feature if isinstance(feature, Mapping) else {}
        return {name: plain_value(one, parts.get(name), where) for name, one in value.items()}
    if hasattr(feature, "int2str"):
        return _class_name(value, feature.names, where)
    return _shortest(value, feature.dtype) if getattr(feature, "dtype", "") in _SHORT else value


def _at(features: Mapping[str, Any], parts: list[str]) -> Any:
    """The feature at a path of names; ``None`` where there is none."""
    feature: Any = features
    for part in parts:
        feature = feature.get(part) if isinstance(feature, Mapping) else None
    return feature


def _to_change(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_to_change, feature.values()))
    if hasattr(feature, "feature"):
        return _to_change(feature.feature)
    return hasattr(feature, "int2str") or getattr(feature, "dtype", "") in _SHORT


def _class_name(value: int, names: list[str], where: str) -> str | None:
    if value == -1:
        return None
    if not 0 <= value < len(names):
        raise DataError(f"{where} has no label ({value}); it has {len(names)} classes")
    return names[value]


def _shortest(value: float, dtype: str) -> float:
    import numpy as np

    return float(str(np.dtype(dtype).type(value)))
