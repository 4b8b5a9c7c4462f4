"""Some cases of each fuzzer, the same everywhere; ``make fuzz`` draws more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cases"), [("configurations", 40), ("data", 150), ("runs", 40)])
def test_no_traceback_no_hang_no_silent_change(name, cases):
    command = [sys.executable, "-m", "tests.fuzz", name, "--cases", str(cases), "--seed", "0"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{name}: {cases} cases" in done.stderr
    assert "'ran'" in done.stderr  # some are right as they are
    assert "'refused'" in done.stderr
