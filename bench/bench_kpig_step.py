"""What KPIG and distillation cost: training steps of the quickstart's model and tasks, and plain ones, in turns.

    python -m bench.bench_kpig_step          prints, and records in bench/results

Copies of the model take the same examples with the same optimizer: KPIG, distillation, distillation without the target
and plain tuning (`cross-entropy`) as `cit-fast run` trains them, and plain tuning through PEFT's layers. A step is
forward, backward and AdamW. The pass of the frozen model over a task's examples, which happens once a stage, is timed
apart and shared out over the steps of one epoch. Batches take turns between the tasks, as their lengths differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from bench.ceilings import record
from cit_fast.data import load_stream
from cit_fast.methods.objectives import KPIG, CrossEntropy, Distillation, Objective
from cit_fast.methods.stage import Stage
from cit_fast.models.adapters import prompt_encoder, train_adapter
from cit_fast.models.pretrained import load_model, load_tokenizer, resolve_model
from cit_fast.run.config import load_config

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16, help="batches that are timed")
    parser.add_argument("--separate", action="store_true", help="without shared prefixes")
    parser.add_argument("--profile", action="store_true", help="print where the time of KPIG's steps goes")
    options = parser.parse_args()
    config = load_config(QUICKSTART)
    folder = resolve_model(config.model)
    encoder = prompt_encoder(load_tokenizer(folder, False), config.data)
    stream = load_stream(config.data.tasks, seed=config.seed, train=config.data.train, dev=0, test=config.data.test)
    size = config.training["per_device_train_batch_size"]

    share = False if options.separate else "auto"
    objectives: dict[str, Objective] = {
        "PEFT": CrossEntropy(share_prefix=False),
        "cross-entropy": CrossEntropy(),
        "KPIG": KPIG(key_parts="data", share_prefix=share),
        "distillation": Distillation(when="always", share_prefix=share),
        "distillation without the target": Distillation(when="always", without_target=True, share_prefix=share),
    }
    sides, frozen_seconds = {}, dict.fromkeys(objectives, 0.0)
    for name, objective in objectives.items():
        fuse = name != "PEFT"
        model = load_model(folder, config.model.model_copy(update={"fuse_norms": fuse}))
        model = train_adapter(model, config.adapter, "shared", config.seed, fuse=fuse)[0].train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        inputs = []
        for task in stream:  # each a stage of its own, as in a run
            stage = Stage(model, encoder, tasks=tuple(stream), examples=tuple(task.train))
            inputs.append(objective.prepare(stage))
            frozen_seconds[name] += inputs[-1].seconds * size / sum(len(each.train) for each in stream)
        sides[name] = model, optimizer, inputs
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    places: dict[str, list[int]] = {name: [] for name in sides}
    profiler = torch.profiler.profile() if options.profile else None
    for turn in range(options.rounds + 2):
        own = slice(turn // len(stream) * size, (turn // len(stream) + 1) * size)
        for name, (model, optimizer, inputs) in sides.items():
            one = inputs[turn % len(stream)]
            batch = one.collator(one.features[own])
            watched = profiler if name == "KPIG" and turn == 2 else None
            if watched is not None:
                watched.start()
            began = time.perf_counter()
            objectives[name](model, batch, None).backward()
            optimizer.step()
            optimizer.zero_grad()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
                places[name].append(batch["input_ids"].numel())
            if watched is not None:
                watched.stop()
    if profiler is not None:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
    # Each batch against itself: tasks differ in length, and the machine in speed from minute to minute.
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for ours in list(sides)[2:]:
        for theirs in ("PEFT", "cross-entropy"):
            step = statistics.median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))
            frozen = frozen_seconds[ours] / statistics.median(seconds[theirs])
            found = {"step": round(step, 3), "with the frozen pass, one epoch": round(step + frozen, 3)}
            ratios.setdefault(f"{ours}, share of", {})[theirs] = found
    result = {
        "model": config.model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "share_prefix": share,
        "median ms": {name: round(statistics.median(each) * 1e3, 1) for name, each in seconds.items()},
        "places a batch": {name: round(statistics.mean(counts)) for name, counts in places.items()},
        "frozen pass, ms a batch": {name: round(each * 1e3, 1) for name, each in frozen_seconds.items() if each},
        **ratios,
    }
    print(json.dumps(result, indent=1))
    if not options.separate:
        print(f"recorded in {record('kpig_step', result)}")


if __name__ == "__main__":
    main()
