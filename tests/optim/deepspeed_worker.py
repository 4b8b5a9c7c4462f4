"""One process of test_engines.py under DeepSpeed: ``python deepspeed_worker.py stage kind rule``; prints JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import nn

from cit_fast.errors import CitFastError
from cit_fast.optim import AdamWBalanceEMA, BalanceEMA


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def make_optimizer(kind: str, params: Any, rule: Any) -> Any:
    if kind == "fused":
        return AdamWBalanceEMA(params, lr=0.01, rule=rule, decay=0.5)
    return BalanceEMA(torch.optim.AdamW(params, lr=0.01), rule, decay=0.5)


def main() -> None:
    stage, kind, rule = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    model, single = make_model(), make_model().bfloat16()
    optimizer = make_optimizer(kind, model.parameters(), rule)
    masters = [param.detach().float().clone().requires_grad_() for param in single.parameters()]
    reference = BalanceEMA(torch.optim.AdamW(masters, lr=0.01), "fixed", decay=0.5)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
    }
    result: dict[str, Any] = {}
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for step in range(3):
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).bfloat16()
            engine.backward(engine(batch).float().square().mean())
            engine.step()
            single(batch).float().square().mean().backward()
            for param, master in zip(single.parameters(), masters, strict=True):
                master.grad, param.grad = param.grad.float(), None
            reference.step()
            for param, master in zip(single.parameters(), masters, strict=True):
                param.data.copy_(master.data)
        optimizer.flush()
        result["difference"] = max(
            (safe_get_full_optimizer_state(param, "average") - reference.state[master]["average"]).abs().max().item()
            for param, master in zip(model.parameters(), masters, strict=True)
        )
        result["moved"] = max((reference.state[m]["average"] - m).abs().max().item() for m in masters)
        with optimizer.averaged():
            pass
    except CitFastError as error:
        result["error"] = str(error)
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
