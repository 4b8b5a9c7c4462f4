"""token_gain, key_part_information_gain and masked_jsd against the equations of KPIG, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toy_heads import HEADS, TOLERANCES, head_options, make, naive_logits, two_words

import cit_fast
from cit_fast.errors import CitFastError
from cit_fast.ops.information_gain import (
    TokenGain,
    key_part_information_gain,
    linear_cross_entropy,
    masked_jsd,
    token_gain,
)

# --- token_gain ---


def test_token_gain_by_hand() -> None:
    full, masked, weight = two_words()
    gain = token_gain(full, masked, weight, torch.tensor([1]))
    expected = TokenGain(
        log_prob_full=math.log(3 / 4),
        log_prob_masked=math.log(1 / 2),
        probability_gain=1 / 4,
        entropy_full=-(1 / 4 * math.log(1 / 4) + 3 / 4 * math.log(3 / 4)),
        entropy_masked=math.log(2),
        kl_full_masked=1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2),
        kl_masked_full=1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3),
    )
    for name, value in zip(TokenGain._fields, gain, strict=True):
        assert value.shape == (1,)
        assert value.item() == pytest.approx(getattr(expected, name), abs=1e-15), name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("tokens", "d", "vocabulary"), [(9, 5, 41), (1, 1, 2), (33, 16, 341)])
def test_token_gain_equals_the_equations(tokens: int, d: int, vocabulary: int, dtype: torch.dtype, head: str) -> None:
    full, masked = make(tokens, d, seed=1, dtype=dtype), make(tokens, d, seed=2, dtype=dtype)
    weight, options = make(vocabulary, d, seed=3, dtype=dtype), head_options(head, vocabulary, dtype)
    targets = torch.arange(tokens) % vocabulary
    gain = token_gain(full, masked, weight, targets, **options)

    log_p = naive_logits(full, weight, **options).log_softmax(1)
    log_q = naive_logits(masked, weight, **options).log_softmax(1)
    p, q, rows = log_p.exp(), log_q.exp(), torch.arange(tokens)
    expected = (
        log_p[rows, targets],
        log_q[rows, targets],
        p[rows, targets] - q[rows, targets],
        -(p * log_p).sum(1),
        -(q * log_q).sum(1),
        (p * (log_p - log_q)).sum(1),
        (q * (log_q - log_p)).sum(1),
    )
    assert {each.dtype for each in gain} == {torch.float64 if dtype == torch.float64 else torch.float32}
    for name, value, right in zip(TokenGain._fields, gain, expected, strict=True):
        scale = 1 if name == "probability_gain" else 1 + right.abs().max()
        assert (value - right).abs().max() <= TOLERANCES[dtype] * scale, name


def test_token_gain_of_equal_contexts_is_nothing() -> None:
    hidden, weight = make(7, 4, dtype=torch.float32), make(11, 4, dtype=torch.float32)
    gain = token_gain(hidden, hidden, weight, torch.arange(7))
    assert (gain.probability_gain == 0).all()
    assert (gain.kl_full_masked == 0).all()
    assert (gain.kl_masked_full == 0).all()


def test_token_gain_survives_extreme_logits() -> None:
    full = torch.tensor([[1e4], [-1e4]])
    gain = token_gain(full, -full, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    assert gain.probability_gain.tolist() == [1.0, -1.0]
    assert gain.entropy_full.tolist() == [0.0, 0.0]
    assert gain.kl_full_masked.tolist() == [4e4 / 2 * 1, 4e4 / 2 * 1]


def test_token_gain_takes_no_tokens_int32_targets_and_strides() -> None:
    weight = make(11, 4)
    empty = token_gain(make(0, 4), make(0, 4), weight, torch.empty(0, dtype=torch.int64))
    assert [each.shape for each in empty] == [(0,)] * 7
    full, masked = make(4, 7), make(4, 7, seed=1)
    targets = torch.arange(14, dtype=torch.int32)[::2] % 11
    strided = token_gain(full.T, masked.T, weight.T.contiguous().T, targets)
    plain = token_gain(full.T.contiguous(), masked.T.contiguous(), weight, targets.long())
    torch.testing.assert_close(strided, plain, rtol=1e-13, atol=1e-13)


def test_padded_and_packed_give_the_same_gain() -> None:
    lengths, d, vocabulary = [3, 1, 5], 4, 13
    padded_full, padded_masked = make(3, 5, d), make(3, 5, d, seed=1)
    targets, weight = torch.arange(15).reshape(3, 5) % vocabulary, make(vocabulary, d)
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    offsets = torch.tensor([0, 3, 4, 9])
    packed = token_gain(padded_full[mask], padded_masked[mask], weight, targets[mask])
    together = key_part_information_gain(packed, offsets)
    for row, length in enumerate(lengths):
        alone = token_gain(padded_full[row, :length], padded_masked[row, :length], weight, targets[row, :length])
        one = key_part_information_gain(alone, torch.tensor([0, length]))
        torch.testing.assert_close(one[0], together[row], rtol=1e-13, atol=1e-15)


def test_token_gain_has_no_gradient_and_says_so() -> None:
    hidden = make(3, 4).requires_grad_()
    gain = token_gain(hidden, make(3, 4), make(5, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(CitFastError, match=r"token_gain is for scoring and has no gradient"):
        gain.probability_gain.sum().backward()
    with torch.no_grad():
        assert not token_gain(hidden, make(3, 4), make(5, 4), torch.tensor([0, 1, 2]))[0].requires_grad


def test_autocast_does_not_lower_the_precision() -> None:
    full, masked, weight = (make(*shape, dtype=torch.float32) for shape in ((9, 32), (9, 32), (41, 32)))
    targets = torch.arange(9)
    plain, plain_loss = token_gain(full, masked, weight, targets), masked_jsd(full, masked, weight, weight, 1.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(token_gain(full, masked, weight, targets), plain, rtol=0, atol=0)
        assert torch.equal(masked_jsd(full, masked, weight, weight, 1.5), plain_loss)


# --- key_part_information_gain ---


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_information_gain_by_hand(index_dtype: torch.dtype) -> None:
    gains = torch.tensor([0.5, -0.25, 1.0, 0.125], dtype=torch.float64)
    out = key_part_information_gain(gains, torch.tensor([0, 3, 4], dtype=index_dtype), alpha=0.3)
    by_hand = [0.3 * 0.5 - 0.09 * 0.25 + 0.027, 0.3 * 0.125]
    assert out.tolist() == pytest.approx(by_hand, abs=1e-16)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    alpha=st.floats(0.01, 1.0),
    seed=st.integers(0, 100),
)
def test_information_gain_equals_the_sum(lengths: list[int], alpha: float, seed: int) -> None:
    gains = make(sum(lengths), seed=seed).clamp(-1, 1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    out = key_part_information_gain(gains, offsets, alpha)
    for example, part in enumerate(gains.split(lengths)):
        expected = sum(alpha**k * gain for k, gain in enumerate(part.tolist(), start=1))
        assert out[example].item() == pytest.approx(expected, abs=1e-13)


def test_information_gain_of_a_long_answer_and_of_half_precision() -> None:
    assert key_part_information_gain(torch.ones(100_000), torch.tensor([0, 100_000])).item() == pytest.approx(3 / 7)
    half = key_part_information_gain(torch.ones(3, dtype=torch.bfloat16), torch.tensor([0, 3]))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(0.3 + 0.09 + 0.027)


def test_information_gain_of_no_examples() -> None:
    assert key_part_information_gain(torch.empty(0), torch.tensor([0])).shape == (0,)


def test_information_gain_gradient() -> None:
    offsets = torch.tensor([0, 2, 3, 7])
    gains = make(7).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: key_part_information_gain(each, offsets, 0.7), gains)


# --- masked_jsd ---


def naive_jsd(live_logits: Tensor, frozen_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Base-2 Jensen-Shannon divergence per row, as METHODS states it: entropy of the mean less the mean entropy."""
    beta = torch.as_tensor(temperature, dtype=torch.float64)
    p, q = ((logits / (beta[:, None] if beta.dim() else beta)).softmax(1) for logits in (live_logits, frozen_logits))

    def entropy(each: Tensor) -> Tensor:
        return -(each * each.log2()).sum(1)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def test_jsd_by_hand() -> None:
    live, frozen, weight = two_words()
    # p = (1/4, 3/4), q = (1/2, 1/2), m = (3/8, 5/8), in bits.
    kl_pm = 1 / 4 * math.log2(2 / 3) + 3 / 4 * math.log2(6 / 5)
    kl_qm = 1 / 2 * math.log2(4 / 3) + 1 / 2 * math.log2(4 / 5)
    assert masked_jsd(live, frozen, weight, weight, 1.0).item() == pytest.approx((kl_pm + kl_qm) / 2, abs=1e-15)
    # Temperature log 3 / log 2 turns the logit log 3 into log 2, and p into (1/3, 2/3).
    kl_pm = 1 / 3 * math.log2(4 / 5) + 2 / 3 * math.log2(8 / 7)
    kl_qm = 1 / 2 * math.log2(6 / 5) + 1 / 2 * math.log2(6 / 7)
    cooler = masked_jsd(live, frozen, weight, weight, math.log(3) / math.log(2))
    assert cooler.item() == pytest.approx((kl_pm + kl_qm) / 2, abs=1e-15)


@pytest.mark.parametrize("head", HEADS)
def test_jsd_and_gradients_equal_autograd_through_the_equation(head: str) -> None:
    tokens, vocabulary = 9, 41
    live, frozen = make(tokens, 5, seed=1).requires_grad_(), make(tokens, 7, seed=2)
    weight, weight_frozen = make(vocabulary, 5, seed=3).requires_grad_(), make(vocabulary, 7, seed=4)
    options = head_options(head, vocabulary)
    bias = options.pop("bias")
    bias_frozen = None if bias is None else make(vocabulary, seed=5)
    wanted = [live, weight] if bias is None else [live, weight, bias.requires_grad_()]
    temperature = 2 - torch.rand(tokens, dtype=torch.float64)
    row_weight = torch.rand(tokens, dtype=torch.float64)
    loss = masked_jsd(
        live, frozen, weight, weight_frozen, temperature, row_weight, bias_live=bias, bias_frozen=bias_frozen, **options
    )
    rows = naive_jsd(
        naive_logits(live, weight, bias, **options),
        naive_logits(frozen, weight_frozen, bias_frozen, **options),
        temperature,
    )
    expected = (row_weight * rows).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    got, right = torch.autograd.grad(3 * loss, wanted), torch.autograd.grad(3 * expected, wanted)
    torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("head", HEADS)
def test_jsd_gradcheck(head: str) -> None:
    frozen, weight_frozen = make(4, 3, seed=2), make(6, 3, seed=4)
    options = head_options(head, 6)
    bias = options.pop("bias")
    inputs = [make(4, 3, seed=1).requires_grad_(), make(6, 3, seed=3).requires_grad_()]
    if bias is not None:
        inputs.append(bias.requires_grad_())
    temperature = torch.tensor([1.0, 1.2, 1.7, 2.0], dtype=torch.float64)

    def loss(live: Tensor, weight: Tensor, bias_live: Tensor | None = None) -> Tensor:
        return masked_jsd(live, frozen, weight, weight_frozen, temperature, bias_live=bias_live, **options)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_jsd_in_lower_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    live, frozen, weight = (make(*shape, seed=i, dtype=dtype) for i, shape in enumerate(((9, 5), (9, 5), (41, 5))))
    live.requires_grad_()
    weight.requires_grad_()
    loss = masked_jsd(live, frozen, weight, weight, 1.5)
    loss.backward()
    double = [each.detach().double().requires_grad_() for each in (live, weight)]
    exact = masked_jsd(double[0], frozen.double(), double[1], weight.detach().double(), 1.5)
    exact.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) <= TOLERANCES[dtype]
    for low, high in ((live, double[0]), (weight, double[1])):
        assert low.grad.dtype == dtype
        unit = torch.finfo(dtype).eps
        assert (low.grad.double() - high.grad).abs().max() <= max(unit, 1e-5) * high.grad.abs().max()


def test_jsd_is_a_divergence() -> None:
    live, frozen, weight = make(5, 4), make(5, 4, seed=1), make(11, 4)
    assert masked_jsd(live, live, weight, weight, 1.3) == 0
    forward = masked_jsd(live, frozen, weight, weight, 1.3)
    assert 0 < forward < 1
    torch.testing.assert_close(masked_jsd(frozen, live, weight, weight, 1.3), forward)
    apart = masked_jsd(torch.tensor([[1e4]]), torch.tensor([[-1e4]]), *[torch.tensor([[1.0], [-1.0]])] * 2, 1.0)
    assert apart.item() == 1.0


@pytest.mark.parametrize("change", [1e-1, 1e-2, 1e-3])
def test_jsd_of_a_small_change_keeps_its_digits(change: float) -> None:
    live, weight = make(50, 8, dtype=torch.float32), make(100, 8, dtype=torch.float32)
    frozen = live * (1 + change)
    loss = masked_jsd(live, frozen, weight, weight, 1.5).item()
    exact = masked_jsd(live.double(), frozen.double(), weight.double(), weight.double(), 1.5).item()
    assert loss == pytest.approx(exact, rel=1e-5 / change)


def test_jsd_temperature_of_each_row() -> None:
    live, frozen, weight = make(3, 4), make(3, 4, seed=1), make(11, 4)
    temperature = torch.tensor([1.0, 1.5, 2.0])
    rows = [
        masked_jsd(live[row : row + 1], frozen[row : row + 1], weight, weight, temperature[row].item()).item()
        for row in range(3)
    ]
    assert masked_jsd(live, frozen, weight, weight, temperature).item() == pytest.approx(sum(rows) / 3, abs=1e-15)
    scalar = masked_jsd(live, frozen, weight, weight, torch.tensor(1.5))
    assert torch.equal(scalar, masked_jsd(live, frozen, weight, weight, 1.5))


def test_jsd_rows_of_weight_zero_are_padding() -> None:
    live, frozen, weight = make(4, 3), make(4, 3, seed=1), make(7, 3)
    kept = live[:3].clone().requires_grad_()
    expected = masked_jsd(kept, frozen[:3], weight, weight, 1.5)
    expected.backward()
    live[3], frozen[3] = torch.nan, torch.inf
    live.requires_grad_()
    row_weight = torch.tensor([1, 1, 1, 0]) / torch.tensor(3, dtype=torch.float64)
    temperature = torch.tensor([1.5, 1.5, 1.5, 0.0])
    loss = masked_jsd(live, frozen, weight, weight, temperature, row_weight)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(live.grad[:3], kept.grad)
    assert (live.grad[3] == 0).all()


def test_jsd_of_no_rows_with_given_weights_is_zero() -> None:
    live = make(0, 4).requires_grad_()
    loss = masked_jsd(live, make(0, 4), make(5, 4), make(5, 4), 1.5, torch.empty(0))
    loss.backward()
    assert loss == 0
    assert live.grad.shape == (0, 4)


def test_jsd_gradient_reaches_the_live_side_only() -> None:
    shared = make(7, 3).requires_grad_()
    live, frozen = make(4, 3).requires_grad_(), make(4, 3, seed=1).requires_grad_()
    temperature = torch.full((4,), 1.5, requires_grad=True)
    row_weight = torch.full((4,), 0.25, requires_grad=True)
    bias_frozen = make(7).requires_grad_()
    masked_jsd(live, frozen, shared, shared, temperature, row_weight, bias_frozen=bias_frozen).backward()
    assert frozen.grad is temperature.grad is row_weight.grad is bias_frozen.grad is None
    separate = shared.detach().clone().requires_grad_()
    masked_jsd(live, frozen, separate, shared.detach(), 1.5, bias_frozen=bias_frozen).backward()
    torch.testing.assert_close(shared.grad, separate.grad)

    frozen_head = make(7, 3)
    live.grad = None
    masked_jsd(live, frozen, frozen_head, frozen_head, 1.5).backward()
    assert live.grad is not None
    with torch.no_grad():
        assert not masked_jsd(live, frozen, shared, shared, 1.5).requires_grad


# --- linear_cross_entropy ---


def test_cross_entropy_by_hand() -> None:
    full, masked, weight = two_words()
    hidden = torch.cat([full, masked])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2, abs=1e-15)
    weighted = linear_cross_entropy(hidden, weight, torch.tensor([1, 0]), torch.tensor([2.0, 3.0]))
    assert weighted.item() == pytest.approx(-(2 * math.log(3 / 4) + 3 * math.log(1 / 2)), abs=1e-15)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_cross_entropy_equals_torch(dtype: torch.dtype, head: str) -> None:
    hidden, weight, options = make(9, 5, dtype=dtype), make(41, 5, dtype=dtype), head_options(head, 41, dtype)
    targets = torch.arange(9) * 3
    loss = linear_cross_entropy(hidden, weight, targets, **options)
    expected = torch.nn.functional.cross_entropy(naive_logits(hidden, weight, **options), targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(loss.item() - expected.item()) <= TOLERANCES[dtype] * (1 + expected.item())


@pytest.mark.parametrize("head", HEADS)
def test_cross_entropy_gradcheck(head: str) -> None:
    options, targets = head_options(head, 7), torch.tensor([0, 6, 2, 2])
    bias = options.pop("bias")
    inputs = [make(4, 3).requires_grad_(), make(7, 3).requires_grad_()]
    if bias is not None:
        inputs.append(bias.requires_grad_())

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias=bias, **options)

    assert torch.autograd.gradcheck(loss, inputs)


def test_cross_entropy_rows_of_weight_zero_are_padding() -> None:
    hidden, weight = make(4, 3), make(7, 3)
    hidden[3] = torch.nan
    hidden.requires_grad_()
    row_weight, targets = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 1, 2, -100])
    loss = linear_cross_entropy(hidden, weight, targets, row_weight)
    loss.backward()
    expected = linear_cross_entropy(hidden.detach()[:3], weight, targets[:3]) * 3
    torch.testing.assert_close(loss.detach(), expected)
    assert (hidden.grad[3] == 0).all()
    assert linear_cross_entropy(hidden[:0], weight, targets[:0], row_weight[:0]) == 0


def test_the_entropy_gate_by_hand() -> None:
    """Probabilities 3/4 and 1/4: an entropy of 0.56 of the 3.0 from which on a token counts in full."""
    full, _, weight = two_words()
    entropy = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    for exponent in (1.0, 2.5):
        loss = linear_cross_entropy(full, weight, torch.tensor([0]), entropy_gate=exponent)
        assert loss.item() == pytest.approx((entropy / math.log(20)) ** exponent * -math.log(1 / 4), abs=1e-15)
    # Of 50 tokens equally likely each counts in full, of one that is certain none.
    even = linear_cross_entropy(torch.zeros(1, 3), make(50, 3).float(), torch.tensor([7]), entropy_gate=1.0)
    assert even.item() == pytest.approx(math.log(50), rel=1e-6)
    certain = torch.tensor([[1e3]]), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(*certain, torch.tensor([1]), entropy_gate=1.0).item() == 0


@pytest.mark.parametrize("head", HEADS)
def test_the_gate_is_a_constant_of_the_gradient(head: str) -> None:
    options, targets = head_options(head, 41), torch.arange(9) * 3
    inputs = [make(9, 5).requires_grad_(), make(41, 5).requires_grad_()]
    weights = torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = linear_cross_entropy(*inputs, targets, weights, entropy_gate=1.3, **options)
    log_p = naive_logits(*inputs, **options).log_softmax(1)
    gate = (-(log_p.exp() * log_p).sum(1) / math.log(20)).clamp(max=1).pow(1.3).detach()
    expected = -(weights * gate * log_p[torch.arange(9), targets]).sum()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_gate_is_nearly_that_of_the_authors() -> None:
    """EAFT takes the entropy of the 20 likeliest tokens, over 3: of predictions like a model's much the same."""
    ranks = torch.arange(1, 5001).log()
    logits = -torch.linspace(1.2, 6, 400)[:, None] * ranks + make(400, 5000).float()  # probabilities by Zipf's law
    top = logits.topk(20, dim=1).values.log_softmax(1)
    theirs = -(top.exp() * top).sum(1) / 3
    log_p = logits.log_softmax(1)
    ours = (-(log_p.exp() * log_p).sum(1) / math.log(20)).clamp(max=1)
    decided = theirs < 0.8
    assert decided.sum() > 100
    assert torch.corrcoef(torch.stack([ours[decided], theirs[decided]]))[0, 1] > 0.97


def test_the_reference_can_be_forced() -> None:
    with cit_fast.backend("reference"):
        test_token_gain_by_hand()
        test_jsd_by_hand()
