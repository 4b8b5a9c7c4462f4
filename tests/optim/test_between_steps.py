"""What people do to an optimizer between two steps: edit its groups, schedule options, compile it, load other state."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from toy_training import averages, values

from cit_fast.errors import CitFastError
from cit_fast.ops.balance_ema import reference
from cit_fast.optim import AdamWBalanceEMA, BalanceEMA

KINDS: dict[str, Any] = {
    "wrapped": lambda params, **options: BalanceEMA(AdamW(params, lr=0.05), **options),
    "fused": lambda params, **options: AdamWBalanceEMA(params, lr=0.05, **options),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 10))


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    batch = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
    (100 * model(batch).square().mean()).backward()


def test_a_parameter_that_moves_to_another_group_takes_its_options() -> None:
    model = make_model()
    w1, b1, w2, b2 = model.parameters()
    optimizer = AdamWBalanceEMA([{"params": [w1, b1], "lr": 0.1}, {"params": [w2, b2], "lr": 0.0}])
    for step in range(2):
        backward(model, step)
        optimizer.step()
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop(0))
    before = values(model)
    backward(model, 2)
    optimizer.step()
    assert not torch.equal(w2, before[2])
    assert torch.equal(b2, before[3])


@each_kind
def test_weights_can_be_asked_for_after_a_parameter_left(kind: str) -> None:
    model = make_model()
    optimizer = KINDS[kind](model.parameters())
    backward(model, 0)
    optimizer.step()
    optimizer.param_groups[0]["params"].pop(0)
    assert list(optimizer.balance_weights()) == [0, 1, 2]


def test_a_refused_step_changes_nothing_and_the_next_one_is_whole() -> None:
    """One parameter cannot step; without its gradient the others go on as if it had never been tried."""
    found = []
    for refused_at in (2, None):
        model = make_model()
        optimizer = AdamWBalanceEMA(model.parameters(), lr=0.05)
        *rest, late = model.parameters()
        for step in range(4):
            backward(model, step)
            if step == refused_at:
                optimizer.state[late]["average"] = torch.empty_like(late, device="meta")
                with pytest.raises(CitFastError, match="its average on meta"):
                    optimizer.step()
                del optimizer.state[late]
            late.grad = None
            optimizer.step()
        optimizer.flush()
        found.append(values(model) + [optimizer.state[param]["average"] for param in rest])
    assert all(map(torch.equal, *found))


@each_kind
def test_decay_may_follow_a_schedule(kind: str) -> None:
    model = make_model()
    optimizer = KINDS[kind](model.parameters(), rule="fixed", decay=0.5)
    expected = [value.double() for value in values(model)]
    for step, decay in enumerate((0.5, 0.9, 0.75)):
        optimizer.decay = decay
        backward(model, step)
        optimizer.step()
        expected = [e + (1 - decay) * (p.double() - e) for e, p in zip(expected, values(model), strict=True)]
    for average, want in zip(averages(optimizer), expected, strict=True):
        torch.testing.assert_close(average.double(), want, rtol=1e-6, atol=1e-6)


@each_kind
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decay", 1.5, r"decay=1.5 must be in \[0, 1\)"),
        ("decay", -0.1, r"decay=-0.1 must be in \[0, 1\)"),
        ("fallback", 0.0, r"fallback=0.0 must be in \(0, 1\]"),
        ("rule", "released", "rule was 'fixed' and is 'released' now"),
        ("average_dtype", torch.bfloat16, "average_dtype was"),
        ("keep_gradients", "copy", "keep_gradients was 'reference' and is 'copy' now"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(
    kind: str, name: str, value: Any, message: str
) -> None:
    model = make_model()
    optimizer = KINDS[kind](model.parameters(), rule="fixed", decay=0.9)
    backward(model, 0)
    optimizer.step()
    before, kept = values(model), averages(optimizer)
    good = getattr(optimizer, name)
    setattr(optimizer, name, value)
    with pytest.raises(CitFastError, match=message):
        optimizer.step()
    setattr(optimizer, name, good)
    assert all(map(torch.equal, values(model), before))
    assert all(map(torch.equal, averages(optimizer), kept))
    optimizer.step()


@pytest.mark.parametrize("kind", [*KINDS, "watched"])
def test_a_compiled_step_follows_the_definition(kind: str) -> None:
    torch.compiler.reset()
    model = make_model()
    if kind == "watched":
        stepped = AdamW(model.parameters(), lr=0.05)
        optimizer = BalanceEMA.attach(stepped)
    else:
        stepped = optimizer = KINDS[kind](model.parameters())
    step = torch.compile(stepped.step, backend="eager")
    expected = [value.double() for value in values(model)]
    previous: list[Tensor] = []
    for i in range(5):
        backward(model, i)
        step()
        grads = [param.grad.double() for param in model.parameters()]
        previous = previous or [grad.clone() for grad in grads]
        weights = reference.balance_ema_(
            [value.double() for value in values(model)], expected, grads, previous, None, reference.BalanceOptions()
        )
    assert not weights.fallbacks.all()
    assert list(optimizer.balance_weights().values()) == pytest.approx(weights.alphas.tolist(), rel=1e-4)
    for average, want in zip(averages(optimizer), expected, strict=True):
        torch.testing.assert_close(average.double(), want, rtol=1e-5, atol=1e-6)


@each_kind
def test_tied_weights_have_one_average_and_move_it_once(kind: str) -> None:
    embedding, head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    optimizer = KINDS[kind](model.parameters(), rule="fixed", decay=0.75)
    start = head.weight.detach().double()
    (1 - model(torch.arange(7)).sum()).backward()
    optimizer.step()
    (average,) = averages(optimizer)
    torch.testing.assert_close(average.double(), start + 0.25 * (head.weight.detach().double() - start))
    with optimizer.averaged():
        assert torch.equal(embedding.weight, average)
        assert torch.equal(head.weight, average)


@each_kind
def test_everything_that_is_saved_is_where_loading_keeps_it(kind: str) -> None:
    """``Optimizer.load_state_dict`` drops every other key."""
    model = make_model()
    optimizer = KINDS[kind](model.parameters(), average_dtype=torch.bfloat16)
    backward(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert all({"average", "previous_grad"} <= set(entry) for entry in state["state"].values())


def test_weight_decay_of_an_adam_is_not_taken_for_that_of_an_adamw() -> None:
    model = make_model()
    adam = Adam(model.parameters(), weight_decay=0.1)
    backward(model, 0)
    adam.step()
    optimizer = AdamWBalanceEMA(model.parameters())
    with pytest.raises(CitFastError, match="state of an Adam with L2 regularisation"):
        optimizer.load_state_dict(adam.state_dict())
    adam.param_groups[0]["weight_decay"] = 0
    optimizer.load_state_dict(adam.state_dict())
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], adam.state[model[0].weight]["exp_avg"])


@pytest.mark.parametrize("make", [lambda p: AdamW(p), lambda p: SGD(p, lr=0.1, momentum=0.9)], ids=["adamw", "sgd"])
def test_plain_state_of_another_model_is_refused_by_the_wrapper(make: Any) -> None:
    model = make_model()
    optimizer = BalanceEMA(make(model.parameters()))
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    other = nn.Sequential(nn.Linear(7, 40), nn.Linear(40, 10))
    plain = make(other.parameters())
    other(torch.ones(1, 7)).sum().backward()
    plain.step()
    with pytest.raises(CitFastError, match="this state belongs to another model"):
        optimizer.load_state_dict(plain.state_dict())
    for entry, kept in zip(optimizer.state_dict()["state"].values(), before.values(), strict=True):
        assert entry.keys() == kept.keys()
        assert all(torch.equal(entry[name], kept[name]) for name in kept if isinstance(kept[name], Tensor))


def offloaded(state: dict[str, Any]) -> dict[str, Any]:
    """The entry of a parameter with its tensors replaced, as after a way to the CPU and back."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


@each_kind
@pytest.mark.parametrize("rule", ["released", "paper", "fixed"])
@pytest.mark.parametrize("how", ["tensors", "entries"])
def test_state_that_is_replaced_between_two_steps_is_the_one_that_counts(kind: str, rule: str, how: str) -> None:
    """Trainers for reinforcement learning offload the state, ``state[p][name] = tensor.to(...)``, after each step."""

    def train(offload: bool) -> tuple[list[Tensor], dict[str, Any]]:
        model = make_model()
        optimizer = KINDS[kind](model.parameters(), rule=rule, scale=1e-3, average_dtype=torch.bfloat16)
        for step in range(5):
            backward(model, step)
            optimizer.step()
            if not offload:
                continue
            for param in model.parameters():
                if how == "tensors":
                    optimizer.state[param].update(offloaded(optimizer.state[param]))
                else:
                    optimizer.state[param] = offloaded(optimizer.state[param])
        return averages(optimizer), optimizer.state_dict()["state"]

    (plain, plain_state), (offloads, state) = train(False), train(True)
    assert all(map(torch.equal, plain, offloads))
    for index, entry in plain_state.items():
        assert {name: torch.equal(value, state[index][name]) for name, value in entry.items()} == dict.fromkeys(
            entry, True
        )


@each_kind
def test_a_plan_keeps_no_state_alive(kind: str) -> None:
    """Or offloading would free nothing."""
    model = make_model()
    optimizer = KINDS[kind](model.parameters())
    backward(model, 0)
    optimizer.step()
    model.zero_grad()
    kept = [weakref.ref(value) for entry in optimizer.state.values() for value in entry.values() if value.dim()]
    for entry in optimizer.state.values():
        entry.update(offloaded(entry))
    gc.collect()
    assert kept
    assert not any(each() is not None for each in kept)


@each_kind
def test_a_gradient_in_another_order_of_memory_is_a_previous_gradient_too(kind: str) -> None:
    """It is kept by reference, and kernels that walk flat memory must not take it for one in the usual order."""

    def train(transposed: int | None) -> list[Tensor]:
        model = make_model()
        optimizer = KINDS[kind](model.parameters(), scale=1e-3)
        for step in range(4):
            backward(model, step)
            if step == transposed:
                for param in model.parameters():
                    if param.dim() == 2:
                        param.grad = param.grad.t().contiguous().t()
            optimizer.step()
        return averages(optimizer)

    for expected, found in zip(train(None), train(1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_step_count_that_somebody_sets_is_the_one_that_counts(how: str) -> None:
    """As in ``torch.optim.AdamW``: with its moments at 0 too, the optimizer starts again."""

    def train(make: Any) -> list[Tensor]:
        model = make_model()
        optimizer = make(model.parameters(), lr=0.05)
        for step in range(6):
            backward(model, step)
            optimizer.step()
            for entry in optimizer.state.values() if step == 3 else ():
                entry["exp_avg"].zero_()
                entry["exp_avg_sq"].zero_()
                if how == "in place":
                    entry["step"].zero_()
                else:
                    entry["step"] = torch.tensor(0.0)
        assert {float(entry["step"]) for entry in optimizer.state.values()} == {2.0}
        return values(model)

    for found, expected in zip(train(AdamWBalanceEMA), train(AdamW), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_is_pending_outlives_a_step_that_fails_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}]
    optimizer = AdamWBalanceEMA(groups, rule="fixed", decay=0.5)
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    start = averages(optimizer)[0]
    run = AdamWBalanceEMA._run

    def fail(self: Any, sweep: Any, group: Any, index: int) -> Tensor:
        if index == 1:
            raise RuntimeError("out of memory")
        return run(self, sweep, group, index)

    monkeypatch.setattr(AdamWBalanceEMA, "_run", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    torch.testing.assert_close(averages(optimizer)[0], torch.lerp(start, first.detach(), 0.5))


@each_kind
@pytest.mark.parametrize("how", ["as always", "failed", "closure", "copied"])
def test_averages_start_where_they_were_told_to(kind: str, how: str) -> None:
    """Also after a step that failed, one in which the parameter had no gradient, or as a copy of the optimizer."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = KINDS[kind]([first, second], rule="fixed", decay=0.5)
    optimizer.start_averages_at({param: torch.full((3,), 5.0) for param in (first, second)})

    def closure() -> float:
        first.grad = torch.ones(3)
        if how == "failed":
            raise RuntimeError("out of memory")
        return 0.0

    if how == "failed":
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(closure)
    if how == "closure":
        optimizer.step(closure)
    if how == "copied":
        (first, second), optimizer = copy.deepcopy(((first, second), optimizer))
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(averages(optimizer)[1], torch.lerp(torch.full((3,), 5.0), second.detach(), 0.5))
