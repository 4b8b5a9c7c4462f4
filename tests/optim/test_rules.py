"""The rules of the paper and of its authors' code, written out once more in float64, and how an average starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from toy_training import averages, make_model, same, train, values

from cit_fast.errors import CitFastError
from cit_fast.optim import AdamWBalanceEMA, BalanceEMA

Make = Callable[..., Any]
KINDS: dict[str, Make] = {
    "fused": lambda params, **options: AdamWBalanceEMA(params, lr=0.05, **options),
    "wrapped": lambda params, **options: BalanceEMA(AdamW(params, lr=0.05), **options),
    "watched": lambda params, **options: BalanceEMA.attach(AdamW(params, lr=0.05), **options),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
STEPS = 12


def trace(steps: int = STEPS) -> tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]]]:
    """(parameters at first, after each step, gradients of each step) of AdamW alone, float64."""
    model = make_model()
    optimizer = AdamW(model.parameters(), lr=0.05)
    first = [value.double() for value in values(model)]
    params, grads = [], []
    for step in range(steps):
        train(model, optimizer, range(step, step + 1))
        params.append([value.double() for value in values(model)])
        grads.append([param.grad.double() for param in model.parameters()])
    return first, params, grads


def l1(x: Tensor) -> float:
    return x.abs().sum().item()


def paper(first: Tensor, params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, list[float]]:
    """Equation (45), with norms over tensors and the share of the OLD average outside (0, 1) as the paper has it."""
    average, before, alphas = first, first, []
    for step, (p, g) in enumerate(zip(params, grads, strict=True)):
        beta = 0.99
        if step:
            numerator = l1(before - average) * (1 + l1(g))
            denominator = l1(p - average) * l1(g - grads[step - 1])
            found = 1 - numerator / denominator
            beta = found if 0 < found < 1 else 0.99
        average, before = beta * average + (1 - beta) * p, p
        alphas.append(1 - beta)
    return average, alphas


def released(
    first: Tensor, params: list[Tensor], grads: list[Tensor], scale: float = 2.0
) -> tuple[Tensor, list[float]]:
    """The authors' ``ema_update``: the average is a copy after the first step; ``first`` is not used."""
    average, alphas = params[0], [0.01]
    for step in range(1, len(params)):
        p, g = params[step], grads[step]
        found = scale * (1 + l1(g)) / (l1(p - average) * l1(g - grads[step - 1]))
        alpha = found if 0 < found < 1 else 0.01
        average = average * (1 - alpha) + p * alpha
        alphas.append(alpha)
    return average, alphas


@each_kind
@pytest.mark.parametrize(
    ("definition", "options"),
    [
        (paper, {"rule": "paper"}),
        (released, {"rule": "released", "start": "after"}),
        (lambda *lists: released(*lists, scale=0.01), {"rule": "released", "start": "after", "scale": 0.01}),
    ],
    ids=["paper", "released", "scale"],
)
def test_the_published_arithmetic(kind: str, definition: Callable[..., Any], options: dict[str, Any]) -> None:
    first, params, grads = trace()
    model = make_model()
    optimizer = KINDS[kind](model.parameters(), **options)
    weights: list[list[float]] = []
    for step in range(STEPS):
        train(model, getattr(optimizer, "optimizer", optimizer) if kind == "watched" else optimizer, [step])
        weights.append(list(optimizer.balance_weights().values()))
    usable = 0
    for i, average in enumerate(averages(optimizer)):
        expected, alphas = definition(first[i], [p[i] for p in params], [g[i] for g in grads])
        torch.testing.assert_close(torch.tensor([w[i] for w in weights]), torch.tensor(alphas), rtol=2e-4, atol=1e-7)
        torch.testing.assert_close(average.double(), expected, rtol=1e-4, atol=1e-6)
        usable += sum(abs(alpha - 0.01) > 1e-9 for alpha in alphas)
    assert usable > 5  # or the constant alone is tested


@each_kind
def test_an_average_that_starts_after_the_first_step(kind: str) -> None:
    model = make_model()
    optimizer = KINDS[kind](model.parameters(), start="after", rule="fixed", decay=0.5)
    inner = optimizer.optimizer if kind == "watched" else optimizer
    train(model, inner, [0])
    assert same(averages(optimizer), values(model))
    before = values(model)
    train(model, inner, [1])
    for average, old, new in zip(averages(optimizer), before, values(model), strict=True):
        torch.testing.assert_close(average, (old + new) / 2)


@each_kind
@pytest.mark.parametrize("rule", ["paper", "fixed"])
def test_an_average_is_continued_by_another_optimizer(kind: str, rule: str) -> None:
    """What an average of the whole stream does between two stages: live weights go on, the average as well."""
    options: dict[str, Any] = {"rule": rule, "decay": 0.75}
    straight = make_model()
    first = KINDS[kind](straight.parameters(), **options)
    train(straight, getattr(first, "optimizer", first) if kind == "watched" else first, range(3))
    kept = averages(first)

    model = make_model()
    model.load_state_dict(straight.state_dict())
    second = KINDS[kind](model.parameters(), **options)
    second.start_averages_at(dict(zip(model.parameters(), kept, strict=True)))
    train(model, getattr(second, "optimizer", second) if kind == "watched" else second, [3])
    moved = [(new - old).abs().max().item() for new, old in zip(averages(second), kept, strict=True)]
    assert max(moved) > 0
    alphas = list(second.balance_weights().values())
    assert alphas == pytest.approx([0.25 if rule == "fixed" else 0.01] * 4)  # no gradient of the step before
    for average, old, live, alpha in zip(averages(second), kept, values(model), alphas, strict=True):
        torch.testing.assert_close(average, old + alpha * (live - old))
    if rule == "paper":  # the distance of an average that is no copy was measured, so the next weight is known
        train(model, getattr(second, "optimizer", second) if kind == "watched" else second, [4])
        assert any(alpha != pytest.approx(0.01) for alpha in second.balance_weights().values())


def test_averages_cannot_start_anywhere() -> None:
    model = make_model()
    optimizer = AdamWBalanceEMA(model.parameters(), lr=0.1)
    with pytest.raises(CitFastError, match="whole parameters of this optimizer"):
        optimizer.start_averages_at({nn.Parameter(torch.ones(2)): torch.ones(2)})
    with pytest.raises(CitFastError, match=r"a value has shape \(1,\), its parameter \("):
        optimizer.start_averages_at({next(model.parameters()): torch.ones(1)})


@pytest.mark.parametrize("option", [{"start": "later"}, {"rounding": "up"}, {"scale": -1.0}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(CitFastError, match=f"BalanceEMA: {name}="):
        BalanceEMA(SGD(make_model().parameters(), lr=0.1), **option)


@each_kind
def test_an_average_rounded_to_the_nearest_stands_still(kind: str) -> None:
    """What the authors' bfloat16 runs do, and stochastic rounding does not."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        model = make_model(torch.bfloat16)
        optimizer = KINDS[kind](
            model.parameters(), rule="fixed", decay=0.999, average_dtype=torch.bfloat16, rounding=rounding
        )
        first = values(model)
        train(model, getattr(optimizer, "optimizer", optimizer) if kind == "watched" else optimizer, range(3))
        pairs = zip(averages(optimizer), first, strict=True)
        moved[rounding] = sum((average != start).sum().item() for average, start in pairs)
    assert moved["nearest"] < moved["stochastic"]
