"""The registry and the switch between backends."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import cit_fast
from cit_fast.errors import BackendError
from cit_fast.ops import backends, balance_ema_
from cit_fast.ops.backends import Backend, BackendStatus, available_backends, backend, forced_backend, register, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def op(monkeypatch):
    """A scratch op with a reference and a native implementation."""
    monkeypatch.setattr(backends, "_implementations", {})
    monkeypatch.setattr(backends, "_only_when_forced", set())
    register("op", Backend.REFERENCE)(lambda: "reference")
    register("op", Backend.NATIVE)(lambda: "native")
    return "op"


@pytest.fixture
def all_available(monkeypatch):
    monkeypatch.setattr(backends, "_status", lambda _: BackendStatus(True, "for the test"))


def test_available_backends_gives_a_reason_for_each():
    statuses = available_backends()
    assert list(statuses) == ["reference", "native", "triton", "cuda"]
    assert statuses["reference"].available
    assert statuses["native"].available, statuses["native"].reason
    assert "threads" in statuses["native"].reason
    for status in statuses.values():
        assert status.reason
        assert "\n" not in status.reason
    assert cit_fast.available_backends is available_backends


def test_cpu_prefers_native_and_other_devices_get_the_reference(op, all_available):
    assert resolve(op, CPU)() == "native"
    assert resolve(op, CUDA)() == "reference"
    assert resolve(op, torch.device("meta"))() == "reference"


def test_cuda_order_is_cuda_then_triton(op, all_available):
    register(op, Backend.TRITON)(lambda: "triton")
    assert resolve(op, CUDA)() == "triton"
    register(op, Backend.CUDA)(lambda: "cuda")
    assert resolve(op, CUDA)() == "cuda"


def test_only_when_forced_is_never_chosen_by_itself(op, all_available):
    register(op, Backend.CUDA, only_when_forced=True)(lambda: "cuda")
    assert resolve(op, CUDA)() == "reference"
    with backend("cuda"):
        assert resolve(op, CUDA)() == "cuda"


def test_unavailable_backend_is_passed_over(op, monkeypatch):
    monkeypatch.setattr(backends, "_status", lambda b: BackendStatus(b is Backend.REFERENCE, "for the test"))
    assert resolve(op, CPU)() == "reference"


def test_arguments_a_backend_cannot_take(op):
    cannot = {Backend.NATIVE: "it takes no float64"}
    assert resolve(op, CPU, cannot=cannot)() == "reference"
    with (
        backend("native"),
        pytest.raises(BackendError, match=r"'native'.*'op'.*'cpu'.*float64.*would serve: reference"),
    ):
        resolve(op, CPU, cannot=cannot)


def test_blocks_nest_and_restore(op):
    assert forced_backend() is None
    with backend("reference"):
        assert resolve(op, CPU)() == "reference"
        with backend(Backend.NATIVE):
            assert resolve(op, CPU)() == "native"
        assert resolve(op, CPU)() == "reference"
        with pytest.raises(ValueError, match="from inside"), backend("native"):
            raise ValueError("from inside")
        assert forced_backend() is Backend.REFERENCE
    assert forced_backend() is None


def test_another_thread_is_not_forced(op):
    seen = []
    with backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(resolve(op, CPU)()))
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_environment_variable_forces_and_a_block_wins_over_it(op, monkeypatch):
    monkeypatch.setenv("CIT_FAST_BACKEND", "reference")
    assert resolve(op, CPU)() == "reference"
    with backend("native"):
        assert resolve(op, CPU)() == "native"
    monkeypatch.setenv("CIT_FAST_BACKEND", "quick")
    with pytest.raises(BackendError, match=r"CIT_FAST_BACKEND.*'quick'.*accepted: reference, native, triton, cuda"):
        resolve(op, CPU)


def test_unknown_name_is_refused():
    with pytest.raises(BackendError, match="unknown backend 'fast'"), backend("fast"):
        pass


def test_unavailable_backend_is_refused_at_the_block(monkeypatch):
    monkeypatch.setattr(backends, "_status", lambda b: BackendStatus(b is Backend.REFERENCE, "no CUDA device"))
    with (
        pytest.raises(BackendError, match=r"'cuda' is not available: no CUDA device; available: reference"),
        backend("cuda"),
    ):
        pass


def test_forced_backend_never_falls_through(op, monkeypatch, all_available):
    with backend("native"), pytest.raises(BackendError, match=r"'native'.*'cuda'.*does not run on cuda tensors"):
        resolve(op, CUDA)
    with backend("native"), pytest.raises(BackendError, match="no implementation of 'unheard'"):
        resolve("unheard", CPU)
    monkeypatch.setenv("CIT_FAST_BACKEND", "triton")
    monkeypatch.setattr(backends, "_status", lambda b: BackendStatus(b is not Backend.TRITON, "no CUDA device"))
    with pytest.raises(BackendError, match=r"'triton'.*no CUDA device"):
        resolve(op, CUDA)


def test_op_without_any_implementation():
    with pytest.raises(BackendError, match="'unheard' has no backend for device 'cpu'"):
        resolve("unheard", CPU)


def test_status_when_the_native_module_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "_import_error", lambda module: f"No module named {module!r}")
    status = backends._native_status()
    assert not status.available
    assert "not built" in status.reason


def test_import_error_is_one_line():
    problem = backends._import_error("cit_fast._no_such_module")
    assert problem is not None
    assert "_no_such_module" in problem


@pytest.mark.parametrize("has_device", [False, True])
def test_triton_status(monkeypatch, has_device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(backends, "find_spec", lambda _: object())
    on_gpu = "Some GPU; its kernels never ran on a GPU yet: used for key-part information gain, else only when forced"
    assert backends._triton_status() == BackendStatus(has_device, on_gpu if has_device else "no CUDA device")
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    assert backends._triton_status() == BackendStatus(False, "triton is not installed")


def test_cuda_status(monkeypatch):
    module = SimpleNamespace(architectures=lambda: "sm_80, PTX 90", why_not=lambda device: "")
    monkeypatch.setattr(cit_fast, "_native_cuda", module, raising=False)
    monkeypatch.setattr(backends, "find_spec", lambda _: object())
    monkeypatch.setattr(backends, "_import_error", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built = "built for sm_80, PTX 90; never run on a GPU yet: used only when forced"
    assert backends._cuda_status() == BackendStatus(False, f"no CUDA device ({built})")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert backends._cuda_status() == BackendStatus(True, f"Some GPU, {built}")
    module.why_not = lambda device: "no kernel image is available"
    assert backends._cuda_status() == BackendStatus(False, f"Some GPU: no kernel image is available ({built})")

    monkeypatch.setattr(backends, "_import_error", lambda _: "undefined symbol")
    assert backends._cuda_status() == BackendStatus(False, "cit_fast._native_cuda cannot be loaded: undefined symbol")
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    assert backends._cuda_status() == BackendStatus(False, "not built: this installation has no CUDA kernels")


def test_forced_backend_reaches_a_real_op():
    tensors = [torch.ones(3, dtype=torch.float64)]
    with backend("native"), pytest.raises(BackendError, match=r"'balance_ema_'.*float64"):
        balance_ema_(tensors, [torch.zeros(3)], tensors, tensors)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("baseline", "True baseline SIMD, 1 threads"), ("sse9", "False CIT_FAST_SIMD=sse9: unknown; accepted: baseline")],
)
def test_simd_environment_variable(value, expected, monkeypatch):
    monkeypatch.setenv("CIT_FAST_SIMD", value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = "from cit_fast import available_backends as a; s = a()['native']; print(s.available, s.reason)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(expected)
