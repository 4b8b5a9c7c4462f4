"""One of the processes of test_engines.py under DeepSpeed.

    RANK=0 WORLD_SIZE=2 python deepspeed_worker.py stage folder

Prints one line of JSON: for each case the largest differences from one process. One process for all cases of a stage:
to start it takes longer than to run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from torch import Tensor, nn

from cit_fast.optim import AdamWBalanceEMA, BalanceEMA, find_balance_ema
from cit_fast.optim.callback import export_averaged

OPTIONS: dict[str, Any] = {"decay": 0.9, "fallback": 0.1}
CLIP = 20.0


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    # Odd sizes: pieces that end inside of parameters, padding at the end.
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [(name, param) for name, param in named if param.dim() > 1], "weight_decay": 0.1},
        {"params": [(name, param) for name, param in named if param.dim() == 1 < len(param)], "weight_decay": 0.0},
        # One element: the partition of the second process is nothing but padding.
        {"params": [(name, param) for name, param in named if param.numel() == 1], "weight_decay": 0.05},
    ]


def wrapped(params: Any, rule: Any) -> BalanceEMA:
    return BalanceEMA(torch.optim.AdamW(params, lr=0.1), rule, **OPTIONS)


def attached(params: Any, rule: Any) -> Any:
    optimizer = torch.optim.AdamW(params, lr=0.1)
    BalanceEMA.attach(optimizer, rule=rule, **OPTIONS)
    return optimizer


def fused(params: Any, rule: Any) -> AdamWBalanceEMA:
    return AdamWBalanceEMA(params, lr=0.1, rule=rule, **OPTIONS)


MAKERS: dict[str, Callable[..., Any]] = {"wrapped": wrapped, "attached": attached, "fused": fused}


def batch_of(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def loss_of(output: Tensor) -> Tensor:
    return 100 * (output.float() - 1).square().mean()


def make_engine(stage: int, kind: str, rule: str, dtype: torch.dtype, offload: bool) -> tuple[Any, nn.Module, Any]:
    model = make_model()
    optimizer = MAKERS[kind](groups(model), rule)
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # several sub-groups; some parameters stay whole, others do not
        zero |= {"sub_group_size": 12, "stage3_param_persistence_threshold": 6}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, model, find_balance_ema(optimizer)


def train(engine: Any, steps: range, dtype: torch.dtype) -> None:
    for step in steps:
        batch = batch_of(step)
        if dtype == torch.float32:
            batch = batch[dist.get_rank() * 4 :][:4]
        # In bfloat16 all processes take the same examples: the sum of equal gradients has no rounding.
        engine.backward(loss_of(engine(batch.to(dtype))))
        engine.step()


class Alone:
    """The same training in one process, with float32 masters."""

    def __init__(self, kind: str, rule: str, dtype: torch.dtype) -> None:
        self.model = make_model().to(dtype)
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in self.model.named_parameters()}
        named = [
            {**group, "params": [(name, self.masters[name]) for name, _ in group["params"]]}
            for group in groups(self.model)
        ]
        self.dtype = dtype
        self.stepper = MAKERS[kind](named, rule)
        self.optimizer = find_balance_ema(self.stepper)

    def train(self, steps: range) -> None:
        for step in steps:
            loss_of(self.model(batch_of(step).to(self.dtype))).backward()
            for name, param in self.model.named_parameters():
                self.masters[name].grad, param.grad = param.grad.float(), None
            nn.utils.clip_grad_norm_(self.masters.values(), CLIP)
            self.stepper.step()
            for name, param in self.model.named_parameters():
                param.data.copy_(self.masters[name])


def masters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: safe_get_full_fp32_param(param).clone() for name, param in model.named_parameters()}


def model_of(model: nn.Module) -> dict[str, Tensor]:
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def difference(ours: dict[str, Tensor], theirs: Any) -> float:
    return max((ours[name] - theirs[name].detach()).abs().max().item() for name in ours)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def check(stage: int, kind: str, rule: str, dtype: torch.dtype, folder: str, offload: bool = False) -> dict[str, Any]:
    engine, model, optimizer = make_engine(stage, kind, rule, dtype, offload)
    alone = Alone(kind, rule, dtype)
    result: dict[str, Any] = {"clipped": 0, "decided": 0}
    train(engine, range(3), dtype)
    alone.train(range(3))
    engine.save_checkpoint(folder, tag="three")
    for step in range(3, 6):
        train(engine, range(step, step + 1), dtype)
        alone.train(range(step, step + 1))
        theirs = alone.optimizer.balance_weights()
        ours = optimizer.balance_weights()
        assert list(ours) == list(theirs)
        torch.testing.assert_close(list(ours.values()), list(theirs.values()), rtol=1e-3, atol=1e-7)
        assert optimizer.balance_summary().fallback_fraction == alone.optimizer.balance_summary().fallback_fraction
        result["clipped"] += float(engine.get_global_grad_norm()) > CLIP
        result["decided"] += len({*theirs.values()} - {0.1, 0.10000000149011612})
    live, live_model = masters_of(model), model_of(model)
    result["parameters"] = difference(live, alone.masters)
    with alone.optimizer.averaged():
        averages = {name: param.detach().clone() for name, param in alone.masters.items()}
    with optimizer.averaged():
        result["averages"] = difference(masters_of(model), averages)
        swapped = model_of(model)
        result["published"] = same(swapped, {name: each.to(dtype) for name, each in masters_of(model).items()})
        output = engine(batch_of(9).to(dtype)).float()
        expected = torch.func.functional_call(make_model().to(dtype), swapped, batch_of(9).to(dtype)).float()
        result["output"] = (output - expected).abs().max().item()
    exported = Path(folder) / "averaged"
    export_averaged(model, optimizer, exported, write=dist.get_rank() == 0)
    dist.barrier()
    result["exported"] = same(swapped, load_file(exported / "model.safetensors"))
    result["restored"] = same(masters_of(model), live) and same(model_of(model), live_model)
    result["moved"] = difference(live, averages)

    again, other, resumed = make_engine(stage, kind, rule, dtype, offload)
    again.load_checkpoint(folder, tag="three")
    train(again, range(3, 6), dtype)
    result["resumed"] = same(masters_of(other), live)
    resumed.copy_averaged_to_parameters()
    result["copied"] = same(model_of(other), swapped)
    train(again, range(6, 7), dtype)
    return result


def main() -> None:
    stage, folder = int(sys.argv[1]), sys.argv[2]
    deepspeed.init_distributed("gloo")
    cases = [(kind, rule, torch.float32) for kind in ("wrapped", "fused") for rule in ("released", "paper", "fixed")]
    cases += [("attached", "released", torch.float32), ("fused", "released", torch.bfloat16)]
    results = {}
    for kind, rule, dtype in cases:
        name = f"{kind} {rule} {str(dtype)[6:]}"
        results[name] = check(stage, kind, rule, dtype, f"{folder}/{name}")
    results["offloaded"] = check(stage, "fused", "paper", torch.float32, f"{folder}/offloaded", offload=True)
    print(json.dumps(results))  # noqa: T201
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
