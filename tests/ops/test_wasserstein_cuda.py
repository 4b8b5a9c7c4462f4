"""The CUDA kernels of wasserstein_matrix without a GPU: they compile, and their teams of blocks run on the host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pytest_process import run_tests

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CASES = ROOT / "tests" / "kernels" / "wasserstein_cases.py"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
CXX = os.environ.get("CXX") or shutil.which("g++")
# At most, so that blocks of 512 threads together share a processor; a cluster's block has one to itself.
REGISTERS = {**{f"block_kernelILi{threads}E": 128 for threads in (64, 128, 256)}, "cluster_kernel": 255}


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    output = tmp_path / "kernels.cubin"
    command = [NVCC, "-std=c++17", "--fmad=false", f"-I{CSRC}", "-O3", "-cubin", f"-arch={architecture}"]
    command += ["-Xptxas", "-v", str(CSRC / "cuda/wasserstein/wasserstein.cu"), "-o", str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = re.split(r"Compiling entry function '", done.stderr)[1:]
    assert len(about) == len(REGISTERS)
    for name, most in REGISTERS.items():
        (text,) = (each for each in about if name in each.partition("'")[0])
        assert "0 bytes spill stores, 0 bytes spill loads" in text, name
        assert int(re.findall(r"Used (\d+) registers", text)[0]) <= most, name
    assert output.stat().st_size > 0


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
@pytest.mark.slow
def test_teams_on_the_host(tmp_path: Path) -> None:
    library = tmp_path / "teams.so"
    source = str(CSRC / "cuda/wasserstein/wasserstein_host.cpp")
    command = [CXX, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{CSRC}", source]
    subprocess.run([*command, "-o", str(library)], check=True)
    run_tests(CASES, CIT_FAST_CASES="cuda", CIT_FAST_HOST_LIBRARY=str(library))
