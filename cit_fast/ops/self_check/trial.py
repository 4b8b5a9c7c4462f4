"""Kernels are checked and timed in a process of their own: ``python -m cit_fast.ops.self_check``.

The parent tells it family, backend, device and what to check; it answers with a line of JSON for each. A line that does
not come in time, or a process that ends, is the fault of what was being checked; the rest goes to another process.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch

from cit_fast.ops.backends import KERNELS, Backend, implementation, serving
from cit_fast.ops.self_check.battery import BATTERIES, SIZES, Implementation, problem

Unit = tuple[str, str]
"""Op and dtype."""
Outcome = tuple[str | None, bool, dict[str, tuple[float, float]]]
"""The fields of :class:`cit_fast.ops.self_check.Verdict`."""

LIMIT_S = 120.0
"""For one case, compilation and the start of the process included."""

STARTS = 6
"""Processes at most; what is left then is postponed."""

ROUNDS = 5
"""Of which the medians are taken; one before does not count."""

# What would make the figures those of another program, or products those of TF32.
_NOT_INHERITED = (
    "CUDA_LAUNCH_BLOCKING",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
_MARK = "cit-fast: "  # of our lines, for a compiler may print as well


def outcomes(family: str, backend: Backend, device: torch.device, units: Sequence[Unit]) -> dict[Unit, Outcome]:
    """Check and time ops and dtypes of a family's battery; reasons are of one line."""
    found: dict[Unit, Outcome] = {}
    for _ in range(STARTS):
        left = [unit for unit in units if unit not in found]
        if not left:
            break
        found |= _ask(family, backend, device, left, LIMIT_S)
    left = [unit for unit in units if unit not in found]
    return found | _postponed(left, f"not reached: the check of others failed {STARTS} times")


def _ask(
    family: str, backend: Backend, device: torch.device, units: Sequence[Unit], limit_s: float
) -> dict[Unit, Outcome]:
    """What one process answers; it ends with the first kernel that raises. Those after it are left out."""
    if not sys.executable or getattr(sys, "frozen", False):
        return _postponed(units, "this program has no Python interpreter of its own that could check")
    order = json.dumps({"family": family, "backend": backend.value, "device": str(device), "units": units})
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in sys.path)
    environment["PYTHONSAFEPATH"] = "1"
    found: dict[Unit, Outcome] = {}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            process = subprocess.Popen(  # noqa: S603 - this very package, by this very interpreter
                [sys.executable, "-m", "cit_fast.ops.self_check", order],
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        except (OSError, ValueError) as error:
            return _postponed(units, f"no process for the check could be started ({error})")
        lines = _lines(process)
        begun: Unit | None = None
        lasting = True
        try:
            while line := lines.get(timeout=limit_s):
                answer = json.loads(line)
                if "none" in answer:
                    return _postponed(units, answer["none"])
                if "begin" in answer:
                    begun = tuple(answer["begin"])
                elif "seconds" in answer and begun is not None:
                    seconds = {size: (kernel, without) for size, (kernel, without) in answer["seconds"].items()}
                    found[begun] = (answer["problem"], answer["postponed"], seconds)
            code = process.wait(limit_s)
            why = f"the check ended with code {code} ({_last_line(errors)})"
            lasting = code != -signal.SIGKILL  # that is how a machine without memory ends processes
        except (queue.Empty, subprocess.TimeoutExpired):
            why = f"no answer within {limit_s:g} s"
        finally:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # one that is stuck in the driver
                process.wait(10)
    if begun is None:
        return _postponed(units, why)
    found.setdefault(begun, (why, not lasting, {}))
    return found


def _postponed(units: Sequence[Unit], why: str) -> dict[Unit, Outcome]:
    return {unit: (why, True, {}) for unit in units}


def _lines(process: subprocess.Popen[str]) -> queue.Queue[str]:
    """What it prints, line by line, an empty one at the end."""
    lines: queue.Queue[str] = queue.Queue()

    def read(out: IO[str]) -> None:
        with out:
            for line in out:
                if line.startswith(_MARK):
                    lines.put(line.removeprefix(_MARK))
        lines.put("")

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    return lines


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return lines[-1] if lines else "nothing was said"


# The process


def main(order: str) -> None:
    """Check what the order names, and print a line before and after each."""
    told = json.loads(order)
    family, backend, device = told["family"], Backend(told["backend"]), torch.device(told["device"])
    torch.set_float32_matmul_precision("highest")
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:  # no memory for another process, or the device is another's alone
        _say({"none": _line(error)})
        return
    for op, dtype in told["units"]:
        _say({"begin": [op, dtype]})
        answer, goes_on = _judged(family, op, backend, getattr(torch, dtype), device)
        _say(answer)
        if not goes_on:
            return


def _judged(
    family: str, op: str, backend: Backend, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Any], bool]:
    """The answer, and whether this process is good for another: after an error a CUDA context may be broken."""
    battery = BATTERIES[family]
    seconds: dict[str, tuple[float, float]] = {}
    called = False

    def kernel(*arguments: Any) -> Any:
        nonlocal called
        called = True
        return run(*arguments)

    try:
        run = implementation(op, backend)
        reference = implementation(op, Backend.REFERENCE)
        for case in battery.cases(op, dtype, device):
            _say({"case": case.name})  # a sign of life
            if found := problem(case, kernel, reference, device):
                return {"problem": found, "postponed": False, "seconds": {}}, True
        without = next(each for each in serving(op, device) if each not in KERNELS)
        for size in SIZES:
            _say({"case": size})
            try:
                work = battery.work(op, dtype, device, size)
                seconds[size] = _times(work, kernel, implementation(op, without), device)
            except torch.OutOfMemoryError:  # of a GPU in use: the verdict stands without the figure
                continue
    except torch.OutOfMemoryError as error:
        return {"problem": _line(error), "postponed": True, "seconds": {}}, True
    except Exception as error:  # noqa: BLE001 - whatever a compiler, a driver or a launch says: it may not serve
        text = f"{type(error).__name__}: {_line(error)}"
        # Before the kernel was called it is not the kernel's fault; after, a GPU may tell of it anywhere.
        lasting = called and _is_the_kernels(text)
        return {"problem": text, "postponed": not lasting, "seconds": {}}, False
    return {"problem": None, "postponed": False, "seconds": seconds}, True


# Of errors that a kernel makes itself, whenever it is called on this device.
_LASTING = re.compile(
    r"illegal|misaligned|launch failure|no kernel image|invalid argument|device-side assert|invalid device function"
    r"|OutOfResources|CompilationError|PTXASError|ptxas|BackendError",
    re.IGNORECASE,
)


def _is_the_kernels(text: str) -> bool:
    """Whether an error would come again. Others (no memory, no compiler, no disk) are of the moment."""
    return bool(_LASTING.search(text))


def _times(
    work: Callable[[Implementation], object], kernel: Implementation, without: Implementation, device: torch.device
) -> tuple[float, float]:
    """Medians in seconds, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 1):
        for run, into in zip((kernel, without), times, strict=True):
            _wait(device)
            begin = time.perf_counter()
            work(run)
            _wait(device)
            if turn:  # the first makes plans, loads and compiles
                into.append(time.perf_counter() - begin)
    return median(times[0]), median(times[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:299] + "…"


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(f"{_MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()
