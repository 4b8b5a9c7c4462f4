"""Runs that were killed and went on."""

from __future__ import annotations

from pathlib import Path

import torch
from killed import at_call, killed
from toy_runs import adapter, start

from cit_fast.evaluation import read_stages
from cit_fast.run import run_folder, stage_trainer


def killed_twice(settings, stream) -> Path:
    """The folder of a run of one method that was killed at a checkpoint and between stages, seen to have the bits of
    one that was not.
    """
    (undisturbed,) = start({**settings, "output": settings["output"] + "-whole"}, stream)
    for arm in (at_call(1, stage_trainer, "mark_complete"), at_call(2, run_folder, "commit_folder")):
        assert killed(lambda: start(settings, stream), arm)
    (folder,) = start(settings, stream)
    for one, other in zip(read_stages(folder), read_stages(undisturbed), strict=True):
        assert (one.scores, one.losses) == (other.scores, other.losses)
    for stage in range(1, len(stream) + 1):
        ours, theirs = adapter(folder, stage), adapter(undisturbed, stage)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return folder
