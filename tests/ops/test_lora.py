"""The linear layer with a low-rank update against its definition in float64, and against PEFT's arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from cit_fast.errors import ConfigError, DataError
from cit_fast.ops import lora_linear, lora_linears
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


# -- layers that read the same input -----------------------------------------------------------------------------------


def several(dtype=torch.float64, adapter=None, bias=True, shape=(4, 9), features=33):
    """x, and of three layers W, A, B and bias, of other widths and ranks."""
    layers = [
        make((1,), features, out, rank, dtype=dtype, adapter=adapter, bias=bias, seed=out)[1:]
        for out, rank in ((17, 3), (40, 1), (5, 7))
    ]
    x = make(shape, features, dtype=dtype, seed=1)[0]
    return x, *(list(each) for each in zip(*layers, strict=True))


SCALINGS = (0.5, 2.0, 1.25)


def together_and_apart(x, weights, a, b, biases, used=(0, 1, 2)):
    """Outputs and gradients of :func:`lora_linears`, and of the definition for one layer after the other."""
    wanted = [x, *a, *b, *(each for each in biases if each is not None)]
    generator = torch.Generator().manual_seed(2)
    ups = [torch.randn(*x.shape[:-1], len(weight), generator=generator).to(x.dtype) for weight in weights]

    def results(ys, x, wanted, dtype):
        pairs = [(ys[k], ups[k].to(dtype)) for k in used]
        found = torch.autograd.grad([y for y, _ in pairs], wanted, [up for _, up in pairs], allow_unused=True)
        return [*(y.detach() for y in ys), *found]

    ours = results(lora_linears(x, weights, a, b, biases, scalings=SCALINGS), x, wanted, x.dtype)
    exact = [in_float64(each) for each in ([x], weights, a, b, biases)]
    ys = [
        definition(exact[0][0], *layer, scaling=scaling) for *layer, scaling in zip(*exact[1:], SCALINGS, strict=True)
    ]
    wanted = [exact[0][0], *exact[2], *exact[3], *(each for each in exact[4] if each is not None)]
    return ours, results(ys, exact[0][0], wanted, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_together_give_what_the_definition_gives_of_each(dtype, bias):
    ours, right = together_and_apart(*several(dtype, bias=bias))
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2 * 200**0.5
    bound = 4 * torch.finfo(dtype).eps / 2 + sums  # the sum over the layers rounds as often as autograd's
    for one, other in zip(ours, right, strict=True):
        assert one.dtype == dtype
        assert distance(one, other) <= bound


@pytest.mark.parametrize("used", [(0,), (2,), (0, 2), (1, 2)])
def test_a_layer_whose_output_nobody_uses_gets_no_gradient(used):
    ours, right = together_and_apart(*several(), used=used)
    for one, other in zip(ours, right, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@given(wanted=st.lists(st.booleans(), min_size=10, max_size=10), rows=st.integers(0, 3))
def test_any_choice_of_gradients_of_layers_together(wanted, rows):
    x, weights, a, b, biases = several(shape=(rows,), features=4)
    tensors = [x, *a, *b, *biases]
    for tensor, needs in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(needs)
    ys = lora_linears(x, weights, a, b, biases, scalings=SCALINGS)
    right = [lora_linear(x, *layer, scaling=s) for *layer, s in zip(weights, a, b, biases, SCALINGS, strict=True)]
    if any(wanted):
        chosen = [tensor for tensor in tensors if tensor.requires_grad]
        sums = [sum(y.square().sum() for y in some) for some in (ys, right)]
        found, expected = (torch.autograd.grad(total, chosen, allow_unused=True) for total in sums)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    for one, other in zip(ys, right, strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck_of_layers_together():
    x, weights, a, b, biases = several(shape=(3,), features=4)

    def function(x, *tensors):
        return lora_linears(x, weights, tensors[:3], tensors[3:6], tensors[6:], scalings=SCALINGS)

    assert torch.autograd.gradcheck(function, (x, *a, *b, *biases))


def test_layers_together_err_no_more_than_pefts_arithmetic_one_after_the_other():
    errors = {"together": torch.zeros(3), "peft": torch.zeros(3)}
    for seed in range(6):
        torch.manual_seed(seed)
        x, weights, a, b, biases = several(torch.bfloat16, bias=False, shape=(64,), features=64 + seed)
        gradients = [torch.randn(64, len(weight)).bfloat16() for weight in weights]

        def found(ys, x, a, b, gradients=gradients):
            """Gradients of x, of every A and of every B."""
            grads = torch.autograd.grad(ys, [x, *a, *b], [each.to(x.dtype) for each in gradients])
            return [torch.cat([each.flatten() for each in some]) for some in (grads[:1], grads[1:4], grads[4:])]

        exact_x, exact = in_float64([x])[0], [in_float64(each) for each in (weights, a, b)]
        layers = zip(*exact, SCALINGS, strict=True)
        right = found([definition(exact_x, *each, None, scaling=s) for *each, s in layers], exact_x, *exact[1:])
        ours = lora_linears(x, weights, a, b, scalings=SCALINGS)
        layers = zip(weights, a, b, biases, SCALINGS, strict=True)
        theirs = [peft_arithmetic(x, *layer, scaling=s) for *layer, s in layers]
        for name, ys in (("together", ours), ("peft", theirs)):
            errors[name] += torch.tensor([distance(*pair) for pair in zip(found(ys, x, a, b), right, strict=True)])
    assert (errors["together"] <= 1.02 * errors["peft"]).all(), errors


def test_layers_that_do_not_fit_each_other_are_named():
    x, weights, a, b, biases = several()
    with pytest.raises(DataError, match="3, 3, 3, 3, 2 weights, A, B, biases, scalings; expected as many of each"):
        lora_linears(x, weights, a, b, biases, scalings=(1.0, 2.0))
    with pytest.raises(DataError, match="at least 1"):
        lora_linears(x, [], [], [], scalings=())
    with pytest.raises(DataError, match=r"A and B are torch.float32, torch.float64; expected one dtype"):
        lora_linears(x, weights, [a[0].detach().float(), *a[1:]], b, scalings=SCALINGS)
    with pytest.raises(DataError, match=r"expected x \[..., in\]"):
        lora_linears(x, weights, [a[1], a[0], a[2]], b, scalings=SCALINGS)
