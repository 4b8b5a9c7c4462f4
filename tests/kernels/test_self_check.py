"""The self-check of kernels with Triton's interpreter in the place of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_process import run_tests

pytest.importorskip("triton")


@pytest.mark.slow
def test_interpreted(triton_cache: str, tmp_path: Path) -> None:
    run_tests(
        Path(__file__).parent / "self_check_cases.py",
        TRITON_CACHE_DIR=triton_cache,
        TRITON_INTERPRET="1",
        CUDA_VISIBLE_DEVICES="",
        CIT_FAST_CACHE=str(tmp_path),
    )
