from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.errors import RunError
from cit_fast.evaluation import continual
from cit_fast.evaluation.records import RunRecord, StageRecord

NAN = math.nan
# Three tasks, worked out by hand. Task 0 peaks at stage 1, after its own.
R = [[80.0, 10.0, 20.0], [90.0, 70.0, 30.0], [50.0, 60.0, 85.0]]
UNTRAINED = [5.0, 4.0, 10.0]


def run_record(tasks, **kwargs):
    metrics = dict.fromkeys(tasks, "exact_match")
    return RunRecord("run", {"name": "sequential"}, list(tasks), metrics, "model", 0, **kwargs)


def stages_of(tasks, rows, untrained=None, trained=None):
    stages = [] if untrained is None else [StageRecord(0, [], dict(zip(tasks, untrained, strict=True)))]
    for i, row in enumerate(rows):
        scores = {t: v for t, v in zip(tasks, row, strict=True) if not math.isnan(v)}
        stages.append(StageRecord(i + 1, trained[i] if trained else [tasks[i]], scores))
    return stages


def test_hand_computed():
    assert continual.average_performance(R) == pytest.approx((50 + 60 + 85) / 3)
    assert continual.new_accuracy(R) == pytest.approx((80 + 70 + 85) / 3)
    assert continual.forgetting(R) == pytest.approx(((90 - 50) + (70 - 60)) / 2)
    assert continual.backward_transfer(R) == pytest.approx(((50 - 80) + (60 - 70)) / 2)
    assert continual.forward_transfer(R, UNTRAINED) == pytest.approx(((10 - 4) + (30 - 10)) / 2)
    assert continual.mean_instantaneous(R) == pytest.approx([80, 80, 65])
    gains = continual.relative_gain(R, [100.0, 75.0, 90.0])
    assert gains[0] is None
    assert gains[1:] == pytest.approx([90.0, (50.0 + 80.0) / 2])


def test_all_at_once_from_records():
    run = run_record("abc", experts={"a": 100.0, "b": 75.0, "c": 90.0})
    result = continual.continual_metrics(run, stages_of("abc", R, UNTRAINED))
    assert result.average_performance == pytest.approx(65.0)
    assert result.forgetting == pytest.approx(25.0)
    assert result.new_accuracy == pytest.approx(235 / 3)
    assert (result.balance_weight, result.fallback_share) == (None, None)
    assert (result.relative_gain_mean, result.relative_gain_std) == pytest.approx((77.5, 12.5 * 2**0.5))
    assert result.backward_transfer == pytest.approx(-20.0)
    assert result.forward_transfer == pytest.approx(13.0)
    assert result.mean_instantaneous == pytest.approx((80, 80, 65))
    assert result.relative_gain == result.relative_gains[-1] == pytest.approx(65.0)


def test_score_matrix_keeps_missing_entries_as_nan():
    run = run_record("abc")
    untrained, matrix = continual.score_matrix(run, stages_of("abc", [[1.0, NAN, 3.0]]))
    assert np.isnan(untrained).all()
    np.testing.assert_array_equal(matrix, [[1.0, NAN, 3.0]])
    untrained, matrix = continual.score_matrix(run, [])
    assert untrained.shape == (3,)
    assert matrix.shape == (0, 3)


def test_joint_run_has_an_average_and_nothing_to_forget():
    stages = stages_of("abc", [[70.0, 80.0, 90.0]], UNTRAINED, trained=[["a", "b", "c"]])
    result = continual.continual_metrics(run_record("abc", experts={"a": 70.0, "b": 80.0, "c": 90.0}), stages)
    assert result.average_performance == pytest.approx(80.0)
    assert result.mean_instantaneous == pytest.approx((80.0,))
    assert result.forgetting is None
    assert result.backward_transfer is None
    assert result.forward_transfer is None
    assert result.relative_gain is None


def test_one_task_has_an_average_only():
    result = continual.continual_metrics(run_record("a"), stages_of("a", [[70.0]], [1.0]))
    assert result.average_performance == 70.0
    assert (result.forgetting, result.backward_transfer, result.forward_transfer) == (None, None, None)


def test_untrained_stage_only():
    result = continual.continual_metrics(run_record("ab"), stages_of("ab", [], [1.0, 2.0]))
    assert result == continual.ContinualMetrics(*[None] * 5, (), (), *[None] * 5)


def test_run_under_way_counts_the_tasks_trained_so_far():
    result = continual.continual_metrics(run_record("abc"), stages_of("abc", R[:2], UNTRAINED))
    assert result.average_performance == pytest.approx(80.0)
    assert result.forgetting == pytest.approx(-10.0)
    assert result.forward_transfer == pytest.approx(6.0)


def test_stage_that_trains_two_tasks():
    rows = [[60.0, 70.0, 5.0], [50.0, 75.0, 90.0]]
    stages = stages_of("abc", rows, UNTRAINED, trained=[["a", "b"], ["c"]])
    result = continual.continual_metrics(run_record("abc"), stages)
    assert result.forgetting == pytest.approx(((60 - 50) + (70 - 75)) / 2)
    assert result.backward_transfer == pytest.approx(((50 - 60) + (75 - 70)) / 2)
    assert result.forward_transfer == pytest.approx(5.0 - 10.0)
    assert result.mean_instantaneous == pytest.approx((65.0, 215 / 3))


def test_task_trained_twice_counts_from_the_first_time():
    run = run_record("ab")
    stages = stages_of("ab", [[60.0, 0.0], [50.0, 70.0], [80.0, 40.0]], trained=[["a"], ["b"], ["a"]])
    assert continual.first_trained(run, stages) == [0, 1]
    assert continual.continual_metrics(run, stages).backward_transfer == pytest.approx(((80 - 60) + (40 - 70)) / 2)


def test_what_a_task_scored_before_it_was_trained_is_not_forgotten():
    lucky = [[80.0, 90.0], [80.0, 60.0], [80.0, 70.0]]
    at = [0, 1]
    assert continual.forgetting(lucky, at) == pytest.approx((0 + (60 - 70)) / 2)


def test_balance_weights_of_the_averaged_stages():
    stages = stages_of("ab", [[60.0, 0.0], [50.0, 70.0]])
    stages[1].balance_weights = [(1, 0.01, 0.01, 0.01, 1.0), (2, 0.03, 0.01, 0.2, 0.5)]
    result = continual.continual_metrics(run_record("ab"), stages)
    assert (result.balance_weight, result.fallback_share) == pytest.approx((0.02, 75.0))


def test_missing_terms_leave_a_metric_undefined():
    only_seen = [[80.0, NAN, NAN], [90.0, 70.0, NAN], [50.0, 60.0, 85.0]]
    assert continual.average_performance(only_seen) == pytest.approx(65.0)
    assert continual.forgetting(only_seen) == pytest.approx(25.0)  # a maximum over what was evaluated
    assert continual.backward_transfer(only_seen) == pytest.approx(-20.0)
    assert continual.forward_transfer(only_seen, UNTRAINED) is None
    assert continual.forward_transfer(R, [NAN] * 3) is None
    assert continual.average_performance([[80.0, 1.0], [NAN, 70.0]]) is None
    assert continual.forgetting([[NAN, 1.0], [80.0, 70.0]]) is None
    assert continual.relative_gain(R, [100.0, NAN, NAN]) == [None, pytest.approx(90.0), None]
    assert continual.relative_gain(R, [0.0, 75.0, 90.0]) == [None, None, None]


scores = st.floats(0, 100) | st.just(NAN)


@st.composite
def matrices(draw):
    tasks = draw(st.integers(1, 5))
    rows = draw(st.integers(0, tasks))
    row = st.lists(scores, min_size=tasks, max_size=tasks)
    return draw(st.lists(row, min_size=rows, max_size=rows)), draw(row), draw(row)


def naive_mean(terms):
    return None if not terms or any(math.isnan(t) for t in terms) else sum(terms) / len(terms)


def same(value, expected):
    return expected is None if value is None else value == pytest.approx(expected, abs=1e-9)


@given(matrices())
def test_against_a_naive_computation(given_matrix):
    """The sums of the definitions, written out for "stage i trains task i"."""
    rows, untrained, experts = given_matrix
    S, last = len(rows), len(rows) - 1
    R = np.array(rows).reshape(S, len(untrained))
    rows_since = [[R[i][j] for i in range(j, last) if not math.isnan(R[i][j])] for j in range(max(last, 0))]
    best = [max(since, default=NAN) for since in rows_since]
    ap = naive_mean([R[last][j] for j in range(S)])
    assert same(continual.average_performance(R), ap)
    assert same(continual.new_accuracy(R), naive_mean([R[j][j] for j in range(S)]))
    assert same(continual.forgetting(R), naive_mean([best[j] - R[last][j] for j in range(last)]))
    assert same(continual.backward_transfer(R), naive_mean([R[last][j] - R[j][j] for j in range(last)]))
    fwt = naive_mean([R[j - 1][j] - untrained[j] for j in range(1, S)])
    assert same(continual.forward_transfer(R, untrained), fwt)
    for i, value in enumerate(continual.mean_instantaneous(R)):
        assert same(value, naive_mean([R[i][j] for j in range(i + 1)]))
    for i, value in enumerate(continual.relative_gain(R, experts)):
        terms = [100 * R[i][j] / experts[j] if experts[j] > 1e-9 else NAN for j in range(i)]
        assert same(value, naive_mean(terms))
    if last > 0 and None not in (ap, continual.mean_instantaneous(R)[-1]):
        assert continual.mean_instantaneous(R)[-1] == ap


@given(matrices())
def test_forgetting_is_at_least_the_negative_of_backward_transfer(given_matrix):
    rows, untrained, _ = given_matrix
    R = np.nan_to_num(np.array(rows).reshape(len(rows), len(untrained)))
    forgot, backward = continual.forgetting(R), continual.backward_transfer(R)
    assert (forgot is None) == (backward is None)
    assert forgot is None or forgot >= -backward - 1e-9


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([StageRecord(0, [], {}), StageRecord(2, ["a"], {})], r"without gaps, but are \[0, 2\]"),
        ([StageRecord(1, ["a"], {}), StageRecord(1, ["b"], {})], "without gaps"),
        ([StageRecord(1, ["a"], {"z": 1.0})], "stage 1: scores a task 'z' the run does not have"),
        ([StageRecord(1, ["z"], {"a": 1.0})], "stage 1: trained a task 'z' the run does not have"),
        ([StageRecord(1, ["a"], {"a": 100.5})], r"score of a is 100.5; scores lie in \[0, 100\]"),
        ([StageRecord(1, ["a"], {"a": NAN})], "score of a is nan"),
        ([StageRecord(1, ["a"], {"a": "12"})], "score of a is '12'"),
    ],
)
def test_damaged_records(stages, message):
    with pytest.raises(RunError, match=message):
        continual.continual_metrics(run_record("ab"), stages)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="two dimensions"):
        continual.forgetting([1.0, 2.0])
    with pytest.raises(ValueError, match="2 tasks"):
        continual.forgetting([[1.0, 2.0]], [0])
    with pytest.raises(ValueError, match="does not fit a matrix with 2 tasks"):
        continual.relative_gain([[1.0, 2.0]], [1.0])
