"""Runs killed (-9) before any write, while they are trained and while they learn more: the result has the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from cit_fast import ContinualTrainer, learn
from cit_fast.errors import GateError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.run.candidates import accept
from tests.fuzz.configurations import base
from tests.fuzz.runner import in_a_process

METHODS: dict[str, dict[str, Any]] = {
    "random-replay": {"memory": {"total": 5}},
    "cit-fast": {"memory": {"per_task": 3, "choose": "insinfo"}},
    "switch-tokens": {"memory": "none", "gate": {"new_task": 100}},
    "ewc": {"memory": {"bytes": 900}},
    "merge": {},
    "lcia-ema": {"stages": [{"from": 2, "training": {"learning_rate": 1e-3}}]},
}
WRITES = ("fsync", "rename", "replace", "unlink", "link", "mkdir", "rmdir")


def _config(model: Path, method: str) -> dict[str, Any]:
    config = {**base(model), **METHODS[method], "methods": [method]}
    config["data"] = {**config["data"], "tasks": ["units", "records"], "train": 6}
    config["training"] = {**config["training"], "save_steps": 1, "per_device_train_batch_size": 2}
    config["evaluation"] = {**config["evaluation"], "tasks": "seen"}
    return config


def _whole(model: Path, method: str) -> None:
    """Train two tasks, learn a third, and take what breaks the gate; what is done already is not done again."""
    quiet = Console(quiet=True)

    def taken(work: Callable[[], object]) -> None:
        while True:
            try:
                work()
            except GateError:
                accept(folder)
            else:
                return

    folder = Path("runs") / method
    tasks = read_run(folder).tasks if (folder / "run.json").exists() else []
    if len(tasks) < 3:
        taken(lambda: ContinualTrainer(_config(model, method), console=quiet).run())
    taken(lambda: learn(folder, ["dates"], quiet))


def _counted(limit: int | None) -> list[int]:
    """Count every write from now on; before number ``limit`` the process is killed."""
    count = [0]

    def counting(name: str) -> None:
        original = getattr(os, name)

        def one(*args: Any, **more: Any) -> Any:
            if count[0] == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return original(*args, **more)

        setattr(os, name, one)

    for name in WRITES:
        counting(name)
    return count


def _found(method: str) -> dict[str, Any]:
    folder = Path("runs") / method
    files = [*folder.glob("stages/*/adapters/**/*.safetensors"), *folder.glob("stages/*/router/*")]
    files += [*folder.glob("memory/*"), *folder.glob("stages/*/live/*")]
    return {
        "scores": [[stage.scores, stage.replayed, stage.losses] for stage in read_stages(folder)[1:]],
        "files": {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)},
        "left over": sorted(path.name for path in folder.iterdir() if path.name in ("checkpoints", "candidates")),
    }


def maker(scratch: Path, model: Path) -> Callable[[random.Random], tuple[str, Callable[[], str | None]]]:
    expected: dict[str, dict[str, Any]] = {}
    writes: dict[str, int] = {}
    place = Path.cwd()
    for method in METHODS:
        there = scratch / method
        there.mkdir(parents=True)

        def once(there: Path = there, method: str = method) -> None:
            os.chdir(there)
            count = _counted(None)
            _whole(model, method)
            Path("writes.json").write_text(json.dumps(count[0]))

        in_a_process(once, seconds=300)
        writes[method] = json.loads((there / "writes.json").read_text())
        os.chdir(there)
        expected[method] = _found(method)
        os.chdir(place)

    def make(rng: random.Random) -> tuple[str, Callable[[], str | None]]:
        method = rng.choice(list(METHODS))
        points = [rng.randrange(writes[method]) for _ in range(rng.choice([1, 1, 2, 3]))]

        def attempt() -> str | None:
            for point in points:
                child = os.fork()
                if child == 0:
                    _counted(point)
                    _whole(model, method)
                    os._exit(0)
                os.waitpid(child, 0)
            _whole(model, method)
            found = _found(method)
            shutil.rmtree("runs")
            wanted = expected[method]
            wrong = [name for name in found if name != "files" and found[name] != wanted[name]]
            names = sorted({*found["files"], *wanted["files"]})
            wrong += [name for name in names if found["files"].get(name) != wanted["files"].get(name)]
            return f"other {', '.join(wrong)}" if wrong else None

        return f"{method} killed before write {points} of {writes[method]}", attempt

    return make
