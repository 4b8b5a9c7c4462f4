"""AdamWBalanceEMA: the numbers of BalanceEMA(AdamW), and a torch.optim.Optimizer to everybody."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from toy_training import averages, make_model, same, through_a_file, train, values

import cit_fast
from cit_fast.errors import CitFastError
from cit_fast.optim import AdamWBalanceEMA, BalanceEMA

RULES = ("released", "paper", "fixed")
OPTIONS: dict[str, Any] = {"decay": 0.9, "fallback": 0.1}


def close(model: nn.Module, optimizer: Any, other: nn.Module, reference: Any) -> None:
    torch.testing.assert_close(values(model), values(other))
    torch.testing.assert_close(averages(optimizer), averages(reference))


# What it computes


@pytest.mark.parametrize("rule", RULES)
def test_equals_the_wrapped_adamw(rule: str) -> None:
    model, other = make_model(), make_model()
    options = {**OPTIONS, "rule": rule}
    optimizer = AdamWBalanceEMA(model.parameters(), lr=0.3, weight_decay=0.1, **options)
    reference = BalanceEMA(AdamW(other.parameters(), lr=0.3, weight_decay=0.1), **options)
    seen = set()
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        train(other, reference, range(step, step + 1))
        weights, expected = optimizer.balance_weights(), reference.balance_weights()
        assert list(weights) == list(expected)
        for key in expected:
            torch.testing.assert_close(torch.tensor(weights[key]), torch.tensor(expected[key]), rtol=1e-4, atol=1e-6)
            seen.add(expected[key])
        if step % 2:  # also without a look in between
            close(model, optimizer, other, reference)
    assert rule == "fixed" or len(seen) > 5  # not the fallback all the time


def test_weights_and_summary_survive_a_flush() -> None:
    model = make_model()
    optimizer = AdamWBalanceEMA(model.parameters(), lr=0.3, **OPTIONS)
    train(model, optimizer, range(3))
    before = optimizer.balance_weights(), optimizer.balance_summary()
    optimizer.flush()
    once = averages(optimizer)
    optimizer.flush()
    assert (optimizer.balance_weights(), optimizer.balance_summary()) == before
    assert same(averages(optimizer), once)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_first_call_is_like_every_other(backend: str) -> None:
    """An in-place kernel that is tuned by trials would be applied once for each trial at its first call."""
    if not cit_fast.available_backends()[backend].available:
        pytest.skip(f"no {backend} backend")
    results = []
    with cit_fast.backend(backend):
        for _ in range(2):
            model = make_model()
            optimizer = AdamWBalanceEMA(model.parameters(), lr=0.3)
            train(model, optimizer, range(2))
            results.append(values(model) + averages(optimizer))
    assert same(*results)


def test_groups_have_their_own_options_and_schedulers_may_part_them() -> None:
    model, other = make_model(), make_model()
    pairs = []
    for m, make in ((model, AdamWBalanceEMA), (other, AdamW)):
        groups = [
            {"params": [m[0].weight, m[2].weight], "weight_decay": 0.5},
            {"params": [m[0].bias], "weight_decay": 0.0},
            {"params": [m[2].bias], "weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-3},
        ]
        optimizer = make(groups, lr=0.1)
        optimizer = optimizer if make is AdamWBalanceEMA else BalanceEMA(optimizer)
        rates = [lambda step: 1.0, lambda step: 0.5**step, lambda step: 1.0 if step < 2 else 0.3]
        pairs.append((optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)))
    for step in range(5):
        for m, (optimizer, scheduler) in zip((model, other), pairs, strict=True):
            train(m, optimizer, range(step, step + 1))
            scheduler.step()
    close(model, pairs[0][0], other, pairs[1][0])


def test_learning_rate_may_be_a_tensor() -> None:
    model, other = make_model(), make_model()
    rate = torch.tensor(0.1)
    optimizer, reference = AdamWBalanceEMA(model.parameters(), lr=rate), BalanceEMA(AdamW(other.parameters(), lr=0.1))
    train(model, optimizer, range(2))
    train(other, reference, range(2))
    rate.fill_(0.2)
    reference.param_groups[0]["lr"] = 0.2
    train(model, optimizer, range(2, 4))
    train(other, reference, range(2, 4))
    close(model, optimizer, other, reference)


def test_parameters_without_gradients_in_some_steps() -> None:
    """As experts and unused adapters: their own step counts, and what is pending waits for them."""
    torch.manual_seed(0)
    start = [torch.randn(7), torch.randn(3, 4), torch.randn(5)]
    ours, theirs = ([nn.Parameter(each.clone()) for each in start] for _ in range(2))
    optimizer, reference = AdamWBalanceEMA(ours, lr=0.1, **OPTIONS), BalanceEMA(AdamW(theirs, lr=0.1), **OPTIONS)
    for step, present in enumerate([(0, 1), (1,), (0, 2), (), (2,), (0, 1, 2), (0, 1, 2), (1, 2), (0,)]):
        for i in range(3):
            grad = 100 * torch.randn(start[i].shape, generator=torch.Generator().manual_seed(10 * step + i))
            ours[i].grad, theirs[i].grad = (grad.clone(), grad.clone()) if i in present else (None, None)
        optimizer.step()
        reference.step()
        assert optimizer.balance_weights().keys() == reference.balance_weights().keys() == set(present)
        if step == 5:
            state = copy.deepcopy(optimizer.state_dict())
            assert [int(state["state"][i]["step"]) for i in range(3)] == [3, 3, 3]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(averages(optimizer), averages(reference))


def test_tied_and_repeated_parameters_are_stepped_once() -> None:
    model, other = make_model(), make_model()
    model.register_module("again", model[0])
    optimizer = AdamWBalanceEMA([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        repeated = AdamWBalanceEMA([*other.parameters(), other[0].weight], lr=0.1)
    for step in range(3):
        for m, o in ((model, optimizer), (other, repeated)):
            o.zero_grad()
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            m[2](m[1](m[0](batch))).square().mean().backward()
            o.step()
    assert same(values(model), values(other))
    assert len(repeated.balance_weights()) == 4


def test_added_parameters_get_their_own_average() -> None:
    model, adapter = make_model(), nn.Parameter(torch.ones(3))
    optimizer = AdamWBalanceEMA(model.named_parameters(), lr=0.1)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": [("adapter", adapter)], "lr": 1.0, "weight_decay": 0.0})
    adapter.grad = torch.ones(3)
    optimizer.step()
    optimizer.flush()
    assert list(optimizer.balance_weights()) == ["0.weight", "0.bias", "2.weight", "2.bias", "adapter"]
    assert int(optimizer.state[adapter]["step"]) == 1
    torch.testing.assert_close(optimizer.state[adapter]["average"], torch.full((3,), 0.99))  # 1 + 0.01 (0 - 1)


def test_strided_and_double_parameters_are_served_too() -> None:
    for make in (lambda x: x.t(), lambda x: x.double()):
        ours, theirs = (nn.Parameter(make(torch.arange(12.0).view(3, 4))) for _ in range(2))
        optimizer, reference = AdamWBalanceEMA([ours], lr=0.1), BalanceEMA(AdamW([theirs], lr=0.1))
        for step in range(3):
            grad = 100 * torch.randn(ours.shape, generator=torch.Generator().manual_seed(step)).to(ours.dtype)
            ours.grad, theirs.grad = grad.clone(), grad.clone()
            optimizer.step()
            reference.step()
        torch.testing.assert_close(ours, theirs)
        assert averages(optimizer)[0].dtype == ours.dtype
        torch.testing.assert_close(averages(optimizer), averages(reference))


def test_closure() -> None:
    model = make_model()
    optimizer = AdamWBalanceEMA(model.parameters(), lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().mean()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


# bfloat16


def test_bfloat16_averages_and_moments_follow_in_the_mean() -> None:
    param = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamWBalanceEMA(
        [param],
        lr=0.0,
        rule="fixed",
        decay=0.999,
        average_dtype=torch.bfloat16,
        state_dtype=torch.bfloat16,
    )
    param.grad = torch.ones_like(param)
    optimizer.step()
    with torch.no_grad():
        param.fill_(1.05)
    for _ in range(1000):
        optimizer.step()
    optimizer.flush()
    state = optimizer.state[param]
    assert {state[name].dtype for name in ("average", "exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    # The update 0.001 * 0.05 is a hundredth of bfloat16's last place at 1: rounded to nearest, it would stay at 1.
    expected = 1.05 - 0.05 * 0.999**1000
    assert state["average"].float().mean().item() == pytest.approx(expected, abs=2e-3)
    assert state["exp_avg_sq"].float().mean().item() == pytest.approx(1 - 0.999**1001, abs=1e-2)


def test_bfloat16_state_resumes_with_the_same_bits() -> None:
    options = {"average_dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "lr": 0.1}
    model, other = make_model(torch.bfloat16), make_model(torch.bfloat16, seed=5)
    optimizer, resumed = (AdamWBalanceEMA(m.parameters(), **options) for m in (model, other))
    train(model, optimizer, range(2))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    assert same(values(model), values(other))
    assert averages(resumed)[0].dtype == torch.bfloat16
    assert same(averages(optimizer), averages(resumed))


def test_wrapped_bfloat16_averages_resume_with_the_same_bits() -> None:
    model, other = make_model(), make_model(seed=5)
    optimizer, resumed = (
        BalanceEMA(AdamW(m.parameters(), lr=0.1), "fixed", average_dtype=torch.bfloat16) for m in (model, other)
    )
    train(model, optimizer, range(2))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(2, 5))
    train(other, resumed, range(2, 5))
    assert averages(resumed)[0].dtype == torch.bfloat16
    assert same(averages(optimizer), averages(resumed))


# Saving and resuming


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_gives_the_same_bits(dtype: torch.dtype, rule: str) -> None:
    straight, second = make_model(dtype), make_model(dtype, seed=9)
    optimizer, resumed = (AdamWBalanceEMA(m.parameters(), lr=0.1, rule=rule) for m in (straight, second))
    train(straight, optimizer, range(2))
    saved = through_a_file({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
    train(straight, optimizer, range(2, 4))
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(2, 4))
    assert resumed.balance_weights() == optimizer.balance_weights()
    assert same(values(second), values(straight))
    assert averages(resumed)[0].dtype == torch.float32
    assert same(averages(resumed), averages(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_state_of_adamw_loads_and_the_other_way_round(dtype: torch.dtype, fused: bool) -> None:
    model, other = make_model(dtype), make_model(dtype)
    plain, reference = AdamW(model.parameters(), lr=0.1, fused=fused), AdamW(other.parameters(), lr=0.1, fused=fused)
    train(model, plain, range(2))
    train(other, reference, range(4))
    optimizer = AdamWBalanceEMA(model.parameters(), lr=0.9)
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.1
    start = values(model)
    train(model, optimizer, range(2, 3))
    expected = [(p.float() + 0.01 * (q.float() - p.float())) for p, q in zip(start, values(model), strict=True)]
    torch.testing.assert_close(averages(optimizer), expected)
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    train(model, plain, range(3, 4))
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(values(model), values(other), **tolerance)
    assert [int(plain.state[p]["step"]) for p in model.parameters()] == [4] * 4


@pytest.mark.parametrize("clone", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])  # noqa: S301
def test_pickle_and_deepcopy_train_on(clone: Any) -> None:
    model = make_model()
    optimizer = AdamWBalanceEMA(model.parameters(), lr=0.1, rule="paper", decay=0.9, scope="stream")
    train(model, optimizer, range(2))
    other_model, other = clone((model, optimizer))
    assert (other.rule, other.decay, other.scope, other.state_dtype) == ("paper", 0.9, "stream", torch.float32)
    train(model, optimizer, range(2, 4))
    train(other_model, other, range(2, 4))
    other.load_state_dict(other.state_dict())
    assert same(averages(other), averages(optimizer))
    assert same(values(other_model), values(model))


# Bad input


def test_state_of_another_model_is_refused_before_anything_changes() -> None:
    model = make_model()
    optimizer = AdamWBalanceEMA(model.parameters(), lr=0.1)
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    for change, message in (
        (lambda s: s["state"][1].update(exp_avg=torch.zeros(9)), r"exp_avg of parameter 1 has shape \(9,\)"),
        (lambda s: s["state"][0].update(average=torch.zeros(9)), r"average of parameter 0 has shape \(9,\)"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad=True, which it cannot do"),
    ):
        state = copy.deepcopy(before)
        change(state)
        with pytest.raises(CitFastError, match=message):
            optimizer.load_state_dict(state)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for i in range(4):
            assert all(torch.equal(after["state"][i][name], before["state"][i][name]) for name in before["state"][i])
    with pytest.raises(ValueError, match="doesn't match the size"):
        AdamWBalanceEMA(make_model()[0].parameters()).load_state_dict(before)


def test_bad_options() -> None:
    param = nn.Parameter(torch.ones(2))
    for options, message in (
        ({"lr": -1.0}, "AdamWBalanceEMA: lr=-1.0 must be finite and not negative"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must both be in \[0, 1\)"),
        ({"rule": "fixed", "decay": -0.1}, r"decay=-0.1 must be in \[0, 1\)"),
        ({"rule": "fixed", "decay": 1.5}, r"decay=1.5 must be in \[0, 1\)"),
        ({"state_dtype": torch.float16}, "state_dtype=torch.float16 cannot follow"),
        ({"average_dtype": torch.float16}, "average_dtype=torch.float16 cannot follow"),
        ({"keep_gradients": "never"}, "keep_gradients='never' is unknown; accepted: reference, copy"),
    ):
        with pytest.raises(CitFastError, match=message):
            AdamWBalanceEMA([param], **options)
    optimizer = AdamWBalanceEMA([param])
    with pytest.raises(CitFastError, match="maximize=True"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "maximize": True})
    assert len(optimizer.param_groups) == 1


def test_nothing_is_written_when_a_gradient_cannot_be_used() -> None:
    dense, embedding = nn.Parameter(torch.ones(3)), nn.Embedding(5, 2, sparse=True)
    for make in (AdamWBalanceEMA, lambda params: BalanceEMA(torch.optim.SGD(params, lr=0.1))):
        optimizer = make([dense, embedding.weight])
        dense.grad = torch.ones(3)
        embedding.weight.grad = None
        optimizer.step()
        before = [dense.detach().clone(), averages_of(optimizer, dense)]
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(CitFastError, match=r"gradient of a parameter of shape \(5, 2\) is torch.sparse_coo"):
            optimizer.step()
        assert same(before, [dense.detach(), averages_of(optimizer, dense)])
        meta = nn.Parameter(torch.ones(2, device="meta"))
        meta.grad = torch.ones(2, device="meta")
        with pytest.raises(CitFastError, match=r"shape \(2,\) is on the meta device"):
            make([meta]).step()


def averages_of(optimizer: Any, param: Tensor) -> Tensor:
    optimizer.flush()
    return optimizer.state[param]["average"].clone()


def test_an_average_on_another_device_is_refused() -> None:
    model = make_model()
    optimizer = AdamWBalanceEMA(model.parameters(), lr=0.1)
    train(model, optimizer, range(1))
    before = values(model)
    optimizer.state[model[2].weight]["average"] = torch.ones(3, 10, device="meta")
    optimizer.zero_grad(set_to_none=True)
    model[2](torch.ones(1, 10)).sum().backward()
    with pytest.raises(CitFastError, match="is on cpu, its average on meta"):
        optimizer.step()
    assert same(values(model), before)


def test_not_finite_gradients_change_neither_weights_nor_moments_and_are_counted() -> None:
    model = make_model()
    optimizer = AdamWBalanceEMA(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    before = values(model), averages(optimizer)
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.5)
    model[0].weight.grad[:] = float("nan")
    model[2].bias.grad[0] = float("inf")
    optimizer.step()
    assert optimizer.skipped_updates == 2
    assert optimizer.balance_weights()[0] == optimizer.balance_weights()[3] == 0.0
    assert torch.equal(model[0].weight, before[0][0])
    after = averages(optimizer)
    assert torch.equal(after[0], before[1][0])
    assert torch.equal(after[3], before[1][3])
    assert not torch.equal(after[1], before[1][1])
    train(model, optimizer, range(2, 4))
    assert optimizer.skipped_updates == 2
    assert all(value.isfinite().all() for value in values(model) + averages(optimizer))


def test_docstring_example() -> None:
    import doctest

    from cit_fast.optim import adamw

    assert doctest.testmod(adamw).failed == 0
