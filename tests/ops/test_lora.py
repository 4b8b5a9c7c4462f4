"""The linear layer with a low-rank update against its definition in float64, and against PEFT's arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from cit_fast.errors import ConfigError, DataError
from cit_fast.ops import lora_linear
from cit_fast.ops.lora import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(shape=(3, 7), features=6, out=5, rank=2, *, dtype=torch.float64, adapter=None, bias=True, seed=0):
    """x, W, A, B, bias; all but W with gradients."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size, dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    adapter = adapter or dtype
    x = random(*shape, features, dtype=dtype).requires_grad_()
    weight = random(out, features, dtype=dtype) / features**0.5
    a, b = random(rank, features, dtype=adapter).requires_grad_(), random(out, rank, dtype=adapter).requires_grad_()
    return x, weight, a, b, random(out, dtype=dtype).requires_grad_() if bias else None


def definition(x, weight, a, b, bias, *, scaling=1.0, dropout=0.0):
    rows = x.reshape(-1, x.shape[-1])
    kept = torch.native_dropout(rows, dropout, True)[1] if dropout else None
    y = reference.lora_linear(rows, weight, a, b, bias, scaling, kept, dropout)
    return y.view(*x.shape[:-1], weight.shape[0])


def outputs(function, tensors, gradient, **options):
    torch.manual_seed(5)
    y = function(*tensors, **options)
    wanted = [each for each in tensors if each is not None and each.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, gradient)]


def in_float64(tensors):
    return [each if each is None else each.detach().double().requires_grad_(each.requires_grad) for each in tensors]


def distance(found, right):
    return float((found.double() - right.double()).norm() / right.double().norm().clamp(min=1e-300))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_the_definition(dtype, dropout, bias):
    tensors = make((4, 50), 33, 70, 5, dtype=dtype, bias=bias)
    exact = in_float64(tensors)
    gradient = torch.randn(4, 50, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = outputs(lora_linear, tensors, gradient, scaling=1.7, dropout=dropout)
    right = outputs(definition, exact, gradient.double(), scaling=1.7, dropout=dropout)
    # Three roundings one after the other, each by half a unit of the last place, and sums of 200 terms.
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2 * 200**0.5
    bound = 3 * torch.finfo(dtype).eps / 2 + sums
    for one, other in zip(found, right, strict=True):
        assert one.dtype == dtype
        assert distance(one, other) <= bound


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradcheck(dropout):
    def seeded(*tensors):
        torch.manual_seed(3)
        return lora_linear(*tensors, scaling=0.5, dropout=dropout)

    assert torch.autograd.gradcheck(seeded, make((2, 3)))


@given(
    rows=st.integers(0, 9),
    features=st.integers(1, 9),
    out=st.integers(1, 9),
    rank=st.integers(1, 12),
    wanted=st.tuples(*[st.booleans()] * 4),
)
def test_any_shape_and_any_choice_of_gradients(rows, features, out, rank, wanted):
    x, weight, a, b, bias = make((rows,), features, out, rank)
    for tensor, needs in zip((x, a, b, bias), wanted, strict=True):
        tensor.requires_grad_(needs)
    gradient = torch.ones(rows, out, dtype=torch.float64)
    if not any(wanted):
        assert not lora_linear(x, weight, a, b, bias).requires_grad
        return
    found = outputs(lora_linear, (x, weight, a, b, bias), gradient)
    right = outputs(definition, (x, weight, a, b, bias), gradient)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


def peft_arithmetic(x, weight, a, b, bias, *, scaling):
    """What PEFT's layer computes."""
    result = torch.nn.functional.linear(x, weight, bias)
    inner = torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b)
    return (result + inner * scaling).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_no_larger_than_of_pefts_arithmetic_in_the_same_dtype(dtype):
    errors = {lora_linear: torch.zeros(4), peft_arithmetic: torch.zeros(4)}
    for seed in range(5):
        tensors = make((64,), 96, 80, 8, dtype=dtype, bias=False, seed=seed)
        exact = in_float64(tensors)
        gradient = torch.randn(64, 80, generator=torch.Generator().manual_seed(seed)).to(dtype)
        right = outputs(definition, exact, gradient.double(), scaling=2.0)
        for function in errors:
            found = outputs(function, tensors, gradient, scaling=2.0)
            errors[function] += torch.tensor([distance(one, other) for one, other in zip(found, right, strict=True)])
    assert (errors[lora_linear] <= 1.02 * errors[peft_arithmetic]).all(), errors


def test_factors_in_float32_get_gradients_in_float32():
    tensors = make((40,), 33, 70, 4, dtype=torch.bfloat16, adapter=torch.float32, bias=False)
    found = outputs(lora_linear, tensors, torch.ones(40, 70, dtype=torch.bfloat16))
    assert [each.dtype for each in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_the_generator_decides_what_is_dropped_and_checkpointing_drops_the_same():
    tensors = make((30,), 20, 10, 3)

    def loss():
        torch.manual_seed(7)
        return lora_linear(*tensors, dropout=0.3).square().sum()

    plain = torch.autograd.grad(loss(), [tensors[0], tensors[2]])
    torch.manual_seed(7)
    y = checkpoint(lambda *args: lora_linear(*args, dropout=0.3), *tensors, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum(), [tensors[0], tensors[2]])
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_the_same_call_gives_the_same_bits():
    tensors = make((300,), 64, 48, 8, dtype=torch.bfloat16, adapter=torch.float32)
    gradient = torch.ones(300, 48, dtype=torch.bfloat16)
    for one, other in zip(*(outputs(lora_linear, tensors, gradient) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_to_one_graph(dropout):
    tensors = make((8,), 12, 10, 3, dtype=torch.float32)
    compiled = torch.compile(lambda *args: lora_linear(*args, dropout=dropout), fullgraph=True, backend="aot_eager")
    gradient = torch.ones(8, 10)
    for one, other in zip(
        outputs(compiled, tensors, gradient), outputs(lora_linear, tensors, gradient, dropout=dropout), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_autocast_changes_nothing_inside():
    tensors = make((8,), 12, 10, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_linear(*tensors), lora_linear(*tensors))
        assert lora_linear(*tensors).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 5)}, DataError, r"x \[3, 5\].*expected x \[..., in\]"),
        ({"a": torch.ones(2, 6, dtype=torch.int64)}, DataError, "a is torch.int64"),
        ({"b": torch.ones(5, 3)}, DataError, r"b \[5, 3\]"),
        ({"bias": torch.ones(6)}, DataError, r"bias \[6\]"),
        ({"a": torch.ones(0, 6), "b": torch.ones(5, 0)}, DataError, r"a \[0, 6\]"),
        ({"weight": torch.ones(5, 6, dtype=torch.bfloat16)}, DataError, "weight is torch.bfloat16 and x torch.float32"),
        ({"weight": torch.ones(5, 6, requires_grad=True)}, DataError, "freeze it"),
        ({"a": torch.ones(2, 6, device="meta")}, DataError, "a is on meta and x on cpu"),
        ({"scaling": float("nan")}, ConfigError, "scaling is nan"),
        ({"dropout": 1.0}, ConfigError, "dropout is 1.0"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, weight, a, b, bias = make(dtype=torch.float32)
    arguments = {"x": x, "weight": weight, "a": a, "b": b, "bias": bias, **change}
    with pytest.raises(error, match=message):
        lora_linear(**arguments)
