"""Elastic weight consolidation: its equation, the sum over tasks, and the same bits in a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killed import at_call, killed
from peft import LoraConfig, get_peft_model
from rich.console import Console
from toy_runs import adapter

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task
from cit_fast.errors import CitFastError, ConfigError, RunError
from cit_fast.evaluation import read_stages
from cit_fast.methods.objectives import EWC, CrossEntropy
from cit_fast.methods.stage import Stage
from cit_fast.models import kept_tensors
from cit_fast.models.prompts import IGNORED, PromptEncoder
from cit_fast.run import stage_evaluation, stage_trainer


def task(name: str) -> Task:
    return Task(name, tuple(Example(f"Say {name}.", f"{k}", (f"{name} {k}",), name) for k in range(6)))


TASKS = task("seven"), task("positive"), task("no")


@pytest.fixture
def model(make_model):
    tuned = get_peft_model(make_model("Llama", torch.float64), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained(tuned).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return tuned


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def at(model, tokenizer, index: int, kept: Path | None = None) -> Stage:
    return Stage(
        model,
        PromptEncoder(tokenizer),
        index=index,
        tasks=(TASKS[index - 1],),
        seen=TASKS[: index - 1],
        examples=TASKS[index - 1].train,
        seed=f"0/{index}",
        kept=kept,
    )


def fisher_of(model, tokenizer, one: Task) -> dict[str, torch.Tensor]:
    """By definition: mean over examples of the square of the gradient of the answer's log-likelihood."""
    encoder, found = PromptEncoder(tokenizer), {name: torch.zeros_like(p) for name, p in trained(model).items()}
    for example in one.train:
        encoded = encoder.example(example)
        log_probabilities = model(torch.tensor([encoded.input_ids])).logits[0].log_softmax(1)
        answer = [k for k, label in enumerate(encoded.labels) if label != IGNORED]
        model.zero_grad()
        sum(log_probabilities[k - 1, encoded.input_ids[k]] for k in answer).backward()
        for name, parameter in trained(model).items():
            found[name] += parameter.grad.square() / len(one.train)
    model.zero_grad()
    return found


def test_the_loss_is_the_equation(model, tiny_tokenizer):
    objective, plain = EWC(lambda_=3.0), CrossEntropy()
    expected = fisher_of(model, tiny_tokenizer, TASKS[0])
    stage = at(model, tiny_tokenizer, 2)
    inputs = objective.prepare(stage)
    plain.prepare(stage)
    batch = inputs.collator(inputs.features)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    torch.testing.assert_close(objective(model, batch, None), plain(model, batch, None))  # no way gone yet
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.05)
    penalty = sum((expected[n] * (p - before[n]).square()).sum() for n, p in trained(model).items())
    loss = objective(model, batch, None)
    torch.testing.assert_close(loss - plain(model, batch, None), (1.5 * penalty).to(loss), rtol=2e-6, atol=0)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    plain(model, batch, None).backward()
    for name, parameter in trained(model).items():
        spring = 3.0 * expected[name] * (parameter.detach() - before[name])
        torch.testing.assert_close(gradients[name] - parameter.grad, spring, rtol=3e-6, atol=1e-9)
    assert inputs.record.details["trace of the Fisher information"] == pytest.approx(
        float(sum(value.sum() for value in expected.values())), rel=1e-4
    )


def test_micro_batches_share_the_penalty(model, tiny_tokenizer):
    objective = EWC(lambda_=5.0)
    inputs = objective.prepare(at(model, tiny_tokenizer, 2))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.mul_(1.3)
    items = sum(sum(label != IGNORED for label in feature.labels) for feature in inputs.features)
    whole = objective(model, inputs.collator(inputs.features), items)
    parts = [objective(model, inputs.collator(part), items) for part in (inputs.features[:1], inputs.features[1:])]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_fisher_information_of_earlier_tasks_adds_up(model, tiny_tokenizer, tmp_path, on_disk):
    kept = tmp_path if on_disk else None
    first = fisher_of(model, tiny_tokenizer, TASKS[0])
    objective = EWC()
    objective.prepare(at(model, tiny_tokenizer, 2, kept))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.mul_(1.2)
    second = fisher_of(model, tiny_tokenizer, TASKS[1])
    if on_disk:
        objective = EWC()  # of a resumed run
    objective.prepare(at(model, tiny_tokenizer, 3, kept))
    for (parameter, before, stiff), (name, own) in zip(objective._springs, trained(model).items(), strict=True):
        assert parameter is own
        assert torch.equal(before, own)
        torch.testing.assert_close(stiff, (first[name] + second[name]).float(), rtol=3e-6, atol=1e-9)


def test_nothing_to_hold_in_the_first_stage(model, tiny_tokenizer):
    objective = EWC()
    inputs = objective.prepare(at(model, tiny_tokenizer, 1))
    batch = inputs.collator(inputs.features)
    assert torch.equal(objective(model, batch, None), CrossEntropy()(model, batch, None))


def test_what_an_earlier_stage_kept_must_be_there(model, tiny_tokenizer, tmp_path):
    with pytest.raises(RunError, match=r"02\.safetensors"):
        EWC().prepare(at(model, tiny_tokenizer, 3, tmp_path))
    EWC().prepare(at(model, tiny_tokenizer, 2, tmp_path))
    path = tmp_path / "ewc" / "02.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RunError, match="not there"):
        EWC().prepare(at(model, tiny_tokenizer, 3, tmp_path))


def test_gradients_and_modes_stay_as_they_were(model, tiny_tokenizer):
    model.train()
    state = torch.get_rng_state()
    EWC().prepare(at(model, tiny_tokenizer, 2))
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_several_sets_are_refused(model, tiny_tokenizer):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="router: shared"):
        EWC().prepare(at(model, tiny_tokenizer, 2))


@pytest.mark.parametrize("options", [{"lambda_": -1}, {"lambda_": float("inf")}, {"examples": 0}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        EWC(**options)


def run(settings, stream, output: Path, **objective) -> Path:
    method = {"preset": "ewc", "objective": {"examples": 4, **objective}}
    own = {**settings, "methods": [method], "output": str(output)}
    return ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()[0]


def test_killed_and_resumed_with_the_same_bits(settings, stream, tmp_path):
    settings["training"] |= {"learning_rate": 1e-2}
    whole = run(settings, stream, tmp_path / "whole", lambda_=1e4)
    free = run(settings, stream, tmp_path / "free", lambda_=0.0)
    output = tmp_path / "killed"
    moments = [
        at_call(1, kept_tensors, "save_file"),
        at_call(2, stage_trainer, "mark_complete"),
        at_call(1, kept_tensors, "save_file"),  # of stage 3: stage 2 reads what it had written
        at_call(1, stage_evaluation, "evaluate"),
    ]
    for arm in moments:
        assert killed(lambda: run(settings, stream, output, lambda_=1e4), arm)
    folder = run(settings, stream, output, lambda_=1e4)
    assert [stage.losses for stage in read_stages(folder)] == [stage.losses for stage in read_stages(whole)]
    ours, theirs, plain = (adapter(each, 3) for each in (folder, whole, free))
    first = adapter(whole, 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def way(weights):
        return sum(float((weights[name] - first[name]).square().sum()) for name in weights)

    assert way(theirs) < 0.8 * way(plain)  # the springs hold


def test_routers_with_sets_of_their_own_are_refused(settings, stream, tmp_path):
    own = {**settings, "methods": [{"preset": "ewc", "router": "oracle"}], "output": str(tmp_path / "oracle")}
    with pytest.raises(CitFastError, match="router: shared"):
        ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()
