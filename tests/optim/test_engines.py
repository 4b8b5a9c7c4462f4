"""DeepSpeed ZeRO: flat partitions in place of parameters are averaged with a fixed weight, else refused."""

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


def run(stage: int, kind: str, rule: str) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(WORKER), str(stage), kind, rule],
        env={**os.environ, **rendezvous, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith("{"))


@needs_deepspeed
@pytest.mark.parametrize("kind", ["wrapped", "fused"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_fixed_weight_is_right_on_partitions(stage: int, kind: str) -> None:
    result = run(stage, kind, "fixed")
    assert result["difference"] < 1e-6 < 1e-3 < result["moved"]
    assert "gather each with deepspeed.utils.safe_get_full_optimizer_state" in result["error"]


@needs_deepspeed
@pytest.mark.parametrize(("stage", "kind"), [(2, "fused"), (3, "wrapped")])
def test_other_rules_are_refused_on_partitions(stage: int, kind: str) -> None:
    result = run(stage, kind, "released")
    assert 'so rule="released" cannot weigh each of them' in result["error"]


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
    with pytest.raises(CitFastError, match="flat partitions of many parameters in place of the parameters"):
        engine.step()
    assert torch.equal(engine.flat, before)
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
        with pytest.raises(CitFastError, match='use rule="fixed", DDP or FSDP2'):
            call(optimizer)
    BalanceEMA.attach(optimizer, rule="fixed")
