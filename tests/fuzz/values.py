"""Values that nobody expects, and those that somebody may."""

from __future__ import annotations

import datetime
import random
import typing
from typing import Any

SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**32, 2**63, -(2**63), 10**12, 10**30, 0.0, 0.5, 1.0, -0.5, 1.5,
    1e-300, 1e300, float("inf"), float("-inf"), float("nan"), "", " ", "x", "0", "1e-4", "-1", "true", "null", "auto",
    "none", "all", "default", "é", "日本", "a b", "a/b", "a.b.C", "os.path", "sys.maxsize", "builtins.int", "os.getcwd",
    ".rel", "..", "../x", "~", "/", "/dev/null/x", "/proc/self/mem", "x" * 300, "nul\0l", "\ud83d", "[/red]", "[bold]",
    "(", "*", "(a+)+$", "{", "}", "%s", "{{ x }}", "http://localhost:1", "\n", "a\nb", "<script>", b"bytes",
    datetime.date(2026, 11, 28), datetime.datetime(2026, 11, 28, 1, 2),
)  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    """A scalar most of the time; else a list or a mapping of such, maybe one that contains itself."""
    kind = rng.random()
    if kind < 0.75 or depth > 2:
        return rng.choice(SCALARS)
    if kind < 0.85:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.95:
        keys = ("a", "name", "path", "1", "preset", "base_url")
        return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(3))}
    if kind < 0.97:
        deep: Any = "bottom"
        for _ in range(rng.choice([5, 40, 400])):
            deep = [deep]
        return deep
    own: list[Any] = []
    own.append(own)
    return own


def plausible(hint: Any, rng: random.Random) -> Any:
    """A value that a field with this annotation may well take."""
    if typing.get_origin(hint) is typing.Literal:
        return rng.choice(typing.get_args(hint))
    if inner := [each for each in typing.get_args(hint) if each is not Ellipsis]:
        return plausible(rng.choice(inner), rng)
    small = {bool: (True, False), int: (1, 2, 3, 5), float: (0.1, 0.5, 1.0, 2.0), str: ("auto", "none", "x", "linear")}
    if isinstance(hint, type):
        for kind, choices in small.items():
            if issubclass(hint, kind):
                return rng.choice(choices)
    return None
