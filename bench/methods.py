"""Methods compared on a benchmark of Super-NI task folders: who forgets how much, at what cost.

    python bench/methods.py path/to/superni15 --tasks 5 --train 100 --methods sequential random-replay lcia

The folder holds one sub-folder per task with train.json, dev.json and test.json. Every method trains the same tasks in
the same order from the same seeds; ``joint`` (all tasks at once) is added as the upper bound, and experts (one model
per task, shared by all methods through the cache) for Relative Gain. A call that was interrupted goes on where it was.
The table goes to the terminal and, with hardware and versions, to ``--results``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from cit_fast import ContinualTrainer
from cit_fast.errors import CitFastError, DataError
from cit_fast.evaluation import continual_metrics, read_run, read_stages

# The two orders that continual-learning papers use on these fifteen tasks, by the number in the folder's name.
ORDERS = {
    1: (1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875),
    2: (748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875),
}
COLUMNS = ("AP", "forgetting", "BWT", "relative gain", "replayed", "train minutes", "total minutes")


def task_folders(data: Path, order: int, count: int | None) -> list[Path]:
    """The first ``count`` task folders of ``data`` in one of the published orders."""
    by_number = {int(path.name[4:].partition("_")[0]): path for path in data.glob("task[0-9]*_*") if path.is_dir()}
    wanted = ORDERS[order][:count]
    missing = [number for number in wanted if number not in by_number]
    if missing:
        raise DataError(f"{data}: no folder of task {missing[0]}; give the folder that holds task..._.../train.json")
    return [by_number[number] for number in wanted]


def settings(options: argparse.Namespace, seed: int) -> dict:
    """The configuration of one seed."""
    tasks = [
        {"path": str(path), "format": "super_ni", "metric": "rouge_l", "skip_unanswered": True}
        for path in task_folders(options.data, options.order, options.tasks)
    ]
    return {
        "name": f"superni-order{options.order}",
        "output": str(options.output / f"seed{seed}"),
        "seed": seed,
        "methods": [*options.methods, *([] if "joint" in options.methods else ["joint"])],
        "model": {"name": options.model, "attn_implementation": options.attention},
        "data": {
            "tasks": tasks,
            "train": options.train,
            "test": options.test,
            "max_length": options.max_length,
            "system_prompt": "",
        },
        "training": {
            "learning_rate": options.learning_rate,
            "num_train_epochs": options.epochs,
            "per_device_train_batch_size": options.batch_size,
            "warmup_steps": 3,
        },
        "evaluation": {
            "experts": options.experts,
            "tasks": "seen",
            "untrained": False,
            "max_new_tokens": options.max_new_tokens,
            "batch_size": 32,
        },
    }


def figures(folder: Path) -> dict[str, float | None]:
    """One run's row of the table."""
    run, stages = read_run(folder), read_stages(folder)
    metrics = continual_metrics(run, stages)
    train = sum(stage.train_seconds for stage in stages) / 60
    return {
        "AP": metrics.average_performance,
        "forgetting": metrics.forgetting,
        "BWT": metrics.backward_transfer,
        "relative gain": metrics.relative_gain,
        "replayed": float(sum(sum(stage.replayed.values()) for stage in stages)),
        "train minutes": train,
        "total minutes": train + sum(stage.evaluate_seconds for stage in stages) / 60,
    }


def cell(values: list[float | None]) -> str:
    """Mean, and the standard deviation where there are several seeds."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of Super-NI task folders")
    parser.add_argument("--methods", nargs="+", default=["sequential", "random-replay", "lcia"])
    parser.add_argument("--order", type=int, choices=ORDERS, default=1)
    parser.add_argument("--tasks", type=int, help="only the first so many tasks of the order")
    parser.add_argument("--train", type=int, help="training examples per task at most")
    parser.add_argument("--test", type=int, help="test examples per task at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--no-experts", dest="experts", action="store_false", help="leave Relative Gain out")
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, help="JSON file for the table, with hardware and versions")
    options = parser.parse_args()

    console = Console()
    rows: dict[str, list[dict[str, float | None]]] = {}
    environment: dict = {}
    for seed in options.seeds:
        for folder in ContinualTrainer(settings(options, seed)).run():
            rows.setdefault(folder.name, []).append(figures(folder))
            environment = read_run(folder).environment
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"Super-NI, order {options.order}, {options.tasks or 15} tasks, {len(options.seeds)} seed(s)",
    )
    table.add_column("method", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for method, seeds in rows.items():
        table.add_row(method, *[cell([row[column] for row in seeds]) for column in COLUMNS])
    console.print(table)
    if options.results:
        asked = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items() if key != "results"}
        asked["data"] = options.data.name
        asked.pop("output")
        result = {"date": date.today().isoformat(), "options": asked, "environment": environment, "methods": rows}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except CitFastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
