"""What answering test prompts costs beside `model.generate` in batches of the same size, in turns.

    python -m bench.bench_evaluation                       the quickstart's tasks
    python -m bench.bench_evaluation --superni FOLDER      and the fifteen tasks of Super-NI
    python -m bench.bench_evaluation --dtype float32       whether the answers are the same, where rounding is small

`generate` is transformers' own, greedy, prompts in batches by length, padded on the left; PEFT's layers. `smaller` is
the same in batches of an eighth of the size, which pads less. `contiguous` and `smaller, contiguous` are these without
the copy of the output projection that torch makes on a CPU: the best that we know without this package. `fused` is the
last with fuse_lora and fuse_norms. `ours` is cit_fast's: these, what prompts begin with read once, neighbours in one
pass, all answered together. Records medians in bench/results, and how many answers are those of `generate`: in bfloat16
a batch of another shape rounds otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from bench.ceilings import record
from cit_fast import fuse_lora, fuse_norms, unfuse_lora, unfuse_norms
from cit_fast.data import load_stream
from cit_fast.models.adapters import prompt_encoder, train_adapter
from cit_fast.models.config import DataConfig
from cit_fast.models.forward import whole_rows
from cit_fast.models.generation import generate
from cit_fast.models.pretrained import load_model, load_tokenizer, resolve_model
from cit_fast.run.config import load_config

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"


@torch.inference_mode()
def by_generate(model: Any, encoder: Any, prompts: Sequence[Sequence[int]], size: int, new: int) -> list[str]:
    """What an engineer writes with transformers alone."""
    tokenizer = encoder.tokenizer
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=encoder.pad_token_id,
        eos_token_id=sorted(encoder.stop_token_ids),
    )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        width = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), width), encoder.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]
        for index, tokens in zip(batch, output.tolist(), strict=True):
            end = next((k for k, token in enumerate(tokens) if token in encoder.stop_token_ids), len(tokens))
            answers[index] = tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
    return answers


def measure(
    model: Any, encoder: Any, prompts: list[list[int]], size: int, new: int, rounds: int, only: Sequence[str]
) -> dict[str, Any]:
    """Every contender, or ``only`` some, ``rounds`` times, in turns."""

    def ours() -> list[str]:
        return generate(
            model,
            prompts,
            pad_token_id=encoder.pad_token_id,
            eos_token_ids=sorted(encoder.stop_token_ids),
            tokenizer=encoder.tokenizer,
            max_new_tokens=new,
            batch_size=size,
        )

    def plain(size: int, contiguous: bool) -> list[str]:
        with whole_rows(model) if contiguous else nullcontext():
            return by_generate(model, encoder, prompts, size, new)

    less = max(1, size // 8)
    contenders: dict[str, tuple[bool, Callable[[], list[str]]]] = {
        "generate": (False, lambda: plain(size, False)),
        "smaller": (False, lambda: plain(less, False)),
        "contiguous": (False, lambda: plain(size, True)),
        "smaller, contiguous": (False, lambda: plain(less, True)),
        "fused": (True, lambda: plain(less, True)),
        "ours": (True, ours),
    }
    contenders = {name: one for name, one in contenders.items() if not only or name in only}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    answers: dict[str, list[str]] = {}
    for _ in range(rounds):
        for name, (fused, run) in contenders.items():
            for change in (fuse_lora, fuse_norms) if fused else (unfuse_lora, unfuse_norms):
                change(model)
            start = time.perf_counter()
            answers[name] = run()
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(answers.values()))
    return {
        "prompts": len(prompts),
        "tokens": sum(map(len, prompts)),
        "batch sizes": [size, less],
        "median s": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "ours, share of": {
            name: round(statistics.median(a / b for a, b in zip(seconds["ours"], values, strict=True)), 3)
            for name, values in seconds.items()
        },
        "same answers as the first": {name: _alike(own, first) for name, own in answers.items()},
    }


def _alike(some: Sequence[str], others: Sequence[str]) -> int:
    return sum(one == other for one, other in zip(some, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--test", type=int, default=16, help="prompts of each task")
    parser.add_argument("--superni-test", type=int, default=6, help="of each of these")
    parser.add_argument("--superni", type=Path, help="the folder of the stream superni-15")
    parser.add_argument("--only", nargs="+", default=(), help="these contenders; prints, and records nothing")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    config = load_config(QUICKSTART)
    settings = config.model.model_copy(update={"dtype": options.dtype, "fuse_norms": False})
    # The quickstart's attention is for its short prompts; for long ones transformers' own choice is faster, for all.
    attention = {"quickstart": settings.attn_implementation, "super-ni": None}
    folder = resolve_model(config.model)
    loads: dict[str, tuple[Any, DataConfig, int, int]] = {
        "quickstart": (config.data.tasks, config.data, config.evaluation.max_new_tokens, options.test)
    }
    if options.superni is not None:
        data = DataConfig(stream="superni-15/order-1", root=str(options.superni), on_overflow="skip")
        loads["super-ni"] = (data.tasks, data, 16, options.superni_test)
    result: dict[str, Any] = {"dtype": options.dtype}
    for name, (tasks, data, new, count) in loads.items():
        encoder = prompt_encoder(load_tokenizer(folder, False), data)
        stream = load_stream(tasks, seed=0, train=1, dev=0, test=count)
        prompts = [prompt for task in stream for prompt in encoder.encode_prompts(task.test, reserve=new).prompts]
        own = settings.model_copy(update={"attn_implementation": attention[name]})
        model = train_adapter(load_model(folder, own), config.adapter, "shared", config.seed)[0].eval()
        result[name] = measure(model, encoder, prompts, config.evaluation.batch_size, new, options.rounds, options.only)
        print(name, result[name])
    if not options.only:
        print(f"recorded in {record('evaluation', result)}")


if __name__ == "__main__":
    main()
