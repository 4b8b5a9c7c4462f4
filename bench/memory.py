"""Memory of a long run: three methods, six tasks each, on the quickstart's model, in one process.

    python -m bench.memory                   prints, and records in bench/results (about 12 minutes on two cores)

After each stage: the peak of resident memory since the last one, what is resident, and the bytes of all live tensors.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.ceilings import record
from cit_fast import ContinualTrainer
from cit_fast.data.builtin import builtin_task_names
from cit_fast.run import memory, method_run


def megabytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024


def live() -> int:
    """Megabytes of the tensors that somebody still refers to."""
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values()) // 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="sequential,cit-fast,switchcit")
    parser.add_argument("--tasks", type=int, default=6)
    parser.add_argument("--keep", action="store_true", help="without giving memory back, for comparison; not recorded")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    say_scores = method_run.MethodRun._say_scores

    def measured(run: Any, title: str, stage: Any) -> None:
        rows.append(
            {
                "method": run.method.name,
                "stage": stage.index,
                "peak_mb": megabytes("VmHWM"),
                "resident_mb": megabytes("VmRSS"),
                "tensors_mb": live(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        say_scores(run, title, stage)

    method_run.MethodRun._say_scores = measured  # type: ignore[method-assign]
    if options.keep:
        memory._TRIM = None
    with tempfile.TemporaryDirectory() as output:
        settings = {
            "methods": options.methods.split(","),
            "output": output,
            "model": {"attn_implementation": "eager"},
            "data": {
                "tasks": list(builtin_task_names())[: options.tasks],
                "train": 48,
                "test": 32,
                "max_length": 128,
                "system_prompt": "",
            },
            "training": {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 100},
            "evaluation": {"max_new_tokens": 16, "batch_size": 32, "untrained": False},
        }
        ContinualTrainer(settings, console=Console(quiet=True)).run()
    if not options.keep:
        print(record("memory", {"model": "SmolLM2-135M-Instruct, bf16, LoRA r 16 all-linear", "stages": rows}))


if __name__ == "__main__":
    main()
