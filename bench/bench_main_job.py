"""The quickstart's plain tuning as a whole, beside the loop that an engineer writes with Trainer, PEFT and generate.

    python -m bench.bench_main_job --rounds 3

Both sides are processes of their own, in turns, that do the same job: start, answer the test prompts of the four tasks
with the untrained model, tune on one task after another (same examples, same TrainingArguments, a checkpoint where the
quickstart has one), keep the adapter of each stage, and answer all test prompts again, both in the dtype that
`model.dtype: auto` means here. `trainer` is transformers'
Trainer on PEFT's layers and `generate` in batches by length; `cit-fast` is `cit-fast run`, which also writes records,
predictions and a report. Fetching or converting the model comes before and is not counted. Records the seconds of every
part, the largest resident memory and the scores in bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer

from bench.bench_evaluation import QUICKSTART, by_generate
from bench.ceilings import record
from cit_fast.data import load_stream
from cit_fast.evaluation import read_stages
from cit_fast.evaluation.metrics import score
from cit_fast.models.adapters import prompt_encoder
from cit_fast.models.loading import computing_dtype
from cit_fast.models.pretrained import resolve_model
from cit_fast.run.arguments import training_arguments
from cit_fast.run.config import load_config

METHOD = "sequential"


def by_trainer(output: Path) -> None:
    """The job with transformers and PEFT; writes ``summary.json``."""
    config = load_config(QUICKSTART)
    folder, data = resolve_model(config.model), config.data
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=computing_dtype(folder, settings), attn_implementation=config.model.attn_implementation
    )
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(config.adapter or {})))
    encoder = prompt_encoder(tokenizer, data)
    stream = load_stream(data.tasks, seed=config.seed, train=data.train, dev=0, test=data.test)
    new, size = config.evaluation.max_new_tokens, config.evaluation.batch_size
    prompts = {task.name: encoder.encode_prompts(task.test, reserve=new).prompts for task in stream}
    seconds = {"training": 0.0, "evaluation": 0.0}

    def answer() -> dict[str, float]:
        start = time.perf_counter()
        model.eval()
        answers = iter(by_generate(model, encoder, [one for own in prompts.values() for one in own], size, new))
        scores = {
            task.name: score(
                task.metric, [next(answers) for _ in task.test], [e.references for e in task.test], labels=task.labels
            ).value
            for task in stream
        }
        seconds["evaluation"] += time.perf_counter() - start
        return scores

    scores = [answer()]
    for task in stream:
        start = time.perf_counter()
        examples = [{"input_ids": e.input_ids, "labels": e.labels} for e in encoder.encode_all(task.train).encoded]
        arguments = training_arguments(config.training, config.seed, output / task.name)  # one epoch, as in a run
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        )
        trainer.train()
        model.save_pretrained(output / task.name / "adapter")
        seconds["training"] += time.perf_counter() - start
        scores.append(answer())
    (output / "summary.json").write_text(json.dumps({"seconds": seconds, "scores": scores}))


def of_trainer(output: Path) -> dict[str, Any]:
    """What :func:`by_trainer` wrote."""
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


def of_ours(output: Path) -> dict[str, Any]:
    """The same of a run folder."""
    stages = read_stages(output / METHOD)
    return {
        "seconds": {
            "training": sum(stage.train_seconds for stage in stages),
            "evaluation": sum(stage.evaluate_seconds for stage in stages),
        },
        "scores": [stage.scores for stage in stages],
    }


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and largest resident memory in GB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{errors[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--by-trainer", type=Path, metavar="FOLDER", help="do the job of that side, and nothing else")
    options = parser.parse_args()
    if options.by_trainer is not None:
        by_trainer(options.by_trainer)
        return
    resolve_model(load_config(QUICKSTART).model)
    sides: dict[str, tuple[Callable[[str], list[str]], Callable[[Path], dict[str, Any]]]] = {
        "trainer": (lambda out: ["-m", "bench.bench_main_job", "--by-trainer", out], of_trainer),
        "cit-fast": (
            lambda out: [
                *("-m", "cit_fast.cli", "run", str(QUICKSTART)),
                *("--set", f"methods=[{METHOD}]", "--set", f"output={out}"),
            ],
            of_ours,
        ),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, (command, read) in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                whole, memory = timed([sys.executable, *command(folder)])
                one = read(Path(folder))
            one["seconds"] = {part: round(s, 1) for part, s in {**one["seconds"], "whole": whole}.items()}
            one["memory GB"] = round(memory, 2)
            found[name].append(one)
            print(name, one, flush=True)
    result = {
        side: {
            "median s": {part: statistics.median(one["seconds"][part] for one in each) for part in each[0]["seconds"]},
            "memory GB": max(one["memory GB"] for one in each),
            "scores after the last task": [one["scores"][-1] for one in each],
            "of each round": [one["seconds"] for one in each],
        }
        for side, each in found.items()
    }
    pairs = zip(found["cit-fast"], found["trainer"], strict=True)
    result["cit-fast, share of trainer"] = {
        part: round(statistics.median(ratios), 3)
        for part, ratios in _by_part([(ours["seconds"], theirs["seconds"]) for ours, theirs in pairs]).items()
    }
    print(result["cit-fast, share of trainer"])
    print(f"recorded in {record('main_job', result)}")


def _by_part(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, list[float]]:
    return {part: [ours[part] / theirs[part] for ours, theirs in pairs] for part in pairs[0][0]}


if __name__ == "__main__":
    main()
