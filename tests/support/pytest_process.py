"""Tests in a process of their own: triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_tests(file: Path, **environment: str) -> None:
    """Run the tests of a file by pytest, with nothing of this process's triton, pytest and coverage settings.

    The file sees this folder and the conftest.py of its own folder, not that of all tests, which takes ten seconds to
    import.
    """
    ours = ("TRITON_", "PYTEST_", "COV_", "CIT_FAST_HOST_LIBRARY")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--confcutdir={file.parent}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
