"""The CUDA target without a GPU: it compiles, its arithmetic holds on the host, and the build never depends on it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from array import array
from collections import OrderedDict
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cit_fast import available_backends, backend
from cit_fast.errors import BackendError, CitFastError
from cit_fast.ops import adamw_balance_ema_capturable_
from cit_fast.ops.backends import resolve
from cit_fast.ops.balance_ema import cuda as kernels

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
REGISTERS = {  # at most, so that 2, 3 or 4 blocks of 256 threads fit a processor and hide the latency of the memory
    "norms_kernel": 80,
    "adamw_kernel": 128,
    "apply_kernel": 64,
    "upload_kernel": 32,
    "step_kernel": 64,
}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_cmake = pytest.mark.skipif(
    not shutil.which("cmake") or find_spec("pybind11") is None, reason="no cmake or no pybind11"
)
needs_module = pytest.mark.skipif(find_spec("cit_fast._native_cuda") is None, reason="built without CUDA kernels")


def nvcc(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "--fmad=false", f"-I{CSRC}", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    output = tmp_path / "kernels.cubin"
    done = nvcc(
        "-O3", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", str(CSRC / "cuda/balance_ema.cu"), "-o", str(output)
    )
    about = re.split(r"Compiling entry function '", done.stderr)[1:]
    assert len(about) == len(REGISTERS)
    for name, most in REGISTERS.items():
        (text,) = (each for each in about if name in each.partition("'")[0])
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text
        assert int(re.findall(r"Used (\d+) registers", text)[0]) <= most, name
    assert output.stat().st_size > 0


@needs_nvcc
@pytest.mark.slow
def test_loads_and_stores_are_16_bytes_wide(tmp_path: Path) -> None:
    nvcc("-O3", "-ptx", "-arch=sm_80", str(CSRC / "cuda/balance_ema.cu"), "-o", str(tmp_path / "kernels.ptx"))
    ptx = (tmp_path / "kernels.ptx").read_text()
    # A stream takes two accesses as float32 and one with 16-bit elements; the slots are read by one more.
    for name, loads, stores in (("norms", 4, 1), ("adamw", 6, 5), ("apply", 2, 1)):
        kernel = ptx[ptx.index(f"{name}_kernel") :]
        kernel = kernel[: kernel.index("\n}")]
        assert len(re.findall(r"ld\.global(?:\.cg)?\.v4", kernel)) >= 3 * loads
        assert len(re.findall(r"st\.global\.v4", kernel)) >= 3 * stores


@needs_nvcc
@pytest.mark.slow
def test_blocks_on_the_host_agree_with_the_definition(tmp_path: Path) -> None:
    program = tmp_path / "balance_ema_test"
    nvcc("-O1", "-arch=sm_80", str(CSRC / "cuda/balance_ema_test.cu"), "-o", str(program))
    done = subprocess.run([str(program)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def configure(folder: Path, *definitions: str) -> subprocess.CompletedProcess[str]:
    """Configure with an nvcc that fails on everything."""
    broken = folder / "nvcc"
    broken.write_text("#!/bin/sh\necho 'broken toolkit' >&2\nexit 1\n")
    broken.chmod(0o755)
    import pybind11

    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *(f"-D{each}" for each in definitions)]
    environment = {**os.environ, "CUDACXX": str(broken)}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


@needs_cmake
@pytest.mark.slow
def test_a_broken_toolkit_leaves_the_cpu_module(tmp_path: Path) -> None:
    done = configure(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels left out: no nvcc that works" in done.stdout


@needs_cmake
@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "message"), [("ON", "CIT_FAST_CUDA=ON: no nvcc"), ("perhaps", "accepted are AUTO, ON and OFF")]
)
def test_on_is_an_error_without_a_toolkit(value: str, message: str, tmp_path: Path) -> None:
    done = configure(tmp_path, f"CIT_FAST_CUDA={value}")
    assert done.returncode != 0
    assert message in done.stderr


@needs_cmake
@pytest.mark.slow
def test_off_does_not_look_for_a_toolkit(tmp_path: Path) -> None:
    done = configure(tmp_path, "CIT_FAST_CUDA=OFF")
    assert done.returncode == 0, done.stderr
    assert "Looking for a CUDA compiler" not in done.stdout


@needs_module
def test_module_loads_and_says_what_it_is() -> None:
    from cit_fast import _native_cuda

    assert (_native_cuda.STREAMS, _native_cuda.SLOT_BYTES, _native_cuda.STEP_BYTES) == (6, 16, 32)
    assert _native_cuda.architectures()
    reason = available_backends()["cuda"].reason
    assert f"built for {_native_cuda.architectures()}; never run on a GPU yet: used only when forced" in reason


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_forcing_it_is_an_error() -> None:
    from cit_fast import _native_cuda

    assert _native_cuda.why_not(0)
    with pytest.raises(BackendError, match="'cuda' is not available: no CUDA device"), backend("cuda"):
        pass


def test_cuda_tensors_get_the_cuda_kernels_only_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    from cit_fast.ops import backends

    monkeypatch.setattr(backends, "_status", lambda which: backends.BackendStatus(True, "pretended"))
    device = torch.device("cuda")
    for op in ("balance_norms_", "balance_ema_", "adamw_balance_ema_", "flush_balance_ema_"):
        ours = getattr(kernels, f"_{op[:-1]}")
        assert resolve(op, device) is not ours
        with backend("cuda"):
            assert resolve(op, device) is ours


# The Python side of a call: the kernels replaced by something that writes down what it is given, the table in the
# memory of the host.


class Recorder:
    """Stands in for cit_fast._native_cuda."""

    def __init__(self) -> None:
        from cit_fast import _native_cuda

        self.layout = _native_cuda.layout
        self.STREAMS, self.SLOT_BYTES, self.STEP_BYTES = 6, 16, 32
        self.uploads: list[list[int]] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def upload(self, target: int, words: list[int], *, device: int, stream: int) -> None:
        source = array("q", words)
        ctypes.memmove(target, source.buffer_info()[0], 8 * len(words))
        self.uploads.append(words)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, options))

    def last(self, name: str) -> tuple[list[int], dict[str, Any]]:
        """The table and the arguments of the last call, which was to ``name``."""
        called, options = self.calls[-1]
        assert called == name
        words = 6 * options["count"] + 5 * options["count"] + options["count"] + 1
        return list((ctypes.c_int64 * words).from_address(options["table"])), options


class Gpu:
    """What torch.cuda says in the tests below."""

    stream = 77
    capturing = False


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(device_index=3, cuda_stream=gpu.stream)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(kernels, "_plans", OrderedDict())
    return gpu


@pytest.fixture
def recorder(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    import cit_fast

    recorder = Recorder()
    monkeypatch.setattr(cit_fast, "_native_cuda", recorder, raising=False)
    return recorder


@needs_module
def test_calls_pass_the_table_and_the_stream(recorder: Recorder) -> None:
    p, e, g = (torch.zeros(2, 10_000, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16))
    weights = kernels._balance_ema([p, p], [e, e], [g, g], [], "fixed", 0.9, 0.01, "tensor", True, 5)
    table, options = recorder.last("balance_ema")
    addresses = [each.data_ptr() for each in (p, p, e, e, g, g)] + [0] * 6
    dtypes = 1 + (2 << 16)
    # Per tensor: rows, row size, first row, first slot, dtypes; a row of 20,000 is three pieces. Then the blocks.
    assert table == [*addresses, 1, 20_000, 0, 0, dtypes, 1, 20_000, 1, 3, dtypes, 0, 3, 6]
    assert (options["device"], options["stream"], options["count"], options["blocks"]) == (3, 77, 2, 6)
    assert (options["rule"], options["decay"], options["store_grads"], options["seed"]) == (2, 0.9, True, 5)
    assert [options[name] for name in ("alphas", "fallbacks", "norms")] == [each.data_ptr() for each in weights]
    assert weights.fallbacks.dtype == torch.bool
    assert weights.norms.shape == (2, 3)

    alphas = torch.zeros(2)
    kernels._flush_balance_ema([p], [e], alphas, "row", 9)
    table, options = recorder.last("flush_balance_ema")
    assert table == [p.data_ptr(), e.data_ptr(), 0, 0, 0, 0, 2, 10_000, 0, 0, 1, 0, 4]
    assert (options["alphas"], options["seed"]) == (alphas.data_ptr(), 9)

    norms = kernels._balance_norms([p], [e], [g], [e], "row", False)
    table, options = recorder.last("balance_norms")
    assert table[:4] == [each.data_ptr() for each in (p, e, g, e)]
    assert (options["norms"], options["store_grads"]) == (norms.data_ptr(), False)

    weights = kernels._adamw_balance_ema(
        *([each] for each in (p, g, e, e, e, g)),
        alphas,
        7,
        0.1,
        0.9,
        0.99,
        1e-8,
        0.0,
        "paper",
        0.9,
        0.1,
        "row",
        True,
        4,
    )
    table, options = recorder.last("adamw_balance_ema")
    assert table[:6] == [each.data_ptr() for each in (p, e, g, g, e, e)]
    assert table[10] == 1 + (2 << 16) + (2 << 24)
    assert (options["step"], options["lr"], options["beta2"], options["alphas"]) == (7, 0.1, 0.99, alphas.data_ptr())
    assert weights.alphas is alphas


@needs_module
def test_a_table_is_uploaded_only_when_it_changes(recorder: Recorder, gpu: Gpu) -> None:
    p, e, g, new_g = (torch.zeros(4, 8) for _ in range(4))

    def uploads(grad: torch.Tensor, granularity: str = "tensor") -> int:
        recorder.uploads.clear()
        kernels._balance_norms([p], [e], [grad], [g], granularity, True)
        return sum(map(len, recorder.uploads))

    assert uploads(g) == 6 + 5 + 2
    assert uploads(g) == 0
    assert uploads(new_g) == 6  # the addresses alone
    assert recorder.last("balance_norms")[0][2] == new_g.data_ptr()
    assert uploads(new_g, "row") == 13
    table = recorder.calls[-2][1]["table"]
    gpu.stream = 78
    assert uploads(new_g) == 13
    assert recorder.calls[-1][1]["table"] != table  # another stream must not write to it
    gpu.stream = 77
    assert uploads(new_g) == 0
    assert recorder.calls[-1][1]["table"] == table
    assert uploads(new_g.view(torch.int32).view(torch.float32)) == 0
    e_as_bfloat16 = torch.zeros(4, 8, dtype=torch.bfloat16)
    kernels._balance_norms([p], [e_as_bfloat16], [new_g], [g], "tensor", True)
    assert recorder.last("balance_norms")[0][10] == 1 << 8


@needs_module
def test_the_number_of_tables_is_limited(recorder: Recorder) -> None:
    tensors = [torch.zeros(3) for _ in range(kernels._PLANS + 5)]
    for tensor in tensors:
        kernels._balance_norms([tensor], [tensor], [tensor], [tensor], "tensor", True)
    assert len(kernels._plans) == kernels._PLANS


@needs_module
def test_a_captured_call_has_a_table_of_its_own(recorder: Recorder, gpu: Gpu) -> None:
    p = torch.zeros(4, 8)
    kernels._balance_norms([p], [p], [p], [p], "tensor", True)
    (eager,) = kernels._plans.values()
    gpu.capturing = True
    recorder.uploads.clear()
    kernels._balance_norms([p], [p], [p], [p], "tensor", True)
    assert len(recorder.uploads) == 1
    assert list(kernels._plans.values()) == [eager]


@needs_module
def test_what_a_graph_would_freeze_is_refused(gpu: Gpu) -> None:
    gpu.capturing = True
    p, e = [torch.zeros(4)], [torch.zeros(4, dtype=torch.bfloat16)]
    with pytest.raises(CitFastError, match="balance_ema_: a CUDA graph would round bfloat16 averages with the same"):
        kernels._balance_ema(p, e, p, p, "paper", 0.9, 0.1, "tensor", True, 0)
    with pytest.raises(CitFastError, match="flush_balance_ema_: a CUDA graph would round"):
        kernels._flush_balance_ema(p, e, torch.zeros(1), "tensor", 0)
    adamw = (1, 0.1, 0.9, 0.99, 1e-8, 0.0)
    with pytest.raises(CitFastError, match="this very step count"):
        kernels._adamw_balance_ema(p, p, p, p, p, p, torch.zeros(1), *adamw, "paper", 0.9, 0.1, "tensor", True, 0)


def test_capturable_adamw_without_a_gpu_is_a_clear_error() -> None:
    p, one = [torch.ones(4)], torch.ones(())
    with pytest.raises(BackendError, match="adamw_balance_ema_capturable_: the CUDA kernels cannot serve"):
        adamw_balance_ema_capturable_(p, p, p, p, p, p, torch.zeros(1), step=one, lr=one)


@needs_module
def test_capturable_adamw_checks_its_arguments(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    p = [torch.ones(4)]
    lists = (p, p, p, p, p, p, torch.zeros(1))
    one = torch.ones(())
    with pytest.raises(CitFastError, match="step must be one float32 or int64 on cpu"):
        kernels.adamw_balance_ema_capturable_(*lists, step=one.double(), lr=one)
    with pytest.raises(CitFastError, match="lr must be one float32 or float64 on cpu"):
        kernels.adamw_balance_ema_capturable_(*lists, step=one, lr=torch.ones(2))
    with pytest.raises(CitFastError, match="params is empty"):
        kernels.adamw_balance_ema_capturable_([], [], [], [], [], [], torch.zeros(0), step=one, lr=one)
    with pytest.raises(BackendError, match="it does not run on cpu tensors"):
        kernels.adamw_balance_ema_capturable_(*lists, step=one, lr=one)

    monkeypatch.setattr(kernels, "_check_kernels", lambda *_: None)
    recorder.calls.clear()
    step, lr = torch.ones((), dtype=torch.int64), torch.full((1,), 0.1)
    version = p[0]._version
    weights = kernels.adamw_balance_ema_capturable_(*lists, step=step, lr=lr, seed=8)
    (name, prepared), (_, options) = recorder.calls
    assert name == "step_on_device"
    assert (prepared["step"], prepared["step_is_float"]) == (step.data_ptr(), False)
    assert (prepared["lr"], prepared["lr_is_float"], prepared["seed"]) == (lr.data_ptr(), True, 8)
    assert options["step_on_device"] != 0
    assert weights.alphas is lists[-1]
    assert p[0]._version > version  # autograd would notice
