"""LCIA's ablation on drawn pictures (its table 6 is on CoIN): what the average and the grouping each do.

    python -m bench.visual --results bench/results/visual.json
    python -m bench.visual --methods lora "lcia, paper" --orders 1 --seeds 1

``cit-fast/tiny-vision`` learns six visual tasks one after another, worded as CoIN's Origin: five of them share their
instruction, which decides LCIA's groups. Nothing is replayed. Every seed draws other examples and another
initialisation, the same for all methods. A call that was interrupted goes on where it was; runs that are in
``--results`` are taken from there. The table has means and standard deviations over orders and seeds, and the mean
difference to the first method, paired, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench.ceilings import machine
from bench.methods import figures
from bench.paired import difference, in_processes
from cit_fast import ContinualTrainer
from cit_fast.evaluation import read_run, read_stages
from cit_fast.files import write_file
from cit_fast.models.config import ModelConfig
from cit_fast.models.pretrained import resolve_model

TASKS = ("colour", "count", "box", "yesno", "bars", "left")
ORDERS = {1: TASKS, 2: TASKS[::-1], 3: ("yesno", "box", "colour", "left", "count", "bars")}
_AVERAGE = {"name": "balance-ema"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"preset": "sequential"},
    "fixed 0.99": {"preset": "ema", "update": {"decay": 0.99}},
    # the paper's equation (45) in every stage; the released rule where an adapter is trained again
    "dynamic, paper": {"preset": "sequential", "update": {**_AVERAGE, "rule": "paper", "start": "before"}},
    "dynamic, released": {
        "preset": "sequential",
        "update": {**_AVERAGE, "rule": "released", "when": "retrained", "start": "after"},
    },
    "grouping": {"preset": "lcia", "update": "plain"},
    "lcia, paper": {"preset": "lcia-always"},
    "lcia, released": {"preset": "lcia"},
    "joint": {"preset": "joint"},
}
MODEL = "cit-fast/tiny-vision"
DATA = {"train": 320, "dev": 0, "test": 64, "max_length": 96}
TRAINING = {
    "learning_rate": 2e-3,
    "warmup_steps": 5,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "save_strategy": "no",
    "use_cpu": True,
}
EVALUATION = {"max_new_tokens": 12, "batch_size": 64, "untrained": True}
FIGURES = {"AP": 1, "forgetting": -1, "New.ACC": 1}
"""What is compared, and whether more (1) or less (-1) of it is better."""


class Job(NamedTuple):
    """One run."""

    method: str
    order: int
    seed: int

    @property
    def name(self) -> str:
        """Of its figures."""
        return f"{self.method}, order {self.order}, seed {self.seed}"


def settings(job: Job, folder: Path) -> dict[str, Any]:
    """The configuration of a run."""
    return {
        "name": "visual",
        "output": str(folder),
        "seed": job.seed,
        "methods": [{**METHODS[job.method], "name": "method"}],
        "model": {"name": MODEL},
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "data": {**DATA, "tasks": [f"visual-origin-{task}" for task in ORDERS[job.order]]},
        "training": TRAINING,
        "evaluation": EVALUATION,
    }


def run(job: Job, output: Path) -> None:
    """Run a job, and keep its figures as a file."""
    folder = output / "runs" / job.name
    (made,) = ContinualTrainer(settings(job, folder), console=Console(quiet=True)).run()
    own, stages = figures(made), read_stages(made)
    found = {
        **{name: own[name] for name in (*FIGURES, "learned", "balance weight", "train minutes", "total minutes")},
        "sets": len({stage.adapter for stage in stages[1:]}),
        "scores": {task: [stage.scores.get(task) for stage in stages] for task in read_run(made).tasks},
        "machine": {name: machine()[name] for name in ("cpu", "cores", "torch")},
    }
    write_file(file_of(job, output), json.dumps(found))
    shutil.rmtree(folder)


def file_of(job: Job, output: Path) -> Path:
    """Where a job's figures are until they are recorded."""
    return output / "figures" / f"{job.name}.json"


def rows(known: dict[str, Any], methods: list[str], orders: list[int], seeds: int) -> dict[str, dict[str, Any]]:
    """Means, deviations and paired differences of each method; a joint run forgets nothing that could be measured."""
    made: dict[str, dict[str, Any]] = {}
    pairs = list(itertools.product(orders, range(seeds)))
    runs = {name: [known[Job(name, *pair).name] for pair in pairs] for name in methods}
    for name, own in runs.items():
        values = {figure: [each[figure] for each in own] for figure in FIGURES}
        values = {figure: of for figure, of in values.items() if None not in of}
        others = {figure: [each[figure] for each in runs[methods[0]]] for figure in values}
        made[name] = {
            "mean": {figure: statistics.mean(of) for figure, of in values.items()},
            "deviation": {figure: statistics.stdev(of) if len(of) > 1 else 0.0 for figure, of in values.items()},
            f"difference to {methods[0]}": {
                figure: difference(values[figure], others[figure], FIGURES[figure])
                for figure in values
                if None not in others[figure]
            },
        }
    return made


def printed(title: str, made: dict[str, dict[str, Any]], console: Console) -> None:
    """The table."""
    first = next(iter(made))
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("method", *FIGURES, *(f"{figure}, difference" for figure in FIGURES)):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, row in made.items():
        mean, deviation, apart = row["mean"], row["deviation"], row[f"difference to {first}"]
        cells = [f"{mean[f]:.1f} ± {deviation[f]:.1f}" if f in mean else "–" for f in FIGURES]
        for figure in FIGURES:
            d = apart.get(figure) if name != first else None
            cells.append("–" if d is None else f"{d['mean']:+.1f} [{d['low']:.1f}, {d['high']:.1f}]")
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--orders", type=int, nargs="+", choices=list(ORDERS), default=list(ORDERS))
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, each with one thread")
    parser.add_argument("--output", type=Path, default=Path("runs/visual"))
    parser.add_argument("--results", type=Path, help="JSON file of runs, with hardware, and tables; added to")
    options = parser.parse_args()
    console = Console(width=160)
    model = resolve_model(ModelConfig(name=MODEL))  # pretrained once, before the processes begin
    setting = {"model": model.name, "data": DATA, "training": TRAINING, "methods": METHODS, "orders": ORDERS}
    setting = json.loads(json.dumps(setting))
    record: dict[str, Any] = {"setting": setting, "runs": {}, "tables": {}}
    if options.results is not None and options.results.exists():
        record = json.loads(options.results.read_text())
        if record["setting"] != setting:
            raise SystemExit(f"{options.results}: its runs are of another model or setting; name another file")
    known = record["runs"]
    # Seed by seed, so that what is there after an interruption is paired.
    order_of_runs = itertools.product(range(options.seeds), options.orders, options.methods)
    jobs = [Job(method, order, seed) for seed, order, method in order_of_runs]
    jobs = [job for job in jobs if job.name not in known]
    new = [job for job in jobs if not file_of(job, options.output).exists()]
    in_processes(run, new, options.workers, console, options.output)
    missing = [job.name for job in jobs if not file_of(job, options.output).exists()]
    known |= {job.name: json.loads(file_of(job, options.output).read_text()) for job in jobs if job.name not in missing}
    title = f"orders {', '.join(map(str, options.orders))}, {options.seeds} seeds"
    if not missing:
        made = rows(known, options.methods, options.orders, options.seeds)
        printed(title, made, console)
        record["tables"][f"{title}: {', '.join(options.methods)}"] = made
    if options.results is not None:
        write_file(options.results, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if missing:
        raise SystemExit(f"{len(missing)} runs have no figures, the first {missing[0]}; run the command again")


if __name__ == "__main__":
    main()
