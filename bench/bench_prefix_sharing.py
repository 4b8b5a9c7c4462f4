"""What computing the common prefix of full and masked instruction once saves, on real instructions.

    python -m bench.bench_prefix_sharing DATA...      prints, and records in bench/results

DATA is what `cit-fast distances` takes, e.g. Super-NI task folders. The key parts are discovered under the model. The
same batches of pairs go through the model with shared prefixes and as separate rows, in turns: without gradients (as
in scoring), forward and backward through a LoRA adapter (as in training), and all clauses of an instruction masked one
at a time (as in discovery). The two ways give the same numbers; the largest difference is recorded.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model

from bench.ceilings import record
from cit_fast.data import PromptEncoder, find_tasks, load_task
from cit_fast.data.clauses import clauses
from cit_fast.objectives import PairCollator, encode_pair, encode_pairs, pair_hidden
from cit_fast.objectives.key_parts import find_key_parts
from cit_fast.objectives.pairs import shared_prefix
from cit_fast.training.config import ModelConfig
from cit_fast.training.pretrained import cache_folder, load_model, load_tokenizer, model_identity, resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--examples", type=int, default=2, help="per task")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--row", type=int, default=1024, help="longest shared row of several maskings, in places")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long each part may take")
    options = parser.parse_args()
    config = ModelConfig(dtype="float32")
    folder = resolve_model(config)
    model = load_model(folder, config).eval()
    encoder = PromptEncoder(load_tokenizer(folder), max_length=512, on_overflow="skip")
    tasks = [load_task(source, train=options.examples, dev=0, test=0) for source in find_tasks(options.data)]
    examples = find_key_parts(
        [example for task in tasks for example in task.train],
        "discover",
        model=model,
        encoder=encoder,
        identity=model_identity(folder, config.name),
        cache=cache_folder(),
    ).examples
    examples = [example for example in examples if example.key_parts]
    pairs = sorted(encode_pairs(encoder, examples).pairs, key=lambda pair: len(pair.full.input_ids))
    batches = [pairs[k : k + options.batch_size] for k in range(0, len(pairs), options.batch_size)]
    separate = PairCollator(encoder.pad_token_id)
    sides = (separate, PairCollator(encoder.pad_token_id, share_prefix=True, row=options.row))
    result = {
        "tasks": len(tasks),
        "pairs": len(pairs),
        "tokens full and masked": sum(len(one.input_ids) for pair in pairs for one in (pair.full, pair.masked)),
        "tokens in common": sum(shared_prefix(pair.full.input_ids, pair.masked.input_ids) for pair in pairs),
        "forward": _compare(model, batches, sides, options.seconds, backward=False),
    }
    maskings = []
    for example in {example.instruction: example for example in examples}.values():
        each = [encode_pair(encoder, replace(example, key_parts=(clause,))) for clause in clauses(example.instruction)]
        maskings.append([replace(one, full=each[0].full) for one in each if one.masked is not None])
    result["discovery"] = _compare(model, maskings, sides, options.seconds, backward=False)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    result["forward and backward"] = _compare(adapted, batches, sides, options.seconds, backward=True)
    result["share in common"] = round(result["tokens in common"] / result["tokens full and masked"], 3)
    print(result)
    print(f"recorded in {record('prefix_sharing', result)}")


def _compare(model, batches, sides, seconds: float, *, backward: bool) -> dict[str, float]:
    """Total seconds and places of the batches that fit into the time, separate and shared, each batch in turns."""
    times, places = [0.0, 0.0], [0, 0]
    worst, done = 0.0, 0
    model(input_ids=torch.zeros(2, 64, dtype=torch.int64))  # memory laid out, kernels chosen
    order = sorted(range(len(batches)), key=lambda k: (k * 7) % len(batches))  # short and long ones early on
    for k in order:
        hidden = [None, None]
        for side in (0, 1) if done % 2 else (1, 0):
            batch = sides[side](batches[k])
            places[side] += batch["input_ids"].numel()
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                found = pair_hidden(model, batch)
                if backward:
                    (found.full.sum() + found.masked.sum()).backward()
                    model.zero_grad()
            times[side] += time.perf_counter() - start
            hidden[side] = torch.cat([found.full, found.masked]).detach()
        worst = max(worst, float((hidden[0] - hidden[1]).abs().amax() / hidden[0].square().mean().sqrt()))
        done += 1
        if sum(times) > seconds:
            break
    return {
        "batches": done,
        "separate s": round(times[0], 2),
        "shared s": round(times[1], 2),
        "ratio": round(times[1] / times[0], 3),
        "places ratio": round(places[1] / places[0], 3),
        "largest difference by size of the states": worst,
    }


if __name__ == "__main__":
    main()
