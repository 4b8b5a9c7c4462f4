"""The Triton kernels of wasserstein_matrix without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytest_process import run_tests

from cit_fast.ops import backends
from cit_fast.ops.backends import Backend, backend

pytest.importorskip("triton")
HERE = Path(__file__).parent
CUDA = torch.device("cuda")


@pytest.mark.slow
def test_interpreted(triton_cache: str) -> None:
    run_tests(
        HERE / "wasserstein_cases.py",
        TRITON_CACHE_DIR=triton_cache,
        TRITON_INTERPRET="1",
        CUDA_VISIBLE_DEVICES="",
        CIT_FAST_CASES="triton",
    )


@pytest.mark.slow
def test_compiled_ahead_of_time(triton_cache: str) -> None:
    run_tests(HERE / "wasserstein_builds.py", TRITON_CACHE_DIR=triton_cache)


@pytest.mark.slow
def test_compiled_and_run_on_the_host(triton_cache: str) -> None:
    """What the compiler made of them, in bfloat16, too, with every barrier that they need."""
    run_tests(HERE / "wasserstein_cases.py", TRITON_CACHE_DIR=triton_cache, CIT_FAST_PTX="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize(
    ("which", "module"), [("triton", "cit_fast.kernels.wasserstein"), ("cuda", "cit_fast.ops.wasserstein.cuda")]
)
def test_a_gpu_takes_it_where_it_is_proven(which: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_status", lambda *_: backends.BackendStatus(True, "pretended"))
    op = "wasserstein_matrix"
    monkeypatch.setattr(backends, "_proofs", [])
    assert backends.resolve(op, CUDA) is backends._implementations[op][Backend.NATIVE]
    monkeypatch.setattr(backends, "_proofs", [lambda op, device, usable, work: [Backend(which)]])
    assert backends.resolve(op, CUDA).__module__ == module
    monkeypatch.setattr(backends, "_proofs", [])
    with backend(which):
        assert backends.resolve(op, CUDA).__module__ == module


def test_layout_and_order_of_pairs() -> None:
    from cit_fast.kernels import wasserstein as kernels

    sizes = torch.tensor([[3, 5], [70, 64], [64, 70], [300, 1000], [5000, 5000], [9, 64], [1, 5000]])
    table = torch.zeros(len(sizes), 6, dtype=torch.int64)
    table[:, 2:4] = sizes
    layout = kernels._layout(table)
    n, m = sizes.unbind(dim=1)
    assert layout.table[:, 7].tolist() == [1, 1, 1, 5, 79, 1, 1]
    assert layout.strips == 89
    # What each pair needs, one after the other.
    assert torch.equal(layout.table[:, 6].diff(), (4 * m + 3 * n)[:-1])
    assert layout.vectors == int((4 * m + 3 * n).sum())
    assert torch.equal(layout.table[:, 9].diff(), (2 * layout.table[:, 7] * m)[:-1])
    orders = {block: (small.tolist(), large.tolist()) for block, small, large in kernels._orders(table)}
    assert orders == {64: ([1, 5, 0], []), 128: ([2], []), 1024: ([], [3]), 8192: ([], [4, 6])}
