"""Some cases of each fuzzer, the same everywhere; ``make fuzz`` draws more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_traceback_no_hang_no_silent_change():
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "5", "--seed", "0"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for name, cases in (("configurations", 5), ("data", 20), ("runs", 5), ("kills", 5)):
        (said,) = re.findall(rf"^{name}: {cases} cases, (.*)$", done.stderr, re.MULTILINE)
        assert "'ran'" in said  # some are right as they are
        assert ("'refused'" in said) == (name != "kills")
