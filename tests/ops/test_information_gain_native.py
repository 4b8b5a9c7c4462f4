"""The C++ kernels of the information-gain family against the reference in float64, on every instruction set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cit_fast
from cit_fast.errors import BackendError, DataError
from cit_fast.ops import (
    linear_cross_entropy,
    linear_kl_divergence,
    masked_jsd,
    token_gain,
    token_gain_from_statistics,
    token_gain_statistics,
)
from cit_fast.ops.information_gain import TokenGain, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around a group of 16 tokens, a tile of 8 and a chunk of 96 entries, a piece of 960 and of 1920; odd and even widths
# (an odd one has no pairs of bfloat16), below and above 32 columns; rows so wide that fewer make a block, deeper than a
# panel's share of the cache.
SHAPES = [
    (1, 1, 1),
    (3, 7, 5),
    (16, 32, 96),
    (17, 33, 97),
    (37, 70, 1003),
    (33, 2, 1921),
    (70, 64, 961),
    (18, 1430, 131),
]
HEADS: dict[str, dict[str, object]] = {
    "plain": {},
    "bias and scale": {"bias": True, "scale": 0.7},
    "softcap": {"bias": True, "softcap": 3.0, "scale": 1.5},
}


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_head(vocabulary: int, d: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Logits of wide rows no larger than those of narrow ones: saturated probabilities have gradients of rounding."""
    return (make(vocabulary, d, seed=seed) * min(1, (64 / d) ** 0.5)).to(dtype)


def options_of(head: str, vocabulary: int) -> dict[str, object]:
    options = {"bias": None, "softcap": None, "scale": 1.0, **HEADS[head]}
    if options["bias"]:
        options["bias"] = make(vocabulary, seed=9)
    return options


def double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def logit_error(hidden: Tensor, weight: Tensor, scale: float) -> float:
    """How far float32 may be from the exact logit: two roundings per term of the product, at worst."""
    size = (hidden.double().norm(dim=1).max() * weight.double().norm(dim=1).max()) if hidden.numel() else 0
    return 2 * 2**-24 * math.sqrt(weight.shape[1]) * (1 + float(size)) * abs(scale) + 1e-6


def close(value: Tensor, exact: Tensor, bound: float, name: str) -> None:
    assert value.shape == exact.shape
    assert (value.double() - exact).abs().max() <= bound, f"{name}: {(value.double() - exact).abs().max()} > {bound}"


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "d", "vocabulary"), SHAPES)
def test_token_gain(tokens: int, d: int, vocabulary: int, dtype: torch.dtype, head: str) -> None:
    full, masked = make(tokens, d, seed=1, dtype=dtype), make(tokens, d, seed=2, dtype=dtype)
    weight, options = make_head(vocabulary, d, 3, dtype), options_of(head, vocabulary)
    targets = (torch.arange(tokens) * 7) % vocabulary
    with cit_fast.backend("native"):
        gain = token_gain(full, masked, weight, targets, **options)
    exact = reference.token_gain(
        *(full.double(), masked.double(), weight.double(), targets, double(options["bias"])),
        reference.LogitOptions(options["softcap"], options["scale"]),
    )
    bound = 4 * max(logit_error(each, weight, options["scale"]) for each in (full, masked))
    for name, value, right in zip(TokenGain._fields, gain, exact, strict=True):
        # A divergence weighs errors with log-ratios, an entropy with logarithms.
        close(value, right, bound * (1 if "prob" in name else 1 + float(right.abs().max())), name)


DIVERGENCES = {"jsd": masked_jsd, "kl": linear_kl_divergence, "kl of the rest": linear_kl_divergence}


def gradients_of(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [each for each in inputs if each is not None]))


def close_gradients(got: list[Tensor], exact: list[Tensor], bound: float) -> None:
    for value, right in zip(got, exact, strict=True):
        assert value.dtype in DTYPES
        unit = max(torch.finfo(value.dtype).eps, bound)
        close(value, right, unit * float(right.abs().max()) + 1e-9, f"gradient {list(right.shape)} {value.dtype}")


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "d", "vocabulary"), SHAPES)
@pytest.mark.parametrize("shared", [True, False], ids=["one head", "two heads"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(
    tokens: int, d: int, vocabulary: int, dtype: torch.dtype, head: str, shared: bool, divergence: str
) -> None:
    options = options_of(head, vocabulary)
    bias = options.pop("bias")
    live, weight = make(tokens, d, seed=1, dtype=dtype), make_head(vocabulary, d, 3, dtype)
    frozen = make(tokens, d if shared else d + 3, seed=2, dtype=dtype)
    weight_frozen = weight if shared else make_head(vocabulary, d + 3, 4, dtype)
    temperature = 1 + torch.rand(tokens, generator=torch.Generator().manual_seed(0))
    row_weight = torch.rand(tokens, generator=torch.Generator().manual_seed(1))

    def run(convert: Callable[[object], object]) -> tuple[Tensor, list[Tensor]]:
        inputs = [None if x is None else convert(x).detach().requires_grad_() for x in (live, weight, bias)]
        rest = [convert(x).detach() for x in (frozen, weight_frozen, temperature, row_weight)]
        more = {**options, "bias_live": inputs[2]}
        if divergence == "kl of the rest":
            more["targets"] = (torch.arange(tokens) * 7) % vocabulary
        loss = DIVERGENCES[divergence](inputs[0], rest[0], inputs[1], rest[1], *rest[2:], **more)
        return loss, gradients_of(loss, *inputs)

    with cit_fast.backend("native"):
        loss, gradients = run(lambda x: x.clone())
    exact, exact_gradients = run(double)
    bound = 16 * (logit_error(live, weight, options["scale"]) + logit_error(frozen, weight_frozen, options["scale"]))
    close(loss, exact.detach(), bound * tokens, "loss")
    close_gradients(gradients, exact_gradients, bound)


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "d", "vocabulary"), SHAPES)
@pytest.mark.parametrize("gate", [0.0, 1.5])
def test_linear_cross_entropy(tokens: int, d: int, vocabulary: int, dtype: torch.dtype, head: str, gate: float) -> None:
    options = options_of(head, vocabulary)
    bias = options.pop("bias")
    hidden, weight = make(tokens, d, seed=1, dtype=dtype), make_head(vocabulary, d, 3, dtype)
    targets = (torch.arange(tokens) * 7) % vocabulary
    row_weight = torch.rand(tokens, generator=torch.Generator().manual_seed(1))

    def run(convert: Callable[[object], object]) -> tuple[Tensor, list[Tensor]]:
        inputs = [None if x is None else convert(x).detach().requires_grad_() for x in (hidden, weight, bias)]
        loss = linear_cross_entropy(
            *inputs[:2], targets, convert(row_weight).detach(), bias=inputs[2], entropy_gate=gate, **options
        )
        return loss, gradients_of(loss, *inputs)

    with cit_fast.backend("native"):
        loss, gradients = run(lambda x: x.clone())
    exact, exact_gradients = run(double)
    bound = 16 * logit_error(hidden, weight, options["scale"]) * (1 + gate)
    close(loss, exact.detach(), bound * tokens, "loss")
    close_gradients(gradients, exact_gradients, bound)


@settings(max_examples=30)
@given(
    tokens=st.integers(1, 40),
    d=st.integers(1, 50),
    vocabulary=st.integers(1, 300),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_what_must_hold_whatever_the_input(tokens: int, d: int, vocabulary: int, size: float, seed: int) -> None:
    full, masked, weight = (make(*s, seed=seed + i) for i, s in enumerate(((tokens, d), (tokens, d), (vocabulary, d))))
    full, targets = full * size, torch.arange(tokens) % vocabulary
    gain = token_gain(full, masked, weight, targets)
    assert (gain.log_prob_full <= 0).all()
    assert (gain.probability_gain.abs() <= 1).all()
    assert (gain.entropy_full >= 0).all()
    assert (gain.entropy_full <= math.log(vocabulary) + 1e-5).all()
    assert (gain.kl_full_masked >= 0).all()
    swapped = token_gain(masked, full, weight, targets)
    assert torch.equal(gain.kl_full_masked, swapped.kl_masked_full)
    assert torch.equal(gain.probability_gain, -swapped.probability_gain)
    loss = linear_cross_entropy(full, weight, targets).item()
    assert loss == pytest.approx(-gain.log_prob_full.mean().item(), rel=1e-5, abs=1e-5 * size)
    jsd = masked_jsd(full, masked, weight, weight, 1.5).item()
    assert -1e-6 <= jsd <= 1 + 1e-6
    assert jsd == pytest.approx(masked_jsd(masked, full, weight, weight, 1.5).item(), abs=1e-5)
    kl = linear_kl_divergence(masked, full, weight, weight).item()
    assert kl == pytest.approx(gain.kl_full_masked.mean().item(), rel=1e-5, abs=1e-5 * size)
    assert linear_kl_divergence(masked, full, weight, weight, targets=targets).item() >= -1e-5 * size


# --- the same bits whatever the number of threads, the neighbours and the memory ---


def everything(tokens: int, dtype: torch.dtype, take: slice = slice(None)) -> list[Tensor]:
    d, vocabulary = 64, 2500
    full, masked, weight = (
        make(*s, seed=i, dtype=dtype) for i, s in enumerate(((tokens, d), (tokens, d), (vocabulary, d)))
    )
    full, masked = full[take], masked[take]
    targets = (torch.arange(tokens) * 31 % vocabulary)[take]
    out = [*token_gain(full, masked, weight, targets)]
    row_weight = torch.ones(len(full))
    for loss_of in (
        lambda hidden, head: masked_jsd(hidden, masked, head, weight, 1.5, row_weight),
        lambda hidden, head: linear_cross_entropy(hidden, head, targets, row_weight),
        lambda hidden, head: linear_kl_divergence(hidden, masked, head, weight, 1.5, row_weight, targets),
    ):
        inputs = [each.clone().requires_grad_() for each in (full, weight)]
        loss = loss_of(*inputs)
        out += [loss.detach(), *torch.autograd.grad(loss, inputs)]
        out += torch.autograd.grad(loss_of(inputs[0], weight), inputs[:1])
    return out


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, with_threads: Callable[[int], None]) -> None:
    with_threads(1)
    one = everything(150, dtype)
    for threads in (2, 5):
        with_threads(threads)
        for value, right in zip(everything(150, dtype), one, strict=True):
            assert torch.equal(value, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_token_do_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    together, alone = everything(150, dtype), everything(150, dtype, slice(37, 60))
    for index in (*range(7), 8 + 2, 12 + 2, 16 + 2):  # what belongs to a token: gains, gradients of hidden states
        assert torch.equal(together[index][37:60], alone[index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["jsd", "kl", "cross-entropy"])
def test_each_gradient_alone_is_the_one_among_others(loss: str, dtype: torch.dtype) -> None:
    # What else is wanted decides how many tokens make a chunk.
    tokens, d, vocabulary = 50, 40, 2100
    values = [make(*s, seed=i, dtype=dtype) for i, s in enumerate(((tokens, d), (vocabulary, d), (vocabulary,)))]
    frozen, targets = make(tokens, d, seed=5, dtype=dtype), torch.arange(tokens) * 41

    def gradients(*wanted: bool) -> list[Tensor]:
        hidden, weight, bias = (x.clone().requires_grad_(y) for x, y in zip(values, wanted, strict=True))
        with cit_fast.backend("native"):
            if loss == "jsd":
                out = masked_jsd(hidden, frozen, weight, values[1], 1.5, bias_live=bias, softcap=5.0)
            elif loss == "kl":
                out = linear_kl_divergence(
                    hidden, frozen, weight, values[1], 1.5, targets=targets, bias_live=bias, softcap=5.0
                )
            else:
                out = linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=5.0)
        return list(torch.autograd.grad(out, [x for x in (hidden, weight, bias) if x.requires_grad]))

    together = gradients(True, True, True)
    for wanted in itertools.product((True, False), repeat=3):
        if any(wanted):
            right = [x for x, y in zip(together, wanted, strict=True) if y]
            torch.testing.assert_close(gradients(*wanted), right, rtol=1e-5, atol=1e-9 if dtype == torch.float32 else 0)


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    weight = make(7, 3, dtype=dtype).requires_grad_()
    hidden = make(0, 3, dtype=dtype).requires_grad_()
    none = torch.empty(0)
    with cit_fast.backend("native"):
        gain = token_gain(hidden, hidden, weight, none.long())
        loss = masked_jsd(hidden, hidden, weight, weight, 1.5, none)
        loss = loss + linear_cross_entropy(hidden, weight, none.long(), none)
        loss = loss + linear_kl_divergence(hidden, hidden, weight, weight, 1.5, none, none.long())
    loss.backward()
    assert [each.shape for each in gain] == [(0,)] * 7
    assert loss == 0
    assert hidden.grad.shape == (0, 3)
    assert (weight.grad == 0).all()


def test_rows_and_heads_of_any_stride() -> None:
    tokens, d, vocabulary = 20, 24, 130
    for dtype in DTYPES:
        full, masked, weight = (
            make(*s, seed=i, dtype=dtype) for i, s in enumerate(((tokens, d), (tokens, d), (vocabulary, d)))
        )
        targets = torch.arange(2 * tokens, dtype=torch.int32)[::2]
        wide = torch.full((vocabulary, d + 5), math.nan, dtype=dtype)
        wide[:, :d] = weight
        odd = torch.full((vocabulary * (d + 1),), math.nan, dtype=dtype)[1:]  # rows that start at odd addresses
        odd = odd.as_strided((vocabulary, d), (d, 1))
        odd.copy_(weight)
        with cit_fast.backend("native"):
            plain = token_gain(full, masked, weight, targets.long())
            for head in (wide[:, :d], odd):
                for value, right in zip(token_gain(full.T.contiguous().T, masked, head, targets), plain, strict=True):
                    torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)
            expanded = token_gain(full[:1].expand(tokens, d), masked, weight, targets)
            assert torch.equal(expanded.log_prob_full[0], plain.log_prob_full[0])


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    full, weight = make(3, 4), make(4, 7)
    targets = torch.arange(3)
    token_gain(full, full, weight.T, targets)
    with cit_fast.backend("native"):
        with pytest.raises(BackendError, match="do not lie side by side"):
            token_gain(full, full, weight.T, targets)
        with pytest.raises(BackendError, match="it takes no float64"):
            linear_cross_entropy(full.double(), weight.T.contiguous().double(), targets)


# --- extreme values ---


@pytest.mark.usefixtures("simd")
def test_extreme_logits() -> None:
    full, weight = torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [-1.0]])
    with cit_fast.backend("native"):
        gain = token_gain(full, -full, weight, torch.tensor([0, 0]))
        assert gain.probability_gain.tolist() == [1.0, -1.0]
        assert gain.kl_full_masked.tolist() == [2e4, 2e4]
        assert gain.log_prob_full.tolist() == [0.0, -2e4]
        assert masked_jsd(full, -full, weight, weight, 1.0).item() == 1.0
        assert linear_kl_divergence(full, -full, weight, weight).item() == 2e4
        assert linear_kl_divergence(full, -full, weight, weight, targets=torch.tensor([0, 1])).item() == 0
        assert linear_cross_entropy(full, weight, torch.tensor([0, 0])).item() == 1e4
        huge = token_gain(full * 1e30, full, weight, torch.tensor([0, 1]))
        assert huge.log_prob_full.tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("simd")
def test_a_bias_of_minus_infinity_takes_tokens_out() -> None:
    full, masked, weight = make(18, 6), make(18, 6, seed=1), make(2100, 6)
    bias = torch.full((2100,), -math.inf)
    bias[[3, 100, 2000]] = torch.tensor([0.0, 1.0, -1.0])
    few, few_bias = weight[[3, 100, 2000]].contiguous(), bias[[3, 100, 2000]]
    targets = torch.arange(18) % 3
    with cit_fast.backend("native"):
        gain = token_gain(full, masked, weight, torch.tensor([3, 100, 2000])[targets], bias=bias)
        for value, right in zip(gain, token_gain(full, masked, few, targets, bias=few_bias), strict=True):
            torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)
        for loss_of in (
            lambda hidden, head, bias, index: masked_jsd(
                hidden, masked, head, head.detach(), 1.5, bias_live=bias, bias_frozen=bias
            ),
            lambda hidden, head, bias, index: linear_kl_divergence(
                hidden, masked, head, head.detach(), 1.5, targets=index[targets], bias_live=bias, bias_frozen=bias
            ),
            lambda hidden, head, bias, index: linear_cross_entropy(hidden, head, index[targets], bias=bias),
        ):
            grads = []
            for head, b, index in ((weight, bias, torch.tensor([3, 100, 2000])), (few, few_bias, torch.arange(3))):
                inputs = [full.clone().requires_grad_(), head.clone().requires_grad_()]
                loss = loss_of(*inputs, b, index)
                grads.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
            torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(grads[0][2][[3, 100, 2000]], grads[1][2], rtol=1e-4, atol=1e-6)
            assert grads[0][2].count_nonzero(dim=1).count_nonzero() == 3


@pytest.mark.usefixtures("simd")
def test_nan_is_seen() -> None:
    full, masked, weight = make(40, 6), make(40, 6, seed=1), make(200, 6)
    full[17, 2] = math.nan
    with cit_fast.backend("native"):
        gain = token_gain(full, masked, weight, torch.arange(40))
        assert gain.entropy_full.isnan().nonzero().flatten().tolist() == [17]
        assert gain.log_prob_full.isnan().nonzero().flatten().tolist() == [17]
        assert not gain.log_prob_masked.isnan().any()
        for loss in (
            masked_jsd(full, masked, weight, weight, 1.5),
            linear_kl_divergence(full, masked, weight, weight),
            linear_kl_divergence(full, masked, weight, weight, targets=torch.arange(40)),
            linear_cross_entropy(full, weight, torch.arange(40)),
        ):
            assert loss.isnan()


@pytest.mark.usefixtures("simd")
def test_padding_may_hold_anything() -> None:
    hidden, frozen, weight = make(40, 6), make(40, 6, seed=1), make(200, 6)
    kept = torch.ones(40)
    kept[[3, 20, 39]] = 0
    targets = torch.arange(40)
    with cit_fast.backend("native"):
        for dirty in (False, True):
            if dirty:
                hidden[kept == 0], frozen[kept == 0] = math.nan, math.inf
                targets[kept == 0] = -100
            inputs = hidden.clone().requires_grad_()
            sides = inputs, frozen, weight, weight, torch.where(kept == 0, math.nan if dirty else 1.0, 1.5), kept
            loss = linear_cross_entropy(inputs, weight, targets, kept) + masked_jsd(*sides)
            loss = loss + linear_kl_divergence(*sides, targets)
            got = (loss.detach(), *torch.autograd.grad(loss, inputs))
            if not dirty:
                clean = got
        assert all(torch.equal(x, y) for x, y in zip(got, clean, strict=True))
        assert (got[1][kept == 0] == 0).all()


# --- pieces of a vocabulary ---


@pytest.mark.parametrize("forced_backend", ["native", "reference"])
@pytest.mark.parametrize("head", HEADS)
def test_pieces_of_the_vocabulary_merge_to_the_whole(head: str, forced_backend: str) -> None:
    full, masked, weight = (make(*s, seed=i) for i, s in enumerate(((19, 6), (19, 6), (2500, 6))))
    options = options_of(head, 2500)
    bias = options.pop("bias")
    targets = torch.arange(19) * 131
    with cit_fast.backend(forced_backend):
        whole = token_gain(full, masked, weight, targets, bias=bias, **options)
        for bounds in ([0, 2500], [0, 1, 2500], [0, 700, 701, 1900, 2500]):
            pieces = [
                token_gain_statistics(
                    *(full, masked, weight[start:end], targets, start),
                    bias=None if bias is None else bias[start:end],
                    **options,
                )
                for start, end in itertools.pairwise(bounds)
            ]
            for order in (pieces, pieces[::-1]):
                merged = token_gain_from_statistics(torch.stack(order))
                for name, value, right in zip(TokenGain._fields, merged, whole, strict=True):
                    assert value.dtype == torch.float64
                    torch.testing.assert_close(value.float(), right, rtol=2e-5, atol=2e-6, msg=name)


def test_pieces_without_a_finite_logit_and_without_tokens() -> None:
    full, weight = make(5, 3), make(8, 3)
    bias = torch.tensor([0.0] * 4 + [-math.inf] * 4)
    pieces = [
        token_gain_statistics(full, full, weight[a:b], torch.arange(4).repeat(2)[:5], a, bias=bias[a:b])
        for a, b in ((0, 4), (4, 8))
    ]
    merged = token_gain_from_statistics(torch.stack(pieces))
    whole = token_gain(full, full, weight[:4].contiguous(), torch.arange(4).repeat(2)[:5])
    for value, right in zip(merged, whole, strict=True):
        torch.testing.assert_close(value.float(), right, rtol=1e-5, atol=1e-6)
    empty = token_gain_statistics(full[:0], full[:0], weight, torch.arange(0))
    assert empty.shape == (10, 0)
    assert [each.shape for each in token_gain_from_statistics(empty[None])] == [(0,)] * 7


def test_statistics_of_another_shape_are_refused() -> None:
    for wrong in (torch.zeros(10, 4), torch.zeros(2, 9, 4), torch.zeros(0, 10, 4)):
        with pytest.raises(DataError, match=r"expected \[pieces, 10, T\]"):
            token_gain_from_statistics(wrong.double())
    with pytest.raises(DataError, match=r"torch.float32; expected float64"):
        token_gain_from_statistics(torch.zeros(1, 10, 4))
