"""Kernels are checked and timed in a process of their own: ``python -m cit_fast.ops.self_check``.

The parent tells it family, backend, device and what to check; it answers with a line of JSON for each. A line that does
not come in time, or a process that ends, is the fault of what was being checked; the rest goes to another process.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
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
"""For one op with one dtype, its compilation included."""

STARTS = 4
"""Processes at most; what is left then is refused."""

ROUNDS = 5
"""Of which the medians are taken; one before does not count."""


def outcomes(family: str, backend: Backend, device: torch.device, units: Sequence[Unit]) -> dict[Unit, Outcome]:
    """Check and time ops and dtypes of a family's battery, each within ``LIMIT_S``; reasons are of one line."""
    found: dict[Unit, Outcome] = {}
    for start in range(STARTS):
        left = [unit for unit in units if unit not in found]
        if not left:
            break
        found |= _ask(family, backend, device, left, LIMIT_S)
        if start == STARTS - 1:
            for unit in units:
                found.setdefault(unit, (f"not reached: the check of others failed {STARTS} times", False, {}))
    return found


def _ask(
    family: str, backend: Backend, device: torch.device, units: Sequence[Unit], limit_s: float
) -> dict[Unit, Outcome]:
    """What one process answers. A unit that ends it or keeps silent is refused; those after it are left out."""
    order = json.dumps({"family": family, "backend": backend.value, "device": str(device), "units": units})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
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
        try:
            while True:
                answer = json.loads(lines.get(timeout=limit_s) or "null")
                if answer is None:
                    break
                if "begin" in answer:
                    begun = tuple(answer["begin"])
                elif "postponed" in answer:
                    return found | _postponed([unit for unit in units if unit not in found], answer["postponed"])
                elif begun is not None:
                    seconds = {size: (kernel, without) for size, (kernel, without) in answer["seconds"].items()}
                    found[begun] = (answer["problem"], False, seconds)
            code = process.wait(limit_s)
            why = f"the check ended with code {code} ({_last_line(errors)})"
        except (queue.Empty, subprocess.TimeoutExpired):
            why = f"no answer within {limit_s:g} s"
        finally:
            process.kill()
            process.wait()
    if begun is None:
        return _postponed(units, why)
    found.setdefault(begun, (why, False, {}))
    return found


def _postponed(units: Sequence[Unit], why: str) -> dict[Unit, Outcome]:
    return {unit: (why, True, {}) for unit in units}


def _lines(process: subprocess.Popen[str]) -> queue.Queue[str]:
    """What it prints, line by line, an empty one at the end."""
    lines: queue.Queue[str] = queue.Queue()

    def read(out: IO[str]) -> None:
        with out:
            for line in out:
                if line.startswith("{"):  # a compiler may print as well
                    lines.put(line)
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
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:  # no memory for another process, or the device is another's alone
        _say({"postponed": _line(error)})
        return
    for op, dtype in told["units"]:
        _say({"begin": [op, dtype]})
        try:
            _say(_judged(family, op, backend, getattr(torch, dtype), device))
        except torch.OutOfMemoryError as error:
            _say({"postponed": _line(error)})
            return


def _judged(family: str, op: str, backend: Backend, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    battery = BATTERIES[family]
    try:
        kernel = implementation(op, backend)
        reference = implementation(op, Backend.REFERENCE)
        for case in battery.cases(op, dtype, device):
            if found := problem(case, kernel, reference, device):
                return {"problem": found, "seconds": {}}
        without = next(each for each in serving(op, device) if each not in KERNELS)
        seconds: dict[str, tuple[float, float]] = {}
        for size in SIZES:
            try:
                work = battery.work(op, dtype, device, size)
                seconds[size] = _times(work, kernel, implementation(op, without), device)
            except torch.OutOfMemoryError:  # of a GPU in use: what is known of little stands for much
                if not seconds:
                    raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a compiler, a driver or a launch says: it may not serve
        return {"problem": f"{type(error).__name__}: {_line(error)}", "seconds": {}}
    return {"problem": None, "seconds": seconds}


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
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
