"""What has changed between two JSON values that mostly grow, so that a stage writes what it has added and no more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any


def changes(before: Any, after: Any, at: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """What makes ``after`` of ``before``: new values (``is``) and items at a list's end (``more``), each with its place
    (``at``, the keys that lead to it).
    """
    if isinstance(before, dict) and isinstance(after, dict) and list(islice(after, len(before))) == list(before):
        for key, value in after.items():
            if key in before:
                yield from changes(before[key], value, (*at, key))
            else:
                yield {"at": [*at, key], "is": value}
    elif isinstance(before, list) and isinstance(after, list) and _same(after[: len(before)], before):
        if len(after) > len(before):
            yield {"at": [*at], "more": after[len(before) :]}
    elif not _same(before, after):
        yield {"at": [*at], "is": after}


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one) == json.dumps(other)  # unlike ==, it tells 1 from true, and heeds the order of keys


def changed(value: Any, found: Iterable[dict[str, Any]]) -> Any:
    """``value``, which is changed in place, after these :func:`changes`.

    Raises:
        KeyError, TypeError, AttributeError: they are those of another value.
    """
    for change in found:
        root = {"": value}
        holder, last = root, ""
        for key in change["at"]:
            holder, last = holder[last], key
        if "more" in change:
            holder[last].extend(change["more"])
        else:
            holder[last] = change["is"]
        value = root[""]
    return value
