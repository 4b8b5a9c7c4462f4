"""Parameters that sit out a step, leave the optimizer, join it, or change place with another tensor."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from toy_training import averages, make_model, train

from cit_fast.optim import AdamWBalanceEMA, BalanceEMA

KINDS: dict[str, Any] = {
    "wrapped": lambda params, **options: BalanceEMA(AdamW(params, lr=0.05), **options),
    "fused": lambda params, **options: AdamWBalanceEMA(params, lr=0.05, **options),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def step(optimizer: Any, *params: Tensor) -> None:
    optimizer.zero_grad()
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()


@each_kind
@pytest.mark.parametrize("how", ["entry", "contents"])
def test_what_is_pending_for_a_parameter_without_state_is_dropped(kind: str, how: str) -> None:
    stays, leaves = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = KINDS[kind]([{"params": [stays]}, {"params": [leaves]}])
    step(optimizer, stays, leaves)
    step(optimizer, stays)
    if how == "entry":
        optimizer.param_groups.pop()
        del optimizer.state[leaves]
    else:
        optimizer.state[leaves].clear()
    optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    assert "average" in state[0]
    assert not state.get(1)


@each_kind
@pytest.mark.parametrize("set_to_none", [True, False])
def test_parameters_that_left_are_freed(kind: str, set_to_none: bool) -> None:
    """An adapter for each task: frozen for its last step, then taken out."""
    shared = nn.Parameter(torch.rand(3))
    optimizer = KINDS[kind]([shared])
    left = []
    for _ in range(3):
        adapter = nn.Parameter(torch.rand(5))
        optimizer.add_param_group({"params": [adapter]})
        for _ in range(2):
            step(optimizer, shared, adapter)
            optimizer.zero_grad(set_to_none=set_to_none)
        adapter.grad = None
        shared.grad = torch.ones(3)
        optimizer.step()
        optimizer.param_groups.pop()
        del optimizer.state[adapter]
        left.append(weakref.ref(adapter))
        del adapter
    step(optimizer, shared)
    gc.collect()
    assert not any(each() is not None for each in left)
    assert len(averages(optimizer)) == 1


@each_kind
def test_a_gradient_that_was_written_to_while_its_parameter_sat_out_is_not_the_previous_one(kind: str) -> None:
    def change_of_gradient(keep: str) -> Tensor:
        torch.manual_seed(0)
        always, sometimes = nn.Parameter(torch.ones(9)), nn.Parameter(torch.ones(9))
        optimizer = KINDS[kind]([always, sometimes], keep_gradients=keep)
        step(optimizer, always, sometimes)
        held, sometimes.grad = sometimes.grad, None
        step(optimizer, always)
        optimizer.flush()
        held.fill_(3.0)
        sometimes.grad = held
        always.grad = torch.ones(9)
        optimizer.step()
        return torch.cat([last.weights.norms for last in optimizer._last])

    expected = change_of_gradient("copy")
    assert (expected[:, 2] > 0).all()
    torch.testing.assert_close(change_of_gradient("reference"), expected)


@each_kind
def test_a_gradient_stays_watched_when_the_averages_are_flushed(kind: str) -> None:
    """Also where the state has other tensors by then, so that new plans are due."""
    model = make_model()
    optimizer = KINDS[kind](model.parameters())
    train(model, optimizer, range(2))
    held = [param.grad for param in model.parameters()]
    model.zero_grad()
    optimizer.state[model[0].weight]["average"] = optimizer.state[model[0].weight]["average"].clone()
    optimizer.flush()
    for grad in held:
        grad.zero_()
    with pytest.warns(UserWarning, match="4 gradients of the last step were written to"):
        train(model, optimizer, range(2, 3))


@each_kind
def test_parameters_can_be_swapped(kind: str) -> None:
    """``torch.utils.swap_tensors`` refuses tensors with weak references; FSDP2 moves its models so."""
    model = make_model()
    optimizer = KINDS[kind](model.parameters())
    train(model, optimizer, range(2))
    model.zero_grad()
    expected = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        torch.utils.swap_tensors(param, nn.Parameter(param.detach().clone()))
    assert all(map(torch.equal, model.parameters(), expected))
    train(model, optimizer, range(2, 3))
    assert len(optimizer.balance_weights()) == 4


@pytest.mark.parametrize("how", ["inner", "attached", "exchanged"])
def test_a_plain_tensor_that_joined_the_given_parameters_is_one_of_them(how: str) -> None:
    first, second, third = (torch.ones(3, requires_grad=True) for _ in range(3))
    inner = SGD([first, second], lr=0.1)
    stepped, optimizer = inner, BalanceEMA.attach(inner) if how == "attached" else BalanceEMA(inner)
    if how != "attached":
        stepped = optimizer
    if how == "exchanged":
        inner.param_groups[0]["params"][1] = third
    else:
        inner.add_param_group({"params": [third]})
    optimizer.start_averages_at({third: torch.full((3,), 5.0)})
    step(stepped, first, third)
    assert torch.equal(optimizer.state[third]["average"], torch.lerp(torch.full((3,), 5.0), third.detach(), 0.01))
    assert not optimizer.in_partitions()
