"""Two gloo processes on the CPU, launched the way a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.evaluation import read_run, read_stages


@pytest.mark.slow
def test_accelerate_launch_with_two_processes(settings, tmp_path):
    """Half the batch per process: the same global batches, so the same losses up to the rounding of the sum."""
    for name in ("alpha", "beta"):
        folder = tmp_path / name
        folder.mkdir()
        for split, start, count in (("train", 0, 16), ("test", 100, 5)):
            records = [
                {"instruction": f"Say {name}, then the number.", "input": str(k), "output": f"{name} {k}"}
                for k in range(start, start + count)
            ]
            (folder / f"{split}.json").write_text(json.dumps(records))
    settings["data"] = {"max_length": 96, "tasks": [{"path": str(tmp_path / name)} for name in ("alpha", "beta")]}
    settings["adapter"]["lora_dropout"] = 0.0
    settings["methods"] = ["balance-ema"]

    ContinualTrainer(settings, console=Console(quiet=True)).run()
    alone = read_stages(Path(settings["output"]) / "balance-ema")

    settings["output"] += "-two"
    settings["training"]["per_device_train_batch_size"] = 2
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(settings))
    # accelerate's own --cpu starts one process unless there is MPI; its multi-process launcher takes CPUs all the same.
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "cit_fast.cli", "run", str(config)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CIT_FAST_CACHE": str(tmp_path / "other-cache"),
    }
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Report: ") == 1  # one process speaks

    folder = Path(settings["output"]) / "balance-ema"
    record, together = read_run(folder), read_stages(folder)
    assert record.status == "finished"
    assert record.environment["effective_batch_size"] == 4
    assert [stage.steps for stage in together] == [stage.steps for stage in alone]
    for ours, theirs in zip(together[1:], alone[1:], strict=True):
        assert [loss for _, loss in ours.losses] == pytest.approx([loss for _, loss in theirs.losses], rel=2e-3)
        lines = (folder / f"stages/{ours.index:02d}/predictions/alpha.jsonl").read_text().splitlines()
        assert [json.loads(line)["references"] for line in lines] == [[f"alpha {k}"] for k in range(100, 105)]

    again = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "already finished" in again.stdout
