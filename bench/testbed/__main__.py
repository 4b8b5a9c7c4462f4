"""Who forgets less, with how much certainty: methods on generated tasks, paired by seed.

    python -m bench.testbed --methods sequential random-replay cit-fast joint --seeds 20
    python -m bench.testbed --methods random-replay inscl kpig --fraction 0.01 --seeds 20 --orders 1

A Llama of 5 M parameters, pretrained once on 30 generated tasks, learns a stream of eight others in one of two orders
(:mod:`bench.testbed.streams`); the pretraining tasks are its general ability. Every seed draws other examples and
another initialisation, the same for all methods. A call that was interrupted goes on where it was, and runs that are in
``--results`` are taken from there. The table has means (``reworded``: AP in a wording of each task that is never
trained), and of every method the mean difference to the first one of ``--methods`` paired by seed, with a 95 %
bootstrap interval and the share of seeds in which it is better. ``--fraction`` gives every method that replays the
same budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.paired import difference, in_processes
from bench.testbed.model import pretrained
from bench.testbed.picture import picture
from bench.testbed.runs import FIGURES, GENERAL_TEST, TEST, TRAIN, TRAINING, Job, run
from cit_fast.files import write_file

COMPARED = {"AP": 1, "forgetting": -1, "New.ACC": 1, "general": 1, "reworded": 1}
"""Figures, and whether more (1) or less (-1) of them is better."""


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means and standard deviations of every method, and its differences to the first, where it has the figure.

    A joint run forgets nothing that could be measured.
    """
    reference = next(iter(found))
    rows = {}
    for name, runs in found.items():
        values = {figure: [run[figure] for run in runs] for figure in FIGURES}
        values = {figure: of for figure, of in values.items() if None not in of}
        others = {figure: [run[figure] for run in found[reference]] for figure in COMPARED}
        rows[name] = {
            "mean": {figure: statistics.mean(of) for figure, of in values.items()},
            "deviation": {figure: statistics.stdev(of) if len(of) > 1 else 0.0 for figure, of in values.items()},
            f"difference to {reference}": {
                figure: difference(values[figure], others[figure], better)
                for figure, better in COMPARED.items()
                if figure in values and None not in others[figure]
            },
        }
    return rows


def tables(title: str, rows: dict[str, dict[str, Any]], console: Console) -> None:
    """The table of a bed."""
    reference = next(iter(rows))
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("method", *FIGURES, "AP, difference", "wins", "forgetting, difference", "wins"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, row in rows.items():
        mean, deviation = row["mean"], row["deviation"]
        cells = [f"{mean[f]:.1f} ± {deviation[f]:.1f}" if f in mean else "–" for f in FIGURES[:5]]
        cells += [f"{mean['minutes']:.2f}", f"{mean['replayed']:.0f}"]
        for figure in ("AP", "forgetting"):
            d = row[f"difference to {reference}"].get(figure)
            if name == reference or d is None:
                cells += ["–", "–"]
            else:
                cells += [f"{d['mean']:+.1f} [{d['low']:.1f}, {d['high']:.1f}]", f"{d['wins']:.0%}"]
        table.add_row(name, *cells)
    console.print(table)


def recorded(path: Path | None, setting: dict[str, Any]) -> dict[str, Any]:
    """What a record holds: ``runs``, figures by job, and ``tables``."""
    if path is None or not path.exists():
        return {"runs": {}, "tables": {}}
    record = json.loads(path.read_text())
    if record["setting"] != setting:
        raise SystemExit(f"{path}: its runs are of another model or setting; name another file")
    return {"runs": record["runs"], "tables": record["tables"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["random-replay", "sequential", "cit-fast", "joint"])
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="a search takes seeds from 100 on, none that judge")
    parser.add_argument("--orders", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--fraction", type=float, help="share of every earlier task that is replayed, for all methods")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, each with one thread")
    parser.add_argument("--output", type=Path, default=Path("runs/testbed"))
    parser.add_argument("--keep", action="store_true", help="keep the run folders, not only their figures")
    parser.add_argument("--picture", type=Path, help="PNG file: forgetting against minutes, of the first order")
    parser.add_argument("--results", type=Path, help="JSON file of runs, with hardware, and tables; added to")
    options = parser.parse_args()
    console, model = Console(width=180), pretrained()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    # Seed by seed, so that what is there after an interruption is paired.
    jobs = [
        Job(name, options.fraction, order, seed)
        for seed, order, name in itertools.product(seeds, options.orders, options.methods)
    ]
    setting = {"model": model.name, "train": TRAIN, "test": TEST, "general test": GENERAL_TEST, "training": TRAINING}
    record = recorded(options.results, setting)
    known = record["runs"]
    open_jobs = [job for job in jobs if job.name not in known and not job.file(options.output).exists()]
    in_processes(run, open_jobs, options.workers, console, model, options.output, options.keep)
    for job in jobs:
        if job.name not in known and job.file(options.output).exists():
            known[job.name] = json.loads(job.file(options.output).read_text())
    missing = [job.name for job in jobs if job.name not in known]
    if missing:
        raise SystemExit(f"{len(missing)} runs have no figures, the first {missing[0]}; run the command again")
    for order in options.orders:
        found = {
            name: [known[Job(name, options.fraction, order, seed).name] for seed in seeds] for name in options.methods
        }
        rows = summary(found)
        title = f"order {order}, seeds {seeds[0]} to {seeds[-1]}, replay {options.fraction or 'of each preset'}"
        tables(title, rows, console)
        if options.picture is not None and order == options.orders[0]:
            picture(
                f"Test bed, {title.partition(', seeds')[0]}, replay {options.fraction or 'of each preset'}",
                found,
                options.picture,
            )
            console.print(f"picture in {options.picture}")
        record["tables"][f"{title}: {', '.join(options.methods)}"] = rows
    if options.results is not None:
        write_file(options.results, json.dumps({"setting": setting, **record}, indent=1) + "\n")
        console.print(f"recorded in {options.results}")


if __name__ == "__main__":
    main()
