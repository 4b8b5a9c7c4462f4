"""BalanceEMA: everything that takes an optimizer, saves or resumes one, takes it."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from toy_training import averages, batch, make_model, same, through_a_file, train, values

from cit_fast.errors import CitFastError
from cit_fast.optim import BalanceEMA

RULES = ("released", "paper", "fixed")


# Saving and resuming


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_gives_the_same_bits(dtype: torch.dtype, rule: str) -> None:
    straight = make_model(dtype)
    optimizer = BalanceEMA(AdamW(straight.parameters(), lr=0.01), rule)
    train(straight, optimizer, range(4))

    first = make_model(dtype)
    first_optimizer = BalanceEMA(AdamW(first.parameters(), lr=0.01), rule)
    train(first, first_optimizer, range(2))
    saved = through_a_file({"model": first.state_dict(), "optimizer": first_optimizer.state_dict()})

    second = make_model(dtype, seed=9)
    second.load_state_dict(saved["model"])
    second_optimizer = BalanceEMA(AdamW(second.parameters(), lr=0.5), rule)
    second_optimizer.load_state_dict(saved["optimizer"])
    train(second, second_optimizer, range(2, 4))
    assert averages(second_optimizer)[0].dtype == torch.float32
    assert same(values(second), values(straight))
    assert same(averages(second_optimizer), averages(optimizer))
    assert second_optimizer.balance_weights() == optimizer.balance_weights()


def test_loading_copies() -> None:
    model, other = make_model(), make_model()
    optimizer, copied = (BalanceEMA(AdamW(m.parameters(), lr=0.01)) for m in (model, other))
    train(model, optimizer, range(2))
    copied.load_state_dict(optimizer.state_dict())
    before = [average.clone() for average in averages(optimizer)]
    train(other, copied, range(2))
    assert same(averages(optimizer), before)


def test_state_of_the_plain_optimizer_loads_and_the_other_way_round() -> None:
    model = make_model()
    plain = AdamW(model.parameters(), lr=0.01)
    train(model, plain, range(2))
    optimizer = BalanceEMA(AdamW(model.parameters(), lr=0.3))
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01
    start = values(model)
    train(model, optimizer, range(2, 3))
    expected = [(p + 0.01 * (q - p)) for p, q in zip(start, values(model), strict=True)]
    torch.testing.assert_close(averages(optimizer), expected)
    plain.load_state_dict(optimizer.state_dict())
    train(model, plain, range(1))


def test_state_of_another_model_is_refused_before_anything_changes() -> None:
    model = make_model()
    optimizer = BalanceEMA(AdamW(model.parameters(), lr=0.01))
    train(model, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["average"] = torch.zeros(99)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CitFastError, match=r"average of parameter 1 has shape \(99,\), the parameter has \(10,\)"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert same([after["state"][i]["average"] for i in range(4)], [before["state"][i]["average"] for i in range(4)])
    other = BalanceEMA(AdamW(make_model()[0].parameters()))
    with pytest.raises(ValueError, match="doesn't match the size"):
        other.load_state_dict(before)


def test_state_dict_hooks_run_once_and_may_replace() -> None:
    model = make_model()
    optimizer = BalanceEMA(AdamW(model.parameters(), lr=0.01))
    train(model, optimizer, range(1))
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save before"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "mine"})
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load after"))
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["save before", "load after"]


@pytest.mark.parametrize("clone", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])  # noqa: S301
def test_pickle_and_deepcopy_train_on(clone: Callable[[object], tuple[nn.Module, BalanceEMA]]) -> None:
    model = make_model()
    optimizer = BalanceEMA(AdamW(model.parameters(), lr=0.01), "paper", 0.9, 0.1, "stream")
    train(model, optimizer, range(2))
    other_model, other = clone((model, optimizer))
    assert (other.rule, other.decay, other.fallback, other.scope) == ("paper", 0.9, 0.1, "stream")
    train(model, optimizer, range(2, 4))
    train(other_model, other, range(2, 4))
    assert same(averages(other), averages(optimizer))
    assert same(values(other_model), values(model))


# A real optimizer


def test_learning_rate_schedulers() -> None:
    model = make_model()
    optimizer = BalanceEMA(SGD(model.parameters(), lr=1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, range(3), scheduler)
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.125
    state = scheduler.state_dict()
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.load_state_dict(state)
    train(model, optimizer, range(1), scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.0625


def test_everything_is_shared_with_the_wrapped_optimizer() -> None:
    model = make_model()
    inner = AdamW(model.parameters(), lr=0.01)
    optimizer = BalanceEMA(inner)
    assert isinstance(optimizer, Optimizer)
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(inner, name)
        replacement = copy.copy(getattr(inner, name))
        setattr(optimizer, name, replacement)
        assert getattr(inner, name) is replacement
    assert "set_to_none" in inspect.signature(optimizer.zero_grad).parameters
    train(model, optimizer, range(1))
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert "lr: 0.01" in repr(optimizer)


def test_added_parameters_get_their_own_average() -> None:
    model, adapter = make_model(), nn.Parameter(torch.ones(3))
    optimizer = BalanceEMA(SGD(model.parameters(), lr=0.1), rule="fixed", decay=0.5)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": [adapter], "lr": 1.0})
    adapter.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[adapter]["average"].tolist() == [0.5] * 3
    assert len(optimizer.balance_weights()) == 5


def test_closure() -> None:
    model = make_model()
    optimizer = BalanceEMA(SGD(model.parameters(), lr=0.01))
    start = values(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch(0)).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert isinstance(loss, Tensor)
    expected = [p + 0.01 * (q - p) for p, q in zip(start, values(model), strict=True)]
    torch.testing.assert_close(averages(optimizer), expected)


def test_step_hooks_fire_once_on_both() -> None:
    model = make_model()
    optimizer = BalanceEMA(SGD(model.parameters(), lr=0.1))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.optimizer.register_step_post_hook(lambda *_: calls.append("inner"))
    train(model, optimizer, range(1))
    assert calls == ["before", "inner", "after"]


def test_only_the_mode_switch_passes_through() -> None:
    class Switching(SGD):
        def train(self) -> str:
            return "train"

    param = nn.Parameter(torch.ones(1))
    assert BalanceEMA(Switching([param], lr=0.1)).train() == "train"
    plain = BalanceEMA(AdamW([param], lr=0.1, fused=True))
    for name in ("train", "eval", "_step_supports_amp_scaling", "anything"):
        assert not hasattr(plain, name)


def test_grad_scaler_unscales_before_and_skips_whole_steps() -> None:
    model, plain = make_model(), make_model()
    # A fused optimizer unscales by itself; behind the wrapper the scaler must, or the average sees scaled ones.
    optimizer, inner = BalanceEMA(AdamW(model.parameters(), lr=0.01, fused=True)), AdamW(plain.parameters(), lr=0.01)
    other = BalanceEMA(inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(1000 * model(batch(step)).square().mean()).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            train(plain, other, range(step, step + 1))
    torch.testing.assert_close(values(model), values(plain))
    torch.testing.assert_close(averages(optimizer), averages(other))
    assert optimizer.skipped_updates == 0


def test_accelerate_prepare_keeps_the_average_through_a_round_trip() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, plain = make_model(), make_model()
    optimizer, other = (BalanceEMA(AdamW(m.parameters(), lr=0.01)) for m in (model, plain))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    prepared_model, prepared, scheduler = accelerator.prepare(model, optimizer, scheduler)
    assert prepared.optimizer is optimizer
    for step in range(3):
        prepared.zero_grad()
        accelerator.backward(1000 * prepared_model(batch(step)).square().mean())
        prepared.step()
        scheduler.step()
        if step == 1:
            prepared.load_state_dict(copy.deepcopy(prepared.state_dict()))
    train(plain, other, range(3))
    assert same(averages(optimizer), averages(other))
    assert same(values(model), values(plain))
