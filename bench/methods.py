"""Methods compared on a benchmark of Super-NI task folders: who forgets how much, who heeds instructions, at what cost.

    python bench/methods.py path/to/superni15 --tasks 5 --train 100 --methods sequential random-replay lcia-ema

    python bench/methods.py path/to/superni15 --by-category --train 100 --fraction 0.1 \\
        --methods sequential random-replay inscl inscl-uniform inscl-no-insinfo

    python bench/methods.py path/to/superni15 --held-out 3 --train 100 --methods sequential random-replay

The folder holds one sub-folder per task with train.json, dev.json and test.json. Every method trains the same tasks in
the same order from the same seeds; ``joint`` (all tasks at once) is added as the upper bound, and experts (one model
per task, shared by all methods through the cache) for Relative Gain. A method whose experts (without them, its tasks
when they were new) are less than 20 points above the untrained model is marked: its tasks were not learned, so it
cannot show forgetting.

A call that was interrupted goes on where it was. The table goes to the terminal and, with hardware and versions, to
``--results``, run by run as they end; runs that are there are not made again, on another machine either, so that a
comparison of several seeds can be made in several nights.

Every Super-NI task has one instruction. With ``--by-category`` the tasks of a category are trained as one, as in the
InsCL paper, so that there are several to choose from. ``--fraction`` or ``--per-task`` gives every method that replays
the same budget; without them each has its preset's, for a published method that of its paper.

The last ``--held-out`` tasks of the order (or, by category, the last categories) are never trained, only answered at
the end. V says how often answers break what a task's definition asks for (the stream file superni-15 says what, and
the closed sets that its answers show); the P-score of the trained tasks is AP.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import t

from cit_fast import ContinualTrainer
from cit_fast.data import Task, TaskStream, load_stream
from cit_fast.data.sources import TaskSource
from cit_fast.data.streams import stream_files
from cit_fast.errors import CitFastError, DataError
from cit_fast.evaluation import continual_metrics, read_run, read_stages, task_set_scores
from cit_fast.evaluation.metrics import normalise_label
from cit_fast.files import write_file
from cit_fast.methods.config import presets

STREAM = stream_files()["superni-15"]
ABLATIONS = {
    method["name"]: method
    for method in yaml.safe_load(Path(__file__).with_name("configs").joinpath("ablations.yaml").read_text())["methods"]
}
COLUMNS = (
    "AP", "New.ACC", "forgetting", "BWT", "learned", "relative gain", "V", "held-out P", "held-out V", "balance weight",
    "fell back %", "replayed", "train minutes", "total minutes",
)  # fmt: skip
PAIRED = ("AP", "New.ACC", "forgetting")


def task_folders(data: Path, order: int, count: int | None, only: Sequence[int] = ()) -> list[Path]:
    """The first ``count`` task folders of ``data`` in one of the published orders, or ``only`` these, in this order."""
    names = STREAM.orders[f"order-{order}"]
    if only:
        by_number = {int(name[4:].partition("_")[0]): name for name in names}
        names = [by_number.get(number, f"task{number}_?") for number in only]
    missing = [name for name in names[:count] if not (data / name).is_dir()]
    if missing:
        raise DataError(f"{data}: no folder {missing[0]}; give the folder that holds task..._.../train.json")
    return [data / name for name in names[:count]]


def source(path: Path) -> dict:
    """A task as the stream file names it, with what its definition asks of an answer."""
    return {**STREAM.tasks[path.name], "path": str(path), "name": path.name}


def divided(options: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The tasks to train, the first ``--tasks`` of the order, and the held-out ones, its last ``--held-out``."""
    every = task_folders(options.data, options.order, None if options.held_out else options.tasks, options.only)
    trained = every[: len(every) - options.held_out][: options.tasks]
    if not trained or len(trained) < (options.tasks or 0):
        raise DataError(f"--held-out {options.held_out} leaves {len(every) - options.held_out} tasks to train")
    return [source(path) for path in trained], [source(path) for path in every[len(every) - options.held_out :]]


def category(folder: Path) -> str:
    """The category that a task's own file names."""
    named = json.loads((folder / "train.json").read_text(encoding="utf-8"))["Categories"]
    return str(named if isinstance(named, str) else named[0]).lower().replace(" ", "-")


def categories(options: argparse.Namespace, seed: int) -> tuple[TaskStream, list[Task]]:
    """One task per category, in the order in which the categories appear, and the held-out ones, the last of them;
    ``--train`` and ``--test`` hold for each of the tasks in it.
    """
    members: dict[str, list[Task]] = {}
    for path in task_folders(options.data, options.order, options.tasks, options.only):
        (task,) = load_stream([TaskSource(**source(path))], seed=seed, train=options.train, test=options.test)
        members.setdefault(category(path), []).append(task)
    merged = [_merged(name, tasks) for name, tasks in members.items()]
    count = len(merged) - options.held_out
    if count < 1:
        raise DataError(f"--held-out {options.held_out} leaves none of {len(merged)} categories to train")
    return TaskStream(tuple(merged[:count])), merged[count:]


def _merged(name: str, tasks: list[Task]) -> Task:
    splits = {
        split: tuple(dataclasses.replace(each, task=name) for task in tasks for each in getattr(task, split))
        for split in ("train", "dev", "test")
    }
    # The tasks of a category ask for different forms; only where each has a closed set is there one for all of them.
    closed = all(task.labels for task in tasks)
    labels = {normalise_label(label): label for task in tasks for label in task.labels} if closed else {}
    return Task(name, **splits, metric="rouge_l", labels=tuple(labels.values()))


def method(name: str, options: argparse.Namespace) -> dict:
    """A preset or one of the ablations over it, with the budget that was asked for where it replays."""
    chosen = ABLATIONS.get(name, {"preset": name})
    replay = {**presets().get(chosen["preset"], {}).get("replay", {}), **(chosen.get("replay") or {})}
    given = options.fraction is not None or options.per_task is not None
    if not given or chosen.get("replay") == "none" or not replay:
        return chosen
    own = {key: None for key in ("tasks", "instances") if key in replay}  # the paper's budget gives way
    fraction = {} if options.fraction is None else {"fraction": options.fraction}
    return {**chosen, "replay": {**(chosen.get("replay") or {}), **own, **fraction, "per_task": options.per_task}}


def settings(options: argparse.Namespace, seed: int, chosen: dict) -> dict:
    """The configuration of one seed of a method."""
    if options.by_category:  # the trainer is given the categories made of these
        folders = task_folders(options.data, options.order, options.tasks, options.only)
        trained, held_out = [source(path) for path in folders], []
    else:
        trained, held_out = divided(options)
    return {
        "name": "superni-chosen" if options.only else f"superni-order{options.order}",
        "output": str(options.output / f"seed{seed}"),
        "seed": seed,
        "methods": [chosen],
        "model": {"name": options.model, "attn_implementation": options.attention},
        "data": {
            "tasks": trained,
            "train": options.train,
            "test": options.test,
            "max_length": options.max_length,
            "on_overflow": options.on_overflow,
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
            "tasks": "seen" if options.sample is None else {"sample": options.sample},
            "untrained": True,
            "held_out": held_out,
            "max_new_tokens": options.max_new_tokens,
            "batch_size": 32,
        },
    }


def figures(folder: Path) -> dict[str, Any]:
    """One run's row of the table, and what was replayed of each task in each stage."""
    run, stages = read_run(folder), read_stages(folder)
    metrics = continual_metrics(run, stages)
    last = stages[-1]
    seen = task_set_scores(run.tasks, last.scores, last.violations, run.metrics)
    held_out = task_set_scores(run.held_out_tasks, last.scores, last.violations, run.metrics)
    train = sum(stage.train_seconds for stage in stages) / 60
    untrained = stages[0].scores
    alone = run.experts or {task: stage.scores[task] for stage in stages for task in stage.trained}
    known = run.experts or run.method["schedule"] != "joint"
    return {
        "learned": statistics.mean(alone[task] - untrained[task] for task in alone) if known else None,
        "AP": metrics.average_performance,
        "New.ACC": metrics.new_accuracy,
        "forgetting": metrics.forgetting,
        "BWT": metrics.backward_transfer,
        "relative gain": metrics.relative_gain_mean,
        "relative gain std over stages": metrics.relative_gain_std,
        "balance weight": metrics.balance_weight,
        "fell back %": metrics.fallback_share,
        "V": seen.v,
        "held-out P": held_out.p,
        "held-out V": held_out.v,
        "replayed": float(sum(sum(stage.replayed.values()) for stage in stages)),
        "train minutes": train,
        "total minutes": train + sum(stage.evaluate_seconds for stage in stages) / 60,
        "replayed by stage": [stage.replayed for stage in stages if stage.replayed],
        "seen": dataclasses.asdict(seen),
        "held-out": dataclasses.asdict(held_out) if run.held_out_tasks else None,
        "held-out scores": {task: last.scores[task] for task in run.held_out_tasks},
        "violations": last.violations,
    }


def cell(values: list[float | None], digits: int = 1) -> str:
    """Mean, and the standard deviation where there are several seeds."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def paired_difference(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Mean of the differences by seed, and Student's 95 % interval of it."""
    differences = [x - y for x, y in zip(ours, theirs, strict=True)]
    mean = statistics.mean(differences)
    half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - half, mean + half


def differences(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Of every method to the first one, paired by seed: metric -> mean and interval."""
    first, *others = rows
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name in others:
        for metric in PAIRED:
            values = [[row[metric] for row in rows[each]] for each in (name, first)]
            if None not in values[0] + values[1]:
                found.setdefault(name, {})[metric] = paired_difference(*values)
    return found


LEARNED = 20.0
"""Points that experts, or tasks when they were new, must be above the untrained model on average."""


def recorded(path: Path | None, asked: dict[str, Any]) -> dict[str, Any]:
    """The record at ``path`` to add to, of the same options but for methods and seeds."""
    if path is None or not path.exists():
        return {"runs": {}}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "runs" not in record or record["options"] != asked:
        raise DataError(f"{path}: holds runs of other options; name another file")
    return record


def made(options: argparse.Namespace, asked: dict[str, Any]) -> dict[str, Any]:
    """The record with every run that was asked for, written as they end."""
    record = recorded(options.results, asked)
    for seed in options.seeds:
        stream, held_out = categories(options, seed) if options.by_category else (None, None)
        for name in dict.fromkeys([*options.methods, *options.bound]):
            if f"{name}/{seed}" in record["runs"]:
                continue
            chosen = method(name, options)
            (folder,) = ContinualTrainer(settings(options, seed, chosen), stream=stream, held_out=held_out).run()
            run = read_run(folder)
            own = {"environment": run.environment, "tasks": len(run.tasks), **figures(folder)}
            record["runs"][f"{name}/{seed}"] = own
            if options.results:
                write_file(
                    options.results, json.dumps({"options": asked, **record}, indent=1, ensure_ascii=False) + "\n"
                )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of Super-NI task folders")
    parser.add_argument("--methods", nargs="+", default=["sequential", "random-replay", "lcia-ema"])
    parser.add_argument("--order", type=int, choices=(1, 2), default=1)
    parser.add_argument("--tasks", type=int, help="only the first so many tasks of the order")
    parser.add_argument("--only", type=int, nargs="+", default=(), help="these tasks by number, instead of an order")
    parser.add_argument("--by-category", action="store_true", help="train the tasks of a category as one")
    parser.add_argument("--held-out", type=int, default=0, help="so many tasks at the end of the order are not trained")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--fraction", type=float, help="share of every earlier task that is replayed, for all methods")
    budget.add_argument("--per-task", type=int, help="examples per earlier task that are replayed, for all methods")
    parser.add_argument("--train", type=int, help="training examples per task at most")
    parser.add_argument("--test", type=int, help="test examples per task at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--on-overflow", choices=["truncate", "error", "skip"], default="truncate")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--sample", type=int, help="answer so many earlier tasks after a stage, not all of them")
    parser.add_argument("--no-experts", dest="experts", action="store_false", help="leave Relative Gain out")
    parser.add_argument("--no-joint", dest="bound", action="store_const", const=(), default=("joint",))
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, help="JSON file for the table, with hardware and versions")
    options = parser.parse_args()

    console = Console()
    apart = {"results", "output", "methods", "seeds"}
    asked = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items() if key not in apart}
    asked = json.loads(json.dumps({**asked, "data": options.data.name}))
    record = made(options, asked)
    names = list(dict.fromkeys([*options.methods, *options.bound]))
    rows = {name: [record["runs"][f"{name}/{seed}"] for seed in options.seeds] for name in names}
    count = rows[names[0]][0]["tasks"]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"Super-NI, {'chosen' if options.only else f'order {options.order}'}, {count} tasks"
        f"{' in categories' if options.by_category else ''}, {len(options.seeds)} seed(s)",
    )
    table.add_column("method", no_wrap=True)
    known = [row for seeds in rows.values() for row in seeds]
    columns = [column for column in COLUMNS if any(row[column] is not None for row in known)]
    for column in columns:
        table.add_column(column, justify="right")
    for method, seeds in rows.items():
        digits = {"balance weight": 3}
        cells = [cell([row[column] for row in seeds], digits.get(column, 1)) for column in columns]
        learned = [row["learned"] for row in seeds if row["learned"] is not None]
        table.add_row(f"{method} (not learned)" if learned and statistics.mean(learned) < LEARNED else method, *cells)
    console.print(table)
    paired = differences(rows) if len(options.seeds) > 1 else {}
    if paired:
        first = next(iter(rows))
        console.print(f"Difference to {first}, paired by seed, with Student's 95 % interval:")
        for name, metrics in paired.items():
            said = (f"{metric} {mean:+.1f} [{low:+.1f}, {high:+.1f}]" for metric, (mean, low, high) in metrics.items())
            console.print(f"  {name}: {', '.join(said)}", highlight=False, markup=False)
    if options.results:
        record["paired"] = {**record.get("paired", {}), f"seeds {options.seeds}, to {names[0]}": paired}
        result = {"date": date.today().isoformat(), "options": asked, **record}
        write_file(options.results, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    try:
        main()
    except CitFastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
