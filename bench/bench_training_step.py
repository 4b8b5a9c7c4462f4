"""What the average costs a whole training step: the quickstart's model and tasks, with and without it, in turns.

    python -m bench.bench_training_step          prints, and records in bench/results

Two copies of the model take the same batches: one with transformers' default AdamW, one with AdamWBalanceEMA.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from bench.ceilings import record
from cit_fast.data import load_stream
from cit_fast.methods.objectives import CrossEntropy
from cit_fast.models.adapters import prompt_encoder, train_adapter
from cit_fast.models.collation import choose_collator
from cit_fast.models.pretrained import load_model, load_tokenizer, resolve_model
from cit_fast.optim import AdamWBalanceEMA
from cit_fast.run.config import load_config

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    config = load_config(QUICKSTART)
    folder = resolve_model(config.model)
    encoder = prompt_encoder(load_tokenizer(folder, False), config.data)
    stream = load_stream(
        config.data.tasks, seed=config.seed, train=config.data.train, dev=config.data.dev, test=config.data.test
    )
    encoded = encoder.encode_all([example for task in stream for example in task.train]).encoded
    objective, size = CrossEntropy(), config.training["per_device_train_batch_size"]
    sides = {}
    for name, kind in {"AdamW": torch.optim.AdamW, "AdamWBalanceEMA": AdamWBalanceEMA}.items():
        model = train_adapter(load_model(folder, config.model), config.adapter, "shared", config.seed)[0].train()
        params = [param for param in model.parameters() if param.requires_grad]
        extra = {"fused": True} if kind is torch.optim.AdamW else {}
        sides[name] = model, kind(params, lr=1e-4, **extra), {"step": [], "optimizer": []}
    collate = choose_collator(
        model.config._attn_implementation,
        model.device,
        pad_token_id=encoder.pad_token_id,
        max_length=config.data.max_length,
    )
    for turn in range(options.rounds + 2):
        batch = collate(encoded[turn * size : (turn + 1) * size])
        for model, optimizer, times in sides.values():
            start = time.perf_counter()
            objective(model, dict(batch), None).backward()
            middle = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            optimizer.zero_grad()
            if turn >= 2:
                times["optimizer"].append(end - middle)
                times["step"].append(time.perf_counter() - start)
    rows = {
        name: {part: round(statistics.median(seconds) * 1e3, 2) for part, seconds in times.items()}
        for name, (_, _, times) in sides.items()
    }
    difference = rows["AdamWBalanceEMA"]["optimizer"] - rows["AdamW"]["optimizer"]
    result = {
        "trained parameters": sum(param.numel() for param in params),
        "median ms": rows,
        "step ratio": round(rows["AdamWBalanceEMA"]["step"] / rows["AdamW"]["step"], 3),
        "optimizer's difference by step": round(difference / rows["AdamW"]["step"], 4),
    }
    print(result)
    print(f"recorded in {record('training_step', result)}")


if __name__ == "__main__":
    main()
