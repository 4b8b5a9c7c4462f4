"""BalanceEMA: what it computes, and that everything that takes an optimizer takes it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from cit_fast import reference
from cit_fast.errors import CitFastError
from cit_fast.optim import BalanceEMA

RULES = ("released", "paper", "fixed")


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(model: nn.Module, optimizer: Optimizer, steps: range, scheduler=None) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        (100 * model(batch(step, dtype)).float().square().mean()).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def averages(optimizer: BalanceEMA) -> list[Tensor]:
    return [optimizer.state[p]["average"] for group in optimizer.param_groups for p in group["params"]]


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return len(xs) == len(ys) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


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
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        train(plain, inner, range(step, step + 1))
        grads = [p.grad for p in plain.parameters()]
        previous = previous or [grad.clone() for grad in grads]
        weights = reference.balance_ema_(values(plain), expected, grads, previous, rule, 0.9, 0.1)
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


# Saving and resuming


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
        scaler.scale(100 * model(batch(step)).square().mean()).backward()
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
        accelerator.backward(100 * prepared_model(batch(step)).square().mean())
        prepared.step()
        scheduler.step()
        if step == 1:
            prepared.load_state_dict(copy.deepcopy(prepared.state_dict()))
    train(plain, other, range(3))
    assert same(averages(optimizer), averages(other))
    assert same(values(model), values(plain))


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

    class Sharded(nn.Parameter):
        def to_local(self) -> Tensor:
            return self.data

    sharded = Sharded(torch.ones(2))
    sharded.grad = torch.ones(2)
    with pytest.raises(CitFastError, match="is sharded"):
        BalanceEMA(SGD([sharded], lr=0.1)).step()


def test_docstring_example() -> None:
    import doctest

    from cit_fast.optim import balance_ema

    assert doctest.testmod(balance_ema).failed == 0
