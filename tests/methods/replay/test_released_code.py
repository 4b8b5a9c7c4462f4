"""Allocation, InsInfo and draws against the arithmetic of the authors' released code, on its own terms.

What is below was written after reading that code (MIT, Wang et al.), without its files and
models. Where it and the method part ways, the test says so: units left over by rounding down go to the largest shares
there and to the largest remainders here, a tie gives them all to one task there, and an instruction may lose its last
instance there.
"""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cit_fast.methods.replay.allocation import allocate
from cit_fast.methods.replay.insinfo import draw_by_insinfo, insinfo

distances_of_tasks = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=15, unique=True)


def released_shares(distances: list[float], total: int) -> list[int]:
    share = [distance / sum(distances) for distance in distances]
    count = [int(each * total) for each in share]
    missing = total - sum(count)
    for each in sorted(share)[len(share) - missing :]:
        count[share.index(each)] += 1
    return count


def released_scores(tags_of_tasks: list[list[list[str]]]) -> list[list[float]]:
    """Of all tasks but the last, which is the new one."""
    number = sum(len(task) for task in tags_of_tasks)
    counts = Counter(tag for task in tags_of_tasks for tags in task for tag in tags)
    return [[sum(math.log(number / counts[tag]) for tag in tags) for tags in task] for task in tags_of_tasks[:-1]]


def released_first_draws(scores: list[float], budget: int) -> list[int]:
    """Instances of each instruction before the total is put right."""
    if budget < len(scores):
        top = sorted(range(len(scores)), key=lambda k: -scores[k])[:budget]
        return [int(k in top) for k in range(len(scores))]
    return [max(1, int(score / sum(scores) * budget)) for score in scores]


@given(distances_of_tasks, st.integers(1, 400))
def test_shares_are_those_of_the_released_code_up_to_the_units_left_by_rounding(
    distances: list[float], per_task: int
) -> None:
    total = per_task * len(distances)
    assume(len({distance / sum(distances) for distance in distances}) == len(distances))  # a tie is their defect
    ours = allocate(distances, total, [10**6] * len(distances)).shares
    theirs = released_shares(distances, total)
    assert sum(ours) == sum(theirs) == total
    assert all(abs(a - b) <= 1 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("distances", "total"), [([0.10, 0.25, 0.65], 400), ([0.2, 0.35, 0.45], 200)])
def test_shares_are_equal_where_the_largest_tasks_have_the_largest_remainders(
    distances: list[float], total: int
) -> None:
    exact = [distance / sum(distances) * total for distance in distances]
    missing = total - sum(map(int, exact))
    largest = set(sorted(range(len(exact)), key=lambda k: -exact[k])[:missing])
    assert largest == set(sorted(range(len(exact)), key=lambda k: int(exact[k]) - exact[k])[:missing])
    assert list(allocate(distances, total, [10**6] * len(distances)).shares) == released_shares(distances, total)


def test_three_equal_tasks_are_the_defect() -> None:
    assert released_shares([0.3, 0.3, 0.3], 200) == [68, 66, 66]
    assert allocate([0.3, 0.3, 0.3], 200, [500] * 3).shares == (67, 67, 66)


TAGS = [
    [["summarize", "news"], ["summarize", "dialogue", "short"], ["headline"]],
    [["classify", "sentiment"], ["classify", "emotion", "label"]],
    [["extract", "relation"], ["news", "extract"]],
]


def test_insinfo_is_that_of_the_released_code() -> None:
    ours = insinfo([tags for task in TAGS for tags in task])
    theirs = [score for task in released_scores(TAGS) for score in task]
    assert ours[: len(theirs)] == pytest.approx(theirs, rel=1e-14)


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=8, unique=True), st.integers(1, 60), st.integers(0, 9))
def test_draws_are_those_of_the_released_code_before_the_total_is_put_right(
    scores: list[float], budget: int, seed: int
) -> None:
    instances = [list(range(100 * k, 100 * k + 100)) for k in range(len(scores))]
    drawn = draw_by_insinfo(instances, scores, budget, random.Random(seed))
    ours = Counter(instance // 100 for instance in drawn)
    theirs = released_first_draws(scores, budget)
    assert len(set(drawn)) == len(drawn) == budget
    if sum(theirs) <= budget:  # the rest is drawn from all instances
        assert all(ours[k] >= theirs[k] for k in range(len(scores)))
    else:  # taken away at random, but never an instruction's last
        assert all(1 <= ours[k] <= theirs[k] for k in range(len(scores)))
    if sum(theirs) == budget:
        assert [ours[k] for k in range(len(scores))] == theirs
