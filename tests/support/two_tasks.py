"""A run of two stages that two processes and one process train on the same batches, and what must be equal then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_runs import adapter

from cit_fast.evaluation import predictions_after, read_run, read_stages


@pytest.fixture
def two_tasks(settings, tmp_path):
    for name in ("alpha", "beta"):
        folder = tmp_path / name
        folder.mkdir()
        for split, start, count in (("train", 0, 16), ("test", 100, 5)):
            records = [
                {"instruction": f"Say {name}, then the number.", "input": str(k), "output": f"{name} {k}"}
                for k in range(start, start + count)
            ]
            (folder / f"{split}.json").write_text(json.dumps(records))
    # No dev set held out of the 16: four full batches of four, which two processes need not fill up.
    tasks = [{"path": str(tmp_path / name)} for name in ("alpha", "beta")]
    settings["data"] = {"max_length": 96, "dev": 0, "tasks": tasks}
    settings["adapter"]["lora_dropout"] = 0.0
    settings["training"]["logging_steps"] = 1
    return settings


def compare(two: Path, one: Path, *, losses: float = 1e-5, weights: float = 1e-4) -> None:
    """Half the batch per process: the same global batches, so the same losses up to the rounding of the sum."""
    record, together, alone = read_run(two), read_stages(two), read_stages(one)
    assert record.status == "finished"
    assert record.environment["effective_batch_size"] == 4
    assert [stage.steps for stage in together] == [stage.steps for stage in alone] == [0, 4, 4]
    for ours, theirs in zip(together[1:], alone[1:], strict=True):
        assert len(ours.losses) == 4  # of every step, the last one too
        assert [loss for _, loss in ours.losses] == pytest.approx([loss for _, loss in theirs.losses], rel=losses)
        theirs_weights = {step: values for step, *values in theirs.balance_weights}
        for step, *values in ours.balance_weights:
            assert values == pytest.approx(theirs_weights[step], rel=weights)
        assert len(ours.balance_weights) == len(theirs.balance_weights)
        lines = predictions_after(two, ours, "alpha").read_text().splitlines()
        assert [json.loads(line)["references"] for line in lines] == [[f"alpha {k}"] for k in range(100, 105)]


def compare_adapters(two: Path, one: Path, tolerance: float) -> None:
    """The weights that the stages kept are the same ones, of a size that says that they were trained."""
    for stage in (1, 2):
        ours, theirs = adapter(two, stage), adapter(one, stage)
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, rtol=0, atol=tolerance)
        assert max(weight.abs().max() for name, weight in theirs.items() if "lora_B" in name) > 5 * tolerance
