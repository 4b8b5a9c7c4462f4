"""What an installed wheel has to do, with nothing of a checkout or a compiler around.

``python smoke.py`` tries the ops and the command line, ``python smoke.py MODEL`` a run of two stages, too, on the tiny
language model in that folder, and ``python smoke.py --module FILE`` only whether the native module loads, which needs
no torch. It uses what is installed and the standard library.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = """
import importlib.util, os, re, sys

def native():
    spec = importlib.util.spec_from_file_location("cit_fast._native", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
# Both parallel regions start threads of the one runtime: its team is reused, and two runtimes would have a team each.
ONE_OPENMP = """
torch.set_num_threads(3)
from cit_fast.ops import wasserstein_matrix
a = torch.randn(1 << 21)
a.add(a).sum()
before = len(os.listdir("/proc/self/task"))
wasserstein_matrix([torch.randn(64, 32) for _ in range(12)])
after = len(os.listdir("/proc/self/task"))
maps = open("/proc/self/maps").read()
found = {os.path.realpath(path) for path in re.findall(r"\\S*/lib(?:gomp|iomp5|omp)\\b\\S*\\.so\\S*", maps)}
assert len(found) == 1, f"more than one OpenMP runtime: {found}"
assert "/torch/" in found.copy().pop(), found
assert before == after, (before, after)
print(*found)
"""


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cit_fast(*arguments: str, cwd: str | None = None) -> str:
    command = [str(Path(sys.executable).with_name("cit-fast")), *arguments]
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def native_file() -> str:
    """Where the native module is installed, found without importing torch."""
    spec = importlib.util.find_spec("cit_fast")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("_native.*.so")
    return str(file)


def expected_level() -> str:
    """The widest instruction set that this processor and our dispatch both know."""
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    if platform.machine() != "x86_64" or not {"avx2", "fma", "f16c"} <= flags:
        return "baseline"
    return "avx512" if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags else "avx2"


def check_module(file: str) -> None:
    levels = run_python(f"{LOAD}print(*native().simd_levels())", file).split()
    assert levels[-1] == expected_level(), levels
    print(f"native module: {', '.join(levels)}")


def check_ops() -> None:
    import torch

    from cit_fast import _native, backend
    from cit_fast.ops import wasserstein_matrix

    assert "site-packages" in str(_native.__file__), _native.__file__
    points = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (1, 7, 40)]
    with backend("reference"):
        wanted = wasserstein_matrix(points).distances
    for level in _native.simd_levels():
        _native.set_simd_level(level)
        with backend("native"):
            torch.testing.assert_close(wasserstein_matrix(points).distances, wanted, rtol=0, atol=1e-13)
        print(f"wasserstein_matrix, native at {level}: as the reference")
    _native.set_simd_level("")


def check_openmp() -> None:
    file = native_file()
    first = run_python(f"{LOAD}import torch; native(){ONE_OPENMP}", file)
    after = run_python(f"{LOAD}native(); import torch{ONE_OPENMP}", file)
    assert first == after, (first, after)
    print("torch imported before the native module or after: one OpenMP runtime, torch's")


def check_command_line() -> None:
    said = cit_fast("doctor")
    name = {"baseline": "baseline SIMD", "avx2": "AVX2", "avx512": "AVX-512"}[expected_level()]
    assert re.search(rf"native\W+yes\W+{name}, \d+ threads", said), said
    assert "lcia-ema" in cit_fast("presets")
    print("cit-fast doctor, cit-fast presets: as they should be")


def check_run(model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = f"""
model: {{name: {model}}}
methods: [lcia-ema]
adapter: {{r: 4, target_modules: all-linear}}
data: {{tasks: [units, intents], train: 16, dev: 0, test: 2, max_length: 512}}
training: {{per_device_train_batch_size: 8, max_steps: 2, use_cpu: true}}
evaluation: {{max_new_tokens: 4}}
output: runs
"""
        Path(folder, "tiny.yaml").write_text(config, encoding="utf-8")
        assert "Report: " in cit_fast("run", "tiny.yaml", cwd=folder)
    print("cit-fast run: two stages, reported")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--module"]:
        check_module(arguments[1])
        return
    check_module(native_file())
    check_ops()
    check_openmp()
    check_command_line()
    for model in arguments:
        check_run(model)


if __name__ == "__main__":
    main(sys.argv[1:])
