"""Where the compiler of the Triton kernels keeps what it made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def compiled_kernels_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CIT_FAST_PTX asks for it."""
    if os.environ.get("CIT_FAST_PTX"):
        from ptx_driver import on_the_host

        on_the_host(monkeypatch)


@pytest.fixture
def triton_cache(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Kept between runs beside pytest's own cache: what was compiled from the same source is not compiled again."""
    cache = getattr(request.config, "cache", None)  # None with -p no:cacheprovider
    return str(tmp_path if cache is None else cache.mkdir("triton"))
