"""What has changed between two JSON values, and the second one made of the first and that."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cit_fast.methods.routing.changes import changed, changes

_leaf = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text("ab", max_size=2)
values = st.recursive(
    _leaf,
    lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text("abc", max_size=1), own, max_size=3),
    max_leaves=8,
)


@given(values, values)
@example([1, 0.0], [True, -0.0, 2])
def test_the_changes_make_the_second_of_the_first(before, after):
    """With the order of keys, and without a change to the second."""
    found = json.loads(json.dumps(list(changes(before, after))))
    assert json.dumps(changed(copy.deepcopy(before), found)) == json.dumps(after)


@given(values)
def test_nothing_has_changed_in_what_is_the_same(value):
    assert list(changes(value, copy.deepcopy(value))) == []


def test_what_is_added_is_all_that_is_told():
    before = {"set_of": {"a": "set-a"}, "known": [0.5, 0.25], "below": 1.0}
    after = {"set_of": {"a": "set-a", "b": "set-b"}, "known": [0.5, 0.25, 0.125], "below": 1.0}
    assert list(changes(before, after)) == [
        {"at": ["set_of", "b"], "is": "set-b"},
        {"at": ["known"], "more": [0.125]},
    ]


@pytest.mark.parametrize("change", [{"at": ["gone", "b"], "is": 1}, {"at": ["a"], "more": [1]}, {"is": 1}])
def test_those_of_another_value_are_an_error(change):
    with pytest.raises((KeyError, TypeError, AttributeError)):
        changed({"a": 1}, [change])
