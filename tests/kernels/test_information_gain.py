"""The Triton kernels of the information-gain family without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.errors import BackendError
from cit_fast.ops import backends, token_gain
from cit_fast.ops.backends import Backend, backend
from cit_fast.ops.information_gain import triton as glue

HERE = Path(__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = ("token_gain", "token_gain_statistics", "masked_jsd", "linear_cross_entropy")


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
    run("information_gain_cases.py", tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    run("information_gain_builds.py", tmp_path)


# The choice of the backend


def test_a_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_status", lambda which: backends.BackendStatus(True, "pretended"))
    for op in OPS:
        assert backends.resolve(op, CUDA).__module__ == glue.__name__
        assert backends.resolve(op, CPU) is backends._implementations[op][Backend.NATIVE]
        # What the kernels do not take goes to the reference.
        cannot = {Backend.NATIVE: "no", Backend.TRITON: "no"}
        assert backends.resolve(op, CUDA, cannot=cannot) is backends._implementations[op][Backend.REFERENCE]


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_status", lambda which: backends.BackendStatus(True, "pretended"))
    hidden = torch.zeros(2, 3)
    with backend("triton"), pytest.raises(BackendError, match="does not run on cpu tensors"):
        token_gain(hidden, hidden, hidden, torch.arange(2))


# How the work is cut


@given(blocks=st.integers(1, 128), tiles=st.integers(1, 2000), processors=st.integers(1, 200))
def test_tiles_of_a_program(blocks: int, tiles: int, processors: int) -> None:
    each = glue._tiles(blocks, tiles, processors)
    assert 1 <= each <= min(tiles, glue._MOST_TILES)
    assert each >= min(tiles, glue._LEAST_TILES)


def test_few_processors_wait_for_the_last_tiles() -> None:
    """Of an H200, at sizes that count: 128 rows and 128 entries a tile."""
    for tokens, vocabulary in ((512, 65536), (512, 151936), (4096, 131072), (16384, 49152)):
        blocks, tiles = tokens // 128, vocabulary // 128
        each = glue._tiles(blocks, tiles, 132)
        waves = -(-blocks * -(-tiles // each) // 132)
        assert blocks * tiles / (waves * each * 132) > 0.9


@given(tokens=st.integers(0, 5000), entries=st.integers(1, 3_000_000), sides=st.integers(1, 2))
def test_the_workspace_is_bounded(tokens: int, entries: int, sides: int) -> None:
    size, spaces = glue._workspace(tokens, entries, sides, torch.device("meta"))
    assert size >= 1
    assert len(spaces) == sides
    rows, stride = spaces[0].shape
    assert rows == min(size, tokens)
    assert stride >= entries
    assert stride % glue._ALIGNED == 0  # so that rows of logits and of 16-bit gradients start at multiples of 16 bytes
    assert rows == 1 or sides * rows * stride * 4 <= glue._WORKSPACE
    chunks = [rows.stop - rows.start for rows in glue._slices(tokens, size)]
    assert sum(chunks) == tokens
    # As few chunks as fit, but for tiles of 128 rows.
    most = max(1, glue._WORKSPACE // (4 * stride * sides))
    assert len(chunks) <= -(-tokens // (most // 128 * 128 or most))


def test_gradients_of_half_precision_lie_where_the_logits_were() -> None:
    """Row by row, and only where all logits of the row up to there have been read."""
    hidden, weight = torch.zeros(5, 3, dtype=torch.bfloat16), torch.zeros(70, 3, dtype=torch.bfloat16)
    gradients = glue._Gradients(hidden, weight, None, torch.ones(5), torch.ones(5), (True, False, False))
    _, (space,) = glue._workspace(5, 70, 1, CPU)
    logits = glue._Head(weight, None).logits(hidden, space)
    gradient = gradients.instead_of(logits, space)
    assert gradient.shape == logits.shape
    for row in range(5):
        assert gradient[row].data_ptr() == logits[row].data_ptr()
        assert gradient.stride(0) * 2 == logits.stride(0) * 4
