"""Gradients of wasserstein_matrix against finite differences, of the distance itself or, entropic, of POT's value."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from cit_fast import backend
from cit_fast.ops.wasserstein import METHODS, METRICS, Wasserstein, wasserstein_matrix

BACKENDS = ("native", "reference")


@pytest.fixture(params=BACKENDS, autouse=True)
def each_backend(request: pytest.FixtureRequest):
    with backend(request.param):
        yield


def clouds_and_weights(sizes: tuple[int, ...] = (5, 7, 4), d: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    clouds = [(make(n, d) + 2 * make(1, d)).requires_grad_() for n in sizes]
    return clouds, [(make(n) + 0.2).requires_grad_() for n in sizes]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("p", [1.0, 2.0, 1.5])
def test_gradcheck(p: float, metric: str) -> None:
    clouds, weights = clouds_and_weights((3, 4, 2), d=2)

    def distances(*tensors: Tensor) -> Tensor:
        return wasserstein_matrix(tensors[:3], tensors[3:], metric=metric, p=p).distances

    # Tolerances above the rounding of a difference quotient of values good to 1e-12.
    assert torch.autograd.gradcheck(distances, (*clouds, *weights), eps=1e-5, atol=2e-5, rtol=1e-4)


def entropic_value(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray, metric: str, epsilon: float) -> float:
    """<P, C> + epsilon KL(P || a b^T) of POT's plan."""
    cost = ot.dist(x, y, metric=metric)
    a, b = a / a.sum(), b / b.sum()
    plan = ot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", stopThr=1e-14, numItermax=20_000)
    return float((plan * cost).sum() + epsilon * (plan * np.log(plan / np.outer(a, b))).sum())


@pytest.mark.parametrize("metric", METRICS)
def test_sinkhorn_is_the_gradient_of_the_entropic_value(metric: str) -> None:
    clouds, weights = clouds_and_weights((4, 3), d=2)
    epsilon, step = 0.2, 1e-5
    out = wasserstein_matrix(
        clouds, weights, metric=metric, method="sinkhorn", epsilon=epsilon, tolerance=1e-12, pairs=[(0, 1)]
    )
    # W itself is the upper bound, with the gradient of W^p at p = 1: no root between the two.
    out.distances.sum().backward()
    arrays = [each.detach().numpy().copy() for each in (*clouds, *weights)]
    for k, tensor in enumerate((*clouds, *weights)):
        for index in np.ndindex(arrays[k].shape):
            values = []
            for sign in (1, -1):
                moved = [each.copy() for each in arrays]
                moved[k][index] += sign * step
                values.append(entropic_value(*moved, metric, epsilon))
            assert tensor.grad[index].item() == pytest.approx((values[0] - values[1]) / 2 / step, abs=1e-6)


def test_sinkhorn_comes_to_the_exact_gradient() -> None:
    clouds, weights = clouds_and_weights((5, 7))
    epsilon, tolerance = 2e-4, 1e-6
    options = {"metric": "euclidean", "pairs": [(0, 1)], "tolerance": tolerance, "max_iterations": 5000}
    exact, near = (
        torch.autograd.grad(
            wasserstein_matrix(clouds, weights, method=method, epsilon=epsilon, **options).distances.sum(),
            (*clouds, *weights),
        )
        for method in METHODS
    )
    # The best plan is the only one and its entries are a tree. On it f_i + g_j = C_ij + eps log(pi_ij / (a_i b_j)),
    # which tells by how much the entropic potentials differ from the exact ones: the gradients with respect to the
    # weights are known to the error of the plan. That is exponentially small off the tree; on it, it is that of the
    # marginals, which add up along a path.
    x, y, *raw = (each.detach().numpy() for each in (*clouds, *weights))
    a, b = (weight / weight.sum() for weight in raw)
    plan = ot.emd(a, b, ot.dist(x, y, metric="euclidean"))
    path = len(a) + len(b) - 1
    rows, columns = np.nonzero(plan > 0)
    assert len(rows) == path
    entries = plan[rows, columns]
    edges = np.zeros((path, path + 1))
    edges[range(path), rows] = edges[range(path), len(a) + columns] = 1
    potentials = np.linalg.lstsq(edges, epsilon * np.log(entries / (a[rows] * b[columns])), rcond=None)[0]
    for got, expected in zip(near[:2], exact[:2], strict=True):  # the slope of a distance is at most 1
        torch.testing.assert_close(got, expected, rtol=0, atol=2 * path * tolerance)
    shifts = (potentials[: len(a)], a, raw[0]), (potentials[len(a) :], b, raw[1])
    for got, expected, (shift, share, weight) in zip(near[2:], exact[2:], shifts, strict=True):
        moved = torch.from_numpy((shift - (share * shift).sum()) / weight.sum())
        assert moved.abs().max() > 1e-5  # not the exact gradient itself
        bound = epsilon * path * tolerance / entries.min() / weight.sum()
        torch.testing.assert_close(got, expected + moved, rtol=0, atol=2 * bound)


@pytest.mark.parametrize("method", METHODS)
def test_a_shift_moves_the_distance_by_its_length(method: str) -> None:
    cloud, direction = clouds_and_weights((6,))[0][0].detach(), torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    shift = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    out = wasserstein_matrix([cloud, cloud + shift * direction], metric="euclidean", method=method, epsilon=1e-3)
    out.distances[0, 1].backward()
    assert shift.grad.item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_no_nan_between_equal_clouds_and_points(p: float, method: str, metric: str) -> None:
    clouds, weights = clouds_and_weights((5, 5, 4))
    with torch.no_grad():
        clouds[1].copy_(clouds[0])
        weights[1].copy_(weights[0])
        clouds[2][:2] = clouds[0][:2]
        weights[2][3] = 0
    out = wasserstein_matrix(clouds, weights, metric=metric, method=method, p=p, max_iterations=100)
    out.distances.sum().backward()
    for tensor in (*clouds, *weights):
        assert tensor.grad.isfinite().all()
    assert (clouds[2].grad[3] == 0).all()
    assert weights[2].grad[3] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_have_the_dtype_of_the_points(dtype: torch.dtype) -> None:
    clouds = clouds_and_weights()[0]
    low = [cloud.detach().to(dtype).requires_grad_() for cloud in clouds]
    wasserstein_matrix(low).distances.sum().backward()
    high = [cloud.detach().double().requires_grad_() for cloud in low]
    wasserstein_matrix(high).distances.sum().backward()
    for got, expected in zip(low, high, strict=True):
        torch.testing.assert_close(got.grad, expected.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_packed_points_and_only_what_is_asked_for() -> None:
    clouds, weights = clouds_and_weights()
    wasserstein_matrix(clouds, weights, pairs=[(2, 0)]).distances.sum().backward()
    packed = torch.cat([cloud.detach() for cloud in clouds]).requires_grad_()
    weight = torch.cat([each.detach() for each in weights]).requires_grad_()
    wasserstein_matrix(packed, weight, offsets=torch.tensor([0, 5, 12, 16]), pairs=[(2, 0)]).distances.sum().backward()
    for tensor, listed in ((packed, clouds), (weight, weights)):
        for (start, end), part in zip(pairwise((0, 5, 12, 16)), listed, strict=True):
            assert torch.equal(tensor.grad[start:end], part.grad)
    assert (packed.grad[5:12] == 0).all()


def test_bounds_have_no_gradient() -> None:
    clouds, _ = clouds_and_weights()
    out = wasserstein_matrix(clouds, method="sinkhorn")
    assert out.distances.requires_grad
    assert not any(each.requires_grad for each in out[1:])


def test_compile_without_a_graph_break() -> None:
    clouds, weights = clouds_and_weights()

    def distances(*tensors: Tensor) -> Wasserstein:
        return wasserstein_matrix([cloud * 2 for cloud in tensors[:3]], tensors[3:], metric="euclidean")

    compiled = torch.compile(distances, fullgraph=True, backend="aot_eager")
    got, expected = (
        torch.autograd.grad(run(*clouds, *weights).distances.sum(), (*clouds, *weights))
        for run in (compiled, distances)
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_opcheck(method: str) -> None:
    clouds, weights = clouds_and_weights((3, 4))
    arguments = (torch.cat(clouds).detach(), torch.tensor([0, 3, 7]), torch.cat(weights).detach())
    more = (torch.tensor([[0, 1]]), "cosine", 1.0, method, 0.1, 1e-9, 100, 0.0)
    for needed in ((True, True), (True, False), (False, True)):
        points, weight = (
            tensor.clone().requires_grad_(want) for tensor, want in zip(arguments[::2], needed, strict=True)
        )
        torch.library.opcheck(torch.ops.cit_fast.wasserstein_matrix.default, (points, arguments[1], weight, *more))
