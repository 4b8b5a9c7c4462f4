"""One seed of one method on one stream: run, reduced to its figures, and kept as a small file."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bench.ceilings import machine
from bench.methods import figures as compared
from bench.methods import method
from bench.testbed.pretraining_tasks import general
from bench.testbed.streams import REWORDED, reworded, stream
from cit_fast import ContinualTrainer
from cit_fast.evaluation import read_run, read_stages
from cit_fast.files import write_file

TRAIN, TEST, GENERAL_TEST = 640, 40, 20
TRAINING = {
    "learning_rate": 1.5e-3,
    "per_device_train_batch_size": 4,
    "warmup_steps": 3,
    "num_train_epochs": 1,
    "save_strategy": "no",
    "use_cpu": True,
}
FIGURES = ("AP", "forgetting", "New.ACC", "general", "reworded", "minutes", "replayed")


class Job(NamedTuple):
    """What is run: a method with a replay budget on one order with one seed."""

    method: str
    fraction: float | None
    order: int
    seed: int

    @property
    def name(self) -> str:
        """Of its figures."""
        budget = "own" if self.fraction is None else f"{self.fraction:g}"
        return f"{self.method}-{budget}-order{self.order}-seed{self.seed}"

    def file(self, output: Path) -> Path:
        """Where its figures are."""
        return output / "figures" / f"{self.name}.json"


def settings(job: Job, model: Path, folder: Path) -> dict[str, Any]:
    """The configuration of a run."""
    chosen = method(job.method, argparse.Namespace(fraction=job.fraction, per_task=None))
    return {
        "name": "testbed",
        "output": str(folder),
        "seed": job.seed,
        "methods": [chosen],
        "model": {"name": str(model), "attn_implementation": "eager"},
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "data": {"max_length": 192},
        "training": TRAINING,
        "evaluation": {"max_new_tokens": 24, "batch_size": 64, "tasks": "seen", "untrained": True},
    }


def figures(folder: Path) -> dict[str, Any]:
    """The figures of any comparison, change of general ability, AP in unseen wordings, and every score."""
    run, stages = read_run(folder), read_stages(folder)
    before, after = stages[0].scores, stages[-1].scores
    unseen = [task for task in run.held_out_tasks if task.endswith(REWORDED)]
    ability = {task: (before[task], after[task]) for task in run.held_out_tasks if task not in unseen}
    own = compared(folder)
    return {
        **{name: own[name] for name in ("AP", "forgetting", "New.ACC", "replayed", "train minutes")},
        "general": statistics.mean(new - old for old, new in ability.values()),
        "general before": statistics.mean(old for old, _ in ability.values()),
        "reworded": statistics.mean(after[task] for task in unseen),
        "minutes": own["total minutes"],
        "steps": sum(stage.steps for stage in stages),
        "scores": {task: [_rounded(stage.scores.get(task)) for stage in stages] for task in run.tasks},
        "reworded scores": {task: _rounded(after[task]) for task in unseen},
        "general scores": {task: [_rounded(score) for score in pair] for task, pair in ability.items()},
    }


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 2)


def run(job: Job, model: Path, output: Path, keep: bool) -> None:
    """Run a job whose figures are not there yet."""
    file = job.file(output)
    if file.exists():
        return
    folder, tasks = output / "runs" / job.name, stream(job.order, job.seed, TRAIN, TEST)
    trainer = ContinualTrainer(
        settings(job, model, folder),
        stream=tasks,
        held_out=[*general(GENERAL_TEST), *reworded(tasks)],
        console=Console(quiet=True),
    )
    started = time.process_time()
    (made,) = trainer.run()
    seconds = time.process_time() - started
    file.parent.mkdir(parents=True, exist_ok=True)
    hardware = {name: machine()[name] for name in ("cpu", "cores", "torch")}
    write_file(file, json.dumps({**figures(made), "cpu minutes": seconds / 60, "machine": hardware}))
    if not keep:
        shutil.rmtree(folder)
