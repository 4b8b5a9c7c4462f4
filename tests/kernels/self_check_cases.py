"""The Triton kernels prove themselves in the interpreter, which stands in for a GPU: from the first use to the choice.

Not collected by itself: test_self_check.py runs it in a process of its own, for TRITON_INTERPRET is read when triton is
imported.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from cit_fast.kernels import wasserstein as kernels
from point_clouds import random_clouds

from cit_fast import backend
from cit_fast.ops import backends, self_check, wasserstein_matrix
from cit_fast.ops.backends import Backend
from cit_fast.ops.self_check import Verdict, trial
from cit_fast.ops.wasserstein import native

# The interpreter is numpy, which warns of arithmetic with infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
OP = "wasserstein_matrix"


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "CHECKED", {"cpu"})
    monkeypatch.setitem(backends.PREFERENCE, "cpu", (Backend.TRITON, Backend.NATIVE, Backend.REFERENCE))


def test_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    clouds, options = random_clouds((6, 4, 5)), {"method": "sinkhorn", "max_iterations": 10}
    with backend("native"):
        expected = wasserstein_matrix(clouds, **options)
    # Right, but interpreted, so slower than what serves without it.
    assert torch.equal(wasserstein_matrix(clouds, **options).distances, expected.distances)
    (verdict,) = self_check.verdicts("wasserstein", Backend.TRITON, CPU).values()
    assert verdict.problem is None
    assert max(verdict.gain("little"), verdict.gain("much")) < 1
    assert backends.resolve(OP, CPU) is native.wasserstein_matrix

    def fast(verdict: Verdict, size: str) -> float:
        return float(verdict.problem is None) * 2

    monkeypatch.setattr(Verdict, "gain", fast)
    monkeypatch.setattr(self_check, "_chosen", {})
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(trial, "outcomes", lambda *_: pytest.fail("it is in the cache"))
    assert backends.resolve(OP, CPU) is kernels.wasserstein_matrix
    got = wasserstein_matrix(clouds, **options)
    exact = wasserstein_matrix(clouds)
    assert (got.lower <= exact.distances * (1 + 1e-12)).all()
    assert (exact.distances <= got.upper * (1 + 1e-12)).all()
    assert exact.iterations.max() == 0  # the exact method is not asked of them
    with backend("triton"):
        assert torch.equal(wasserstein_matrix(clouds, **options).distances, got.distances)


def test_averages_and_gains() -> None:
    for family, op in (("balance_ema", "flush_balance_ema_"), ("information_gain", "token_gain")):
        found: Mapping[tuple[str, str], trial.Outcome] = trial.outcomes(family, Backend.TRITON, CPU, [(op, "float32")])
        problem, postponed, seconds = found[op, "float32"]
        assert problem is None
        assert not postponed
        assert seconds.keys() == set(self_check.SIZES)
