"""How often the right adapter is picked: the switch network by what is retained, LCIA's similarity, rejection.

    python -m bench.bench_routing --data path/to/superni15 --results bench/results/routing.json
    python -m bench.bench_routing --data path/to/superni15 --time --results bench/results/routing.json

Tasks arrive one by one, in the built-in stream and, with ``--data``, in the folders of Super-NI tasks there; nothing is
trained but the switch network. A prompt is instruction and input, as plain text. ``accuracy`` is the share of the test
prompts of all tasks that go to their own task's set after the last task; ``along the way`` the same after each task,
averaged. Features are computed once and kept in the cache of cit-fast. Accuracies do not depend on the machine;
``--time`` measures milliseconds a prompt, nothing cached, and belongs on an idle one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from cit_fast.cache import cache_folder
from cit_fast.data import Task, load_stream
from cit_fast.data.builtin import builtin_task_names
from cit_fast.data.sources import TaskSource
from cit_fast.embeddings.cache import CachedEmbedder
from cit_fast.errors import CitFastError
from cit_fast.methods.routing import PerTaskRouter, SwitchTokensRouter
from cit_fast.methods.routing.features import LastTokenFeatures
from cit_fast.methods.stage import Stage
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.config import ModelConfig
from cit_fast.models.pretrained import load_model, load_tokenizer, resolve_model
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run.environment import describe_environment

FRACTIONS = (0.005, 0.01, 0.02, 0.05, 0.2, 1.0)


class Setting:
    """A stream, and the base model whose features are read."""

    def __init__(self, name: str, sources: list[Any], options: argparse.Namespace) -> None:
        self.name, self.sources = name, sources
        self.tasks: list[Task] = list(load_stream(sources, seed=0, train=options.train, dev=32, test=options.test))
        config = ModelConfig(name=options.model)
        self.folder = resolve_model(config)
        self.model = load_model(self.folder, config)
        self.encoder = PromptEncoder(load_tokenizer(self.folder, False))
        base = LastTokenFeatures(self.model, self.encoder.tokenizer)
        self._cached = CachedEmbedder(base, cache_folder() / "embeddings")

    def stage(self, seed: int, *tasks: Task) -> Stage:
        return Stage(self.model, self.encoder, tasks=tasks, seed=str(seed), cache=cache_folder())

    def switch(self, features: str, **options: Any) -> SwitchTokensRouter:
        """A switch router, with the base model's states from the cache."""
        if features != "base":
            return SwitchTokensRouter(features, **options)
        router = SwitchTokensRouter("cached", **options)
        router._extractor = self._cached
        return router

    def held_out(self, tasks: list[Task]) -> list[str]:
        """These tasks as a router names them."""
        places = {task.name: source for task, source in zip(self.tasks, self.sources, strict=True)}
        return [getattr(places[task.name], "path", None) or places[task.name] for task in tasks]


def learned(router: Any, setting: Setting, tasks: list[Task], seed: int = 0) -> list[float]:
    """Let ``router`` learn the tasks one by one; its accuracy in per cent after each."""
    along = []
    for count, task in enumerate(tasks, 1):
        stage = setting.stage(1000 * seed + count, task)
        router.assign(stage)
        router.learn(stage)
        along.append(accuracy(router, setting, tasks[:count]))
    return along


def accuracy(router: Any, setting: Setting, tasks: list[Task]) -> float:
    """Per cent of the tasks' test prompts that go to their own set."""
    sets = dict(zip((task.name for task in tasks), router.sets, strict=True))
    examples = [example for task in tasks for example in task.test]
    answers = router.answer(examples, setting.stage(0))
    right = [sets[example.task] == name for example, name in zip(examples, answers, strict=True)]
    return 100 * sum(right) / len(right)


def to_base(router: Any, setting: Setting, tasks: list[Task]) -> float:
    """Per cent of the tasks' test prompts that go to the base model."""
    examples = [example for task in tasks for example in task.test]
    return 100 * router.answer(examples, setting.stage(0)).count(BASE) / len(examples)


def curve(setting: Setting, features: str, seeds: list[int], reads: str) -> list[dict[str, Any]]:
    """A row per retained fraction, without a least number; the last is what a switch router keeps by itself."""
    rows = []
    for fraction, least in [*((fraction, 1) for fraction in FRACTIONS), (None, None)]:
        options: dict[str, Any] = {} if fraction is None else {"retained": fraction, "at_least": least}
        along = []
        for seed in seeds:
            router = setting.switch(features, reads=reads, reject=0, **options)
            along.append(learned(router, setting, setting.tasks, seed))
        last = [run[-1] for run in along]
        rows.append(
            {
                "stream": setting.name,
                "router": f"switch, {features}",
                "reads": reads,
                "retained": "default" if fraction is None else fraction,
                "prompts kept a task": statistics.mean(len(kept) for kept in router._kept),
                "accuracy": statistics.mean(last),
                "deviation": statistics.stdev(last) if len(last) > 1 else None,
                "along the way": statistics.mean(statistics.mean(run) for run in along),
            }
        )
    return rows


def grouping(setting: Setting, similarity: str, reads: str) -> dict[str, Any]:
    """The answers of LCIA's similarity, a set per task."""
    along = learned(PerTaskRouter(similarity, reads=reads, reject=0), setting, setting.tasks)
    return {
        "stream": setting.name,
        "router": f"similarity, {similarity}",
        "reads": reads,
        "retained": None,
        "prompts kept a task": statistics.mean(len(task.instructions) for task in setting.tasks),
        "accuracy": along[-1],
        "deviation": None,
        "along the way": statistics.mean(along),
    }


def rejection(setting: Setting, make: Any, name: str) -> list[dict[str, Any]]:
    """The first half of the tasks is learned; of the others, two may set the threshold, and the rest are unknown."""
    half = len(setting.tasks) // 2
    known, helping, unknown = setting.tasks[:half], setting.tasks[half : half + 2], setting.tasks[half + 2 :]
    rows = []
    for held_out in ([], setting.held_out(helping)):
        router = make(held_out)
        learned(router, setting, known)
        rows.append(
            {
                "stream": setting.name,
                "router": name,
                "held-out tasks": len(held_out),
                "unknown to base": to_base(router, setting, unknown),
                "known to base": to_base(router, setting, known),
                "accuracy": accuracy(router, setting, known),
            }
        )
    return rows


def timing(setting: Setting, count: int) -> list[dict[str, Any]]:
    """Milliseconds a prompt, median of five calls with ``count`` prompts each, after one that does not count."""
    makers = {
        "switch, base, 128 tokens": lambda: SwitchTokensRouter("base"),
        "switch, base, 32 tokens": lambda: SwitchTokensRouter("base", max_length=32),
        "switch, tokens": lambda: SwitchTokensRouter("tokens"),
        "lcia, tfidf": lambda: PerTaskRouter("tfidf"),
        "lcia, tfidf-pairwise": lambda: PerTaskRouter("tfidf-pairwise"),
        "lcia, embedding, tokens": lambda: PerTaskRouter("embedding"),
    }
    examples = [task.test[n % len(task.test)] for n in range(count) for task in setting.tasks][:count]
    short = [dataclasses.replace(t, train=t.train[:8], dev=t.dev[:4], test=t.test[:1]) for t in setting.tasks]
    rows = []
    for name, make in makers.items():
        router = make()
        learned(router, setting, short)
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            router.answer(examples, setting.stage(0))
            seconds.append(time.perf_counter() - started)
        rows.append(
            {
                "stream": setting.name,
                "router": name,
                "sets": len(short),
                "prompts": count,
                "ms a prompt": 1e3 * statistics.median(seconds[1:]) / count,
            }
        )
    return rows


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*("–" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder of Super-NI task folders; without it the built-in stream only"
    )
    parser.add_argument("--train", type=int, default=100, help="training prompts a task")
    parser.add_argument("--test", type=int, default=32, help="test prompts a task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default=ModelConfig().name)
    parser.add_argument("--time", action="store_true", help="measure the time of routing instead")
    parser.add_argument("--results", type=Path, help="JSON file; what it holds of the other kind is kept")
    options = parser.parse_args()
    console = Console(width=140)
    settings = [Setting("built-in", list(builtin_task_names()), options)]
    if options.data:
        folders = sorted(path for path in options.data.glob("task[0-9]*_*") if path.is_dir())
        sources = [TaskSource(path=str(path), format="super_ni", skip_unanswered=True) for path in folders]
        settings.append(Setting("Super-NI", sources, options))
    found: dict[str, Any] = {}
    for setting in settings:
        if options.time:
            found.setdefault("time", []).extend(timing(setting, 64))
            continue
        for features in ("base", "tokens"):
            found.setdefault("accuracy", []).extend(curve(setting, features, options.seeds, "prompt"))
        for similarity in ("tfidf", "tfidf-pairwise", "embedding"):
            for reads in ("prompt", "instruction"):
                found["accuracy"].append(grouping(setting, similarity, reads))
        for name, make in {
            "switch, base": lambda held, setting=setting: setting.switch("base", held_out=held),
            "switch, tokens": lambda held: SwitchTokensRouter("tokens", held_out=held),
            "similarity, tfidf": lambda held: PerTaskRouter(held_out=held),
        }.items():
            found.setdefault("rejection", []).extend(rejection(setting, make, name))
    for title, rows in found.items():
        show(console, title, rows)
    if options.results:
        before = json.loads(options.results.read_text()) if options.results.exists() else {}
        asked = {"train": options.train, "test": options.test, "seeds": options.seeds, "model": options.model}
        for kind, rows in found.items():
            before[kind] = {"date": date.today().isoformat(), "options": asked, "rows": rows}
        before["environment"] = describe_environment()
        options.results.write_text(json.dumps(before, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    try:
        main()
    except CitFastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
