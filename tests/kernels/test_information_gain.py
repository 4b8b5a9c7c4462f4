"""The Triton kernels of the information-gain family without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytest_process import run_tests

from cit_fast.errors import BackendError
from cit_fast.ops import backends, token_gain
from cit_fast.ops.backends import Backend, backend
from cit_fast.ops.information_gain.reference import Needed

pytest.importorskip("triton")
HERE = Path(__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = ("token_gain", "token_gain_statistics", "masked_jsd", "linear_cross_entropy")


@pytest.mark.slow
def test_interpreted(triton_cache: str) -> None:
    run_tests(
        HERE / "information_gain_cases.py",
        TRITON_CACHE_DIR=triton_cache,
        TRITON_INTERPRET="1",
        CUDA_VISIBLE_DEVICES="",
    )


@pytest.mark.slow
def test_compiled_ahead_of_time(triton_cache: str) -> None:
    run_tests(HERE / "information_gain_builds.py", TRITON_CACHE_DIR=triton_cache)


@pytest.mark.slow
def test_compiled_and_run_on_the_host(triton_cache: str) -> None:
    """What the compiler made of them, in bfloat16, too, with every barrier that they need."""
    run_tests(
        HERE / "information_gain_cases.py", TRITON_CACHE_DIR=triton_cache, CIT_FAST_PTX="1", CUDA_VISIBLE_DEVICES=""
    )


# The choice of the backend


def test_a_gpu_takes_it_where_it_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_status", lambda *_: backends.BackendStatus(True, "pretended"))
    monkeypatch.setattr(backends, "_proofs", [lambda op, device, usable, work: usable])
    for op in OPS:
        assert backends.resolve(op, CUDA).__module__.startswith("cit_fast.kernels.information_gain")
        assert backends.resolve(op, CPU) is backends._implementations[op][Backend.NATIVE]
        # What the kernels do not take goes to the reference.
        cannot = {Backend.NATIVE: "no", Backend.TRITON: "no"}
        assert backends.resolve(op, CUDA, cannot=cannot) is backends._implementations[op][Backend.REFERENCE]


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_status", lambda *_: backends.BackendStatus(True, "pretended"))
    hidden = torch.zeros(2, 3)
    with backend("triton"), pytest.raises(BackendError, match="does not run on cpu tensors"):
        token_gain(hidden, hidden, hidden, torch.arange(2))


@pytest.mark.parametrize(("gigabytes", "expected"), [(16, 512 << 20), (80, 80 << 24), (141, 141 << 24)])
def test_a_large_gpu_has_a_larger_workspace(gigabytes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from cit_fast.kernels import information_gain_losses as kernels

    properties = SimpleNamespace(total_memory=gigabytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert kernels._workspace_bytes.__wrapped__(torch.device("cuda", 0)) == expected
    assert kernels._workspace_bytes.__wrapped__(CPU) == 512 << 20


def test_gradients_of_half_precision_lie_where_the_logits_were() -> None:
    """Row by row, and only where all logits of the row up to there have been read."""
    from cit_fast.kernels import information_gain_losses as kernels

    hidden, weight = torch.zeros(5, 3, dtype=torch.bfloat16), torch.zeros(70, 3, dtype=torch.bfloat16)
    gradients = kernels._Gradients(hidden, weight, None, torch.ones(5), torch.ones(5), Needed(True, False, False))
    _, (space,) = kernels._workspace(5, 70, 1, CPU)
    logits = kernels._Head(weight, None).logits(hidden, space)
    gradient = gradients.instead_of(logits, space)
    assert gradient.shape == logits.shape
    for row in range(5):
        assert gradient[row].data_ptr() == logits[row].data_ptr()
        assert gradient.stride(0) * 2 == logits.stride(0) * 4
