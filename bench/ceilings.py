"""What the machine can do, measured in the same run as the benchmark beside it, and what the machine is."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def best_time(run: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of ``repeats`` calls, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth(megabytes: int = 256) -> float:
    """GB/s of torch's copy between two float32 arrays of that size, read and write counted."""
    source = torch.ones(megabytes * 1024**2 // 4)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / best_time(lambda: target.copy_(source)) / 1e9


def in_place_bandwidth(megabytes: int = 256) -> float:
    """GB/s of torch's in-place lerp of two float32 arrays: two reads and a write, no write-allocate traffic."""
    source = torch.ones(megabytes * 1024**2 // 4)
    target = torch.zeros_like(source)
    return 3 * source.numel() * 4 / best_time(lambda: target.lerp_(source, 0.5)) / 1e9


def gemm_rate(size: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """TFLOP/s of a square matrix product."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / best_time(lambda: left @ right, 3) / 1e12


def machine() -> dict[str, Any]:
    """Hardware and versions, for the record beside a result."""
    from cit_fast import available_backends

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # above the number of threads: others were using the machine
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {name: status.reason for name, status in available_backends().items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def record(name: str, content: dict[str, Any]) -> Path:
    """Write ``content`` with :func:`machine` to ``bench/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    return path
