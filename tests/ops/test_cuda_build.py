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
from cit_fast.errors import BackendError, CitFastError
from cit_fast.ops import adamw_balance_ema_capturable_
from cit_fast.ops.backends import resolve
from cit_fast.ops.balance_ema import cuda as kernels

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
KERNELS = str(CSRC / "cuda/balance_ema/balance_ema.cu")
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
        "-O3",
        "-cubin",
        f"-arch={architecture}",
        "-Xptxas",
        "-v",
        KERNELS,
        "-o",
        str(output),
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
    nvcc("-O3", "-ptx", "-arch=sm_80", KERNELS, "-o", str(tmp_path / "kernels.ptx"))
    ptx = (tmp_path / "kernels.ptx").read_text()
    # A stream takes two accesses as float32 and one with 16-bit elements; the slots are read by one more.
    for name, loads, stores in (("norms", 4, 1), ("adamw", 6, 5), ("apply", 2, 1)):
        kernel = ptx[ptx.index(f"{name}_kernel") :]
        kernel = kernel[: kernel.index("\n}")]
        assert len(re.findall(r"ld\.global(?:\.cg)?\.v4", kernel)) >= 3 * loads
        assert len(re.findall(r"st\.global(?:\.wb)?\.v4", kernel)) >= 3 * stores


@needs_nvcc
@pytest.mark.slow
def test_blocks_on_the_host_agree_with_the_definition(tmp_path: Path) -> None:
    program = tmp_path / "balance_ema_test"
    nvcc("-O1", "-arch=sm_80", str(CSRC / "cuda/balance_ema/balance_ema_test.cu"), "-o", str(program))
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

    assert (_native_cuda.STREAMS, _native_cuda.SLOT_BYTES, _native_cuda.STEP_BYTES) == (6, 16, 36)
    assert _native_cuda.architectures()
    reason = available_backends()["cuda"].reason
    assert f"built for {_native_cuda.architectures()}; checked at first use on each kind of device" in reason


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_forcing_it_is_an_error() -> None:
    from cit_fast import _native_cuda

    assert _native_cuda.why_not(0)
    with pytest.raises(BackendError, match="'cuda' is not available: no CUDA device"), backend("cuda"):
        pass


def test_cuda_tensors_get_the_cuda_kernels_where_they_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    from cit_fast.ops import backends
    from cit_fast.ops.balance_ema import flat

    monkeypatch.setattr(backends, "_status", lambda *_: backends.BackendStatus(True, "pretended"))
    device = torch.device("cuda")
    for op in ("balance_norms_", "balance_ema_", "adamw_balance_ema_", "flush_balance_ema_"):
        ours = getattr(kernels, f"_{op[:-1]}")
        for proven, chosen in ((True, ours), (False, getattr(flat, op))):
            kept = slice(None) if proven else slice(2, None)
            monkeypatch.setattr(backends, "_proofs", [lambda op, device, usable, work, kept=kept: usable[kept]])
            assert resolve(op, device) is chosen
        with backend("cuda"):
            assert resolve(op, device) is ours


def test_capturable_adamw_without_a_gpu_is_a_clear_error() -> None:
    p, one = [torch.ones(4)], torch.ones(())
    with pytest.raises(BackendError, match="adamw_balance_ema_capturable_: the CUDA kernels cannot serve"):
        adamw_balance_ema_capturable_(p, p, p, p, p, p, torch.zeros(1), step=one, lr=one)


def test_capturable_adamw_checks_its_arguments() -> None:
    p, one = [torch.ones(4)], torch.ones(())
    lists = (p, p, p, p, p, p, torch.zeros(1))
    with pytest.raises(CitFastError, match="step must be one float32 or int64 on cpu"):
        adamw_balance_ema_capturable_(*lists, step=one.double(), lr=one)
    with pytest.raises(CitFastError, match="lr must be one float32 or float64 on cpu"):
        adamw_balance_ema_capturable_(*lists, step=one, lr=torch.ones(2))
    with pytest.raises(CitFastError, match="params is empty"):
        adamw_balance_ema_capturable_([], [], [], [], [], [], torch.zeros(0), step=one, lr=one)
