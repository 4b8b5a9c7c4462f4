"""Distillation against its equation, written out with explicit logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killed import at_call, killed
from rich.console import Console
from toy_runs import adapter

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task
from cit_fast.errors import ConfigError
from cit_fast.evaluation import read_stages
from cit_fast.methods.objectives import CrossEntropy, Distillation, distillation, earlier_model
from cit_fast.methods.stage import Stage
from cit_fast.models import kept_tensors
from cit_fast.run import stage_evaluation, stage_trainer

ROUNDING = {"rtol": 1e-4, "atol": 1e-7}  # of a model in float64 whose normalisation computes in float32
OLD = [
    Example("Write the date in the form year, month, day.", "4 May", ("05 04",), "dates", ((19, 43),), source="b:1"),
    Example("Write the date in the form year, month, day.", "the quick fox", ("over the lazy dog 0 1",), "dates"),
]
NEW = [
    Example("Convert the number to words.", "42", ("forty two",), "words"),
    Example("Extract the e-mail address from the text.", "jo", ("jo",), "words"),
]


def stage(model, encoder, folder=None, index=2) -> Stage:
    old, new = (Task(group[0].task, tuple(group), ()) for group in (OLD, NEW))
    return Stage(
        *(model, encoder, index, (new,)),
        seen=(old,) if index > 1 else (),
        examples=(*NEW, *OLD) if index > 1 else tuple(NEW),
        scratch=folder,
    )


def response_logits(model, encoded):
    return model(input_ids=torch.tensor([encoded.input_ids])).logits[0, encoded.prompt_length - 1 : -1].double()


def by_hand(live, previous, encoder, examples, compared, temperature, lambda_, without_target):
    """Mean over the response tokens of the cross-entropy and, of some examples, of T^2 KL."""
    total, count = 0.0, 0
    for example in examples:
        encoded = encoder.example(example)
        targets = torch.tensor(encoded.input_ids[encoded.prompt_length :])
        z = response_logits(live, encoded)
        rows = torch.arange(len(targets))
        total = total - z.log_softmax(1)[rows, targets].sum()
        count += len(targets)
        if example not in compared:
            continue
        w = response_logits(previous, encoded).detach()
        if without_target:
            kept = torch.ones_like(z, dtype=torch.bool)
            kept[rows, targets] = False
            z, w = z[kept].view(len(rows), -1), w[kept].view(len(rows), -1)
        log_p, log_q = (z / temperature).log_softmax(1), (w / temperature).log_softmax(1)
        total = total + lambda_ * temperature**2 * (log_q.exp() * (log_q - log_p)).sum()
    return total / count


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("share_prefix", [False, "auto"])
@pytest.mark.parametrize(
    ("on", "temperature", "without_target"), [("all", 1.0, False), ("new", 2.0, False), ("replayed", 1.5, True)]
)
def test_the_equation(live, previous, encoder, on, temperature, without_target, share_prefix, tmp_path):
    objective = Distillation(
        0.7, temperature, on, without_target=without_target, share_prefix=share_prefix, batch_size=3
    )
    inputs = objective.prepare(stage(previous, encoder, tmp_path))
    loss = objective(live, inputs.collator(inputs.features), None)
    loss.backward()
    found = gradients(live)
    compared = {"all": [*NEW, *OLD], "new": NEW, "replayed": OLD}[on]
    assert inputs.record.compared == len(compared)
    expected = by_hand(live, previous, encoder, [*NEW, *OLD], compared, temperature, 0.7, without_target)
    expected.backward()
    torch.testing.assert_close(loss, expected.to(loss.dtype), **ROUNDING)
    for name, value in gradients(live).items():
        torch.testing.assert_close(found[name], value, **ROUNDING)


def test_of_the_same_model_it_is_the_cross_entropy(previous, encoder):
    objective, plain = Distillation(), CrossEntropy()
    inputs = objective.prepare(stage(previous, encoder))
    other = plain.prepare(stage(previous, encoder))
    loss = objective(previous, inputs.collator(inputs.features), None)
    torch.testing.assert_close(
        loss, plain(previous, other.collator(other.features), None).to(loss.dtype), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    ("options", "index", "compares"),
    [({}, 1, False), ({}, 2, True), ({"when": "always"}, 1, True), ({"lambda_": 0.0}, 2, False)],
)
def test_the_stages_that_compare(previous, encoder, options, index, compares):
    inputs = Distillation(**options).prepare(stage(previous, encoder, index=index))
    assert (inputs.record.compared > 0) == compares
    assert ("frozen" in inputs.collator(inputs.features)) == compares


def test_a_batch_of_new_examples_alone_where_the_replayed_are_compared(live, previous, encoder):
    objective = Distillation(compare="replayed")
    inputs = objective.prepare(stage(previous, encoder))
    loss = objective(live, inputs.collator(inputs.features[: len(NEW)]), None)
    expected = by_hand(live, previous, encoder, NEW, [], 1.0, 1.0, False)
    torch.testing.assert_close(loss, expected.to(loss.dtype), **ROUNDING)


def test_without_replay_nothing_replayed_is_compared(previous, encoder):
    one = stage(previous, encoder, index=2)
    one = Stage(previous, encoder, 2, one.tasks, one.seen, tuple(NEW))
    inputs = Distillation(compare="replayed").prepare(one)
    assert inputs.record.compared == 0
    assert "frozen" not in inputs.collator(inputs.features)


def test_what_the_earlier_model_says_is_computed_once_and_kept(live, previous, encoder, tmp_path, monkeypatch):
    from cit_fast.key_parts import teacher

    first = Distillation().prepare(stage(previous, encoder, tmp_path))
    monkeypatch.setattr(teacher, "hidden_of", lambda *_: pytest.fail("computed again"))
    again = Distillation().prepare(stage(previous, encoder, tmp_path))
    batches = [each.collator(each.features) for each in (first, again)]
    assert torch.equal(batches[0]["frozen"], batches[1]["frozen"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_": -1.0}, "lambda_: -1.0 is negative"),
        ({"lambda_": float("nan")}, "lambda_: nan"),
        ({"temperature": 0.0}, "temperature: 0.0; expected a positive number"),
        ({"compare": "old"}, "compare: 'old' is unknown; expected all, new or replayed"),
        ({"when": "never"}, "when: 'never' is unknown"),
        ({"batch_size": 0}, "batch_size: 0 is below 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(**options)


def run(settings, stream, output: Path, preset: str = "lwf", **objective) -> Path:
    own = {**settings, "methods": [{"preset": preset, "objective": objective}], "output": str(output)}
    return ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()[0]


def test_killed_and_resumed_with_the_same_bits(settings, stream, tmp_path):
    settings["training"] |= {"learning_rate": 1e-2}
    whole = run(settings, stream, tmp_path / "whole", lambda_=3.0)
    moments = [
        at_call(1, kept_tensors, "save_file"),
        at_call(2, stage_trainer, "mark_complete"),
        at_call(1, kept_tensors, "save_file"),  # of stage 3
        at_call(1, stage_evaluation, "evaluate"),
    ]
    for arm in moments:
        assert killed(lambda: run(settings, stream, tmp_path / "killed", lambda_=3.0), arm)
    folder = run(settings, stream, tmp_path / "killed", lambda_=3.0)
    assert [stage.losses for stage in read_stages(folder)] == [stage.losses for stage in read_stages(whole)]
    assert [stage.objective.compared for stage in read_stages(folder)[1:]] == [0, 16, 16]
    ours, theirs = adapter(folder, 3), adapter(whole, 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_with_replay_and_an_adapter_for_each_task(settings, stream, tmp_path):
    """The earlier model of a new adapter set is the base model; ``when: retrained`` leaves it out."""
    for when, compared in (("always", [16, 16, 16]), ("retrained", [0, 0, 0])):
        method = {
            "preset": "oracle",
            "name": when,
            "objective": {"name": "distillation", "when": when, "without_target": True},
        }
        own = {**settings, "methods": [method], "output": str(tmp_path / when)}
        (folder,) = ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()
        assert [stage.objective.compared for stage in read_stages(folder)[1:]] == compared


def test_under_autocast_both_heads_are_multiplied_in_its_dtype(previous, live, encoder, monkeypatch):
    """Accelerate wraps the forward pass alone; the loss runs outside, on weights in float32."""
    for model in (previous, live):
        model.float()
    objective = Distillation(0.7, 1.0, "all")
    inputs = objective.prepare(stage(previous, encoder))
    batch = inputs.collator(inputs.features)
    exact = objective(live, dict(batch), None)
    dtypes = []
    for module, name in ((earlier_model, "linear_cross_entropy"), (distillation, "linear_kl_divergence")):
        op = getattr(module, name)

        def looked_at(*arguments, op=op, **options):
            dtypes.extend(each.dtype for each in arguments if each is not None and each.dim() == 2)
            return op(*arguments, **options)

        monkeypatch.setattr(module, name, looked_at)
    forward = live.forward

    def autocast(*arguments, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*arguments, **options)

    monkeypatch.setattr(live, "forward", autocast)
    loss = objective(live, batch, None)
    loss.backward()
    assert len(dtypes) == 6
    assert set(dtypes) == {torch.bfloat16}
    torch.testing.assert_close(loss, exact, rtol=2**-8, atol=0)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in gradients(live).values())
