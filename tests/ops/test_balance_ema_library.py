"""The balance-weight EMA as ops of torch: opcheck, torch.compile, dispatch modes, autograd's version counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cit_fast.ops import adamw_balance_ema_, balance_norms_, balance_weights, flush_balance_ema_

Make = Callable[..., Any]


def sample(make: Make, moments: Make) -> tuple[Any, Any]:
    shapes = [(3, 5), (1,), (0,), (70,)]
    return make(shapes), moments(make(shapes))


def test_opcheck(make: Make, moments: Make) -> None:
    lists, state = sample(make, moments)
    x, library, opcheck = state.lists, torch.ops.cit_fast, torch.library.opcheck
    arguments = (lists.params, lists.averages, lists.grads, lists.previous_grads)
    opcheck(library.balance_norms_.default, (*arguments, True))
    opcheck(library.balance_ema_.default, (*arguments, lists.remaining, "paper", 0.9, 0.1, 2.0, "nearest", True, 3))
    opcheck(library.balance_ema_.default, (*arguments, None, "released", 0.9, 0.1, 2.0, "stochastic", True, 3))
    arguments = (
        x.params, x.grads, state.exp_avgs, state.exp_avg_sqs, x.averages, x.previous_grads, state.alphas,
        x.remaining, 1, 0.1, 0.9, 0.99, 1e-8, 0.1, "paper", 0.99, 0.01, 2.0, "stochastic", False, 3,
    )  # fmt: skip
    opcheck(library.adamw_balance_ema_.default, arguments)
    opcheck(library.flush_balance_ema_.default, (x.params, x.averages, state.alphas, "nearest", 3))


def test_compiles_without_a_graph_break(make: Make, moments: Make) -> None:
    def step(lists: Any, state: Any) -> tuple[Tensor, ...]:
        weights = lists.run(rule="paper")
        x = state.lists
        norms = balance_norms_(x.params, x.averages, x.grads, x.previous_grads, store_grads=False)
        fused = adamw_balance_ema_(
            x.params, x.grads, state.exp_avgs, state.exp_avg_sqs, x.averages, x.previous_grads, state.alphas,
            step=1, lr=0.1, seed=-1,
        )  # fmt: skip
        flush_balance_ema_(x.params, x.averages, fused.alphas)
        return weights.alphas, fused.fallbacks, fused.norms, balance_weights(norms).alphas

    eager, compiled = sample(make, moments), sample(make, moments)
    expected = step(*eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(compiled[0].averages, eager[0].averages, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(compiled[1].lists.averages, eager[1].lists.averages, strict=True))


def test_steps_seeds_and_a_schedule_do_not_break_the_graph(make: Make, moments: Make) -> None:
    def step(state: Any, count: int, lr: float) -> Tensor:
        return state.step(count, lr=lr, seed=3 * count).alphas * 1

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    eager, traced = sample(make, moments)[1], sample(make, moments)[1]
    for state in (eager, traced):
        state.alphas = torch.zeros(4)
    for count in range(1, 2 * torch._dynamo.config.recompile_limit):
        lr = 0.1 if count < 5 else 0.01
        assert torch.equal(compiled(traced, count, lr), step(eager, count, lr))
    assert all(torch.equal(x, y) for x, y in zip(traced.lists.averages, eager.lists.averages, strict=True))
    assert counter.frame_count <= 4  # once for counts that change, and once for each learning rate, as any float


class Log(TorchDispatchMode):
    """The names of the ops of this package that go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cit_fast":
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_modes_and_autograd_see_the_ops(make: Make) -> None:
    lists = make([(5,), (3, 2)])
    expected = lists.copy()
    with Log() as log:
        lists.run()
    expected.run()
    assert log.seen == ["balance_ema_.default"]
    assert all(torch.equal(x, y) for x, y in zip(lists.averages, expected.averages, strict=True))
    # What is written in place must not be used by a backward pass that saved it before.
    average = expected.averages[0]
    product = (torch.ones(5, requires_grad=True) * average).sum()
    expected.run()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_parameters_that_require_gradients(make: Make, moments: Make) -> None:
    lists = make([(10,)])
    lists.params = [torch.nn.Parameter(p) for p in lists.params]
    assert not lists.run().alphas.requires_grad
    moments(lists).step(1, lr=0.1)
    assert lists.params[0].is_leaf
