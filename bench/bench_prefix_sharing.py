"""What computing the common beginnings of full and masked instructions once saves, on real instructions.

    python -m bench.bench_prefix_sharing DATA...      prints, and records in bench/results

DATA is what `cit-fast distances` takes, e.g. Super-NI task folders. The key parts are discovered under the model. The
same pairs go through the model in three layouts, batches in turns: a row for each sequence, the full context beside
the masked one in one row ("pairs"), and whichever takes least work by our estimate ("chosen", what scoring, discovery
and training do). Without gradients (as in scoring), forward and backward through a LoRA adapter (as in training), and
all clauses of an instruction masked one at a time (as in discovery). All give the same numbers; how far apart they are
is recorded, relative in the 2-norm.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model

from bench.ceilings import RESULTS, record
from cit_fast.cache import cache_folder
from cit_fast.data import find_tasks, load_task
from cit_fast.key_parts.clauses import clauses
from cit_fast.key_parts.hidden import pair_hidden
from cit_fast.key_parts.layout import GroupingCollator, alike_together
from cit_fast.key_parts.pairs import PairCollator, encode_pair, encode_pairs, shared_prefix
from cit_fast.key_parts.sources import find_key_parts
from cit_fast.models.config import ModelConfig
from cit_fast.models.digests import model_identity
from cit_fast.models.pretrained import load_model, load_tokenizer, resolve_model
from cit_fast.models.prompts import PromptEncoder

DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--examples", type=int, default=4, help="per task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    options = parser.parse_args()
    config = ModelConfig(dtype=options.dtype)
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
    pairs = encode_pairs(encoder, examples).pairs
    separate = PairCollator(encoder.pad_token_id)
    shared = replace(separate, share_prefix=True)
    sides = {"separate": separate, "pairs": shared, "chosen": GroupingCollator(shared)}
    result = {
        "tasks": len(tasks),
        "pairs": len(pairs),
        "batch size": options.batch_size,
        "tokens full and masked": sum(len(one.input_ids) for pair in pairs for one in (pair.full, pair.masked)),
        "tokens in common": sum(shared_prefix(pair.full.input_ids, pair.masked.input_ids) for pair in pairs),
        "forward": _compare(model, pairs, sides, options.batch_size, backward=False),
    }
    maskings = []
    for example in {example.instruction: example for example in examples}.values():
        each = [encode_pair(encoder, replace(example, key_parts=(clause,))) for clause in clauses(example.instruction)]
        maskings += [replace(one, full=each[0].full) for one in each if one.masked is not None]
    result["maskings of discovery"] = len(maskings)
    result["discovery"] = _compare(model, maskings, sides, options.batch_size, backward=False)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    result["forward and backward"] = _compare(adapted, pairs, sides, options.batch_size, backward=True)
    result["share in common"] = round(result["tokens in common"] / result["tokens full and masked"], 3)
    print(result)
    path = RESULTS / "prefix_sharing.json"
    before = {k: v for k, v in json.loads(path.read_text()).items() if k in DTYPES} if path.exists() else {}
    print(f"recorded in {record('prefix_sharing', {**before, options.dtype: result})}")


def _compare(model, pairs, sides, size: int, *, backward: bool) -> dict[str, float]:
    """Total seconds and places of all pairs in each layout, a batch of one and of another in turns."""
    times, places = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0)
    states: dict[str, dict[int, torch.Tensor]] = {name: {} for name in sides}
    model(input_ids=torch.zeros(2, 64, dtype=torch.int64))  # memory laid out, kernels chosen
    batches = {name: alike_together(pairs, size, share_prefix=name == "chosen") for name in sides}
    for each in zip(*batches.values(), strict=True):
        for (name, collate), numbers in zip(sides.items(), each, strict=True):
            batch = collate([pairs[number] for number in numbers])
            places[name] += batch["input_ids"].numel()
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                found = pair_hidden(model, batch)
                if backward:
                    (found.full.sum() + found.masked.sum()).backward()
                    model.zero_grad()
            times[name] += time.perf_counter() - start
            own = torch.cat([found.full, found.masked], 1).detach().split(found.offsets.diff().tolist())
            states[name] |= dict(zip(numbers, own, strict=True))
    plain = torch.cat([states["separate"][number] for number in range(len(pairs))]).float()
    result: dict[str, float] = {}
    for name in sides:
        own = torch.cat([states[name][number] for number in range(len(pairs))]).float()
        result[f"{name} s"] = round(times[name], 2)
        result[f"{name} places"] = places[name]
        if name != "separate":
            result[f"{name}, time"] = round(times[name] / times["separate"], 3)
            result[f"{name}, difference"] = float((own - plain).norm() / plain.norm())
    print(result, flush=True)
    return result


if __name__ == "__main__":
    main()
