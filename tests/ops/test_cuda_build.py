"""The CUDA target without a GPU: it compiles, its arithmetic holds on the host, and the build never depends on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cit_fast import available_backends, backend
from cit_fast.backends import Backend, resolve
from cit_fast.errors import BackendError
from cit_fast.ops import _balance_ema_backends as kernels

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
CPU_SOURCES = ["cpu/balance_ema.cpp", "cpu/balance_ema_kernels.cpp", "cpu/dispatch.cpp"]

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
    kernels = re.findall(r"Compiling entry function '(\S+)'", done.stderr)
    assert len(kernels) == 3
    for name in ("norms_kernel", "weights_kernel", "apply_kernel"):
        assert any(name in kernel for kernel in kernels)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert memory == [("0", "0", "0")] * 3
    # At 80 registers three blocks of 256 threads fit: 24 warps hide the latency of the memory.
    assert all(int(used) <= 80 for used in re.findall(r"Used (\d+) registers", done.stderr))
    assert output.stat().st_size > 0


@needs_nvcc
@pytest.mark.slow
def test_loads_and_stores_are_16_bytes_wide(tmp_path: Path) -> None:
    nvcc("-O3", "-ptx", "-arch=sm_80", str(CSRC / "cuda/balance_ema.cu"), "-o", str(tmp_path / "kernels.ptx"))
    ptx = (tmp_path / "kernels.ptx").read_text()
    norms, apply = (ptx[ptx.index(f"{name}_kernel") :] for name in ("norms", "apply"))
    norms, apply = norms[: norms.index("ret;")], apply[: apply.index("ret;")]
    assert len(re.findall(r"ld\.global\.v4", norms)) >= 2 + 3 * 3  # e; p, g and g_prev as float32 or 16-bit
    assert len(re.findall(r"st\.global\.v4", norms)) >= 2 + 1
    assert len(re.findall(r"ld\.global\.v4", apply)) >= 2 + 3
    assert len(re.findall(r"st\.global\.v4", apply)) >= 2


@needs_nvcc
@pytest.mark.slow
def test_arithmetic_on_the_host_agrees_with_the_cpu_kernels(tmp_path: Path) -> None:
    program = tmp_path / "balance_ema_test"
    sources = [str(CSRC / name) for name in ("cuda/balance_ema_test.cu", *CPU_SOURCES)]
    nvcc("-O2", "-arch=sm_80", "-DCIT_SIMD_NAMESPACE=simd_baseline", *sources, "-o", str(program))
    done = subprocess.run([str(program)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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

    assert _native_cuda.CHUNK == 16384
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


def test_cuda_tensors_get_the_reference_unless_cuda_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    from cit_fast import backends, reference

    monkeypatch.setattr(backends, "_status", lambda which: backends.BackendStatus(True, "pretended"))
    device = torch.device("cuda")
    assert resolve("balance_ema_", device) is reference.balance_ema_
    assert resolve("flush_balance_ema_", device) is reference.flush_balance_ema_
    with backend("cuda"):
        assert resolve("balance_ema_", device) is kernels._cuda_balance_ema
        assert resolve("flush_balance_ema_", device) is kernels._cuda_flush_balance_ema
        with pytest.raises(BackendError, match="no implementation of 'adamw_balance_ema_'"):
            resolve("adamw_balance_ema_", device)


def test_first_chunks() -> None:
    params = [torch.empty(size) for size in (0, 1, 16384, 16385, 0, 40_000)]
    assert kernels._first_chunks(params, 16384) == [0, 0, 1, 2, 4, 4, 7]


@pytest.mark.parametrize(("kind", "which"), [("cpu", Backend.NATIVE), ("cuda", Backend.CUDA)])
def test_kernels_refuse_what_they_cannot_walk(kind: str, which: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BACKENDS", {"cpu": which})
    good, double = torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.float64)
    assert kernels.kernels_cannot([good], [good], [good]) == {}
    assert kernels.kernels_cannot([double], [good], [double]) == {
        which: "it keeps averages and moments in float32, not torch.float64"
    }
    assert kernels.kernels_cannot([good], [double], [good]) == {which: "it takes no torch.float64"}
    assert "not dense" in kernels.kernels_cannot([good], [good], [torch.zeros(4, 12)[:, ::2]])[which]


def test_cuda_calls_pass_the_table_and_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python side of a call, with the GPU replaced by something that writes down what it is given."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    import cit_fast

    calls: list[tuple[list[int], dict[str, object]]] = []
    tables: list[torch.Tensor] = []

    def to_device(integers: list[int], device: torch.device) -> torch.Tensor:
        tables.append(torch.tensor(integers))
        return torch.empty(len(integers), dtype=torch.int64, device="meta")

    def record(table: int, **options: object) -> None:
        calls.append((tables[-1].tolist(), options))

    module = SimpleNamespace(CHUNK=16384, balance_ema=record, flush_balance_ema=record)
    monkeypatch.setattr(cit_fast, "_native_cuda", module, raising=False)
    monkeypatch.setattr(kernels, "_to_device", to_device)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))

    p, e, g = torch.zeros(20_000, dtype=torch.bfloat16), torch.zeros(20_000), torch.zeros(20_000, dtype=torch.float16)
    weights = kernels._cuda_balance_ema([p, p], [e, e], [g, g], [], "fixed", 0.9, 0.01)
    row = [20_000, p.data_ptr(), 1, e.data_ptr(), g.data_ptr(), 2, 0, 0]
    table, options = calls.pop()
    assert table == row + row + [0, 2, 4]
    assert options["count"] == 2
    assert options["chunks"] == 4
    assert options["rule"] == 2
    assert options["stream"] == 77
    assert options["alphas"] == weights.alphas.data_ptr()
    assert weights.fallbacks.dtype == torch.bool

    alphas = torch.zeros(1)
    kernels._cuda_flush_balance_ema([p], [e], alphas)
    table, options = calls.pop()
    assert table[:4] == row[:4]
    assert table[8:] == [0, 2]
    assert options["alphas"] == alphas.data_ptr()
