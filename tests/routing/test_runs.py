"""Routers in continual runs: whole families of adapters, kept, resumed, and answered with."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.evaluation import read_stages
from cit_fast.routing import BASE, load_router
from cit_fast.training import method_run, run_folder

PRESETS = ["lcia", "switchcit", "oracle"]


def run(settings, stream, method, **more) -> Path:
    settings = {**settings, "methods": [method], **more}
    return ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()[0]


def files(folder: Path, stage: int) -> dict[str, bytes]:
    """Adapter and router files of a stage."""
    path = folder / "stages" / f"{stage:02d}"
    return {
        str(file.relative_to(path)): file.read_bytes()
        for kind in ("adapters", "router")
        for file in sorted((path / kind).rglob("*"))
        if file.suffix in {".safetensors", ".json"}
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_each_task_has_its_own_set_and_old_ones_never_change(settings, tasks, preset):
    folder = run(settings, tasks, preset)
    stages = read_stages(folder)
    sets = [stage.adapter for stage in stages[1:]]
    assert len(set(sets)) == 3
    assert [stage.routing["new"] for stage in stages[1:]] == [True] * 3
    for stage in range(1, 4):
        kept = sorted(path.name for path in (folder / f"stages/{stage:02d}/adapters").iterdir() if path.is_dir())
        assert kept == sorted(sets[:stage])
    first, last = files(folder, 1), files(folder, 3)
    assert all(last[name] == content for name, content in first.items() if name.startswith("adapters"))
    assert load_router(folder / "stages/03/router").sets == tuple(sets)
    final = stages[3].routing
    assert final["trained_by"] == dict(zip(tasks.names, sets, strict=True))
    assert {task: sum(counts.values()) for task, counts in final["answers"].items()} == dict.fromkeys(tasks.names, 4)
    assert final["to_base"] is None
    if preset == "oracle":
        assert (final["accuracy"], stages[1].routing["to_base"]) == (1.0, 1.0)
        assert stages[1].routing["answers"]["mood"] == {BASE: 4}
        assert [stage.scores["dates"] for stage in stages[1:]] == [stages[1].scores["dates"]] * 3
        assert stages[1].scores["mood"] == stages[0].scores["mood"]  # the base model, as it was


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number, module, name):
    """Replace ``module.name`` so that its ``number``-th call is the process's last act."""

    def arm():
        original, calls = getattr(module, name), []

        def counted(*args, **kwargs):
            calls.append(1)
            return die() if len(calls) == number else original(*args, **kwargs)

        setattr(module, name, counted)

    return arm


MOMENTS = {
    "inside the second stage": at_call(7, torch.optim.AdamW, "step"),
    "between checkpoint and evaluation": at_call(4, method_run, "evaluate"),
    "before a stage is renamed into place": at_call(4, run_folder, "commit_folder"),
    "after a stage, before the next": at_call(3, method_run, "train_adapter"),
}


@pytest.mark.parametrize("preset", ["switchcit", {"preset": "lcia", "update": "plain"}])
def test_kill_and_go_on_with_the_same_family(settings, tasks, preset, tmp_path):
    whole = run(settings, tasks, preset)
    expected = read_stages(whole)
    for number, (moment, arm) in enumerate(MOMENTS.items()):
        os.environ["CIT_FAST_CACHE"] = str(tmp_path / f"cache-{number}")
        output = f"{settings['output']}-{number}"
        child = os.fork()
        if child == 0:  # the run that dies
            try:
                arm()
                run(settings, tasks, preset, output=output)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{moment}: the run was not killed"
        folder = run(settings, tasks, preset, output=output)
        resumed = read_stages(folder)
        assert [stage.scores for stage in resumed] == [stage.scores for stage in expected], moment
        for stage in range(1, 4):
            assert files(folder, stage) == files(whole, stage), (moment, stage)
            ours, theirs = ({**each[stage].routing, "seconds": 0} for each in (resumed, expected))
            assert ours == theirs, (moment, stage)
