from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.methods.routing.rejection import rejection_threshold

SCORES = st.lists(st.floats(-1, 1, width=32), max_size=60)


@given(SCORES, SCORES, st.floats(0, 0.99))
def test_never_rejects_more_of_the_known_than_allowed(known, unknown, share):
    below = rejection_threshold(known, unknown, share)
    if below is None:
        assert not known or share == 0
    else:
        assert sum(score < below for score in known) <= share * len(known)


@given(SCORES, SCORES, st.floats(0.01, 0.99))
def test_rejects_as_many_of_the_unknown_as_any_threshold_may(known, unknown, share):
    below = rejection_threshold(known, unknown, share)
    if below is not None and unknown:
        highest = rejection_threshold(known, [], share)
        assert sum(score < below for score in unknown) == sum(score < highest for score in unknown)


def test_between_the_known_and_the_unknown():
    known, unknown = [0.5, 0.6, 0.7, 0.8, 0.9], [0.1, 0.2, 0.3]
    assert rejection_threshold(known, [], 0.2) == 0.6
    assert rejection_threshold(known, [], 0.19) == 0.5
    assert rejection_threshold(known, unknown, 0.2) == pytest.approx(0.4)  # all of the unknown, none of the known
    assert rejection_threshold(known, [0.55, 0.95], 0.2) == pytest.approx((0.55 + 0.6) / 2)
    assert rejection_threshold(known, [0.95], 0.2) == 0.5  # nothing to gain
    assert rejection_threshold(known, unknown, 0) is None
    assert rejection_threshold([], unknown, 0.2) is None
