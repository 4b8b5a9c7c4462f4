"""The Triton kernels of the balance-weight EMA without a GPU: interpreted, and compiled ahead of time."""

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
from cit_fast.ops import backends, balance_ema_
from cit_fast.ops.backends import Backend, backend
from cit_fast.ops.balance_ema import triton as glue

HERE = Path(__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
    run("balance_ema_cases.py", tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    run("balance_ema_builds.py", tmp_path)


# The choice of the backend


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if triton were there, which these tests do not import."""
    real = backends.find_spec
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if name == "triton" else real(name))


def test_the_interpreter_serves_cpu_tensors_when_forced(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    status = backends._triton_status()
    assert status.available
    assert "interpreter" in status.reason
    with backend("triton"):
        assert backends.resolve("balance_ema_", CPU) is glue._triton_balance_ema
        with pytest.raises(BackendError, match="does not run on cuda tensors"):
            backends.resolve("balance_ema_", CUDA)
    assert backends.resolve("balance_ema_", CPU) is not glue._triton_balance_ema


def test_without_the_interpreter_cpu_tensors_are_refused(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    tensors = [torch.zeros(3)]
    with backend("triton"), pytest.raises(BackendError, match="does not run on cpu tensors"):
        balance_ema_(tensors, tensors, tensors, tensors)


def test_a_gpu_takes_it_only_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        backends, "_status", lambda which: backends.BackendStatus(which is not Backend.CUDA, "pretended")
    )
    for op in ("balance_norms_", "balance_ema_", "adamw_balance_ema_", "flush_balance_ema_"):
        chosen = backends.resolve(op, CUDA)
        with backend("triton"):
            forced = backends.resolve(op, CUDA)
        assert forced.__module__ == glue.__name__
        assert chosen is not forced


# The tables


@given(
    st.lists(
        st.tuples(
            st.integers(0, 300), st.one_of(st.integers(0, 40), st.sampled_from([1000, 1025, 9000, 16384, 40_000]))
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_element_is_in_one_chunk_and_every_row_has_its_slots(shapes: list[tuple[int, int]]) -> None:
    """What sweep_kernel and weights_kernel do with the tables, in Python."""
    layout = glue._layout(tuple((rows, rows * size) for rows, size in shapes), CPU, 0)
    columns, tensors = layout.shapes.tolist(), layout.chunks.tolist()
    covered = [torch.zeros(rows, size, dtype=torch.int8) for rows, size in shapes]
    written = torch.zeros(layout.slots, dtype=torch.int64)
    for chunk, tensor in enumerate(tensors):
        size, rows, span_log, rows_per_chunk, row_chunks, first_chunk, first_slot, _ = columns[tensor]
        local = chunk - first_chunk
        row, col = local // row_chunks * rows_per_chunk, local % row_chunks * glue._CHUNK
        count = min(rows - row, rows_per_chunk)
        assert count > 0
        assert count * min(size - col, glue._CHUNK) <= 2 * glue._CHUNK
        assert (1 << span_log) * glue._GROUP >= min(size, glue._TILE)
        covered[tensor][row : row + count, col : col + glue._CHUNK] += 1
        written[[first_slot + r * row_chunks + local % row_chunks for r in range(row, row + count)]] += 1
    assert all((each == 1).all() for each in covered)
    assert (written == 1).all()

    rows_seen: list[int] = []
    slots_seen: list[int] = []
    for first_row, first_slot, rows, slots in layout.groups.tolist():
        assert rows == 1 or slots == 1
        assert rows <= 1 << glue._LOG_ROWS
        rows_seen += range(first_row, first_row + rows)
        slots_seen += range(first_slot, first_slot + rows * slots)
    assert rows_seen == list(range(sum(rows for rows, _ in shapes)))
    assert slots_seen == list(range(layout.slots))


def test_streams_table() -> None:
    p, e = torch.zeros(16, 24, dtype=torch.bfloat16), torch.zeros(16, 24)
    odd = torch.zeros(4, 9)
    shapes = ((16, p.numel()), (4, odd.numel()), (1, odd.numel()), (1, 35))
    shifted = odd.view(-1)[1:]
    table = glue._stream_table([[p, odd, odd, shifted], [e, odd, odd, odd], [], [], [], []], shapes)
    assert table[:, 0].tolist() == [p.data_ptr(), odd.data_ptr(), odd.data_ptr(), shifted.data_ptr()]
    assert not table[:, [2, 3, 4, 5, 7]].any()
    assert (table[:, 6] & 0xFF).tolist() == [0x01, 0, 0, 0]
    # A single row may end in half a group, but rows that follow one would not be aligned.
    assert (table[:, 6] >> 24).tolist() == [1, 0, 1, 0]
    assert glue._common_dtype([p, p]) == 1
    assert glue._common_dtype([p, e]) == 3
    assert glue._common_dtype([]) == 4


def test_a_seed_keeps_its_bits() -> None:
    assert [glue._as_int32(seed) for seed in (0, 2**31 - 1, 2**31, 2**32 - 1)] == [0, 2**31 - 1, -(2**31), -1]
