"""One record read, or refused; and rows that everything accepts."""

from __future__ import annotations

import pytest

from cit_fast.data import ReadOptions, read_records
from cit_fast.errors import DataError

TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]

ROWS = [{"instruction": f"Say {n}. \u2028\u00e9", "output": str(n)} for n in range(3)]


def one(record, **options):
    (example,) = read_records([("here:1", record)], ReadOptions(**options))
    return example


def failing(record, **options):
    with pytest.raises(DataError) as caught:
        one(record, **options)
    message = str(caught.value)
    assert message.startswith("here:1: ")
    assert "\n" not in message
    return message
