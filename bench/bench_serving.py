"""Serving many adapter sets from one base model: throughput, memory, loading and routing, against one PEFT adapter.

    python -m bench.bench_serving [--rounds 3] [--dtype auto]      prints, and records in bench/results/serving.json

SmolLM2-135M with LoRA of rank 16 on every linear layer; a hundred sets with random weights. Prompts of the built-in
tasks in batches of 16, all of one number of new tokens, contenders in turns. "sets N": rows of a batch go round N sets.
PEFT's own mixing has only the sets of one batch loaded, as many more take it minutes to load.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from bench.ceilings import record
from cit_fast.data import Example, Task
from cit_fast.data.builtin import builtin_stream
from cit_fast.methods.routing import GroupingRouter, SwitchTokensRouter
from cit_fast.methods.routing.features import LastTokenFeatures
from cit_fast.methods.stage import Stage
from cit_fast.models.adapter_bank import AdapterBank
from cit_fast.models.adapters import prompt_encoder
from cit_fast.models.config import ModelConfig
from cit_fast.models.pretrained import load_model, load_tokenizer, resolve_model
from cit_fast.run.config import RunConfig

SETS, BATCH, PEFT_SETS = 100, 16, 16


def resident() -> float:
    """GB of memory that is this process's own; pages of mapped files, which the system can drop, are not."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1e6


def make_sets(base: Any, folder: Path) -> None:
    options = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, options, adapter_name="set-000")
    model.save_pretrained(folder)
    weights = load_file(folder / "set-000" / "adapter_model.safetensors")
    model.unload()
    generator = torch.Generator().manual_seed(0)
    for number in range(SETS):
        own = folder / f"set-{number:03d}"
        if number:
            shutil.copytree(folder / "set-000", own)
        drawn = {key: torch.randn(value.shape, generator=generator) * 0.02 for key, value in weights.items()}
        save_file(drawn, own / "adapter_model.safetensors")


def tokens_of(model: Any, rows: list[list[int]], pad: int, new: int, **options: Any) -> None:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=pad,
            **options,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    config = RunConfig.model_validate({"model": {"dtype": options.dtype}})
    folder = resolve_model(ModelConfig())
    encoder = prompt_encoder(load_tokenizer(folder), config.data)
    stream = builtin_stream(seed=0, train=160, dev=0, test=8)
    examples = [example for task in stream for example in task.test]
    examples = examples[:: max(1, len(examples) // options.prompts)][: options.prompts]
    prompts = sorted((encoder.prompt(example) for example in examples), key=len, reverse=True)
    pad = encoder.pad_token_id
    with tempfile.TemporaryDirectory() as scratch:
        adapters = Path(scratch)
        make_sets(load_model(folder, config.model), adapters)
        base = load_model(folder, config.model).eval()
        before, start = resident(), time.perf_counter()
        bank = AdapterBank()
        for number in range(SETS):
            bank.read(base, f"set-{number:03d}", adapters / f"set-{number:03d}")
        loading, memory = time.perf_counter() - start, resident() - before
        with_peft, start, before = load_model(folder, config.model), time.perf_counter(), resident()
        with_peft = PeftModel.from_pretrained(with_peft, adapters / "set-000", adapter_name="set-000")
        for number in range(1, PEFT_SETS):
            with_peft.load_adapter(adapters / f"set-{number:03d}", f"set-{number:03d}")
        peft_loading, peft_memory = time.perf_counter() - start, resident() - before
        with_peft.eval()
        with_peft.set_adapter("set-000")

        def single(rows: list[list[int]], first: int) -> None:
            tokens_of(with_peft, rows, pad, options.new_tokens)

        def mixed(sets: int) -> Callable[[list[list[int]], int], None]:
            def answer(rows: list[list[int]], first: int) -> None:
                with bank.answering([f"set-{(first + k) % sets:03d}" for k in range(len(rows))]):
                    tokens_of(base, rows, pad, options.new_tokens)

            return answer

        def mixed_by_peft(sets: int) -> Callable[[list[list[int]], int], None]:
            def answer(rows: list[list[int]], first: int) -> None:
                names = [f"set-{k % sets:03d}" for k in range(len(rows))]
                tokens_of(with_peft, rows, pad, options.new_tokens, adapter_names=names)

            return answer

        contenders: dict[str, Callable[[list[list[int]], int], None]] = {
            "one PEFT adapter": single,
            "base model": lambda rows, first: tokens_of(base, rows, pad, options.new_tokens),
            **{f"sets {n}": mixed(n) for n in (1, 10, SETS)},
            **{f"PEFT adapter_names, sets {n}": mixed_by_peft(n) for n in (1, 10, PEFT_SETS)},
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(options.rounds + 1):
            for name, answer in contenders.items():
                start = time.perf_counter()
                for first in range(0, len(prompts), BATCH):
                    answer(prompts[first : first + BATCH], first)
                    if turn == 0:
                        break
                if turn:
                    times[name].append(time.perf_counter() - start)
                print(f"turn {turn}, {name}: {time.perf_counter() - start:.2f} s", flush=True)
        seconds = {name: statistics.median(each) for name, each in times.items()}
        start = time.perf_counter()
        for number in range(20):
            with bank.answering([f"set-{(number + k) % SETS:03d}" for k in range(BATCH)]):
                pass
        switching = (time.perf_counter() - start) / 20

    lcia, switch = GroupingRouter(threshold=2.0), SwitchTokensRouter(epochs=1)
    pool: list[Example] = [example for task in stream for example in task.train]
    for number in range(SETS):
        own = tuple(pool[number::SETS])
        task = Task(f"{number:03d}", own, (), own[:1], metric="exact_match")
        for router in (lcia, switch):
            router.assign(Stage(base, encoder, tasks=(task,)))
        switch.learn(Stage(base, encoder, tasks=(task,)))
    features = LastTokenFeatures(base, encoder.tokenizer)
    texts = [f"{example.instruction}\n\n{example.input}" for example in examples]
    routing: dict[str, Any] = {}
    for name, route in {
        "lcia, TF-IDF": lambda: lcia.answer(examples, Stage(base, encoder)),
        "switch, mean token embeddings": lambda: switch.answer(examples, Stage(base, encoder)),
        "switch, last-token states of the base model (features alone)": lambda: features.embed(texts),
    }.items():
        route()
        took = []
        for _ in range(5):
            start = time.perf_counter()
            route()
            took.append(time.perf_counter() - start)
        share = statistics.median(took) / (statistics.median(took) + seconds[f"sets {SETS}"])
        routing[name] = {
            "ms per prompt": round(statistics.median(took) / len(examples) * 1e3, 2),
            "share": round(share, 4),
        }
    new = options.new_tokens * len(prompts)
    result = {
        "versions": {"peft": peft.__version__, "transformers": transformers.__version__},
        "setting": {
            "model": config.model.name,
            "dtype": str(base.dtype),
            "rank": 16,
            "sets": SETS,
            "batch": BATCH,
            "prompts": len(prompts),
            "prompt tokens": [min(map(len, prompts)), max(map(len, prompts))],
            "new tokens": options.new_tokens,
            "rounds": options.rounds,
        },
        "throughput": {
            name: {
                "tokens per second": round(new / each, 1),
                "of one PEFT adapter": round(seconds["one PEFT adapter"] / each, 3),
                "seconds": [round(value, 3) for value in times[name]],
            }
            for name, each in seconds.items()
        },
        "stacking the sets of a batch, ms": round(switching * 1e3, 1),
        "loading": {
            f"{SETS} sets": {
                "seconds": round(loading, 2),
                "GB mapped": round(bank.memory() / 1e9, 3),
                "GB own": round(memory, 3),
            },
            f"PEFT, {PEFT_SETS} sets": {"seconds": round(peft_loading, 2), "GB own": round(peft_memory, 3)},
        },
        "routing": routing,
    }  # fmt: skip
    print(result)
    print(f"recorded in {record('serving', result)}")


if __name__ == "__main__":
    main()
