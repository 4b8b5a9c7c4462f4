"""The Triton kernels of the balance-weight EMA on a GPU: the cases of tests/kernels, and what only a GPU can show.

pytest tests/gpu
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytest_process import run_tests
from torch import Tensor

from cit_fast import backend
from cit_fast.errors import BackendError
from cit_fast.ops import adamw_balance_ema_, balance_ema_, flush_balance_ema_

pytest.importorskip("triton")
from cit_fast.kernels import balance_ema as kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CASES = Path(__file__).parent.parent / "kernels" / "balance_ema_cases.py"


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[list[Tensor]]:
    """params, grads, exp_avgs, exp_avg_sqs, averages, previous_grads."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]

    return [random(dtype), random(dtype), random(), [x.abs() for x in random()], random(), random(dtype)]


def copy(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def same(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True))


def run(lists: list[list[Tensor]], steps: int = 2, which: str = "triton"):
    alphas = torch.zeros(len(lists[0]), device="cuda")
    with backend(which):
        for step in range(1, steps + 1):
            weights = adamw_balance_ema_(*lists, alphas, step=step, lr=0.01, seed=step)
        weights = weights._replace(alphas=weights.alphas.clone())
        flush_balance_ema_(lists[0], lists[4], alphas)
    return weights


def test_all_cases_of_the_interpreter() -> None:
    run_tests(CASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shapes", [[(8192, 8193)], [(1 + 997 * i % 40_009,) for i in range(224)], [(4096, 16), (16, 4096)] * 112], ids=str
)
def test_large_lists(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    lists = make(shapes, dtype)
    expected = copy(lists)
    weights, expected_weights = run(lists), run(expected, which="reference")
    torch.testing.assert_close(weights.norms[:, 1:], expected_weights.norms[:, 1:], rtol=2e-6, atol=0)
    torch.testing.assert_close(weights.norms[:, 0], expected_weights.norms[:, 0], rtol=1e-3, atol=0)
    assert same(lists[1:4] + lists[5:], expected[1:4] + expected[5:])
    for p, right in zip(lists[0], expected[0], strict=True):
        torch.testing.assert_close(p, right)


def test_the_number_of_warps_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = make([(300, 1000), (70_001,)])
    once = copy(lists)
    weights = run(once)
    for warps in (1, 2, 8):
        monkeypatch.setitem(kernels._TILING, "num_warps", warps)
        again = copy(lists)
        assert torch.equal(run(again).norms, weights.norms)
        assert same(again, once)


def test_runs_on_the_current_stream_and_never_waits() -> None:
    lists = make([(100_000,), (33, 7)] * 10)
    expected, warm = copy(lists), copy(lists)
    run(expected)
    run(warm)  # compiled and loaded, which may wait
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            run(lists)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert same(lists, expected)


def test_a_list_that_stays_costs_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = make([(1000,)])
    run(lists)
    monkeypatch.setattr(kernels, "_to_device", lambda *_: pytest.fail("copied again"))
    run(lists)


def test_a_graph_is_refused() -> None:
    p, g, _, _, e, previous = make([(1000,)])
    with backend("triton"):
        balance_ema_(p, e, g, previous)
        with pytest.raises(BackendError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            balance_ema_(p, e, g, previous)
