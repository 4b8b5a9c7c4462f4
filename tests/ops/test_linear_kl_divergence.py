"""linear_kl_divergence against its equations, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy_heads import HEADS, head_options, make, naive_logits, two_words

import cit_fast
from cit_fast.ops import linear_kl_divergence, token_gain


def naive_kl(live: Tensor, frozen: Tensor, temperature: Tensor | float = 1.0, targets: Tensor | None = None) -> Tensor:
    """KL(q || p) per row from logits; with targets by the equation of METHODS, from the whole predictions."""
    beta = torch.as_tensor(temperature, dtype=torch.float64)
    beta = beta[:, None] if beta.dim() else beta
    log_p, log_q = (live / beta).log_softmax(1), (frozen / beta).log_softmax(1)
    q = log_q.exp()
    whole = (q * (log_q - log_p)).sum(1)
    if targets is None:
        return whole
    at = torch.arange(len(targets)), targets
    rest_p, rest_q = 1 - log_p[at].exp(), 1 - q[at]
    return (whole - q[at] * (log_q[at] - log_p[at])) / rest_q - (rest_q / rest_p).log()


def test_kl_by_hand() -> None:
    live, frozen, weight = two_words()
    expected = 1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3)  # q = (1/2, 1/2), p = (1/4, 3/4)
    assert linear_kl_divergence(live, frozen, weight, weight).item() == pytest.approx(expected, abs=1e-15)
    # Without the target one word is left, of which both are certain.
    assert linear_kl_divergence(live, frozen, weight, weight, targets=torch.tensor([1])).item() == 0
    # Of three words with odds 1 : 3 : 2 against 1 : 1 : 2, without the first 3/5, 2/5 against 1/3, 2/3.
    odds = torch.tensor([[1.0, 3.0, 2.0], [1.0, 1.0, 2.0]], dtype=torch.float64).log()
    sides = odds[:1], odds[1:], *[torch.eye(3, dtype=torch.float64)] * 2
    rest = 1 / 3 * math.log(5 / 9) + 2 / 3 * math.log(5 / 3)
    assert linear_kl_divergence(*sides, targets=torch.tensor([0])).item() == pytest.approx(rest, abs=1e-15)


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_kl_and_gradients_equal_autograd_through_the_equation(head: str, without: bool) -> None:
    tokens, vocabulary = 9, 41
    live, frozen = make(tokens, 5, seed=1).requires_grad_(), make(tokens, 7, seed=2)
    weight, weight_frozen = make(vocabulary, 5, seed=3).requires_grad_(), make(vocabulary, 7, seed=4)
    options = head_options(head, vocabulary)
    bias = options.pop("bias")
    bias_frozen = None if bias is None else make(vocabulary, seed=5)
    wanted = [live, weight] if bias is None else [live, weight, bias.requires_grad_()]
    temperature, row_weight = 2 - torch.rand(tokens, dtype=torch.float64), torch.rand(tokens, dtype=torch.float64)
    targets = torch.arange(tokens) * 3 if without else None
    loss = linear_kl_divergence(
        *(live, frozen, weight, weight_frozen, temperature, row_weight, targets),
        bias_live=bias,
        bias_frozen=bias_frozen,
        **options,
    )
    rows = naive_kl(
        naive_logits(live, weight, bias, **options),
        naive_logits(frozen, weight_frozen, bias_frozen, **options),
        temperature,
        targets,
    )
    expected = (row_weight * rows).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    got, right = torch.autograd.grad(3 * loss, wanted), torch.autograd.grad(3 * expected, wanted)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_kl_gradcheck(head: str, without: bool) -> None:
    frozen, weight_frozen = make(4, 3, seed=2), make(6, 3, seed=4)
    options = head_options(head, 6)
    bias = options.pop("bias")
    inputs = [make(4, 3, seed=1).requires_grad_(), make(6, 3, seed=3).requires_grad_()]
    if bias is not None:
        inputs.append(bias.requires_grad_())
    temperature = torch.tensor([1.0, 1.2, 1.7, 2.0], dtype=torch.float64)
    targets = torch.tensor([0, 5, 2, 2]) if without else None

    def loss(live: Tensor, weight: Tensor, bias_live: Tensor | None = None) -> Tensor:
        return linear_kl_divergence(
            live, frozen, weight, weight_frozen, temperature, targets=targets, bias_live=bias_live, **options
        )

    assert torch.autograd.gradcheck(loss, inputs)


def test_kl_is_that_of_token_gain() -> None:
    """The statistics that scoring returns give the same numbers, whole and without the target."""
    live, frozen, weight, targets = make(9, 5), make(9, 5, seed=1), make(41, 5), torch.arange(9)
    gain = token_gain(live, frozen, weight, targets)
    whole = linear_kl_divergence(live, frozen, weight, weight)
    torch.testing.assert_close(whole, gain.kl_masked_full.mean(), rtol=1e-12, atol=0)
    q, p = gain.log_prob_masked.exp(), gain.log_prob_full.exp()
    rest = (gain.kl_masked_full - q * (gain.log_prob_masked - gain.log_prob_full)) / (1 - q) - ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(
        linear_kl_divergence(live, frozen, weight, weight, targets=targets), rest.mean(), rtol=1e-11, atol=0
    )


def test_kl_without_the_target_leaves_its_probability_free() -> None:
    """A target that is certain on one side or on both changes nothing, where the equation has 0 / 0."""
    live, frozen, targets = make(6, 11, dtype=torch.float32), make(6, 11, seed=1, dtype=torch.float32), torch.arange(6)
    eye = torch.eye(11)
    expected = linear_kl_divergence(live, frozen, eye, eye, targets=targets)
    for one in (0.0, 60.0, 1e4):
        for other in (0.0, 60.0, 1e4):
            x, y = live.clone(), frozen.clone()
            x[torch.arange(6), targets], y[torch.arange(6), targets] = one, other
            x.requires_grad_()
            loss = linear_kl_divergence(x, y, eye, eye, targets=targets)
            torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-7)
            loss.backward()
            assert (x.grad[torch.arange(6), targets] == 0).all()
            assert x.grad.isfinite().all()


def test_kl_rows_of_weight_zero_are_padding_and_of_equal_sides_it_is_nothing() -> None:
    live, frozen, weight = make(4, 3), make(4, 3, seed=1), make(7, 3)
    assert linear_kl_divergence(live, live, weight, weight, 1.3) == 0
    expected = linear_kl_divergence(live[:3], frozen[:3], weight, weight, 1.5, targets=torch.arange(3)) * 3
    live[3], frozen[3] = torch.nan, torch.inf
    live.requires_grad_()
    row_weight, temperature = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1.5, 1.5, 1.5, 0.0])
    loss = linear_kl_divergence(
        live, frozen, weight, weight, temperature, row_weight, targets=torch.tensor([0, 1, 2, -100])
    )
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    assert (live.grad[3] == 0).all()
    assert linear_kl_divergence(live[:0], frozen[:0], weight, weight, 1.0, row_weight[:0]) == 0


def test_the_reference_can_be_forced() -> None:
    with cit_fast.backend("reference"):
        test_kl_by_hand()
