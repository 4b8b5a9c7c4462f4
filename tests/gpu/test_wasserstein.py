"""The Triton and CUDA kernels of wasserstein_matrix on a GPU: the cases of tests/kernels, and sizes only a GPU can do.

pytest tests/gpu
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytest_process import run_tests
from torch import Tensor

from cit_fast import available_backends, backend
from cit_fast.ops import wasserstein_matrix
from cit_fast.ops.wasserstein import Wasserstein

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CASES = Path(__file__).parent.parent / "kernels" / "wasserstein_cases.py"
AGREEMENT = 2e-5  # of two plans that both stopped at 1e-6 of the mass


@pytest.fixture(params=["triton", "cuda"])
def which(request: pytest.FixtureRequest) -> str:
    status = available_backends()[request.param]
    if not status.available:
        pytest.skip(status.reason)
    return request.param


def make(sizes: list[int], d: int, seed: int = 0) -> list[Tensor]:
    """Clusters in a low-rank space, as embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(16, d, generator=generator)
    centres = 2 * torch.randn(len(sizes), 1, 16, generator=generator)
    return [
        (torch.randn(n, 16, generator=generator) + centre) @ basis for n, centre in zip(sizes, centres, strict=True)
    ]


def run(which: str, clouds: list[Tensor], device: str = "cuda", **options: object) -> Wasserstein:
    with backend(which):
        return wasserstein_matrix([cloud.to(device) for cloud in clouds], method="sinkhorn", **options)


def test_all_cases(which: str) -> None:
    run_tests(CASES, CIT_FAST_CASES=which)


# Each tier of the CUDA kernels, on GPUs with and without clusters, and of the Triton kernels.
@pytest.mark.parametrize("sizes", [[100, 120], [230, 240], [400, 500], [1100, 900], [3000, 5000]], ids=str)
def test_large_pairs(which: str, sizes: list[int]) -> None:
    clouds = make(sizes, 384)
    options = {"metric": "euclidean", "pairs": [(0, 1)]}
    got = run(which, clouds, **options)
    expected = run("native", clouds, "cpu", **options)
    assert got.marginal_error <= max(1e-6, float(expected.marginal_error))
    for name in ("upper", "lower"):
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(expected, name), rtol=AGREEMENT, atol=0)


def test_many_pairs_twice_give_the_same_bits(which: str) -> None:
    clouds = make([1 + 37 * i % 150 for i in range(60)], 1024)
    first, second = run(which, clouds), run(which, clouds)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    expected = run("native", clouds, "cpu")
    scale = float(expected.upper.max())
    torch.testing.assert_close(first.upper.cpu(), expected.upper, rtol=AGREEMENT, atol=AGREEMENT * scale)
    assert (first.lower <= first.upper).all()


def test_runs_on_the_current_stream(which: str) -> None:
    clouds = [cloud.cuda() for cloud in make([50, 60, 70], 64)]
    expected = run(which, clouds)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = run(which, clouds)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
