"""The kernels prove themselves on the GPU that is here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cit_fast.ops import backends, self_check
from cit_fast.ops.backends import KERNELS, Backend
from cit_fast.ops.self_check.battery import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", KERNELS, ids=lambda which: which.value)
def test_every_op_and_dtype(which: Backend, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ops = self_check.BATTERIES[family].OPS
    if not any(which in backends._implementations[op] for op in ops):
        pytest.skip(f"{family} has no {which.value} kernels on any machine")
    if not any(which in backends.serving(op, device) for op in ops):
        pytest.skip(f"{which.value}: {backends._status(which, device).reason}")
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(self_check, "_known", {})
    found = self_check.verdicts(family, which, device)
    assert {unit: verdict.problem for unit, verdict in found.items() if verdict.problem is not None} == {}
    for (op, dtype), verdict in found.items():
        for size in self_check.SIZES:
            kernel, without = verdict.seconds[size]
            print(f"{op} {dtype} {size}: {1e3 * kernel:.3f} ms, without it {1e3 * without:.3f} ms")  # noqa: T201
