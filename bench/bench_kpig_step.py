"""What KPIG costs: training steps of the quickstart's model and tasks with its loss and with cross-entropy, in turns.

    python -m bench.bench_kpig_step          prints, and records in bench/results

Three copies of the model take the same examples with the same optimizer: KPIG and plain tuning (`cross-entropy`) as
`cit-fast run` trains them, and plain tuning through PEFT's layers. A step is forward, backward and AdamW. The pass of
the frozen model over a task's examples, which happens once a stage, is timed apart and shared out over the steps of one
epoch. Batches take turns between the tasks, as their lengths differ.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from bench.ceilings import record
from cit_fast.data import load_stream
from cit_fast.methods.objectives import KPIG, CrossEntropy
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

    sides = {}
    for name in ("PEFT", "cross-entropy", "KPIG"):
        fuse = name != "PEFT"
        model = load_model(folder, config.model.model_copy(update={"fuse_norms": fuse}))
        model = train_adapter(model, config.adapter, "shared", config.seed, fuse=fuse)[0].train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        sides[name] = model, optimizer, []
    model = sides["KPIG"][0]
    objective = KPIG(key_parts="data", share_prefix=False if options.separate else "auto")
    plain, bare = CrossEntropy(), CrossEntropy(share_prefix=False)
    stages, frozen_seconds = [], 0.0
    for task in stream:  # each a stage of its own, as in a run
        stage = Stage(model, encoder, tasks=tuple(stream), examples=task.train)
        stages.append((objective.prepare(stage), plain.prepare(stage), bare.prepare(stage)))
        frozen_seconds += stages[-1][0].seconds * size / sum(len(each.train) for each in stream)
    places: dict[str, list[int]] = {name: [] for name in sides}
    profiler = torch.profiler.profile() if options.profile else None
    for turn in range(options.rounds + 2):
        inputs, plainly, barely = stages[turn % len(stages)]
        own = slice(turn // len(stages) * size, (turn // len(stages) + 1) * size)
        batches = {
            "PEFT": (bare, barely.collator(barely.features[own])),
            "cross-entropy": (plain, plainly.collator(plainly.features[own])),
            "KPIG": (objective, inputs.collator(inputs.features[own])),
        }
        for name, (loss, batch) in batches.items():
            model, optimizer, seconds = sides[name]
            if profiler is not None and name == "KPIG" and turn == 2:
                profiler.start()
            began = time.perf_counter()
            loss(model, batch, None).backward()
            optimizer.step()
            optimizer.zero_grad()
            if turn >= 2:
                seconds.append(time.perf_counter() - began)
                places[name].append(batch["input_ids"].numel())
            if profiler is not None and name == "KPIG" and turn == 2:
                profiler.stop()
    if profiler is not None:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
    # Each batch against itself: tasks differ in length, and the machine in speed from minute to minute.
    ratios = {}
    for name in ("PEFT", "cross-entropy"):
        ours, theirs = sides["KPIG"][2], sides[name][2]
        step = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        frozen = frozen_seconds / statistics.median(theirs)
        ratios[name] = {"step": round(step, 3), "with the frozen pass, one epoch": round(step + frozen, 3)}
    result = {
        "model": config.model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "share_prefix": inputs.collator.pairs.pairs.share_prefix,
        "median ms": {name: round(statistics.median(seconds) * 1e3, 1) for name, (_, _, seconds) in sides.items()},
        "places a batch": {name: round(statistics.mean(counts)) for name, counts in places.items()},
        "frozen pass, ms a batch": round(frozen_seconds * 1e3, 1),
        "KPIG, share of": ratios,
    }
    print(result)
    if not options.separate:
        print(f"recorded in {record('kpig_step', result)}")


if __name__ == "__main__":
    main()
