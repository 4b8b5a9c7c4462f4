"""One of the processes of test_sharded.py: FSDP2, DDP or a distributed checkpoint on a gloo group.

    RANK=0 WORLD_SIZE=2 python sharded_worker.py store-file folder

Prints one line of JSON when every comparison held. One process for all of them: to start it takes longer than to run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cit_fast.optim import AdamWBalanceEMA, BalanceEMA

OPTIONS: dict[str, Any] = {"decay": 0.9, "fallback": 0.1}
STEPS = 5


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    # 5 and 3 do not divide by 2, and a shard of the last bias is small: uneven shards.
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def wrapped(params: Any, **options: Any) -> BalanceEMA:
    return BalanceEMA(torch.optim.AdamW(params, lr=0.3), **OPTIONS, **options)


def fused(params: Any, **options: Any) -> AdamWBalanceEMA:
    return AdamWBalanceEMA(params, lr=0.3, **OPTIONS, **options)


MAKERS: dict[str, Callable[..., Any]] = {"wrapped": wrapped, "fused": fused}


def train(model: nn.Module, optimizer: Any, steps: range, rank: int, world: int) -> None:
    for step in steps:
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        part = batch[rank * 8 // world : (rank + 1) * 8 // world]
        optimizer.zero_grad()
        (1000 * model(part).square().mean()).backward()
        optimizer.step()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def compare(model: nn.Module, optimizer: Any, single: nn.Module, reference: Any) -> None:
    optimizer.flush()
    reference.flush()
    for (name, param), other in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(full(param).detach(), other.detach(), msg=lambda m, n=name: f"{n}: {m}")
        average = full(optimizer.state[param]["average"])
        torch.testing.assert_close(
            average, reference.state[other]["average"], msg=lambda m, n=name: f"{n} average: {m}"
        )


def shard(model: nn.Sequential) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(kind: str, rank: int, world: int, **options: Any) -> dict[str, Any]:
    model, single = shard(make_model()), make_model()
    optimizer, reference = MAKERS[kind](model.parameters(), **options), MAKERS[kind](single.parameters(), **options)
    used = set()
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1), rank, world)
        train(single, reference, range(step, step + 1), 0, 1)
        weights, expected = optimizer.balance_weights(), reference.balance_weights()
        for key, weight in expected.items():
            assert abs(weights[key] - weight) < 1e-5, (step, key, weights, expected)
        used |= set(expected.values())
    compare(model, optimizer, single, reference)
    # Averages go in and out of the gathered parameters that FSDP2 keeps after a forward without backward.
    probe = torch.ones(2, 6)
    for _ in range(2):
        with optimizer.averaged(model), reference.averaged(), torch.no_grad():
            torch.testing.assert_close(model(probe), single(probe))
        with torch.no_grad():
            torch.testing.assert_close(model(probe), single(probe))
        train(model, optimizer, range(STEPS, STEPS + 1), rank, world)
        train(single, reference, range(STEPS, STEPS + 1), 0, 1)
    compare(model, optimizer, single, reference)
    optimizer.copy_averaged_to_parameters()
    reference.copy_averaged_to_parameters()
    compare(model, optimizer, single, reference)
    return {"weights": len(used), "skipped": optimizer.skipped_updates}


def checkpoint(kind: str, rank: int, world: int, folder: Path, rule: str) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    straight, first, second = shard(make_model()), shard(make_model()), shard(make_model())
    optimizers = [MAKERS[kind](model.parameters(), rule=rule) for model in (straight, first, second)]
    train(straight, optimizers[0], range(4), rank, world)
    train(first, optimizers[1], range(2), rank, world)
    model_state, optimizer_state = get_state_dict(first, optimizers[1])
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    model_state, optimizer_state = get_state_dict(second, optimizers[2])
    loaded = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(loaded, checkpoint_id=folder / "checkpoint")
    set_state_dict(second, optimizers[2], model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(second, optimizers[2], range(2, 4), rank, world)
    compare_sharded(straight, optimizers[0], second, optimizers[2])
    return {"keys": sorted(optimizers[2].state[next(second.parameters())])}


def compare_sharded(model: nn.Module, optimizer: Any, other: nn.Module, reference: Any) -> None:
    optimizer.flush()
    reference.flush()
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(full(param), full(twin))
        assert torch.equal(full(optimizer.state[param]["average"]), full(reference.state[twin]["average"]))


def ddp(kind: str, rank: int, world: int, bucket_view: bool) -> dict[str, Any]:
    model, single = make_model(), make_model()
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    optimizer, reference = MAKERS[kind](model.parameters()), MAKERS[kind](single.parameters())
    train(parallel, optimizer, range(STEPS), rank, world)
    train(single, reference, range(STEPS), 0, 1)
    compare(model, optimizer, single, reference)
    return {"kept": all(optimizer.state[p]["previous_grad"] is p.grad for p in model.parameters())}


def other_placements(rank: int, world: int) -> None:
    """Tensors sharded by columns or replicated."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line, grid = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (world, 1))
    cases = [(line, [placement]) for placement in (Shard(1), Shard(0), Replicate())]
    cases += [(grid, [Replicate(), Shard(0)]), (grid, [Shard(0), Replicate()]), (grid, [Shard(0), Shard(1)])]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4, 6, generator=generator)
    grads = [torch.randn(4, 6, generator=generator) * 10 for _ in range(3)]
    for mesh, placements in cases:
        for make in MAKERS.values():
            param = nn.Parameter(distribute_tensor(start.clone(), mesh, placements))
            single = nn.Parameter(start.clone())
            optimizer = make([param])
            reference = make([single])
            for grad in grads:
                param.grad = distribute_tensor(grad.clone(), mesh, placements)
                single.grad = grad.clone()
                optimizer.step()
                reference.step()
            optimizer.flush()
            reference.flush()
            torch.testing.assert_close(full(param).detach(), single.detach())
            torch.testing.assert_close(full(optimizer.state[param]["average"]), reference.state[single]["average"])


def main() -> None:
    store, folder = sys.argv[1], Path(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    result: dict[str, Any] = {}
    for kind in MAKERS:
        for rule in ("released", "paper", "fixed"):
            result[f"fsdp {kind} {rule}"] = fsdp(kind, rank, world, rule=rule)
        for rule in ("released", "paper"):
            result[f"checkpoint {kind} {rule}"] = checkpoint(kind, rank, world, folder / f"{kind}-{rule}", rule)
        result[f"ddp {kind}"] = ddp(kind, rank, world, bucket_view=False)
        result[f"ddp {kind} buckets"] = ddp(kind, rank, world, bucket_view=True)
    other_placements(rank, world)
    dist.destroy_process_group()
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
