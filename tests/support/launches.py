"""The command line in two processes on the CPU, launched the way a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CPU_SCRIPT = str(Path(__file__).with_name("launch_on_cpu.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", CPU_SCRIPT]
LAUNCH_FILES = Path(__file__).parents[2] / "examples" / "launch"
CPU_COUNT = ["--num_processes", "2", "--mixed_precision", "no"]
# accelerate's own --cpu starts one process unless there is MPI; its multi-process launcher takes CPUs all the same.
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH_FILES / "ddp.yaml"), *CPU_COUNT]
ACCELERATE += ["-m", "cit_fast.cli"]

FSDP2_FILE = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH_FILES / "fsdp2.yaml"), *CPU_COUNT]
FSDP2_FILE += [CPU_SCRIPT]


def launch(
    launcher: list[str], configs: Sequence[dict[str, Any]], folder: Path, *command: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``cit-fast run`` in two processes, or another command, with a cache of their own in ``folder``.

    ``TORCHRUN`` and ``FSDP2_FILE`` take several configurations, one after another (``launch_on_cpu.py``), and
    ``ACCELERATE`` one.
    """
    paths = []
    for number, config in enumerate(configs):
        paths.append(folder / f"{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(config))
    own = {"OMP_NUM_THREADS": "1", "CIT_FAST_CACHE": str(folder / "other-cache"), "DS_ACCELERATOR": "cpu"}
    if launcher is ACCELERATE:
        own["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(
        [sys.executable, *launcher, *(command or ("run",)), *map(str, paths)],
        capture_output=True,
        text=True,
        env={**os.environ, **own, **environment},
        timeout=240,
        check=False,
    )
