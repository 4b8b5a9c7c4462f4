"""The files of examples/launch as they are: on two CPU processes, with no more changed than those need.

ddp.yaml and fsdp2.yaml are what test_distributed.py launches everything with.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from launches import CPU_COUNT, CPU_SCRIPT, LAUNCH_FILES
from rich.console import Console
from two_tasks import compare, compare_adapters

from cit_fast import ContinualTrainer
from cit_fast.key_parts.layout import PrefixCollator

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def fill_last_batches(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let one process train what several do: Accelerate fills a last batch up with the first examples of the epoch.

    Every process has to have as many batches as the others (its ``even_batches``), so these examples count twice.
    """
    collate, first = PrefixCollator.__call__, []

    def filled(self, features):
        first[:] = first or features
        if len(features) < size:
            features = [*features, *first[: size - len(features)]]
            first.clear()  # the next batch is of another stage
        return collate(self, features)

    monkeypatch.setattr(PrefixCollator, "__call__", filled)


@pytest.fixture
def alone(two_tasks) -> Path:
    """One process's run; after that ``two_tasks`` is the configuration of two processes."""
    two_tasks["methods"] = ["lcia-ema"]
    ContinualTrainer(two_tasks, console=Console(quiet=True)).run()
    one = Path(two_tasks["output"]) / "lcia-ema"
    two_tasks["output"] += "-two"
    two_tasks["training"]["per_device_train_batch_size"] = 2
    return one


def on_cpu(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "CIT_FAST_CACHE": str(folder / "other-cache"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_accelerate_launch_with_the_file(name, two_tasks, alone, tmp_path):
    two_tasks["training"]["use_cpu"] = False  # launch_on_cpu.py says what Accelerate makes of these files on a CPU
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(two_tasks))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH_FILES / f"{name}.yaml")]
    command += [*CPU_COUNT, CPU_SCRIPT, "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=on_cpu(tmp_path), timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Report: ") == 1
    two = Path(two_tasks["output"]) / "lcia-ema"
    # DeepSpeed clips and reduces in ways of its own (test_distributed.py).
    compare(two, alone, losses=2e-3, weights=0.05)
    compare_adapters(two, alone, 1e-3)


SRUN = """#!/usr/bin/env bash
# The command once for each node, at the same time, as its own processes.
set -euo pipefail
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait -n && wait -n
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == 'show hostnames node[1-2]' ]] && printf '127.0.0.1\\nanother\\n'
"""


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """What a job of two nodes with one GPU each finds, but that both nodes are this machine."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    path = os.pathsep.join((str(tools), str(Path(sys.executable).parent), os.environ["PATH"]))
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "1"}
    return {**on_cpu(tmp_path), "ACCELERATE_USE_CPU": "true", **job, "SLURM_JOB_ID": str(os.getpid()), "PATH": path}


@pytest.mark.slow
def test_slurm_script_on_two_nodes(two_tasks, tmp_path, cluster, monkeypatch, request):
    """Each node starts its own part, and the two find each other; names may hold blanks. Batches are full, but for a
    last one of three, which Accelerate fills up.
    """
    two_tasks["data"]["dev"] = 1
    with monkeypatch.context() as filled:
        fill_last_batches(filled, 4)
        alone = request.getfixturevalue("alone")
    folder = tmp_path / "a job"
    folder.mkdir()
    (folder / "my run.yaml").write_text(yaml.safe_dump(two_tasks))
    launch = {**yaml.safe_load((LAUNCH_FILES / "ddp.yaml").read_text()), "mixed_precision": "no"}
    (folder / "ddp on CPUs.yaml").write_text(yaml.safe_dump(launch))
    done = subprocess.run(
        ["bash", str(LAUNCH_FILES / "slurm.sh"), "my run.yaml"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**cluster, "LAUNCH": "ddp on CPUs.yaml"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Report: ") == 1
    two = Path(two_tasks["output"]) / "lcia-ema"
    compare(two, alone)
    compare_adapters(two, alone, 1e-5)


@pytest.mark.parametrize("missing", ["SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE"])
def test_slurm_script_says_what_the_job_lacks(missing, tmp_path, cluster):
    del cluster[missing]
    script = ["bash", str(LAUNCH_FILES / "slurm.sh"), "my.yaml"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=cluster, timeout=20, check=False)
    assert done.returncode != 0
    assert f"{missing}: sbatch sets it" in done.stderr


def test_slurm_script_fails_where_a_node_does(tmp_path, cluster):
    (tmp_path / "tools" / "accelerate").write_text('#!/usr/bin/env bash\nexit "$((SLURM_NODEID * 7))"\n')
    (tmp_path / "tools" / "accelerate").chmod(0o755)
    script = ["bash", str(LAUNCH_FILES / "slurm.sh"), "my.yaml"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=cluster, timeout=20, check=False)
    assert done.returncode == 7
