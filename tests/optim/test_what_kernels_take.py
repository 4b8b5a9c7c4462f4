"""What goes straight to the kernels, and what must not: they walk flat memory of a few dtypes and ask nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW
from torch.testing._internal.two_tensor import TwoTensor
from toy_training import averages, make_model, same, train, values

from cit_fast.errors import CitFastError
from cit_fast.ops import balance_ema_
from cit_fast.optim import AdamWBalanceEMA, BalanceEMA

KINDS: dict[str, Any] = {
    "wrapped": lambda params, **options: BalanceEMA(AdamW(params, lr=0.05, foreach=False), **options),
    "fused": lambda params, **options: AdamWBalanceEMA(params, lr=0.05, **options),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    torch.set_default_dtype(torch.float32)


def trained(kind: str, default: torch.dtype = torch.float32, steps: int = 4) -> list[Tensor]:
    model = make_model()
    optimizer = KINDS[kind](model.parameters(), scale=1e-3)
    for step in range(steps):
        torch.set_default_dtype(torch.float32)
        model.zero_grad()
        (1000 * model(torch.ones(2, 6) + step).square().mean()).backward()
        torch.set_default_dtype(default)
        optimizer.step()
    found = [*values(model), *averages(optimizer), *optimizer._last[0].weights]
    torch.set_default_dtype(torch.float32)
    return found


@each_kind
def test_the_default_dtype_does_not_matter(kind: str, default_dtype: torch.dtype) -> None:
    assert same(trained(kind, default_dtype), trained(kind))


def test_the_ops_results_do_not_follow_the_default_dtype(default_dtype: torch.dtype) -> None:
    lists = [[torch.rand(7)] for _ in range(4)]
    expected = balance_ema_(*[[each.clone() for each in tensors] for tensors in lists]).alphas
    torch.set_default_dtype(default_dtype)
    found = balance_ema_(*lists).alphas
    nothing = balance_ema_([], [], [], []).alphas
    assert same([found], [expected])
    assert nothing.dtype == torch.float32


def test_steps_are_counted_in_float32(default_dtype: torch.dtype) -> None:
    """bfloat16 would stop at 256."""
    torch.set_default_dtype(default_dtype)
    param = nn.Parameter(torch.ones(2, dtype=torch.float32))
    optimizer = AdamWBalanceEMA([param], rule="fixed")
    param.grad = torch.ones(2, dtype=torch.float32)
    for _ in range(260):
        optimizer.step()
    step = optimizer.state_dict()["state"][0]["step"]
    assert (step.dtype, step.item()) == (torch.float32, 260)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[param]["step"].dtype == torch.float32


@each_kind
def test_subclasses_of_tensor_step_as_their_parts_would(kind: str) -> None:
    parts = torch.rand(4), torch.rand(4)
    pair = nn.Parameter(TwoTensor(*(part.clone() for part in parts)))
    plain = [nn.Parameter(part.clone()) for part in parts]
    for params in ([pair], plain):
        optimizer = KINDS[kind](params, rule="fixed")
        for _ in range(3):
            optimizer.zero_grad()
            sum((param * param).sum() for param in params).backward()
            optimizer.step()
    assert same([pair.detach().a, pair.detach().b], [param.detach() for param in plain])


@each_kind
def test_gradients_may_be_of_a_subclass(kind: str) -> None:
    """Their memory is not where that of the subclass seems to be."""

    def train(wrapped: bool) -> list[Tensor]:
        model = make_model()
        optimizer = KINDS[kind](model.parameters())
        for step in range(3):
            for param in model.parameters():
                grad = torch.full_like(param, step + 1.0)
                param.grad = grad.as_subclass(Marked) if wrapped and step else grad
            optimizer.step()
        return [*values(model), *averages(optimizer)]

    class Marked(Tensor):
        pass

    assert same([each.as_subclass(Tensor) for each in train(True)], train(False))


@each_kind
def test_steps_may_be_faked(kind: str) -> None:
    with FakeTensorMode():
        model = nn.Linear(4, 4)
        optimizer = KINDS[kind](model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        assert optimizer.state[model.weight]["average"].shape == model.weight.shape


@each_kind
def test_state_in_float16_goes_the_way_of_the_public_op(kind: str) -> None:
    def train(straight: bool) -> list[Tensor]:
        model = make_model()
        optimizer = KINDS[kind](model.parameters(), rule="fixed", decay=0.5)
        for step in range(4):
            for param in model.parameters():
                param.grad = torch.full_like(param, step + 1.0)
                if step == 2:
                    getattr(optimizer, "flush", lambda: None)()
                    optimizer.state[param]["average"] = optimizer.state[param]["average"].half()
            for sweep in optimizer._sweeps if not straight else ():
                sweep.plain = False
            optimizer.step()
        return [*values(model), *averages(optimizer)]

    assert same(train(straight=True), train(straight=False))
    assert {average.dtype for average in train(straight=True)} == {torch.float32, torch.float16}


@each_kind
def test_a_kept_gradient_may_have_been_converted_with_its_model(kind: str) -> None:
    """``model.double()`` gives ``p.grad``, which is kept, other memory; ``model.float()`` after zero_grad does not."""

    def train_(convert: bool) -> list[Tensor]:
        model = make_model()
        optimizer = KINDS[kind](model.parameters(), scale=1e-3)
        for step in range(4):
            train(model, optimizer, range(step, step + 1))
            if convert and step == 1:
                model.double().zero_grad()
                model.float()
        assert optimizer._sweeps[0].plain
        assert not optimizer._sweeps[0].copies
        return [*values(model), *averages(optimizer)]

    assert same(train_(True), train_(False))


@each_kind
def test_a_parameter_of_another_shape_is_refused(kind: str) -> None:
    """As many elements, which is all that a kernel sees."""
    param = nn.Parameter(torch.rand(2, 3))
    optimizer = KINDS[kind]([param]) if kind == "fused" else BalanceEMA(torch.optim.SGD([param], lr=0.1))
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.zero_grad()
    param.data = param.data.t().contiguous()
    param.grad = torch.ones_like(param)
    with pytest.raises(CitFastError, match=r"has shape \(2, 3\), its parameter \(3, 2\)"):
        optimizer.step()
