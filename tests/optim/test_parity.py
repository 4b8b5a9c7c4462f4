"""A LoRA training run by transformers' Trainer, its averages against the definition and against the authors' code.

Both are computed along the run's own weights and clipped gradients, which a callback notes down at every step: the
definition (METHODS of LCIA, arXiv 2410.10868) in float64, and the arithmetic of the authors' released code in
float32, in its own order of operations. Theirs differs in three places that this run does not reach: a value that is
not finite enters the average; a parameter without a gradient moves its average by the fallback; and the average
starts as a copy after the first step. A warm-up from 0, as the authors train with, makes the last one the same:
the first step changes no weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from cit_fast.optim import AdamWBalanceEMA, BalanceEMA, BalanceEMACallback, find_balance_ema

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data")

STEPS, RATE, CLIP, DECAY, FALLBACK = 20, 0.03, 0.5, 0.99, 0.01
UNIT = 2.0**-24  # half the distance from 1 to the next float32


class Rows(torch.utils.data.Dataset):
    ids = torch.randint(10, 300, (32, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Trace(TrainerCallback):
    """Weights before the first step, then weights, gradients and our balance weights after every one."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.weights: list[list[float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.trained(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = {name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        self.steps.append((self.trained(kwargs["model"]), grads))
        self.weights.append(list(find_balance_ema(kwargs["optimizer"]).balance_weights().values()))

    @staticmethod
    def trained(model: torch.nn.Module) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


OPTIMIZERS: dict[str, Any] = {
    "watched": lambda rule: None,
    "wrapped": lambda rule: (BalanceEMA.factory(AdamW, rule=rule), {"lr": RATE}),
    "fused": lambda rule: (AdamWBalanceEMA, {"lr": RATE, "rule": rule}),
}


def run(folder: Path, tiny: Path, kind: str, rule: str) -> tuple[Trace, dict[str, Tensor]]:
    """(what happened, the averages at the end)"""
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    trace, optimizer = Trace(), OPTIMIZERS[kind](rule)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=STEPS,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            max_grad_norm=CLIP,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Rows(),
        callbacks=[BalanceEMACallback(final="live", **({} if optimizer else {"rule": rule})), trace],
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.train()
    balance_ema = find_balance_ema(trainer.optimizer)
    balance_ema.flush()
    averages = {
        name: balance_ema.state[p]["average"].clone() for name, p in model.named_parameters() if p.requires_grad
    }
    return trace, averages


@dataclass
class Average:
    """An average along the trace, and how far one in float32 may be from it by rounding alone.

    Attributes:
        value: the average.
        bound: no element of an average in float32 can be further away,
        total: nor all elements together.
        weights: alpha of each step.
        offs: how far one computed in float32 may be from it.
        fallbacks: whether alpha was the constant.
        left: the distance that the last update left.
    """

    value: Tensor
    bound: float = 0.0
    total: float = 0.0
    weights: list[float] = field(default_factory=list)
    offs: list[float] = field(default_factory=list)
    fallbacks: list[bool] = field(default_factory=list)
    left: float = 0.0


def definition(trace: Trace, name: str, rule: str, chose: Sequence[float]) -> Average:
    """Equations (1) to (4) in float64, with the error of the same in float32 carried along.

    Where rounding decides whether a weight is below 1, it decides as ``chose``, the weights computed in float32, did.

    With n elements: ``a`` is off by at most ``total``, by a rounding of each difference, and by n roundings of their
    sum; b and c likewise but for ``total``. The weight has the sum of their relative errors and four roundings of its
    own, and moves the average by that share of |p - e|. Adding e + alpha (p - e) rounds three times values of at most
    max |p|, |e|. The distance that an update leaves enters the paper's next weight, so its bound would grow from step
    to step; there ``off`` is without it, which is still ten times what the errors are.
    """
    average = Average(trace.start[name].double())
    previous: Tensor | None = None
    for (params, grads), chosen in zip(trace.steps, chose, strict=True):
        p, g, e = params[name].double(), grads[name].double(), average.value
        change = g - (g if previous is None else previous)
        a, b, c = ((p - e).abs().sum().item(), g.abs().sum().item(), change.abs().sum().item())
        n = p.numel()
        fraction = (1 + b) / (a * c) if a * c else math.inf
        factor = {"released": 2.0, "paper": average.left, "fixed": math.inf}[rule]
        weight = factor * fraction if factor else 0.0
        constant = 1 - DECAY if rule == "fixed" else FALLBACK
        alpha = weight
        off = weight * ((3 * n + 7) * UNIT + average.total / a) if a and math.isfinite(weight) else 0.0
        fell_back = not 0 < weight < 1
        if abs(weight - 1) <= off:  # rounding decides
            fell_back = abs(chosen - constant) < abs(chosen - alpha)
        if fell_back:
            alpha, off = constant, 4 * UNIT * constant
        moved, size = (p - e).abs(), torch.maximum(p.abs(), e.abs())
        average.value = e + alpha * (p - e)
        stays = 1 - alpha + off
        average.bound = stays * average.bound + off * moved.max().item() + 3 * UNIT * size.max().item()
        average.total = stays * average.total + off * a + 3 * UNIT * size.sum().item()
        average.left = (1 - alpha) * a
        average.weights.append(alpha)
        average.offs.append(off)
        average.fallbacks.append(fell_back)
        previous = g
    return average


def released(trace: Trace, name: str) -> tuple[Tensor, list[float]]:
    """(average, weights) by the authors' arithmetic, float32: a copy after the first step, then twice the fraction.

    Where it finds no weight in (0, 1), nor a previous gradient, it takes 0.01.
    """
    (params, grads), *rest = trace.steps
    average, previous = params[name].clone(), grads[name]
    average, weights = average * (1 - FALLBACK) + params[name] * FALLBACK, [FALLBACK]
    for params, grads in rest:
        p, g = params[name], grads[name]
        distance, gradient, change = (torch.norm(each, p=1) for each in (p - average, g, g - previous))
        weight = float((1 + gradient) / (distance * change) * 2)
        alpha = weight if 0 < weight < 1 else FALLBACK
        average = average * (1 - alpha) + p * alpha
        weights.append(alpha)
        previous = g
    return average, weights


def check(average: Tensor, weights: list[float], expected: Average) -> None:
    """An average and its weights, computed in float32, are within their bounds, and those are small."""
    assert expected.bound < 1e-2 * expected.value.abs().max().item()
    assert (average.double() - expected.value).abs().max().item() <= expected.bound
    for weight, alpha, off in zip(weights, expected.weights, expected.offs, strict=True):
        assert weight == pytest.approx(alpha, rel=0, abs=off)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["released", "paper", "fixed"])
def test_averages_of_a_lora_run(tmp_path: Path, tiny_model_folder: Path, kind: str, rule: str) -> None:
    trace, averages = run(tmp_path, tiny_model_folder, kind, rule)
    assert len(trace.steps) == STEPS
    assert len(averages) == 2 * 14  # A and B of each linear layer, and nothing else
    norms = [math.sqrt(sum(g.double().square().sum().item() for g in grads.values())) for _, grads in trace.steps]
    assert max(norms) == pytest.approx(CLIP, rel=1e-3)  # the clipped gradients are the ones that count
    assert all(torch.equal(trace.start[name], trace.steps[0][0][name]) for name in averages)  # the warm-up
    fallbacks, moved = [], 0.0
    for i, (name, ours) in enumerate(averages.items()):
        weights = [step[i] for step in trace.weights]
        expected = definition(trace, name, rule, weights)
        check(ours, weights, expected)
        if rule == "released":
            theirs, their_weights = released(trace, name)
            theirs_expected = definition(trace, name, rule, their_weights)
            check(theirs, their_weights, theirs_expected)
            if theirs_expected.fallbacks == expected.fallbacks:  # two computations in float32
                assert (ours - theirs).abs().max().item() <= 2 * expected.bound
        fallbacks += expected.fallbacks
        moved = max(moved, (expected.value - trace.steps[-1][0][name].double()).abs().max().item())
    assert moved > 0.01  # the averages are not just the weights
    if rule != "fixed":  # the gradients decided, not the constant; the paper's rule has none for small tensors
        assert sum(fallbacks) < len(fallbacks) * (0.8 if rule == "paper" else 0.5)
