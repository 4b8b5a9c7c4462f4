"""wasserstein_matrix by the Triton or the CUDA kernels against the reference and against exact distances.

Not collected by itself: test_wasserstein.py here and in tests/gpu, and tests/ops/test_wasserstein_cuda.py, run it in a
process of its own. CIT_FAST_CASES names the backend. Without a GPU the Triton kernels are interpreted, and the
teams of the CUDA kernels run on the host, in the library that CIT_FAST_HOST_LIBRARY names.
"""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace
from typing import Any

import point_clouds
import pytest
import torch
from point_clouds import random_weights
from torch import Tensor

import cit_fast
from cit_fast import backend
from cit_fast.errors import BackendError, DataError
from cit_fast.ops import wasserstein_matrix
from cit_fast.ops.wasserstein import METRICS, Wasserstein, cuda

if os.environ.get("CIT_FAST_CASES", "triton") == "triton":
    from cit_fast.kernels import wasserstein as kernels

# The interpreter is numpy, which warns of arithmetic with infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

WHICH = os.environ.get("CIT_FAST_CASES", "triton")
LIBRARY = os.environ.get("CIT_FAST_HOST_LIBRARY")
PTX = bool(os.environ.get("CIT_FAST_PTX"))
ON_HOST = bool(LIBRARY or PTX or os.environ.get("TRITON_INTERPRET"))
DEVICE = "cpu" if ON_HOST else "cuda"

# Of two plans that both stopped at 1e-6 of the mass, whose errors are at distances up to ten times the mean.
AGREEMENT = 2e-5
ROUNDING = 1e-12


too_long = pytest.mark.skipif(PTX, reason="minutes, one instruction after the other")


class Work(ctypes.Structure):
    """TransportWork of csrc/cuda/wasserstein/wasserstein.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "order")),
        ("count", ctypes.c_uint32),
        *(
            (name, ctypes.c_void_p)
            for name in ("next", "costs", "kernels", "weights", "epsilons", "results", "scratch")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("shared_bytes", ctypes.c_size_t),
        *((name, ctypes.c_double) for name in ("tolerance", "max_iterations")),
    )


class Host:
    """Stands in for cit_fast._native_cuda."""

    def __init__(self, library: str) -> None:
        self.library = ctypes.CDLL(library)
        self.library.transport.restype = ctypes.c_bool
        self.capacity, self.clusters = 232448, True
        self.at_once = 2
        self.teams: set[tuple[int, int, bool]] = set()

    def transport_team(self, n: int, m: int, device: int) -> tuple[int, int, int, bool]:
        threads, shared_bytes, resident = ctypes.c_int(), ctypes.c_int64(), ctypes.c_bool()
        numbers = (ctypes.c_int64(each) for each in (n, m, self.capacity))
        outputs = (ctypes.byref(threads), ctypes.byref(shared_bytes), ctypes.byref(resident))
        blocks = self.library.transport_team(*numbers, ctypes.c_bool(self.clusters), *outputs)
        self.teams.add((blocks, threads.value, resident.value))
        return blocks, threads.value, shared_bytes.value, resident.value

    def transport_teams_at_once(self, blocks: int, threads: int, shared_bytes: int, device: int) -> int:
        return self.at_once

    def transport_scratch(self, rows: int, columns: int) -> int:
        return 4 * columns + 3 * rows

    def transport(self, *, blocks: int, threads: int, teams: int, device: int, stream: int, **fields: Any) -> None:
        assert self.library.transport(ctypes.byref(Work(**fields)), blocks, threads, teams)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> Host | None:
    if LIBRARY is None:
        if ON_HOST:  # the interpreter takes as long for a large tile as for a small one
            monkeypatch.setattr(kernels, "_FINE_TILE", 16 * 32)
        return None
    host = Host(LIBRARY)
    monkeypatch.setattr(cit_fast, "_native_cuda", host, raising=False)
    stream = SimpleNamespace(device_index=0, cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return host


def random_clouds(sizes: tuple[int, ...], **options: Any) -> list[Tensor]:
    return point_clouds.random_clouds(sizes, device=DEVICE, **options)


def run(clouds: list[Tensor], weights: list[Tensor] | None = None, **options: Any) -> Wasserstein:
    if LIBRARY is None:
        with backend(WHICH):
            return wasserstein_matrix(clouds, weights, **options)
    with pytest.MonkeyPatch.context() as patch:  # nothing else would give CPU tensors to this backend
        patch.setattr("cit_fast.ops.wasserstein.resolve", lambda *_, **__: cuda.wasserstein_matrix)
        return wasserstein_matrix(clouds, weights, **options)


def reference(clouds: list[Tensor], weights: list[Tensor] | None = None, **options: Any) -> Wasserstein:
    with backend("reference"):
        return Wasserstein(*(each.to(DEVICE) for each in wasserstein_matrix(clouds, weights, **options)))


def assert_bounds(got: Wasserstein, clouds: list[Tensor], weights: list[Tensor] | None = None, **options: Any) -> None:
    exact = reference(clouds, weights, **options).distances
    assert (got.lower <= exact * (1 + ROUNDING)).all()
    assert (got.upper >= exact * (1 - ROUNDING)).all()


@pytest.mark.parametrize(
    ("metric", "p", "weighted", "epsilon"),
    [
        ("cosine", 1, False, None),
        ("euclidean", 1, True, 2.0),
        ("sqeuclidean", 1.5, True, None),
    ],
)
def test_equals_the_reference(metric: str, p: float, weighted: bool, epsilon: float | None) -> None:
    clouds = random_clouds(
        (7, 3, 33 if metric == "cosine" and not PTX else 12, 20) if ON_HOST else (1, 2, 33, 15, 64, 65, 100, 257, 300)
    )
    weights = random_weights(clouds) if weighted else None
    options: dict[str, Any] = {"metric": metric, "p": p, "pairs": 2}
    got = run(clouds, weights, method="sinkhorn", epsilon=epsilon, **options)
    expected = reference(clouds, weights, method="sinkhorn", epsilon=epsilon, **options)
    assert (got.marginal_error <= 1e-6).all()
    assert ((got.iterations - expected.iterations).abs() <= 3 + expected.iterations // 5).all()
    for name in ("distances", "lower", "upper"):
        x, y = (getattr(each, name) ** p for each in (got, expected))
        torch.testing.assert_close(x, y, rtol=AGREEMENT, atol=AGREEMENT * float(expected.upper.max()) ** p)
    assert_bounds(got, clouds, weights, **options)


@pytest.mark.parametrize("epsilon", [1e-13, 1e-3, 1e6])
def test_bounds_hold_and_nothing_overflows_at_any_epsilon(epsilon: float) -> None:
    clouds = random_clouds((9, 12), seed=3)
    weights = random_weights(clouds)
    weights[1][3] = 1e-30
    weights[1][4] = 0
    options: dict[str, Any] = {"metric": "sqeuclidean", "pairs": [(0, 1)]}
    got = run(clouds, weights, method="sinkhorn", epsilon=epsilon, max_iterations=4, **options)
    assert all(each.isfinite().all() for each in got)
    assert_bounds(got, clouds, weights, **options)
    if epsilon == 1e6:  # the product plan
        a, b = (weight.double() / weight.double().sum() for weight in weights)
        cost = torch.cdist(*(cloud.double() for cloud in clouds)) ** 2
        torch.testing.assert_close(got.distances[0], a @ cost @ b, rtol=1e-5, atol=0)


def test_double_goes_on_where_float_ends() -> None:
    clouds = random_clouds((12, 15))
    got = run(clouds, metric="euclidean", method="sinkhorn", epsilon=0.5, tolerance=1e-11, pairs=[(0, 1)])
    expected = reference(clouds, metric="euclidean", method="sinkhorn", epsilon=0.5, tolerance=1e-11, pairs=[(0, 1)])
    assert got.marginal_error <= 1e-11
    assert abs(int(got.iterations - expected.iterations)) <= 5
    torch.testing.assert_close(got.distances, expected.distances, rtol=1e-6, atol=0)


def test_max_iterations() -> None:
    clouds = random_clouds((12, 15))
    few, more = (
        run(clouds, metric="euclidean", method="sinkhorn", epsilon=0.01, max_iterations=most, pairs=[(0, 1)])
        for most in (1, 8)
    )
    assert int(more.iterations - few.iterations) == 7
    assert 1e-6 < more.marginal_error < few.marginal_error
    assert_bounds(few, clouds, metric="euclidean", pairs=[(0, 1)])


@too_long
def test_every_way_to_cut_a_pair_gives_the_same(host: Host | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program or many, a tile as wide as the pair or not; one block or a cluster, K in shared memory or not."""
    clouds = random_clouds((40 if host is not None else 20, 23))  # the interpreter takes its time
    options: dict[str, Any] = {"metric": "euclidean", "method": "sinkhorn", "tolerance": 1e-4, "pairs": [(0, 1)]}
    results = [run(clouds, **options)]
    if host is not None:
        for capacity, clusters in ((9000, True), (4000, True), (2500, True), (1500, True), (1500, False)):
            host.capacity, host.clusters = capacity, clusters
            results.append(run(clouds, **options))
        alone = {(1, 32, True), (1, 64, True), (1, 64, False)}
        assert host.teams == alone | {(2, 64, True), (4, 64, True), (8, 64, False)}
    elif WHICH == "triton":
        monkeypatch.setattr(kernels, "_CHUNK", 16)
        results.append(run(clouds, **options))
        monkeypatch.setattr(kernels, "_LARGE", 1)
        monkeypatch.setattr(kernels, "_STRIP", 9)
        results.append(run(clouds, **options))
    for each in results[1:]:
        torch.testing.assert_close(each.upper, results[0].upper, rtol=1e-6, atol=0)
        torch.testing.assert_close(each.lower, results[0].lower, rtol=1e-5, atol=0)
        assert abs(int(each.iterations - results[0].iterations)) <= 1


@pytest.mark.skipif(LIBRARY is None, reason="of the CUDA kernels, and runs with them on the host")
def test_small_pairs_share_a_processor(host: Host) -> None:
    """As many of them as fit its shared memory, 228 KB, with as many threads together."""
    for points, threads, at_once in ((20, 32, 8), (100, 32, 4), (150, 64, 2), (230, 64, 1)):
        shared = (228 << 10) // at_once - 1024
        assert host.transport_team(points, points, 0) == (1, threads, shared, True)
    assert host.transport_team(300, 300, 0) == (2, 64, host.capacity, True)


def test_a_slice_of_a_gpu_that_runs_no_team_says_so(host: Host | None) -> None:
    if host is None:
        pytest.skip("a GPU that is whole")
    host.at_once = 0
    with pytest.raises(BackendError, match="this GPU, or slice of one, cannot run 1 blocks"):
        run(random_clouds((4, 5)), method="sinkhorn")


@too_long
def test_a_pair_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clouds = random_clouds((5, 3, 9, 3))
    clouds.append(clouds[1].clone())
    options: dict[str, Any] = {"metric": "cosine", "method": "sinkhorn", "epsilon": 0.1, "tolerance": 1e-3}
    all_pairs = run(clouds, **options)
    again = run(clouds, **options)
    assert all(torch.equal(x, y) for x, y in zip(all_pairs, again, strict=True))
    assert (all_pairs.distances == all_pairs.distances.T).all()
    assert all_pairs.distances[1, 4] == 0
    monkeypatch.setattr(cuda, "BATCH_ENTRIES", 30)
    monkeypatch.setattr(cuda, "GROUP_ENTRIES", 20)
    some = run(clouds, **options, pairs=[(4, 0), (2, 2), (3, 2), (0, 2), (1, 0)])
    expected = torch.stack([all_pairs.distances[i, j] for i, j in ((4, 0), (2, 2), (3, 2), (0, 2), (1, 0))])
    torch.testing.assert_close(some.distances, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_no_distance_is_exactly_0(metric: str) -> None:
    cloud = random_clouds((5,))[0]
    equal = [torch.ones(3, 4, device=DEVICE), torch.ones(5, 4, device=DEVICE)]
    out = run([cloud, cloud.clone(), *equal], metric=metric, method="sinkhorn", pairs=[(0, 1), (2, 3)])
    assert all((each == 0).all() for each in out)


@pytest.mark.parametrize("scale", [1e-140, 1e140])
def test_costs_beyond_float32(scale: float) -> None:
    clouds = random_clouds((6, 4), dtype=torch.float64)
    options: dict[str, Any] = {"metric": "sqeuclidean", "method": "sinkhorn", "max_iterations": 5, "pairs": [(0, 1)]}
    expected = run(clouds, **options).distances
    got = run([cloud * scale for cloud in clouds], **options).distances
    torch.testing.assert_close(got / scale**2, expected, rtol=1e-6, atol=0)


@too_long
def test_points_in_common_far_from_the_origin() -> None:
    clouds = [cloud + 100 for cloud in random_clouds((6, 4), d=3)]
    clouds[1] = torch.cat([clouds[1], clouds[0][:3]])
    for metric in METRICS:
        got = run(clouds, metric=metric, method="sinkhorn", tolerance=1e-3, pairs=[(0, 1)])
        assert_bounds(got, clouds, metric=metric, pairs=[(0, 1)])


def test_bfloat16_points() -> None:
    clouds = random_clouds((6, 4), dtype=torch.bfloat16)
    options: dict[str, Any] = {"method": "sinkhorn", "tolerance": 1e-4, "pairs": [(0, 1)]}
    wide = [cloud.float() for cloud in clouds]
    assert torch.equal(run(clouds, **options).distances, run(wide, **options).distances)


@pytest.mark.skipif(LIBRARY is not None, reason="no backend is chosen there")
def test_the_exact_method_is_not_theirs() -> None:
    clouds = random_clouds((6, 4))
    with pytest.raises(BackendError, match=r"the exact method runs on the CPU; backends that would serve: native"):
        run(clouds, pairs=[(0, 1)])
    got = wasserstein_matrix(clouds, pairs=[(0, 1)])
    assert got.distances.device.type == DEVICE
    torch.testing.assert_close(got.distances, reference(clouds, pairs=[(0, 1)]).distances, rtol=1e-10, atol=0)


def test_overflow_names_the_pair() -> None:
    clouds = [cloud * 1e200 for cloud in random_clouds((3, 2, 2), dtype=torch.float64)]
    with pytest.raises(DataError, match=r"clouds 1 and 2: their cost sqeuclidean\^1 overflows float64"):
        run(clouds, metric="sqeuclidean", method="sinkhorn", pairs=[(1, 2)])


def test_too_many_columns() -> None:
    sizes = (1, 20_000)
    clouds = [torch.ones(n, 1, device=DEVICE).cumsum(0) for n in sizes]
    with pytest.raises(BackendError, match=f"the {WHICH} backend .* 20000 ?.* in the second cloud|not 20000"):
        run(clouds, metric="euclidean", method="sinkhorn", pairs=[(0, 1)])
