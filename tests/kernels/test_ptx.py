"""The machine that runs compiled kernels on the host, on kernels of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_process import run_tests

pytest.importorskip("triton")


@pytest.mark.slow
def test_the_machine(triton_cache: str) -> None:
    run_tests(
        Path(__file__).parent / "ptx_cases.py",
        TRITON_CACHE_DIR=triton_cache,
        CIT_FAST_PTX="1",
        CUDA_VISIBLE_DEVICES="",
    )
