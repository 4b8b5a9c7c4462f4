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
from cit_fast.ops.backends import (
    Backend,
    BackendStatus,
    Work,
    available_backends,
    backend,
    forced_backend,
    register,
    resolve,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def op(monkeypatch):
    """A scratch op with a reference and a native implementation."""
    monkeypatch.setattr(backends, "_implementations", {})
    monkeypatch.setattr(backends, "_by_way_of_cpu", set())
    monkeypatch.setattr(backends, "_proofs", [lambda op, device, usable, work: usable])
    register("op", Backend.REFERENCE)(lambda: "reference")
    register("op", Backend.NATIVE)(lambda: "native")
    return "op"


@pytest.fixture
def all_available(monkeypatch):
    monkeypatch.setattr(backends, "_status", lambda *_: BackendStatus(True, "for the test"))


def test_available_backends_gives_a_reason_for_each():
    statuses = available_backends()
    assert list(statuses) == ["reference", "torch", "native", "triton", "cuda"]
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


def test_the_proof_decides_between_kernels(op, all_available, monkeypatch):
    register(op, Backend.TRITON)(lambda: "triton")
    register(op, Backend.CUDA)(lambda: "cuda")
    register(op, Backend.TORCH)(lambda: "torch")
    asked = []

    def proof(op, device, usable, work):
        asked.append((op, device, usable, work))
        return usable[1:] if work.elements else [Backend.TORCH, Backend.REFERENCE]

    monkeypatch.setattr(backends, "_proofs", [proof])
    assert resolve(op, CUDA)() == "torch"
    assert resolve(op, CUDA, work=lambda: Work(torch.bfloat16, 7))() == "triton"
    usable = [Backend.CUDA, Backend.TRITON, Backend.TORCH, Backend.REFERENCE]
    assert asked == [(op, CUDA, usable, Work()), (op, CUDA, usable, Work(torch.bfloat16, 7))]
    with backend("cuda"):
        assert resolve(op, CUDA)() == "cuda"
    cannot = {Backend.CUDA: "no", Backend.TRITON: "no"}
    assert resolve(op, CUDA, cannot=cannot)() == "torch"
    assert len(asked) == 2  # neither where one is forced, nor where no kernel could serve
    monkeypatch.setattr(backends, "_proofs", [])
    assert resolve(op, CUDA)() == "torch"


def test_native_by_way_of_the_cpu(op, all_available):
    assert resolve(op, CUDA)() == "reference"
    register(op, Backend.NATIVE, by_way_of_cpu=True)(lambda: "native")
    assert resolve(op, CUDA)() == "native"
    register(op, Backend.TORCH)(lambda: "torch")
    assert resolve(op, CUDA)() == "torch"
    assert resolve(op, CPU)() == "native"


def test_unavailable_backend_is_passed_over(op, monkeypatch):
    monkeypatch.setattr(
        backends, "_status", lambda b, device=None: BackendStatus(b is Backend.REFERENCE, "for the test")
    )
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
    with pytest.raises(
        BackendError, match=r"CIT_FAST_BACKEND.*'quick'.*accepted: reference, torch, native, triton, cuda"
    ):
        resolve(op, CPU)


def test_unknown_name_is_refused():
    with pytest.raises(BackendError, match="unknown backend 'fast'"), backend("fast"):
        pass


def test_unavailable_backend_is_refused_at_the_block(monkeypatch):
    monkeypatch.setattr(
        backends, "_status", lambda b, device=None: BackendStatus(b is Backend.REFERENCE, "no CUDA device")
    )
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
    monkeypatch.setattr(
        backends, "_status", lambda b, device=None: BackendStatus(b is not Backend.TRITON, "no CUDA device")
    )
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


@pytest.fixture
def pretended_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)


def test_triton_status(monkeypatch, pretended_gpu):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "version", lambda package: "3.7.1")
    good = BackendStatus(True, "Some GPU; checked at first use on each kind of device")
    assert backends._triton_status(0) == good
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    refused = "Some GPU: its compute capability is 7.5; the kernels need 8.0"
    assert backends._triton_status(0) == BackendStatus(False, refused)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backends._triton_status(0) == BackendStatus(False, "Some GPU: the kernels were never tried on ROCm")
    monkeypatch.setattr(backends, "version", lambda package: "3.5.1")
    assert backends._triton_status(0) == BackendStatus(False, "triton 3.5.1 is too old; at least 3.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends._triton_status(0) == BackendStatus(False, "no CUDA device")
    monkeypatch.setattr(backends, "version", lambda package: None)
    assert backends._triton_status(0) == BackendStatus(False, "triton is not installed")


def test_a_status_is_of_the_tensors_device(monkeypatch, pretended_gpu):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "version", lambda package: "3.7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5) if index == 1 else (9, 0))
    monkeypatch.setattr(backends, "_kept_kernel_status", backends._kernel_status)
    status = [backends._status(Backend.TRITON, torch.device("cuda", index)).available for index in range(3)]
    assert status == [True, False, True]


def test_cuda_status(monkeypatch, pretended_gpu):
    module = SimpleNamespace(architectures=lambda: "sm_80, PTX 90", why_not=lambda device: "")
    monkeypatch.setattr(cit_fast, "_native_cuda", module, raising=False)
    monkeypatch.setattr(backends, "find_spec", lambda _: object())
    monkeypatch.setattr(backends, "_import_error", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built = "built for sm_80, PTX 90; checked at first use on each kind of device"
    assert backends._cuda_status(None) == BackendStatus(False, f"no CUDA device ({built})")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert backends._cuda_status(None) == BackendStatus(True, f"Some GPU, {built}")
    module.why_not = lambda device: "no kernel image is available"
    assert backends._cuda_status(None) == BackendStatus(False, f"Some GPU: no kernel image is available ({built})")

    monkeypatch.setattr(backends, "_import_error", lambda _: "undefined symbol")
    assert backends._cuda_status(None) == BackendStatus(
        False, "cit_fast._native_cuda cannot be loaded: undefined symbol"
    )
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    assert backends._cuda_status(None) == BackendStatus(False, "not built: this installation has no CUDA kernels")


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
