"""OSFT: what a stage freezes, what it leaves behind, and the same bits in a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killed import at_call, killed
from rich.console import Console
from safetensors.torch import load_file

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.errors import CitFastError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.evaluation.predictions import read_predictions
from cit_fast.models.adapters import train_adapter
from cit_fast.models.osf import of_stage
from cit_fast.run import stage_evaluation, stage_trainer

OSF = {"peft_type": "OSF", "target_modules": ["q_proj", "up_proj"]}


def test_every_stage_freezes_more():
    assert [of_stage(OSF, k, 4)["effective_rank"] for k in (1, 2, 3, 4)] == [1, 0.25, 0.5, 0.75]
    assert of_stage({**OSF, "effective_rank": 3}, 2, 4)["effective_rank"] == 3
    lora = {"r": 2}
    assert of_stage(lora, 2, 4) is lora
    assert of_stage(None, 2, 4) is None


def test_what_is_frozen_stays_and_the_rest_moves(make_model):
    """The change of a weight has nothing in the directions that were frozen, on either side."""
    model = make_model("Llama")
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    ids = torch.tensor([[5, 9, 11, 30, 7]])
    with torch.no_grad():
        plain = model(ids).logits
    wrapped, merged = train_adapter(model, {**OSF, "effective_rank": 0.5}, "shared", 0)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits, plain, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = wrapped(ids).logits
    model = merged.undo(wrapped, "shared")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trained, rtol=1e-4, atol=1e-4)
    assert not any("osf" in name for name, _ in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    change = model.model.layers[0].mlp.up_proj.weight.detach() - before
    u, _, v = torch.linalg.svd(before, full_matrices=False)
    kept = min(before.shape) // 2
    assert change.norm() > 1e-3
    assert (u[:, :kept].T @ change @ v[:kept].T).norm() < 1e-4 * change.norm()


def run(settings, stream, output: Path, *methods) -> list[Path]:
    own = {**settings, "methods": list(methods) or ["osft"], "output": str(output)}
    return ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()


def weights(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"stages/{stage:02d}/model/model.safetensors")


def test_killed_and_resumed_with_the_same_bits(settings, stream, tmp_path):
    settings["training"] |= {"learning_rate": 1e-2}
    (whole,) = run(settings, stream, tmp_path / "whole")
    moments = [
        at_call(2, stage_trainer, "mark_complete"),
        at_call(1, stage_evaluation, "evaluate"),
        at_call(1, stage_trainer, "mark_complete"),
    ]
    for arm in moments:
        assert killed(lambda: run(settings, stream, tmp_path / "killed"), arm)
    (folder,) = run(settings, stream, tmp_path / "killed")
    ours, theirs = read_stages(folder), read_stages(whole)
    assert [(stage.losses, stage.scores) for stage in ours] == [(stage.losses, stage.scores) for stage in theirs]
    one, other = weights(folder, 3), weights(whole, 3)
    assert all(torch.equal(one[name], other[name]) for name in other)
    first = weights(whole, 1)
    moved = [name for name in other if not torch.equal(first[name], other[name])]
    assert moved
    assert {name for name in moved if "proj" not in name} == set()  # linear layers alone


def test_it_is_served_as_it_was_evaluated(settings, stream, tmp_path):
    settings["training"] |= {"learning_rate": 1e-2}
    (folder,) = run(settings, stream, tmp_path)
    kept = read_predictions(folder / "stages/03/predictions/alpha.jsonl")
    answers = ContinualModel.from_run(folder).generate(list(stream[0].test), settings["evaluation"]["max_new_tokens"])
    assert answers == [each.prediction for each in kept]


def test_methods_of_one_run_may_have_adapters_of_their_own(settings, stream, tmp_path):
    own = {"preset": "sequential", "name": "small", "adapter": {"r": 1, "target_modules": ["q_proj"]}}
    osft, plain, small = run(settings, stream, tmp_path, "osft", "sequential", own)
    assert read_run(osft).config["adapter"]["peft_type"] == "OSF"
    assert read_run(plain).config["adapter"]["r"] == settings["adapter"]["r"]
    assert read_run(small).config["adapter"]["r"] == 1
    assert "adapter" not in read_run(plain).config["method"]
    # Each goes on where it was.
    assert run(settings, stream, tmp_path, "osft", "sequential", own) == [osft, plain, small]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"preset": "osft", "router": "oracle"}, "adapter: OSF trains the model itself"),
        ({"preset": "osft", "update": {"name": "balance-ema", "scope": "stream"}}, "adapters that rewrite the base"),
        ({"preset": "sequential", "name": "x", "adapter": {"peft_type": "OSFF"}}, "unknown adapter 'OSFF'"),
        ({"preset": "sequential", "name": "x", "adapter": {"rr": 2}}, "rr: unknown key"),
    ],
)
def test_what_does_not_go_together(settings, stream, tmp_path, method, message):
    with pytest.raises(CitFastError, match=message):
        run(settings, stream, tmp_path, method)
