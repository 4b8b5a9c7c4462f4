"""What is predicted for GPUs is what the kernels of this commit would take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
RECORD = ROOT / "bench/results/gpu_predictions.json"


@pytest.mark.slow
def test_the_record_is_of_these_kernels(triton_cache: str, tmp_path: Path) -> None:
    """Whoever changes a kernel sees what that costs, and records it."""
    record = json.loads(RECORD.read_text())
    apart = 0.02 if record["triton"] == triton.__version__ else 0.25  # another compiler
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    subprocess.run(
        [sys.executable, "-m", "bench.gpu_predictions", "--results", tmp_path / "now.json"],
        check=True,
        capture_output=True,
        cwd=ROOT,
        env={**inherited, "TRITON_CACHE_DIR": triton_cache},
    )
    now = json.loads((tmp_path / "now.json").read_text())
    assert [row["kernel"] for row in now["rows"]] == [row["kernel"] for row in record["rows"]]
    for ours, theirs in zip(now["rows"], record["rows"], strict=True):
        assert ours["stack"] <= 32
        assert ours["threads of a processor"] >= (1 - apart) * theirs["threads of a processor"]
        for gpu, waits in theirs["milliseconds"].items():
            assert ours["milliseconds"][gpu] == pytest.approx(waits, rel=apart, abs=0.011), ours["kernel"]
