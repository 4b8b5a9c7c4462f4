"""``python -m tests.fuzz [configurations|data|runs|kills ...] [--cases N | --minutes M] [--seed S]``: 1 on a fault.

A case of data is one file and no run, so there are four times as many.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("which", nargs="*", choices=["configurations", "data", "runs", "kills", []], default=[])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=None, help="of each fuzzer, instead of a number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to make one again")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        os.environ["CIT_FAST_CACHE"], os.environ["HF_DATASETS_CACHE"] = f"{scratch}/cache", f"{scratch}/datasets"
        import torch

        from tests.fuzz import configurations, data_files, kills, models, run_folders
        from tests.fuzz.runner import numbers, run

        torch.set_num_threads(1)
        importlib.import_module("cit_fast.run.method_run")
        gc.freeze()  # what is imported is not looked through by each collection of each run
        warnings.simplefilter("ignore")
        model = models.model_folder(Path(scratch) / "model")
        makers = {
            "configurations": lambda: configurations.maker(model),
            "data": data_files.maker,
            "runs": lambda: run_folders.maker(Path(scratch) / "runs", model),
            "kills": lambda: kills.maker(Path(scratch) / "kills", model),
        }
        faults = 0
        for name in arguments.which or makers:
            count = arguments.cases * (4 if name == "data" else 1)
            cases = (number + arguments.first for number in numbers(count, arguments.minutes))
            faults += run(name, makers[name](), cases, arguments.seed)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
