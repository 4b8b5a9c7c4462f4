"""Runs that grow task by task, and whether two of them are the same."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from cit_fast import ContinualTrainer
from cit_fast.evaluation import continual_metrics, predictions_after, read_predictions, read_run, read_stages
from cit_fast.evaluation.predictions import Prediction

SEEN = {"tasks": "seen"}


def run(settings, stream, output: Path, *methods) -> dict[str, Path]:
    evaluation = {**settings["evaluation"], **SEEN, "untrained": True}
    own = {**settings, "methods": list(methods), "output": str(output), "evaluation": evaluation}
    folders = ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()
    return {folder.name: folder for folder in folders}


def predictions(folder: Path, stage: int, task: str) -> list[Prediction]:
    """Of a task after a stage, wherever they lie."""
    return read_predictions(predictions_after(folder, read_stages(folder)[stage], task))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of every adapter set and every average, as each was trained last, and of the router."""
    stages = sorted((folder / "stages").glob("[0-9]*"), key=lambda path: int(path.name))
    found = {}
    for stage in stages:
        files = [*stage.glob("adapters/*/*.safetensors"), *stage.glob("live/*"), *stage.glob("router/*.safetensors")]
        for file in files:
            found |= {f"{file.relative_to(stage)}/{name}": value for name, value in load_file(file).items()}
    return found


def same(one: Path, other: Path, but: Collection[str] = ()) -> None:
    """Whether records and weights are the same; the untrained model may have answered the tasks ``but``, too."""
    ours, theirs = read_stages(one), read_stages(other)
    for task in but:
        ours[0].scores.pop(task)
        ours[0].violations.pop(task)
    for mine, right in zip(ours, theirs, strict=True):
        apart = {"files": {}, "train_seconds": 0, "evaluate_seconds": 0, "untrained": {}, "untrained_violations": {}}
        one_way, other_way = (vars(replace(each, **apart, objective=None, routing=None)) for each in (mine, right))
        assert (mine.index, {name for name in one_way if one_way[name] != other_way[name]}) == (mine.index, set())
    assert continual_metrics(read_run(one), ours) == continual_metrics(read_run(other), theirs)
    mine, right = weights(one), weights(other)
    assert mine.keys() == right.keys()
    assert all(torch.equal(mine[name], right[name]) for name in right)
