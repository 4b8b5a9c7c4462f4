"""BalanceEMA.attach, factory and find_balance_ema: averages for optimizers that somebody else made and steps."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from toy_training import averages, make_model, same, through_a_file, train, values

from cit_fast.errors import CitFastError
from cit_fast.optim import AdamWBalanceEMA, BalanceEMA, find_balance_ema


def test_watching_gives_the_numbers_of_wrapping() -> None:
    model, other = make_model(), make_model()
    inner = AdamW(model.parameters(), lr=0.3)
    watcher, wrapper = BalanceEMA.attach(inner, rule="paper"), BalanceEMA(AdamW(other.parameters(), lr=0.3), "paper")
    train(model, inner, range(3))
    train(model, watcher, range(3, 5))  # stepped through the handle: once
    train(other, wrapper, range(5))
    assert same(values(model), values(other))
    assert same(averages(inner), averages(wrapper))
    assert watcher.balance_weights() == wrapper.balance_weights()
    live = values(model)
    with watcher.averaged():
        assert same(values(model), averages(wrapper))
    assert same(values(model), live)


def test_closures_and_detach() -> None:
    model = make_model()
    inner = SGD(model.parameters(), lr=0.01)
    watcher = BalanceEMA.attach(inner, rule="fixed", decay=0.5)
    start = values(model)

    def closure() -> Tensor:
        inner.zero_grad()
        loss = model(torch.ones(2, 6)).square().mean()
        loss.backward()
        return loss

    inner.step(closure)
    expected = [(p + q) / 2 for p, q in zip(start, values(model), strict=True)]
    torch.testing.assert_close(averages(inner), expected)
    watcher.detach()
    assert find_balance_ema(inner) is None
    inner.step(closure)
    torch.testing.assert_close(averages(inner), expected)
    with pytest.raises(CitFastError, match="only what attach"):
        BalanceEMA(SGD(model.parameters(), lr=0.1)).detach()


@pytest.mark.parametrize("average_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_checkpoints_of_the_watched_optimizer_keep_every_bit(
    dtype: torch.dtype, average_dtype: torch.dtype, loaded: str
) -> None:
    """Also when a plain optimizer, which casts state to the parameters' dtype, loads before anyone watches."""
    options = {"rule": "paper", "average_dtype": average_dtype}
    straight, second = make_model(dtype), make_model(dtype, seed=7)
    inner = AdamW(straight.parameters(), lr=0.1)
    BalanceEMA.attach(inner, **options)
    train(straight, inner, range(2))
    saved = through_a_file(inner.state_dict())
    second.load_state_dict(straight.state_dict())
    train(straight, inner, range(2, 4))

    resumed = AdamW(second.parameters(), lr=0.9)
    if loaded == "before":
        resumed.load_state_dict(saved)
        BalanceEMA.attach(resumed, **options)
    else:
        BalanceEMA.attach(resumed, **options)
        resumed.load_state_dict(saved)
    assert averages(resumed)[0].dtype == average_dtype
    train(second, resumed, range(2, 4))
    assert same(values(second), values(straight))
    assert same(averages(resumed), averages(inner))
    # The fused optimizer takes the same checkpoint.
    if dtype != torch.float16:
        fused = AdamWBalanceEMA(make_model(dtype).parameters(), average_dtype=average_dtype)
        fused.load_state_dict(saved)
        assert averages(fused)[0].dtype == average_dtype


def test_direct_loading_of_the_wrapped_optimizer_keeps_the_dtype() -> None:
    model = make_model(torch.bfloat16)
    inner = AdamW(model.parameters(), lr=0.1)
    optimizer = BalanceEMA(inner)
    train(model, optimizer, range(2))
    before = averages(optimizer)
    inner.load_state_dict(copy.deepcopy(inner.state_dict()))
    assert same(averages(optimizer), before)
    train(model, optimizer, range(2, 3))
    assert not same(averages(optimizer), before)


def test_gradients_are_unscaled_before_a_watched_fused_optimizer_sees_them() -> None:
    model, other = make_model(), make_model()
    inner, wrapper = AdamW(model.parameters(), lr=0.1, fused=True), BalanceEMA(AdamW(other.parameters(), lr=0.1))
    watcher = BalanceEMA.attach(inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        inner.zero_grad()
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        scaler.scale(1000 * model(batch).square().mean()).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = float("inf")
            before = averages(inner)
        scaler.step(inner)
        scaler.update()
        if step == 1:
            assert same(averages(inner), before)  # a skipped step leaves the average alone
        else:
            train(other, wrapper, range(step, step + 1))
    torch.testing.assert_close(averages(inner), averages(wrapper))
    assert watcher.skipped_updates == 0


@pytest.mark.parametrize("make", [AdamWBalanceEMA, lambda params, lr: BalanceEMA(AdamW(params, lr=lr))])
def test_grad_scaler_skips_whole_steps(make: Any) -> None:
    model = make_model()
    optimizer = make(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for bad in (False, True):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 6)).square().mean()).backward()
        if bad:
            optimizer.flush()
            before = values(model) + averages(optimizer)
            model[0].weight.grad[0, 0] = float("nan")
        scaler.step(optimizer)
        scaler.update()
    optimizer.flush()
    assert same(values(model) + averages(optimizer), before)
    assert optimizer.skipped_updates == 0


def test_accelerated_optimizers_are_watched_inside() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    for make in (AdamW, AdamWBalanceEMA):
        model = make_model()
        prepared_model, prepared = accelerator.prepare(model, make(model.parameters(), lr=0.1))
        with pytest.raises(AttributeError):
            prepared.register_step_post_hook(lambda *_: None)  # which is why
        balance_ema = BalanceEMA.attach(prepared) if make is AdamW else find_balance_ema(prepared)
        assert find_balance_ema(prepared) is balance_ema
        train(prepared_model, prepared, range(2))
        balance_ema.flush()
        assert len(averages(prepared)) == 4
        with balance_ema.averaged():
            pass


def test_factory_makes_wrapped_optimizers_of_any_class() -> None:
    made = BalanceEMA.factory(SGD, rule="fixed", decay=0.5)
    assert isinstance(made, type)
    assert issubclass(made, Optimizer)
    model = make_model()
    optimizer = made([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1, momentum=0.9)
    assert type(optimizer) is BalanceEMA
    assert (optimizer.rule, optimizer.decay) == ("fixed", 0.5)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    train(model, optimizer, range(1))
    pickle.loads(pickle.dumps(optimizer))  # noqa: S301
    with pytest.raises(CitFastError, match=r"BalanceEMA\.factory: rule='best' is unknown"):
        BalanceEMA.factory(SGD, rule="best")


def test_one_average_for_each_optimizer() -> None:
    inner = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    assert find_balance_ema(inner) is None
    watcher = BalanceEMA.attach(inner)
    assert find_balance_ema(inner) is watcher
    for again in (BalanceEMA, BalanceEMA.attach):
        with pytest.raises(CitFastError, match="has an average already"):
            again(inner)
    with pytest.raises(CitFastError, match="optimizer is a AdamWBalanceEMA"):
        BalanceEMA(AdamWBalanceEMA([nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize("clone", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])  # noqa: S301
def test_copies_watch_their_own_optimizer(clone: Any) -> None:
    model = make_model()
    watcher = BalanceEMA.attach(AdamW(model.parameters(), lr=0.1))
    train(model, watcher.optimizer, range(2))
    other_model, other = clone((model, watcher))
    train(model, watcher.optimizer, range(2, 4))
    train(other_model, other.optimizer, range(2, 4))
    assert find_balance_ema(other.optimizer) is other
    assert same(averages(other), averages(watcher))
