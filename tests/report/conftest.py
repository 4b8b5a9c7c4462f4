from __future__ import annotations

import io

import pytest
from made_up_runs import JOINT, REPLAY, SEQUENTIAL, write_run
from PIL import Image

from cit_fast.report import figures


@pytest.fixture
def folders(tmp_path):
    return [
        write_run(tmp_path / "a", SEQUENTIAL),
        write_run(tmp_path / "b", REPLAY, method="random-replay", replay=10, weights=True),
        write_run(tmp_path / "c", JOINT, method="joint", joint=True),
    ]


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not drawn, which takes most of the time, where a test is about the text."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "png")
    monkeypatch.setattr(figures, "png", lambda figure: buffer.getvalue())
