"""wasserstein_matrix in C++: the reference, POT, bounds, threads. What every backend must do: test_wasserstein.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ot
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from point_clouds import random_clouds, random_weights
from torch import Tensor

from cit_fast import _native, backend
from cit_fast.ops import wasserstein_matrix
from cit_fast.ops.wasserstein import METHODS, METRICS, Wasserstein, reference
from cit_fast.ops.wasserstein import native as _wasserstein_native

# Relative: of bounds on the exact distance, whose sums have up to 1e5 terms.
ROUNDING = 1e-12

# Both backends stop within `tolerance` of the same plan, each somewhere else.
TOLERANCE = 1e-8
AGREEMENT = 1e-6


def both(clouds: list[Tensor], weights: list[Tensor] | None = None, **options: object) -> list[Wasserstein]:
    results = []
    for name in ("native", "reference"):
        with backend(name):
            results.append(wasserstein_matrix(clouds, weights, **options))
    return results


def exact(x: Tensor, y: Tensor, a: Tensor, b: Tensor, metric: str, p: float = 1) -> float:
    """POT, with nothing of ours."""
    cost = ot.dist(x.double().numpy(), y.double().numpy(), metric=metric) ** p
    return float(ot.emd2((a / a.sum()).numpy(), (b / b.sum()).numpy(), np.ascontiguousarray(cost)) ** (1 / p))


def same_bits(first: Wasserstein, second: Wasserstein) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the reference ---

# Around a block of rows, a vector of floats and of doubles, and the rows summed in float before they go to double.
SIZES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 33)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("p", [1, 2.5])
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_equals_the_reference(simd: str, metric: str, p: float, weighted: bool) -> None:
    clouds = random_clouds(SIZES)
    weights = random_weights(clouds) if weighted else None
    options = {"method": "sinkhorn", "metric": metric, "p": p, "tolerance": TOLERANCE, "max_iterations": 400}
    native, expected = both(clouds, weights, pairs=3, **options)
    settled = (native.marginal_error <= TOLERANCE) & (expected.marginal_error <= TOLERANCE * 1.1)
    assert settled.sum() >= len(SIZES) // 2
    for name in ("distances", "lower", "upper"):
        got, wanted = (getattr(each, name)[settled] for each in (native, expected))
        torch.testing.assert_close(got, wanted, rtol=AGREEMENT, atol=AGREEMENT * float(expected.upper.max()) ** p)


def test_many_rows_are_summed_in_blocks(simd: str) -> None:
    clouds = random_clouds((600, 530), d=8, seed=3)
    native, expected = both(clouds, method="sinkhorn", metric="euclidean", pairs=[(0, 1)])
    assert native.marginal_error <= 1e-6
    torch.testing.assert_close(native.upper, expected.upper, rtol=AGREEMENT, atol=0)
    torch.testing.assert_close(native.lower, expected.lower, rtol=1e-4, atol=0)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-9, 1e-13])
def test_stops_at_the_tolerance(simd: str, tolerance: float) -> None:
    clouds = random_clouds((40, 50))
    out = wasserstein_matrix(clouds, method="sinkhorn", metric="euclidean", epsilon=0.5, tolerance=tolerance)
    assert out.marginal_error[0, 1] <= tolerance
    assert 0 < out.iterations[0, 1] < 1000
    if tolerance < 1e-6:
        looser = wasserstein_matrix(clouds, method="sinkhorn", metric="euclidean", epsilon=0.5, tolerance=1e-4)
        assert looser.iterations[0, 1] < out.iterations[0, 1]


def test_over_relaxation_takes_a_fraction_of_the_iterations() -> None:
    clouds = random_clouds((60, 70), d=2)
    options = {"method": "sinkhorn", "metric": "euclidean", "epsilon": 0.02, "max_iterations": 20_000}
    native, plain = both(clouds, tolerance=1e-6, **options)  # the reference is not over-relaxed
    assert native.marginal_error.max() <= 1e-6
    assert native.iterations[0, 1] < 0.5 * plain.iterations[0, 1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_cost_keeps_its_precision_far_from_the_origin(metric: str, dtype: torch.dtype) -> None:
    clouds = [cloud + 100 for cloud in random_clouds((12, 9), d=3, dtype=dtype)]
    clouds[1] = torch.cat([clouds[1], clouds[0][:3]])  # points in common, at distance exactly 0
    native, expected = both(clouds, metric=metric, method="exact")  # POT's own costs cancel here
    torch.testing.assert_close(native.distances, expected.distances, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [2, 31, 64, 65])
def test_exact_between_clouds_of_one_size(metric: str, n: int) -> None:
    clouds = random_clouds((n, n, n))
    clouds[2] = torch.cat([clouds[1][:1].repeat(n // 2, 1), clouds[0][n // 2 :]])  # duplicates, points in common
    ones = torch.ones(n, dtype=torch.float64)
    with backend("native"):
        out = wasserstein_matrix(clouds, metric=metric)
        weighted = wasserstein_matrix(clouds, random_weights(clouds), metric=metric)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = exact(clouds[i], clouds[j], ones, ones, metric)
        assert out.distances[i, j].item() == pytest.approx(expected, abs=1e-9)
        assert weighted.distances[i, j] != out.distances[i, j]


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("metric", METRICS)
def test_exact_of_many_shapes(simd: str, metric: str, weighted: bool) -> None:
    clouds = random_clouds((1, 2, 7, 8, 9, 40, 40, 63), d=5)
    clouds.append(torch.cat([clouds[5][:20], clouds[5][:20], clouds[3]]))  # duplicates, points in common
    weights = random_weights(clouds) if weighted else [torch.ones(len(each), dtype=torch.float64) for each in clouds]
    weights[3][2] *= 1e-13
    out = wasserstein_matrix(clouds, weights, metric=metric)
    for i in range(len(clouds)):
        for j in range(i):
            expected = exact(clouds[i], clouds[j], weights[i], weights[j], metric)
            assert out.distances[i, j].item() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cost=st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed)),
    n=st.integers(1, 30),
    m=st.integers(1, 30),
    values=st.sampled_from([1, 3, 1000]),
)
def test_exact_of_costs_with_many_ties(cost: np.random.Generator, n: int, m: int, values: int) -> None:
    """Whole numbers on a grid, and weights that are multiples of one another: no plan is the only best one."""
    x, y = (torch.from_numpy(cost.integers(0, values, (k, 2))).double() for k in (n, m))
    a, b = (torch.from_numpy(cost.integers(1, 4, k)).double() for k in (n, m))
    out = wasserstein_matrix([x, y], [a, b], metric="sqeuclidean", pairs=[(0, 1)])
    assert out.distances.item() == pytest.approx(exact(x, y, a, b, "sqeuclidean"), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_the_paths_do_not_serve_goes_to_the_simplex(
    monkeypatch: pytest.MonkeyPatch, threads: int, with_threads: Callable[[int], None]
) -> None:
    clouds = random_clouds((9, 12, 7, 9))
    expected = wasserstein_matrix(clouds)
    monkeypatch.setattr(_wasserstein_native, "PATHS_ENTRIES", 0)
    with_threads(threads)
    torch.testing.assert_close(wasserstein_matrix(clouds), expected, rtol=1e-12, atol=1e-14)


# --- bounds ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("p", [1, 2])
def test_bounds_enclose_pot(simd: str, metric: str, p: float) -> None:
    clouds = random_clouds((1, 30, 47, 9), d=6)
    weights = random_weights(clouds)
    for epsilon in (None, 1e-3, 10.0):
        out = wasserstein_matrix(
            clouds, weights, metric=metric, p=p, method="sinkhorn", epsilon=epsilon, max_iterations=100
        )
        for i in range(4):
            for j in range(i):
                value = exact(clouds[i], clouds[j], weights[i], weights[j], metric, p)
                assert out.lower[i, j] <= value * (1 + 1e-10)
                assert out.upper[i, j] >= value * (1 - 1e-10)
                assert out.distances[i, j] == out.upper[i, j]


def test_certified_within_a_thousandth() -> None:
    clouds = random_clouds((60, 80), d=16)
    out = wasserstein_matrix(
        clouds, metric="euclidean", method="sinkhorn", epsilon=0.01, max_iterations=20_000, tolerance=1e-6
    )
    assert out.upper[0, 1] - out.lower[0, 1] <= 1e-3 * out.upper[0, 1]


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("d", [5, 300])
def test_a_gap_is_certified_without_the_exact_distance(
    simd: str, monkeypatch: pytest.MonkeyPatch, d: int, weighted: bool
) -> None:
    clouds = random_clouds((1, 40, 40, 90), d=d)
    weights = random_weights(clouds) if weighted else [torch.ones(len(each), dtype=torch.float64) for each in clouds]
    options = {"method": "sinkhorn", "tolerance": 1e-4, "max_iterations": 20_000, "gap": 5e-3}
    by_paths = wasserstein_matrix(clouds, weights, **options)
    monkeypatch.setattr(_wasserstein_native, "PATHS_ENTRIES", 0)
    by_sinkhorn = wasserstein_matrix(clouds, weights, **options)
    assert by_sinkhorn.iterations[0, 3] > 0
    assert (by_paths.iterations == 0).all()
    assert (by_paths.marginal_error == 0).all()
    assert by_paths.lower[1, 3] < by_paths.upper[1, 3]  # it stopped early
    for out in (by_paths, by_sinkhorn):
        assert ((out.upper - out.lower) <= 5e-3 * out.upper).all()
        for i in range(4):
            for j in range(i):
                value = exact(clouds[i], clouds[j], weights[i], weights[j], "cosine")
                assert out.lower[i, j] <= value * (1 + 1e-10)
                assert out.upper[i, j] >= value * (1 - 1e-10)
                assert out.distances[i, j] == out.upper[i, j]


# --- costs in float32 ---


def float_and_double(monkeypatch: pytest.MonkeyPatch, clouds: list[Tensor], **options: object) -> list[Wasserstein]:
    """As the op decides, and with costs in float64."""
    chosen = wasserstein_matrix(clouds, method="sinkhorn", max_iterations=200, **options)
    monkeypatch.setattr(_wasserstein_native, "FLOAT_COSTS", (10**9, 1.0))
    return [chosen, wasserstein_matrix(clouds, method="sinkhorn", max_iterations=200, **options)]


def test_costs_in_float32_are_within_their_error(simd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clouds = [cloud + 1 for cloud in random_clouds((30, 47, 16), d=500)]
    in_float, in_double = float_and_double(monkeypatch, clouds, tolerance=1e-4)
    pairs = ~torch.eye(3, dtype=torch.bool)
    error = _native.FLOAT_COST_ERROR
    assert ((in_float.upper - in_double.upper).abs() < 1.1 * error)[pairs].all()
    assert (in_float.upper != in_double.upper)[pairs].all()
    # The error is a part of the bounds, and the true costs are far nearer than it says.
    torch.testing.assert_close(in_float.upper - error * pairs, in_double.upper, rtol=0, atol=error / 20)
    torch.testing.assert_close(in_float.lower + error * pairs, in_double.lower, rtol=0, atol=error / 20)


@pytest.mark.parametrize("options", [{"tolerance": 1e-6}, {"tolerance": 1e-4, "p": 2}], ids=["tolerance", "p"])
def test_costs_stay_in_float64_where_float32_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, float]
) -> None:
    assert same_bits(*float_and_double(monkeypatch, random_clouds((30, 47), d=100), **options))


@pytest.mark.parametrize("gap", [None, 1e-2])
def test_very_near_clouds_get_costs_in_float64(monkeypatch: pytest.MonkeyPatch, gap: float | None) -> None:
    base, far = random_clouds((20, 15), d=100)
    noise = random_clouds((20,), d=100, seed=5)[0]
    clouds = [base.double(), base.double() + 1e-5 * noise, far.double()]
    in_float, in_double = float_and_double(monkeypatch, clouds, tolerance=1e-4, gap=gap)
    assert in_float.upper[0, 1] == in_double.upper[0, 1] > 0
    assert in_float.lower[0, 1] == in_double.lower[0, 1]
    assert in_float.upper[0, 2] != in_double.upper[0, 2]


points_strategy = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=2), min_size=1, max_size=20)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    x=points_strategy,
    y=points_strategy,
    copies=st.integers(1, 3),
    seed=st.integers(0, 99),
    epsilon=st.sampled_from([None, 1e-300, 1e-6, 1e-2, 1.0, 1e300]),
    metric=st.sampled_from(["euclidean", "sqeuclidean"]),
)
@example(  # nothing but a mass of 1e-30 has a way to go
    x=[[0.0, 1.0], [0.0, 0.0]], y=[[0.0, 0.0]], copies=1, seed=0, epsilon=None, metric="euclidean"
)
def test_bounds_of_anything(x: list, y: list, copies: int, seed: int, epsilon: float | None, metric: str) -> None:
    clouds = [torch.tensor(x * copies, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)]
    weights = random_weights(clouds, seed)
    weights[0][seed % len(weights[0])] *= 1e-30
    native, expected = both(clouds, weights, metric=metric, method="sinkhorn", epsilon=epsilon, max_iterations=20)
    with backend("reference"):
        value = wasserstein_matrix(clouds, weights, metric=metric).distances[0, 1]
    slack = 1e-12 * float(expected.upper.max())
    for values in native:
        assert values.isfinite().all()
    assert native.lower[0, 1] <= value + slack
    assert native.upper[0, 1] >= value - slack
    assert native.lower[0, 1] <= native.upper[0, 1]
    assert native.marginal_error[0, 1] >= 0


# --- special clouds ---


@pytest.mark.parametrize("epsilon", [1e-300, 1e-9, 1e-5, 1e5, 1e300])
def test_no_nan_at_any_epsilon(simd: str, epsilon: float) -> None:
    clouds = random_clouds((1, 17, 40, 270), d=3)
    clouds.append(clouds[2][:1].repeat(9, 1))
    weights = random_weights(clouds)
    weights[1][0], weights[2][3], weights[3][::2] = 1e-300, 0.0, 1e-20
    for metric in METRICS:
        out = wasserstein_matrix(clouds, weights, metric=metric, method="sinkhorn", epsilon=epsilon, max_iterations=15)
        for values in out:
            assert values.isfinite().all()
        assert (out.lower <= out.upper).all()


@pytest.mark.parametrize("method", METHODS)
def test_identical_clouds_are_exactly_0_apart(method: str) -> None:
    x, y = random_clouds((9, 9))
    x[0, 0], z = 0.0, x.clone()
    z[0, 0] = -0.0
    with backend("native"):
        out = wasserstein_matrix([x, z, y], method=method, pairs=[(0, 1), (1, 0), (2, 2), (0, 2)])
    for values in out:
        assert (values[:3] == 0).all()
    assert out.distances[3] > 0


def test_one_point_clouds() -> None:
    points = random_clouds((1, 1, 1), dtype=torch.float64)
    expected = torch.cdist(torch.cat(points), torch.cat(points))
    for method in ("exact", "sinkhorn"):
        with backend("native"):
            out = wasserstein_matrix(points, metric="euclidean", method=method)
        torch.testing.assert_close(out.lower, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.upper, expected, rtol=1e-12, atol=1e-12)


def test_duplicates_and_zero_weights_change_nothing() -> None:
    x, y = random_clouds((12, 15), d=5)
    options = {"metric": "euclidean", "method": "sinkhorn", "epsilon": 0.3, "tolerance": 1e-10, "pairs": [(0, 1)]}
    plain = wasserstein_matrix([x, y], **options)
    twice = wasserstein_matrix([torch.cat([x, x]), y], **options)
    torch.testing.assert_close(twice.upper, plain.upper, rtol=1e-8, atol=0)
    more = torch.cat([x, 100 * x])
    weights = [torch.cat([torch.ones(12), torch.zeros(12)]), torch.ones(15)]
    assert same_bits(wasserstein_matrix([more, y], weights, **options), plain)


# --- constants ---


def test_the_constants_are_those_of_the_definition_and_of_the_triton_kernels() -> None:
    compiled = dict(_native.SINKHORN)
    shared = {name: compiled.pop(name) for name in list(compiled) if hasattr(reference, name)}
    assert shared == {
        name: getattr(reference, name)
        for name in ("EPSILON_OF_SPREAD", "EPSILON_RANGE", "COARSE_ITERATIONS", "COARSE_TOLERANCE")
    }
    pytest.importorskip("triton")
    from cit_fast.kernels import wasserstein as kernels

    assert compiled == {name: getattr(kernels, name).value for name in compiled}
    assert len(compiled) == 6


# --- order of the work ---


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_with_any_number_of_threads(simd: str, method: str, with_threads: Callable[[int], None]) -> None:
    clouds = random_clouds((5, 200, 17, 90, 33), d=300)
    results = []
    for threads in (1, 2, 5):
        with_threads(threads)
        with backend("native"):
            results.append(wasserstein_matrix(clouds, method=method, max_iterations=50))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_the_same_bits_at_every_instruction_set() -> None:
    few, many = random_clouds((5, 300, 17), d=6), random_clouds((5, 300, 17), d=450)
    results = []
    for level in _native.simd_levels():
        _native.set_simd_level(level)
        results.append(
            (
                wasserstein_matrix(few, method="sinkhorn", tolerance=1e-9, max_iterations=50),
                wasserstein_matrix(many, method="sinkhorn", tolerance=1e-4, gap=1e-2),
            )
        )
    _native.set_simd_level("")
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_batches_do_not_change_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    clouds = random_clouds((40, 3, 25, 31), d=70)
    whole = [wasserstein_matrix(clouds, method=method) for method in METHODS]
    monkeypatch.setattr(_wasserstein_native, "BATCH_ENTRIES", 100)
    for method, expected in zip(METHODS, whole, strict=True):
        assert same_bits(wasserstein_matrix(clouds, method=method), expected)
