"""The Triton kernels of the balance-weight EMA without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest_process import run_tests

from cit_fast.errors import BackendError
from cit_fast.ops import backends, balance_ema_
from cit_fast.ops.backends import Backend, backend

pytest.importorskip("triton")
from cit_fast.kernels import balance_ema as kernels
from cit_fast.kernels import balance_ema_tables as tables

HERE = Path(__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.slow
def test_interpreted(triton_cache: str) -> None:
    run_tests(
        HERE / "balance_ema_cases.py", TRITON_CACHE_DIR=triton_cache, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""
    )


@pytest.mark.slow
def test_compiled_ahead_of_time(triton_cache: str) -> None:
    run_tests(HERE / "balance_ema_builds.py", TRITON_CACHE_DIR=triton_cache)


@pytest.mark.slow
def test_compiled_and_run_on_the_host(triton_cache: str) -> None:
    """What the compiler made of them, in bfloat16, too, with every barrier that they need."""
    run_tests(HERE / "balance_ema_cases.py", TRITON_CACHE_DIR=triton_cache, CIT_FAST_PTX="1", CUDA_VISIBLE_DEVICES="")


# The choice of the backend


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if triton were there, which these tests do not import."""
    real = backends.version
    monkeypatch.setattr(backends, "version", lambda name: "3.7.1" if name == "triton" else real(name))


def test_the_interpreter_serves_cpu_tensors_when_forced(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    status = backends._triton_status(None)
    assert status.available
    assert "interpreter" in status.reason
    with backend("triton"):
        assert backends.resolve("balance_ema_", CPU) is kernels.balance_ema_
        with pytest.raises(BackendError, match="does not run on cuda tensors"):
            backends.resolve("balance_ema_", CUDA)
    assert backends.resolve("balance_ema_", CPU) is not kernels.balance_ema_


def test_without_the_interpreter_cpu_tensors_are_refused(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    tensors = [torch.zeros(3)]
    with backend("triton"), pytest.raises(BackendError, match="does not run on cpu tensors"):
        balance_ema_(tensors, tensors, tensors, tensors)


def test_a_gpu_takes_it_where_it_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        backends, "_status", lambda which, _=None: backends.BackendStatus(which is not Backend.CUDA, "pretended")
    )
    for op in ("balance_norms_", "balance_ema_", "adamw_balance_ema_", "flush_balance_ema_"):
        monkeypatch.setattr(backends, "_proofs", [])
        assert backends.resolve(op, CUDA).__module__ == "cit_fast.ops.balance_ema.flat"
        monkeypatch.setattr(backends, "_proofs", [lambda op, device, usable, work: usable])
        chosen = backends.resolve(op, CUDA)
        with backend("triton"):
            forced = backends.resolve(op, CUDA)
        assert chosen is forced
        assert forced.__module__ == kernels.__name__


# The tables


@given(st.lists(st.one_of(st.integers(0, 40), st.sampled_from([16384, 16385, 40_000])), min_size=1, max_size=4))
def test_every_element_is_in_one_chunk(numels: list[int]) -> None:
    layout = tables.layout(tuple(numels), CPU, 0)
    covered = [torch.zeros(numel, dtype=torch.int8) for numel in numels]
    seen = set()
    for chunk, tensor in enumerate(layout.chunks.tolist()):
        size, first = layout.sizes[tensor].tolist()
        assert size == numels[tensor]
        covered[tensor][(chunk - first) * tables.CHUNK : (chunk - first + 1) * tables.CHUNK] += 1
        seen.add(tensor)
    assert all((each == 1).all() for each in covered)
    assert len(seen) == len(numels)  # an empty tensor too


def test_streams_table() -> None:
    p, e = torch.zeros(16, 24, dtype=torch.bfloat16), torch.zeros(16, 24)
    odd = torch.zeros(4, 9)
    shifted = odd.view(-1)[1:]
    table = tables.stream_table([[p, odd, shifted], [e, odd, odd], [], [], [], []])
    assert table[:, 0].tolist() == [p.data_ptr(), odd.data_ptr(), shifted.data_ptr()]
    assert not table[:, [2, 3, 4, 5, 7]].any()
    assert (table[:, 6] & 0xFF).tolist() == [0x01, 0, 0]
    assert (table[:, 6] >> 24).tolist() == [1, 1, 0]  # a tensor may end in half a group


def test_a_seed_keeps_its_bits() -> None:
    assert [kernels._as_int32(seed) for seed in (0, 2**31 - 1, 2**31, 2**32 - 1)] == [0, 2**31 - 1, -(2**31), -1]
