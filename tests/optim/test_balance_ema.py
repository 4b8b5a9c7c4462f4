"""BalanceEMA: what it computes, the averages in the model, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from toy_training import averages, make_model, same, train, values

import cit_fast
from cit_fast.errors import CitFastError
from cit_fast.ops.balance_ema import reference
from cit_fast.optim import BalanceEMA

RULES = ("released", "paper", "fixed")


# What it computes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make_inner", [lambda p: AdamW(p, lr=0.01), lambda p: SGD(p, lr=0.01, momentum=0.9)])
def test_equals_the_definition_after_each_step(rule: str, make_inner: Callable[..., Optimizer]) -> None:
    model, plain = make_model(), make_model()
    optimizer, inner = (
        BalanceEMA(make_inner(model.parameters()), rule, decay=0.9, fallback=0.1),
        make_inner(plain.parameters()),
    )
    expected = values(plain)  # the average starts as a copy of the parameters before the first step
    previous: list[Tensor] | None = None
    remaining = torch.zeros(len(expected))
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        train(plain, inner, range(step, step + 1))
        grads = [p.grad for p in plain.parameters()]
        previous = previous or [grad.clone() for grad in grads]
        weights = reference.balance_ema_(
            values(plain), expected, grads, previous, remaining, reference.BalanceOptions(rule, 0.9, 0.1)
        )
        torch.testing.assert_close(torch.tensor(list(optimizer.balance_weights().values())), weights.alphas)
        torch.testing.assert_close(averages(optimizer), expected)
    assert same(values(model), values(plain))  # training itself is untouched, bit for bit


def test_the_wrapped_optimizer_still_initialises_its_own_state() -> None:
    model = make_model()
    optimizer = BalanceEMA(Adagrad(model.parameters(), lr=0.1))
    train(model, optimizer, range(1))
    optimizer = BalanceEMA(AdamW(model.parameters()))
    train(model, optimizer, range(1))
    assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq", "average", "previous_grad"}


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_averages_have_no_graph(backend: str) -> None:
    if not cit_fast.available_backends()[backend].available:
        pytest.skip(f"no {backend} backend")
    model = make_model()
    optimizer = BalanceEMA(SGD(model.parameters(), lr=0.1))
    with cit_fast.backend(backend):
        train(model, optimizer, range(2))
    assert not any(average.requires_grad for average in averages(optimizer))


def test_fixed_stores_no_gradient() -> None:
    model = make_model()
    optimizer = BalanceEMA(SGD(model.parameters(), lr=0.1), rule="fixed")
    train(model, optimizer, range(2))
    assert set(optimizer.state[model[0].weight]) >= {"average"}
    assert "previous_grad" not in optimizer.state[model[0].weight]


def test_average_of_bfloat16_parameters_is_float32_and_moves() -> None:
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = BalanceEMA(SGD([param], lr=0.0), rule="fixed", decay=0.999)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    with torch.no_grad():
        param.fill_(1.05)
    for _ in range(5000):
        optimizer.step()
    average = optimizer.state[param]["average"]
    assert average.dtype == torch.float32
    # The parameter is 1.05 rounded to bfloat16; a bfloat16 average would still be 1.0.
    torch.testing.assert_close(
        average, torch.full((4,), param.detach()[0].item()), rtol=0, atol=(0.05 * 0.999**5000) + 1e-4
    )


def test_parameters_without_gradients_in_some_steps() -> None:
    used, unused, late = (nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0, 3.0))
    optimizer = BalanceEMA(SGD([used, unused, late], lr=0.5), rule="fixed", decay=0.5)
    used.grad = torch.ones(3)
    optimizer.step()
    assert list(optimizer.balance_weights()) == [0]
    assert "average" not in optimizer.state[unused]
    used.grad, late.grad = None, torch.ones(3)
    optimizer.step()
    assert list(optimizer.balance_weights()) == [2]
    assert optimizer.state[used]["average"].tolist() == [0.75] * 3  # untouched by the second step
    assert optimizer.state[late]["average"].tolist() == [2.75] * 3  # started from 3.0 at its own first step
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.balance_weights() == {}
    assert optimizer.balance_summary() is None
    with optimizer.averaged():
        assert used.tolist() == [0.75] * 3
        assert unused.tolist() == [2.0] * 3


def test_frozen_parameters_are_left_alone() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = BalanceEMA(AdamW(model.parameters(), lr=0.1))
    train(model, optimizer, range(3))
    assert set(optimizer.state) == {model[2].weight, model[2].bias}


def test_non_finite_gradients_leave_the_average_untouched_and_are_counted() -> None:
    model = make_model()
    optimizer = BalanceEMA(SGD(model.parameters(), lr=0.01))
    train(model, optimizer, range(2))
    before = [average.clone() for average in averages(optimizer)]
    live = values(model)
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.5)
    model[0].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_updates == 1
    assert optimizer.balance_weights()[0] == 0.0
    assert torch.equal(averages(optimizer)[0], before[0])
    assert not torch.equal(averages(optimizer)[1], before[1])
    summary = optimizer.balance_summary()
    assert summary is not None
    assert summary.minimum > 0  # what was left out does not count
    with torch.no_grad():
        for param, value in zip(model.parameters(), live, strict=True):
            param.copy_(value)
    train(model, optimizer, range(3, 5))
    assert optimizer.skipped_updates == 1
    assert all(average.isfinite().all() for average in averages(optimizer))


def test_summary_when_every_tensor_was_left_out() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = BalanceEMA(SGD([param], lr=0.1))
    assert optimizer.balance_summary() is None
    param.grad = torch.full((2,), float("inf"))
    optimizer.step()
    assert optimizer.balance_summary() == (0.0, 0.0, 0.0, 0.0)
    assert optimizer.state[param]["average"].tolist() == [1.0, 1.0]


def test_summary_and_weights_by_name() -> None:
    model = make_model()
    optimizer = BalanceEMA(SGD(model.named_parameters(), lr=0.01), fallback=0.25)
    train(model, optimizer, range(1))
    assert list(optimizer.balance_weights()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert optimizer.balance_summary() == (0.25, 0.25, 0.25, 1.0)
    train(model, optimizer, range(1, 3))
    weights = list(optimizer.balance_weights().values())
    summary = optimizer.balance_summary()
    assert summary is not None
    mean, minimum, maximum, fraction = summary
    assert (minimum, maximum) == (min(weights), max(weights))
    assert mean == pytest.approx(sum(weights) / 4)
    assert fraction == sum(weight == 0.25 for weight in weights) / 4


# The averages in the model


def test_averaged_swaps_in_and_restores_exactly() -> None:
    model = make_model(torch.bfloat16)
    optimizer = BalanceEMA(AdamW(model.parameters(), lr=0.1), rule="fixed", decay=0.5)
    train(model, optimizer, range(3))
    live, averaged = values(model), [average.bfloat16() for average in averages(optimizer)]
    assert not same(live, averaged)
    with optimizer.averaged():
        assert same(values(model), averaged)
        with optimizer.averaged():
            assert same(values(model), averaged)
        assert same(values(model), averaged)
    assert same(values(model), live)
    with pytest.raises(ValueError, match="inside"), optimizer.averaged():
        raise ValueError("inside")
    assert same(values(model), live)


def test_nothing_is_changed_inside_averaged() -> None:
    model = make_model()
    optimizer = BalanceEMA(SGD(model.parameters(), lr=0.1))
    train(model, optimizer, range(1))
    for call in (optimizer.step, optimizer.copy_averaged_to_parameters, optimizer.reset_average):
        with optimizer.averaged(), pytest.raises(CitFastError, match=rf"{call.__name__}\(\) inside averaged"):
            call()


def test_copy_averaged_to_parameters() -> None:
    model = make_model()
    optimizer = BalanceEMA(AdamW(model.parameters(), lr=0.1))
    train(model, optimizer, range(3))
    optimizer.copy_averaged_to_parameters()
    assert same(values(model), averages(optimizer))


def test_a_new_task_starts_a_new_average_or_not() -> None:
    for scope in ("task", "stream"):
        model = make_model()
        optimizer = BalanceEMA(SGD(model.parameters(), lr=0.01), scope=scope, fallback=0.5)
        train(model, optimizer, range(3))
        before, live = [average.clone() for average in averages(optimizer)], values(model)
        optimizer.start_task()
        if scope == "stream":
            assert same(averages(optimizer), before)
            continue
        assert "average" not in optimizer.state[model[0].weight]
        train(model, optimizer, range(3, 4))
        expected = [(x + y) / 2 for x, y in zip(live, values(model), strict=True)]
        torch.testing.assert_close(averages(optimizer), expected)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "best"}, "BalanceEMA: rule='best' is unknown"),
        ({"decay": 1.5}, r"decay=1.5 must be in \[0, 1\)"),
        ({"fallback": -0.1}, r"fallback=-0.1 must be in \(0, 1\]"),
        ({"scope": "epoch"}, "scope='epoch' is unknown; accepted: task, stream"),
    ],
)
def test_bad_options(arguments: dict, message: str) -> None:
    with pytest.raises(CitFastError, match=message):
        BalanceEMA(SGD([nn.Parameter(torch.ones(1))], lr=0.1), **arguments)


def test_what_cannot_be_wrapped() -> None:
    inner = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(CitFastError, match="optimizer is a BalanceEMA"):
        BalanceEMA(BalanceEMA(inner))
    with pytest.raises(CitFastError, match="optimizer is a list"):
        BalanceEMA([nn.Parameter(torch.ones(1))])


def test_what_cannot_be_averaged() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = BalanceEMA(SGD(embedding.parameters(), lr=0.1))
    embedding(torch.tensor([1])).sum().backward()
    before = values(embedding)
    with pytest.raises(CitFastError, match=r"gradient of a parameter of shape \(5, 2\) is torch.sparse_coo"):
        optimizer.step()
    assert same(values(embedding), before)  # refused before the wrapped optimizer stepped

    complex_param = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    complex_param.grad = torch.ones_like(complex_param)
    with pytest.raises(CitFastError, match=r"shape \(2,\) is torch.complex64; only real floats"):
        BalanceEMA(SGD([complex_param], lr=0.1)).step()


def test_docstring_example() -> None:
    import doctest

    from cit_fast.optim import balance_ema

    assert doctest.testmod(balance_ema).failed == 0
