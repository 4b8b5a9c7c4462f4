"""Every objective learns the same with another attention and with gradient checkpointing, both at once."""

from __future__ import annotations

import pytest
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import TaskStream
from cit_fast.evaluation import read_stages

# One of each objective.
METHODS = ["random-replay", "eaft", "kpig", "lwf", "mask-the-target", "ewc", "o-lora", "sdft"]


def losses(settings, stream, output, method, attention, checkpointing) -> list[list[float]]:
    training = {**settings["training"], "gradient_checkpointing": checkpointing, "logging_steps": 1}
    own = {
        **settings,
        "output": str(output),
        "methods": [method],
        "model": {**settings["model"], "attn_implementation": attention},
        "training": training,
        "evaluation": {**settings["evaluation"], "untrained": False},
    }
    (folder,) = ContinualTrainer(own, stream=TaskStream(stream.tasks[:2]), console=Console(quiet=True)).run()
    return [[loss for _, loss in stage.losses] for stage in read_stages(folder) if stage.index > 0]


@pytest.mark.parametrize("method", METHODS)
def test_attention_and_checkpointing_change_nothing_but_rounding(settings, stream, tmp_path, method):
    expected = losses(settings, stream, tmp_path / "plain", method, "sdpa", False)
    assert all(len(stage) >= 4 for stage in expected)
    assert expected[0][-1] < expected[0][0]
    found = losses(settings, stream, tmp_path / "other", method, "eager", True)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
