"""A long run needs no more memory than its second stage: live tensors and the peak of resident memory stay flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = 8
SCRIPT = """
import gc, json, sys
import torch
from rich.console import Console
from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.run import method_run

torch.set_num_threads(1)
gc.freeze()  # what is imported is not looked through by each collection
settings, stages = json.loads(sys.argv[1]), int(sys.argv[2])


def task(name):
    def examples(count, start):
        numbers = range(start, start + count)
        return tuple(Example(f"Say {name}, then the number.", f"{k}", (f"{name} {k}",)) for k in numbers)

    return Task(name, examples(4, 0), (), examples(1, 100), metric="token_f1")


def peak():
    lines = open("/proc/self/status").read().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
    return kilobytes / 1024


after = method_run.MethodRun._say_scores


def measured(self, title, stage):
    after(self, title, stage)
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    print(json.dumps([self.method.name, stage.index, len(tensors), peak()]))


method_run.MethodRun._say_scores = measured
stream = TaskStream(tuple(task(f"t{k}") for k in range(stages)))
ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of resident memory from Linux")
def test_memory_is_flat_from_the_second_stage_on(settings, tmp_path):
    merged = {**settings, "methods": ["cit-fast"], "evaluation": {**settings["evaluation"], "untrained": False}}
    command = [sys.executable, "-c", SCRIPT, json.dumps(merged), str(STAGES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [row[1] for row in rows] == list(range(1, STAGES + 1))
    tensors, peaks = [row[2] for row in rows], [row[3] for row in rows]
    assert set(tensors[2:]) == {tensors[1]}
    # Pages of the interpreter come and go by a few; a model kept from an earlier stage, or its gradients, would add up.
    assert max(peaks[2:]) - peaks[1] < 6


def test_what_is_there_is_left_out_of_collections_and_given_back_afterwards():
    script = """
import gc, weakref
from cit_fast.run.memory import quick_collections

class Ring:
    def __init__(self):
        self.me = self

before = Ring()
seen = weakref.ref(before)
with quick_collections():
    count = gc.get_freeze_count()
    assert count > 10_000
    with quick_collections():
        pass
    assert gc.get_freeze_count() == count
    inside = Ring()
    other = weakref.ref(inside)
    del before, inside
    gc.collect()
    assert other() is None
    assert seen() is not None
gc.collect()
assert seen() is None
assert gc.get_freeze_count() == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)
