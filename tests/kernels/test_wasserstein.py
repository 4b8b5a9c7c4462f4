"""The Triton kernels of wasserstein_matrix without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cit_fast.ops import backends
from cit_fast.ops.backends import Backend, backend
from cit_fast.ops.wasserstein import cuda as _wasserstein_cuda
from cit_fast.ops.wasserstein import triton as _wasserstein_triton

HERE = Path(__file__).parent
CUDA = torch.device("cuda")


def run(file: str, cache: Path, **environment: str) -> None:
    """Run the tests of a file in a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton")
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_", "COV_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file)],
        env={**inherited, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_interpreted(tmp_path: Path) -> None:
    run("wasserstein_cases.py", tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", CIT_FAST_CASES="triton")


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    run("wasserstein_builds.py", tmp_path)


@pytest.mark.parametrize(("which", "glue"), [("triton", _wasserstein_triton), ("cuda", _wasserstein_cuda)])
def test_a_gpu_takes_it_only_when_forced(which: str, glue: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_status", lambda which: backends.BackendStatus(True, "pretended"))
    op = "wasserstein_matrix"
    assert backends.resolve(op, CUDA) is backends._implementations[op][Backend.REFERENCE]
    with backend(which):
        assert backends.resolve(op, CUDA) is glue._wasserstein_matrix


def test_layout_and_order_of_pairs() -> None:
    sizes = torch.tensor([[3, 5], [70, 64], [64, 70], [300, 1000], [5000, 5000], [9, 64], [1, 5000]])
    table = torch.zeros(len(sizes), 6, dtype=torch.int64)
    table[:, 2:4] = sizes
    layout = _wasserstein_triton._layout(table)
    n, m = sizes.unbind(dim=1)
    assert layout.table[:, 7].tolist() == [1, 1, 1, 5, 79, 1, 1]
    assert layout.strips == 89
    # What each pair needs, one after the other.
    assert torch.equal(layout.table[:, 6].diff(), (4 * m + 3 * n)[:-1])
    assert layout.vectors == int((4 * m + 3 * n).sum())
    assert torch.equal(layout.table[:, 9].diff(), (2 * layout.table[:, 7] * m)[:-1])
    orders = {block: (small.tolist(), large.tolist()) for block, small, large in _wasserstein_triton._orders(table)}
    assert orders == {64: ([1, 5, 0], []), 256: ([2], []), 1024: ([], [3]), 8192: ([], [4, 6])}
