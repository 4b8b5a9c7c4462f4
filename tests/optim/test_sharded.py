"""Two gloo processes on the CPU (DDP, FSDP2, other DTensors) give the weights and averages of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

WORKER = Path(__file__).with_name("sharded_worker.py")
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What both processes found, after they compared weights and averages with those of one."""
    folder = tmp_path_factory.mktemp("sharded")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), str(folder / "store"), str(folder)],
            env={**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    return first


@pytest.mark.parametrize("kind", ["wrapped", "fused"])
def test_fsdp2_equals_one_process(results: dict[str, dict], kind: str) -> None:
    assert results[f"fsdp {kind} released"]["weights"] > 3  # the gradients decided, not the fallback
    assert results[f"fsdp {kind} paper"]["weights"] > 3
    assert results[f"fsdp {kind} fixed"] == {"weights": 1, "skipped": 0}


@pytest.mark.parametrize("kind", ["wrapped", "fused"])
def test_fsdp2_resumes_from_a_distributed_checkpoint_with_the_same_bits(results: dict[str, dict], kind: str) -> None:
    keys = ["average", "exp_avg", "exp_avg_sq", "previous_grad", "step"]
    assert results[f"checkpoint {kind} released"]["keys"] == keys
    assert results[f"checkpoint {kind} paper"]["keys"] == sorted([*keys, "remaining"])


@pytest.mark.parametrize("kind", ["wrapped", "fused"])
def test_ddp_equals_one_process(results: dict[str, dict], kind: str) -> None:
    assert results[f"ddp {kind}"]["kept"]  # gradients of their own are kept by reference,
    assert not results[f"ddp {kind} buckets"]["kept"]  # views of DDP's buckets are copied
