"""Run folders with one file damaged: what is done with them is refused, or gives what it gave before."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.errors import LeftOutWarning
from cit_fast.evaluation import read_stages, rescore
from cit_fast.inference.export import export_adapters
from cit_fast.report import write_report
from cit_fast.run import stage_trainer
from tests.fuzz.configurations import base
from tests.fuzz.runner import in_a_process

METHODS = ("sequential", "switchcit", "cit-fast")
PROMPTS = ["Express the amount in units a thousand times smaller.\n\nRope: 2 km", "Make a record.\n\nroom is 7"]


def _start(model: Path, method: str, output: Path) -> Path:
    config = {**base(model), "methods": [method], "output": str(output)}
    config["training"] = {**config["training"], "save_steps": 1, "per_device_train_batch_size": 2}
    return ContinualTrainer(config, console=Console(quiet=True)).run()[0]


def _killed_in_stage_two(model: Path, method: str, output: Path) -> None:
    """A run that is killed after the first checkpoint of its second stage."""
    marked, calls = stage_trainer.mark_complete, []

    def mark(*args: Any) -> None:
        marked(*args)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    stage_trainer.mark_complete = mark
    _start(model, method, output)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def _report(run: Path) -> Any:
    values = json.loads(write_report([run], Path("report.html")).with_name("report-values.json").read_text())
    for one in values["runs"]:
        del one["folder"]
    return values


def _result(action: str, run: Path, model: Path) -> Any:
    """What an action gives, to be compared."""
    if action == "report":
        return _report(run)
    if action == "eval":
        return [[entry.stage, entry.task, entry.recomputed, entry.agrees] for entry in rescore(run)]
    if action == "generate":
        return ContinualModel.from_run(run, device="cpu").generate(PROMPTS, max_new_tokens=4)
    if action == "export":
        shutil.rmtree("exported", ignore_errors=True)
        export_adapters(run, "exported")
        return _files(Path("exported"))
    done = _start(model, run.name, run.parent)
    last = read_stages(done)[-1]
    return [last.scores, _files(done / f"stages/{last.index:02d}")]


def maker(scratch: Path, model: Path) -> Callable[[random.Random], tuple[str, Callable[[], str | None]]]:
    scratch.mkdir(parents=True, exist_ok=True)
    runs: dict[tuple[str, str], Path] = {}
    for method in METHODS:
        for state, make_it in (("finished", _start), ("killed", _killed_in_stage_two)):
            output = scratch / state

            def prepare(make_it: Any = make_it, method: str = method, output: Path = output) -> None:
                make_it(model, method, output)

            in_a_process(prepare, seconds=300)
            runs[state, method] = output / method
    actions = {
        "finished": ("report", "eval", "generate", "export"),
        "killed": ("resume", "resume", "report", "generate"),
    }
    expected: dict[tuple[str, str, str], Any] = {}
    place = Path.cwd()
    os.chdir(scratch)
    for (state, method), run in runs.items():
        for action in set(actions[state]):
            copy = scratch / "expected" / state / action / method
            shutil.copytree(run, copy)
            expected[state, method, action] = _result(action, copy, model)
    os.chdir(place)

    def make(rng: random.Random) -> tuple[str, Callable[[], str | None]]:
        state, method = rng.choice(list(runs))
        run, action = runs[state, method], rng.choice(actions[state])
        files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
        file = rng.choice(files)
        how = rng.choice(["truncate", "flip", "flip", "delete", "swap", "garbage"])
        number, bit = rng.random(), rng.randrange(8)
        other = rng.choice([path for path in runs.values() if path != run])

        def attempt() -> str | None:
            mine = Path.cwd() / "copy" / method
            shutil.copytree(run, mine)
            path = mine / file.relative_to(run)
            content = path.read_bytes()
            at = int(number * len(content))
            if how == "truncate":
                path.write_bytes(content[:at])
            elif how == "flip" and content:
                path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
            elif how == "delete":
                path.unlink()
            elif how == "swap":
                candidates = sorted(each for each in other.rglob(path.name) if each.is_file())
                if not candidates:
                    return None
                path.write_bytes(candidates[int(number * len(candidates))].read_bytes())
            elif how == "garbage":
                path.write_bytes(b"\0\1garbage{[" * 5)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = _result(action, mine, model)
            told = any(issubclass(each.category, LeftOutWarning) for each in said)
            same = found == expected[state, method, action]
            if not same and action == "eval":
                told = not all(entry[-1] for entry in found)
            if not same and action == "report":  # what is missing or damaged is said on the page
                told = found.get("notes") != expected[state, method, action].get("notes")
            return None if same or told else f"another result: {str(found)[:500]}"

        return f"{state} {method}, {action} after {how} at {number:.3f} of {file.relative_to(run)}", attempt

    return make
