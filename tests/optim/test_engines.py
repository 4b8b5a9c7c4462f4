"""DeepSpeed ZeRO: flat partitions are averaged like the parameters they replace; those of other engines are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from cit_fast.errors import CitFastError
from cit_fast.optim import AdamWBalanceEMA, BalanceEMA

WORKER = Path(__file__).with_name("deepspeed_worker.py")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
TOLERANCE = 1e-6  # parameters of about 1, 6 steps of 0.1 in float32


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_one_process(stage: int, tmp_path: Path) -> None:
    """Weights, averages, what the model holds inside averaged() and after it, a resume through the engine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), str(stage), str(tmp_path)],
            env={
                **os.environ,
                **rendezvous,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    results, other = (
        next(json.loads(line) for line in reversed(output.splitlines()) if line.startswith("{"))
        for output, _ in outputs
    )
    assert results == other
    assert len(results) == 9
    for name, result in results.items():
        assert result["parameters"] < TOLERANCE, name
        assert result["averages"] < TOLERANCE < 0.1 < result["moved"], name
        assert result["published"], name
        assert result["output"] < TOLERANCE, name
        assert result["exported"], name
        assert result["restored"], name
        assert result["resumed"], name
        assert result["copied"], name
        assert result["clipped"] > 0, name
        assert "fixed" in name or result["decided"] > 2, name  # the gradients decided, not only the fallback


class Engine:
    """What ZeRO does to an optimizer: one flat tensor of a type of its own in place of the parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        params = optimizer.param_groups[0]["params"]
        self.flat: Tensor = torch.cat([param.detach().flatten() for param in params]).requires_grad_()
        optimizer.param_groups[0]["params"] = [self.flat]

    def step(self) -> None:
        self.flat.grad = torch.ones_like(self.flat)
        self.optimizer.step()


@pytest.mark.parametrize("make", [AdamWBalanceEMA, lambda params, rule: BalanceEMA(AdamW(params), rule)])
def test_partitions_are_told_from_parameters(make: Any) -> None:
    model = nn.Linear(3, 2)
    engine = Engine(make(model.parameters(), rule="released"))
    before = engine.flat.detach().clone()
    with pytest.raises(CitFastError, match="nothing tells whose pieces they hold"):
        engine.step()
    assert torch.equal(engine.flat, before)
    assert not engine.optimizer.state[engine.flat]
    engine = Engine(make(model.parameters(), rule="fixed"))
    engine.step()
    for call in (lambda: engine.optimizer.averaged().__enter__(), engine.optimizer.copy_averaged_to_parameters):
        with pytest.raises(CitFastError, match="averages are those of an engine's partitions"):
            call()
    # A plain tensor that the optimizer was given is a parameter like any other.
    own = torch.ones(3, requires_grad=True)
    optimizer = make([own], rule="released")
    own.grad = torch.ones(3)
    optimizer.step()
    with optimizer.averaged():
        pass


def test_watching_an_engines_optimizer_is_refused_early() -> None:
    ours = type("ZeROOptimizer", (AdamW,), {"__module__": "deepspeed.runtime.base_optimizer"})
    optimizer = ours([nn.Parameter(torch.ones(2))])
    for call in (BalanceEMA, BalanceEMA.attach):
        with pytest.raises(CitFastError, match='use rule="fixed", DDP, FSDP2, or DeepSpeed ZeRO-1, 2 or 3'):
            call(optimizer)
    BalanceEMA.attach(optimizer, rule="fixed")
