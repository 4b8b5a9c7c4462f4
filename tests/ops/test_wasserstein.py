"""wasserstein_matrix on cases with a known answer, as a metric, and against POT."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from point_clouds import random_clouds, random_weights
from torch import Tensor

from cit_fast import backend
from cit_fast.errors import CitFastError, ConfigError, DataError
from cit_fast.ops.wasserstein import METHODS, METRICS, Wasserstein, reference, wasserstein_matrix
from cit_fast.ops.wasserstein import native as _wasserstein_native

ROUNDING = 1e-12


def pot_distance(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, metric: str, p: float) -> float:
    """The same distance with every step by POT and SciPy."""
    x, y = x.double().numpy(), y.double().numpy()
    cost = ot.dist(x, y, metric=metric) ** p
    a = np.full(len(x), 1 / len(x)) if a is None else a.double().numpy() / a.double().sum().item()
    b = np.full(len(y), 1 / len(y)) if b is None else b.double().numpy() / b.double().sum().item()
    return ot.emd2(a, b, cost) ** (1 / p)


# --- known answers ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("metric", "expected"), [("cosine", 1.0), ("euclidean", 5.0), ("sqeuclidean", 25.0)])
def test_single_points(method: str, metric: str, expected: float) -> None:
    clouds = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    out = wasserstein_matrix(clouds, metric=metric, method=method)
    for values in (out.distances, out.lower, out.upper):
        torch.testing.assert_close(values, torch.tensor([[0, expected], [expected, 0]], dtype=torch.float64))
    assert out.marginal_error.max() <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_point_against_a_cloud_is_the_mean_cost(method: str) -> None:
    cloud, point = torch.tensor([[1.0], [2.0], [6.0]]), torch.zeros(1, 1)
    weights = [torch.tensor([0.5, 0.25, 0.25]), torch.ones(1)]
    out = wasserstein_matrix([cloud, point], weights, metric="euclidean", method=method, epsilon=1e-4)
    assert out.lower[0, 1].item() == pytest.approx(2.5)
    assert out.upper[0, 1].item() == pytest.approx(2.5)
    assert out.distances[0, 1].item() == pytest.approx(2.5, abs=1e-3)


@pytest.mark.parametrize(("p", "metric"), [(1, "euclidean"), (2, "euclidean"), (3.5, "euclidean"), (1, "sqeuclidean")])
def test_a_shifted_cloud_is_as_far_as_the_shift(p: float, metric: str) -> None:
    cloud = random_clouds((12,), d=3, dtype=torch.float64)[0]
    shift = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    out = wasserstein_matrix([cloud, cloud + shift], metric=metric, p=p)
    assert out.distances[0, 1].item() == pytest.approx(3.0 if metric == "euclidean" else 9.0, rel=1e-12)


def test_on_a_line_sorting_is_optimal() -> None:
    x, y = (cloud.sort(dim=0).values for cloud in random_clouds((30, 30), d=1, dtype=torch.float64))
    expected = ((x - y).abs() ** 2).mean().sqrt()
    out = wasserstein_matrix([x[torch.randperm(30)], y[torch.randperm(30)]], metric="euclidean", p=2)
    assert out.distances[0, 1].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", METHODS)
def test_identical_clouds_are_exactly_0_apart(method: str, metric: str) -> None:
    cloud = random_clouds((9,), d=6, dtype=torch.float32)[0]
    out = wasserstein_matrix([cloud, cloud.clone()], metric=metric, method=method)
    for values in out:
        assert (values == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_order_of_points_and_copies_do_not_matter(metric: str) -> None:
    cloud = random_clouds((9,), d=6, dtype=torch.float64)[0]
    copies = torch.cat([cloud, cloud])
    out = wasserstein_matrix([cloud, cloud[torch.randperm(9)], copies], metric=metric)
    assert out.distances.max() <= 1e-14


def test_all_points_equal() -> None:
    clouds = [torch.ones(3, 2), torch.ones(5, 2)]
    for method in METHODS:
        assert (wasserstein_matrix(clouds, method=method).distances == 0).all()


def test_cosine_does_not_see_the_length_of_a_vector() -> None:
    clouds = random_clouds((4, 5), dtype=torch.float64)
    scaled = [clouds[0] * 1e200, clouds[1] * 1e-200]
    torch.testing.assert_close(wasserstein_matrix(scaled).distances, wasserstein_matrix(clouds).distances)


# --- against POT ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_exact_equals_pot(metric: str, p: float, weighted: bool, dtype: torch.dtype) -> None:
    clouds = random_clouds((1, 7, 30, 12), d=9, dtype=dtype)
    weights = random_weights(clouds) if weighted else None
    out = wasserstein_matrix(clouds, weights, metric=metric, p=p)
    for i in range(4):
        for j in range(i):
            a, b = (weights[i], weights[j]) if weights else (None, None)
            expected = pot_distance(clouds[i], clouds[j], a, b, metric, p)
            assert out.distances[i, j].item() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(out.lower, out.distances)
    assert torch.equal(out.upper, out.distances)
    assert (out.iterations == 0).all()
    assert out.distances.dtype == torch.float64
    assert out.iterations.dtype == torch.int64


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("epsilon", [None, 1e-3, 0.5])
def test_bounds_hold_the_exact_distance(metric: str, p: float, epsilon: float | None) -> None:
    clouds = random_clouds((1, 7, 15, 11), d=3, seed=2, dtype=torch.float64)
    weights = random_weights(clouds)
    exact = wasserstein_matrix(clouds, weights, metric=metric, p=p).distances
    out = wasserstein_matrix(
        clouds, weights, metric=metric, p=p, method="sinkhorn", epsilon=epsilon, max_iterations=200
    )
    assert (out.lower <= exact * (1 + ROUNDING)).all()
    assert (out.upper >= exact * (1 - ROUNDING)).all()
    assert torch.equal(out.distances, out.upper)
    if epsilon is None:
        assert ((out.upper - out.lower) <= 0.15 * exact).all(), "automatic epsilon is too coarse"


def test_bounds_hold_however_early_it_stops() -> None:
    clouds = random_clouds((9, 13), seed=4, dtype=torch.float64)
    exact = wasserstein_matrix(clouds, metric="euclidean").distances[0, 1]
    for iterations in (1, 2, 5):
        out = wasserstein_matrix(
            clouds, metric="euclidean", method="sinkhorn", epsilon=1e-5, max_iterations=iterations, tolerance=1e-12
        )
        assert out.lower[0, 1] <= exact * (1 + ROUNDING)
        assert out.upper[0, 1] >= exact * (1 - ROUNDING)
        assert out.marginal_error[0, 1] > 1e-12


def test_small_epsilon_and_many_iterations_reach_the_exact_distance() -> None:
    clouds = random_clouds((6, 8), seed=5, dtype=torch.float64)
    exact = wasserstein_matrix(clouds, metric="euclidean").distances[0, 1].item()
    out = wasserstein_matrix(clouds, metric="euclidean", method="sinkhorn", epsilon=2e-3, max_iterations=5000)
    assert out.distances[0, 1].item() == pytest.approx(exact, rel=1e-3)
    assert (out.upper - out.lower)[0, 1] <= 1e-3 * exact
    assert out.marginal_error[0, 1] <= 1.1e-6


def test_sinkhorn_plan_equals_pot() -> None:
    x, y = random_clouds((7, 9), seed=6, dtype=torch.float64)
    epsilon = 0.3
    cost = ot.dist(x.numpy(), y.numpy(), metric="euclidean")
    expected = ot.sinkhorn2(np.full(7, 1 / 7), np.full(9, 1 / 9), cost, epsilon, stopThr=1e-13, numItermax=10_000)
    out = wasserstein_matrix([x, y], metric="euclidean", method="sinkhorn", epsilon=epsilon, tolerance=1e-12)
    assert out.distances[0, 1].item() == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("epsilon", [1e-300, 1e-12, 1e-4, 1.0, 1e4, 1e300])
def test_no_nan_at_any_epsilon(epsilon: float) -> None:
    clouds = [*random_clouds((1, 6, 9), seed=8, dtype=torch.float64), torch.full((4, 4), 1e-3, dtype=torch.float64)]
    weights = random_weights(clouds)
    weights[1][0], weights[2][3] = 1e-300, 0.0
    for metric in METRICS:
        exact = wasserstein_matrix(clouds, weights, metric=metric).distances
        out = wasserstein_matrix(clouds, weights, metric=metric, method="sinkhorn", epsilon=epsilon, max_iterations=20)
        for values in out:
            assert values.isfinite().all()
        assert (out.lower <= exact * (1 + ROUNDING)).all()
        assert (out.upper >= exact * (1 - ROUNDING)).all()


def test_each_pair_stops_by_itself() -> None:
    near, far = random_clouds((2, 20), seed=9, dtype=torch.float64)
    alone = wasserstein_matrix([near, far], method="sinkhorn").iterations[0, 1]
    out = wasserstein_matrix([near, far, near[:1]], method="sinkhorn")
    assert out.iterations[0, 1] == alone
    assert out.iterations[0, 2] < alone
    assert out.marginal_error.max() <= 1e-6 + ROUNDING


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("metric", METRICS)
def test_bounds_as_near_as_asked_for(metric: str, name: str) -> None:
    clouds = random_clouds((12, 17, 9), seed=10, dtype=torch.float64)
    exact = wasserstein_matrix(clouds, metric=metric).distances
    options = {"metric": metric, "method": "sinkhorn", "tolerance": 1e-4, "max_iterations": 20_000}
    with backend(name):
        loose = wasserstein_matrix(clouds, **options)
        near = wasserstein_matrix(clouds, gap=1e-3, **options)
        cut = wasserstein_matrix(clouds, gap=1e-9, **{**options, "max_iterations": 30})
    pairs = ~torch.eye(3, dtype=torch.bool)
    assert ((near.upper - near.lower) <= 1e-3 * near.upper).all()
    assert ((loose.upper - loose.lower) > 1e-3 * loose.upper)[pairs].any()
    for out in (near, cut):
        assert (out.lower <= exact * (1 + ROUNDING)).all()
        assert (out.upper >= exact * (1 - ROUNDING)).all()
    if name == "reference":  # the native one certifies small clouds without Sinkhorn
        assert (near.iterations >= loose.iterations).all()


# --- a metric (Hypothesis) ---

clouds_strategy = st.lists(
    st.lists(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=2), min_size=1, max_size=5),
    min_size=3,
    max_size=3,
)


@settings(max_examples=50)
@given(clouds=clouds_strategy, p=st.sampled_from([1.0, 2.0]))
def test_euclidean_is_a_metric(clouds: list[list[list[float]]], p: float) -> None:
    tensors = [torch.tensor(cloud) for cloud in clouds]
    d = wasserstein_matrix([*tensors, tensors[0]], metric="euclidean", p=p).distances
    assert torch.equal(d, d.T)
    assert d[0, 3] == 0
    assert (d.diagonal() == 0).all()
    assert (d >= 0).all()
    assert d[0, 2] <= d[0, 1] + d[1, 2] + 1e-6


@settings(max_examples=30)
@given(clouds=clouds_strategy, factor=st.floats(0.01, 100), method=st.sampled_from(METHODS))
def test_scaling_the_points_scales_the_distance_and_scaling_the_weights_does_nothing(
    clouds: list[list[list[float]]], factor: float, method: str
) -> None:
    tensors = [torch.tensor(cloud, dtype=torch.float64) for cloud in clouds]
    weights = random_weights(tensors)
    options = {"metric": "euclidean", "method": method, "max_iterations": 50}
    plain = wasserstein_matrix(tensors, weights, **options)
    heavier = wasserstein_matrix(tensors, [each * factor for each in weights], **options)
    torch.testing.assert_close(heavier.upper, plain.upper, rtol=1e-6, atol=1e-6)
    if method == "exact":
        larger = wasserstein_matrix([each * factor for each in tensors], weights, **options)
        torch.testing.assert_close(larger.distances, plain.distances * factor, rtol=1e-9, atol=1e-12)
    assert (plain.lower <= plain.upper).all()


# --- forms of the input and output ---


def test_points_without_weight_are_as_if_absent() -> None:
    x, y = random_clouds((5, 6), dtype=torch.float64)
    weights = [torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0]), torch.ones(6)]
    with_zero = wasserstein_matrix([x, y], weights)
    without = wasserstein_matrix([x[[0, 2, 4]], y], [torch.tensor([1.0, 2.0, 1.0]), torch.ones(6)])
    assert torch.equal(with_zero.distances, without.distances)


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_pairs_equal_the_matrix(method: str) -> None:
    clouds = random_clouds((3, 6, 1, 4), dtype=torch.float64)
    options = {"method": method, "max_iterations": 50}
    matrix = wasserstein_matrix(clouds, **options)
    row = wasserstein_matrix(clouds, pairs=2, **options)
    some = wasserstein_matrix(clouds, pairs=[(3, 0), (0, 3), (1, 1), (1, 2)], **options)
    for whole, one, few in zip(matrix, row, some, strict=True):
        assert torch.equal(whole, whole.T)
        assert torch.equal(one, whole[2])
        assert torch.equal(few, whole[[3, 0, 1, 1], [0, 3, 1, 2]])
    tensor = wasserstein_matrix(clouds, pairs=torch.tensor([[3, 0]], dtype=torch.int32), **options)
    assert torch.equal(tensor.distances, some.distances[:1])
    assert wasserstein_matrix(clouds, pairs=[], **options).distances.shape == (0,)


def test_packed_points_equal_a_list() -> None:
    clouds = random_clouds((3, 6, 1), dtype=torch.float64)
    weights = random_weights(clouds)
    listed = wasserstein_matrix(clouds, weights)
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor([0, 3, 9, 10], dtype=dtype)
        packed = wasserstein_matrix(torch.cat(clouds), torch.cat(weights), offsets=offsets)
        assert torch.equal(packed.distances, listed.distances)


def test_one_cloud_alone() -> None:
    out = wasserstein_matrix(random_clouds((3,), dtype=torch.float64))
    assert [values.tolist() for values in out] == [[[0]]] * 5


def test_repeats_bit_for_bit() -> None:
    clouds = random_clouds((9, 6, 12), dtype=torch.float32)
    for method in METHODS:
        first, second = (wasserstein_matrix(clouds, method=method) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_does_not_lower_the_precision() -> None:
    clouds = random_clouds((9, 6), d=32, dtype=torch.float32)
    plain = wasserstein_matrix(clouds, method="sinkhorn")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wasserstein_matrix(clouds, method="sinkhorn").distances, plain.distances)


# --- registration ---


@pytest.mark.parametrize("method", METHODS)
def test_opcheck(method: str) -> None:
    points = torch.cat(random_clouds((3, 4), dtype=torch.float64))
    arguments = (points, torch.tensor([0, 3, 7]), torch.ones(7), torch.tensor([[0, 1]]))
    torch.library.opcheck(
        torch.ops.cit_fast.wasserstein_matrix.default, (*arguments, "cosine", 1.0, method, None, 1e-6, 10, 0.0)
    )


@pytest.mark.parametrize("pairs", [None, 1, [(0, 1)]], ids=str)
def test_compile_without_a_graph_break(pairs: int | list[tuple[int, int]] | None) -> None:
    clouds = random_clouds((3, 4, 2), dtype=torch.float64)

    def distances(*clouds: Tensor) -> Wasserstein:
        return wasserstein_matrix([cloud * 2 for cloud in clouds], pairs=pairs, metric="euclidean")

    compiled = torch.compile(distances, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*clouds), distances(*clouds))


# --- bad input ---

X, Y = torch.ones(3, 2), torch.ones(4, 2)
NAN, ZERO, HUGE = (
    torch.tensor([[1.0, 1.0], [1.0, math.nan]]),
    torch.tensor([[1.0, 1.0], [0.0, 0.0]]),
    X.double() * 1e200,
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: wasserstein_matrix([]), DataError, "no clouds"),
        (lambda: wasserstein_matrix([X, X[:0]]), DataError, "cloud 1 is empty"),
        (lambda: wasserstein_matrix([X, NAN]), DataError, "cloud 1, point 1 is not finite"),
        (lambda: wasserstein_matrix([X, NAN * math.inf]), DataError, "cloud 1, point 0 is not finite"),
        (lambda: wasserstein_matrix([X, ZERO]), DataError, "cloud 1, point 1 is all zero, which has no cosine"),
        (lambda: wasserstein_matrix([X, Y[:, :1]]), DataError, "cloud 1 has d = 1 and cloud 0 has d = 2"),
        (lambda: wasserstein_matrix([X, Y[0]]), DataError, r"cloud 1 is \[2\]; expected \[n, d\]"),
        (lambda: wasserstein_matrix([X, Y.int()]), DataError, "cloud 1 is torch.int32; expected float16"),
        (lambda: wasserstein_matrix([X, Y.to("meta")]), DataError, "cloud 1 is on meta and cloud 0 on cpu"),
        (lambda: wasserstein_matrix([HUGE, -HUGE], metric="sqeuclidean"), DataError, "clouds 0 and 1: .* overflows"),
        (lambda: wasserstein_matrix([X, Y], [torch.ones(3), torch.zeros(4)]), DataError, "cloud 1 has no mass"),
        (lambda: wasserstein_matrix([X, Y], [torch.ones(3), torch.tensor([1, 1, -1, 1.0])]), DataError,
         "cloud 1 has weights from -1.0"),
        (lambda: wasserstein_matrix([X, Y], [torch.full((3,), math.nan), torch.ones(4)]), DataError,
         "cloud 0 has weights from nan"),
        (lambda: wasserstein_matrix([X, Y], [torch.ones(3), torch.ones(3)]), DataError,
         r"weights of cloud 1 are \[3\]; expected \[4\]"),
        (lambda: wasserstein_matrix([X, Y], [torch.ones(3)]), DataError, "1 weight tensors for 2 clouds"),
        (lambda: wasserstein_matrix([X, Y], torch.ones(6)), DataError, r"packed weights are \[6\] .* expected \[7\]"),
        (lambda: wasserstein_matrix([X, Y], torch.ones(7).int()), DataError, "packed weights are .*int32"),
        (lambda: wasserstein_matrix(X), DataError, "packed points need offsets"),
        (lambda: wasserstein_matrix([X], offsets=torch.tensor([0, 3])), DataError, "a list of clouds needs none"),
        (lambda: wasserstein_matrix(X, offsets=torch.tensor([0.0, 3.0])), DataError, r"offsets is \[2\] torch.float32"),
        (lambda: wasserstein_matrix(X, offsets=torch.tensor([0, 2])), DataError, "from 0 to 2; .* from 0 to 3"),
        (lambda: wasserstein_matrix(X, offsets=torch.tensor([0, 2, 1, 3])), DataError, "ascending"),
        (lambda: wasserstein_matrix(X[0], offsets=torch.tensor([0, 2])), DataError, r"packed points is \[2\]"),
        (lambda: wasserstein_matrix(X, [torch.ones(3)], offsets=torch.tensor([0, 3])), DataError, "1 weight tensors"),
        (lambda: wasserstein_matrix([X, Y], pairs=[(0, 1), (0, 2)]), DataError,
         r"pair \(0, 2\) is outside the 2 clouds"),
        (lambda: wasserstein_matrix([X, Y], pairs=-1), DataError, r"pair \(-1, 0\) is outside"),
        (lambda: wasserstein_matrix([X, Y], pairs=torch.ones(3, 2)), DataError, r"pairs is \[3, 2\] torch.float32"),
        (lambda: wasserstein_matrix([X, Y], metric="manhattan"), ConfigError, "unknown metric 'manhattan'; .*cosine"),
        (lambda: wasserstein_matrix([X, Y], method="fast"), ConfigError,
         "unknown method 'fast'; expected one of exact"),
        (lambda: wasserstein_matrix([X, Y], p=0.5), ConfigError, "p is 0.5"),
        (lambda: wasserstein_matrix([X, Y], epsilon=0.0), ConfigError, "epsilon is 0.0; expected a positive number"),
        (lambda: wasserstein_matrix([X, Y], tolerance=-1.0), ConfigError, "tolerance is -1.0"),
        (lambda: wasserstein_matrix([X, Y], gap=0.0), ConfigError, "gap is 0.0; expected a number between 0 and 1"),
        (lambda: wasserstein_matrix([X, Y], max_iterations=0), ConfigError, "max_iterations is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_failed_simplex_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SIMPLEX_ITERATIONS", 1)
    monkeypatch.setattr(_wasserstein_native, "PATHS_ENTRIES", 0)
    with pytest.raises(CitFastError, match=r"exact transport between clouds 0 and 1 failed: .*use method='sinkhorn'"):
        wasserstein_matrix(random_clouds((20, 30), dtype=torch.float64))


@pytest.mark.parametrize("turned", [False, True])
def test_masses_below_the_simplexs_epsilon_are_carried(turned: bool) -> None:
    """Where all else is free, a mass of 1e-30 is the distance."""
    clouds = [torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
    weights = [torch.tensor([1e-30, 1.0]), torch.tensor([1.0])]
    order = (1, 0) if turned else (0, 1)
    with backend("reference"):
        found = wasserstein_matrix([clouds[k] for k in order], [weights[k] for k in order], metric="euclidean")
    assert found.distances[0, 1] == pytest.approx(1e-30, rel=1e-6)
