"""What a training step costs beside PEFT's and beside its bare matrix products, in turns.

    python -m bench.bench_training_step                       the quickstart's tasks
    python -m bench.bench_training_step --superni FOLDER      and four tasks of Super-NI, whose instruction is long
    python -m bench.bench_training_step --compile             and PEFT under torch.compile

All sides take the same examples with the same model and optimizer settings:

PEFT            PEFT's LoRA layers, a row for each example, torch's fused AdamW
fused           the same with fuse_lora
apart           what "norms" is, with query, key and value, and gate and up, each computed alone
norms           "fused" and with fuse_norms
shared          and with what a batch's examples begin with computed once
balance-ema     and with AdamWBalanceEMA: a step of the preset `ema`
bare products   x W^T and g W of every adapted layer, for the tokens of PEFT's batch; no attention, no LoRA

Records medians and the fastest of each in bench/results.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Linear

from bench.ceilings import record
from cit_fast.data import Task, load_stream
from cit_fast.methods.objectives import CrossEntropy
from cit_fast.methods.stage import Stage
from cit_fast.models.adapters import prompt_encoder, train_adapter
from cit_fast.models.config import DataConfig
from cit_fast.models.fused_lora import FusedLoraLinear
from cit_fast.models.pretrained import load_model, load_tokenizer, resolve_model
from cit_fast.optim import AdamWBalanceEMA
from cit_fast.run.config import load_config

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
SUPER_NI = ("task363", "task1510", "task591", "task875")


class Side:
    """A model that takes steps, and how long they took."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, *, share: bool) -> None:
        self.model, self.optimizer = model, optimizer
        self.objective = CrossEntropy(share_prefix="auto" if share else False)
        self.seconds: list[float] = []
        self.places = 0

    def prepare(self, encoder: Any, task: Task) -> None:
        """The task's examples as this side's batches take them."""
        self.inputs = self.objective.prepare(Stage(self.model, encoder, tasks=(task,), examples=task.train))

    def step(self, first: int, size: int, *, counted: bool) -> dict[str, Any]:
        """One step over ``size`` examples; the batch."""
        batch = self.inputs.collator(self.inputs.features[first : first + size])
        start = time.perf_counter()
        self.objective(self.model, batch, None).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if counted:
            self.seconds.append(time.perf_counter() - start)
            self.places += batch["input_ids"].numel()
        return batch


def make_sides(folder: Path, config: Any, attention: str, compiled: bool) -> dict[str, Side]:
    """The contenders, each with a model of its own."""

    def side(
        fuse: bool, share: bool, optimizer: Callable[..., Any], compile_it: bool = False, norms: bool = True
    ) -> Side:
        settings = {"attn_implementation": attention, "fuse_norms": fuse and norms}
        model = load_model(folder, config.model.model_copy(update=settings))
        model = train_adapter(model, config.adapter, "shared", config.seed, fuse=fuse)[0].train()
        trained = [param for param in model.parameters() if param.requires_grad]
        return Side(torch.compile(model) if compile_it else model, optimizer(trained), share=share)

    def adamw(params: Sequence[Any]) -> Any:
        return torch.optim.AdamW(params, lr=1e-4, fused=True)

    sides = {
        "PEFT": side(False, False, adamw),
        "fused": side(True, False, adamw, norms=False),
        "apart": side(True, False, adamw),
        "norms": side(True, False, adamw),
        "shared": side(True, True, adamw),
        "balance-ema": side(True, True, lambda params: AdamWBalanceEMA(params, lr=1e-4)),
    }
    for module in sides["apart"].model.modules():
        if isinstance(module, FusedLoraLinear):
            module.siblings = None
    if compiled:
        sides["PEFT, torch.compile"] = side(False, False, adamw, compile_it=True)
    return sides


def bare_products(model: torch.nn.Module, tokens: int) -> Callable[[], None]:
    """What runs the products of every adapted layer, forward and backward, for ``tokens`` tokens."""
    layers = [module.base_layer for module in model.modules() if isinstance(module, Linear)]
    weights = [layer.weight for layer in layers]
    inputs = {shape: torch.randn(tokens, shape[1]).to(weights[0].dtype) for shape in {w.shape for w in weights}}
    gradients = {shape: torch.randn(tokens, shape[0]).to(weights[0].dtype) for shape in inputs}

    @torch.no_grad()
    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape], weight)
        for weight in reversed(weights):
            gradients[weight.shape] @ weight

    return run


def measure(
    sides: dict[str, Side], encoder: Any, tasks: Sequence[Task], size: int, rounds: int, warm: int
) -> dict[str, Any]:
    """Steps of all sides in turns, over every task in turn."""
    bare_seconds = []
    for task in tasks:
        for side in sides.values():
            side.prepare(encoder, task)
        for turn in range(warm + rounds):
            first = turn * size % (len(task.train) - size + 1)
            batches = {name: side.step(first, size, counted=turn >= warm) for name, side in sides.items()}
            run = bare_products(sides["PEFT"].model, batches["PEFT"]["input_ids"].numel())
            start = time.perf_counter()
            run()
            if turn >= warm:
                bare_seconds.append(time.perf_counter() - start)
    seconds = {name: side.seconds for name, side in sides.items()} | {"bare products": bare_seconds}
    median = {name: statistics.median(values) for name, values in seconds.items()}

    def paired(name: str, other: str) -> float:
        """The median over turns, whose steps the machine's other work slows alike."""
        return round(statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True)), 3)

    return {
        "median ms": {name: round(value * 1e3) for name, value in median.items()},
        "least ms": {name: round(min(values) * 1e3) for name, values in seconds.items()},
        "of PEFT's step": {name: paired(name, "PEFT") for name in seconds},
        "together, of apart": paired("norms", "apart"),
        "of the bare products": {name: round(value / median["bare products"], 2) for name, value in median.items()},
        "places a step": {name: round(side.places / len(side.seconds)) for name, side in sides.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="steps of each side over each task")
    parser.add_argument("--warm", type=int, default=2, help="steps before them")
    parser.add_argument("--superni", type=Path, help="the folder of the stream superni-15")
    parser.add_argument("--compile", action="store_true", help="PEFT under torch.compile as well")
    options = parser.parse_args()
    config = load_config(QUICKSTART)
    folder = resolve_model(config.model)
    size = config.training["per_device_train_batch_size"]
    loads: dict[str, tuple[Any, DataConfig]] = {"quickstart": (config.data.tasks, config.data)}
    if options.superni is not None:
        data = DataConfig(stream="superni-15/order-1", root=str(options.superni), on_overflow="skip")
        chosen = [task for task in data.tasks or () if any(name in str(task) for name in SUPER_NI)]
        loads["super-ni"] = (chosen, data)
    result = {}
    for name, (tasks, data) in loads.items():
        encoder = prompt_encoder(load_tokenizer(folder, False), data)
        stream = load_stream(tasks, seed=0, train=8 * size, dev=0, test=1)
        sides = make_sides(folder, config, str(config.model.attn_implementation), options.compile)
        result[name] = measure(sides, encoder, tuple(stream), size, options.rounds, options.warm)
        print(name)
        for what, values in result[name].items():
            print(f"  {what}: {values}")
    print(f"recorded in {record('training_step', result)}")


if __name__ == "__main__":
    main()
