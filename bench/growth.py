"""A run of many small tasks: what a stage costs when many came before it.

    python -m bench.growth --tasks 200 --results bench/results/growth.json

A tiny model with random weights learns tasks of sixteen examples, one after another, in one run. After every stage its
wall time, the part of it in which the router learned, the resident memory of the process, and the files and bytes that
the stage has added are noted. A switch network has an output for each task and is trained on what is retained of all,
so its seconds and its bytes are what was asked for, and are told apart. Replay draws the examples of a memory of 16,
and after a stage three earlier tasks are answered, so that what is asked for does not grow. Of several runs each
stage's fastest counts, for another process only ever adds to its time. The figures are medians over the 20 stages after
the first tenth and over the last 20.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.files import write_file
from cit_fast.run.environment import describe_environment
from cit_fast.run.parts import Parts
from cit_fast.run.run_folder import RunFolder
from tests.fuzz.models import model_folder

WINDOW = 20
METHODS = ["sequential", "random-replay", "oracle", "grouping-ema", "switch-tokens"]


def task(number: int) -> Task:
    """Sixteen examples of one instruction."""
    name = f"task-{number:03d}"
    own = [
        Example(f"Say number {number}, then the letter.", "abcdefghijklmnopqrst"[k], (f"{number} {k}",), task=name)
        for k in range(20)
    ]
    return Task(name, tuple(own[:16]), (), tuple(own[16:]), "token_f1")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def contents(folder: Path) -> tuple[int, int]:
    """Names of files below a folder, and bytes of those that have no other name."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return len(found), sum(each.st_size for each in found if each.st_nlink == 1)


def stages_of(method: str, count: int, scratch: Path) -> list[dict[str, float]]:
    """What each stage of a run cost."""
    noted: list[dict[str, float]] = []
    started, learning = [time.perf_counter()], [0.0]
    commit, learn = RunFolder.commit, Parts.learn

    def timed(self: Parts, stage: Any) -> Any:
        begun = time.perf_counter()
        found = learn(self, stage)
        learning[0] = time.perf_counter() - begun
        return found

    def noting(self: RunFolder, record: Any, fill: Any) -> None:
        commit(self, record, fill)
        files, size = contents(self.stage_path(record.index))
        network = self.stage_path(record.index) / "router" / "switch.safetensors"
        of_network = network.stat().st_size if network.exists() else 0
        now = time.perf_counter()
        seconds = {"seconds": now - started[0] - learning[0], "router seconds": learning[0]}
        noted.append({**seconds, "resident": resident(), "files": files})
        noted[-1] |= {"bytes": size - of_network, "network bytes": of_network}
        started[0] = time.perf_counter()

    RunFolder.commit, Parts.learn = noting, timed  # type: ignore[method-assign]
    chosen: dict[str, Any] = {"preset": method}
    if method == "random-replay":
        chosen["replay"] = {"fraction": 0.01}
    try:
        ContinualTrainer(
            {
                "methods": [chosen],
                "output": str(scratch / "runs"),
                "model": {"name": str(model_folder(scratch / "model"))},
                "adapter": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
                "data": {"max_length": 160},
                "memory": {"total": 16},
                "training": {"per_device_train_batch_size": 8, "save_strategy": "no", "use_cpu": True},
                "evaluation": {"max_new_tokens": 2, "tasks": {"sample": 3}, "untrained": False},
            },
            stream=TaskStream(tuple(map(task, range(count)))),
            console=Console(quiet=True),
        ).run()
    finally:
        RunFolder.commit, Parts.learn = commit, learn  # type: ignore[method-assign]
    return noted[1:]


def fastest(rounds: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Of each stage the least of every figure over runs of the same tasks."""
    return [{name: min(each[name] for each in one) for name in one[0]} for one in zip(*rounds, strict=True)]


def summary(noted: list[dict[str, float]]) -> dict[str, Any]:
    """Early and late medians, and their ratio."""
    first = max(1, len(noted) // 10)
    early, late = noted[first : first + WINDOW], noted[-WINDOW - 1 : -1]  # the last answers everything
    found: dict[str, Any] = {}
    for name in noted[0]:
        then, now = (statistics.median(each[name] for each in some) for some in (early, late))
        found[name] = {"early": then, "late": now, "ratio": now / then if then else None}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds: dict[str, list[list[dict[str, float]]]] = {method: [] for method in options.methods}
    for _ in range(options.rounds):
        for method, noted in rounds.items():
            with tempfile.TemporaryDirectory() as scratch:
                os.environ["CIT_FAST_CACHE"] = f"{scratch}/cache"
                noted.append(stages_of(method, options.tasks, Path(scratch)))
    found = {method: summary(fastest(noted)) for method, noted in rounds.items()}
    for method, of_method in found.items():
        for name, each in of_method.items():
            ratio = "–" if each["ratio"] is None else f"{each['ratio']:.2f}"
            print(f"{method:14} {name:14} {each['early']:14,.2f} {each['late']:14,.2f}  {ratio}", flush=True)
    if options.results:
        record = {"tasks": options.tasks, "rounds": options.rounds, "methods": found}
        record["environment"] = describe_environment()
        write_file(options.results, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
