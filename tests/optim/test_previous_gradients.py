"""Previous gradients kept by reference: the same numbers as copies, and noticed where they cannot be relied on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from toy_training import make_model

from cit_fast.optim import AdamWBalanceEMA, BalanceEMA

MAKERS: dict[str, Callable[..., Any]] = {
    "wrapped": lambda params, **options: BalanceEMA(AdamW(params, lr=0.3), **options),
    "fused": lambda params, **options: AdamWBalanceEMA(params, lr=0.3, **options),
}


def backward(model: nn.Module, step: int) -> None:
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    (1000 * model(batch).square().mean()).backward()


def run(kind: str, between: Callable[[nn.Module, Any], None], steps: int = 5, **options: Any) -> tuple[Any, list[Any]]:
    model = make_model()
    optimizer = MAKERS[kind](model.parameters(), **options)
    weights = []
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        weights.append(list(optimizer.balance_weights().values()))
        between(model, optimizer)
    return optimizer, weights


def to_none(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", MAKERS)
def test_references_give_the_numbers_of_copies(kind: str) -> None:
    optimizer, weights = run(kind, to_none)
    copies, expected = run(kind, to_none, keep_gradients="copy")
    assert weights == expected
    assert len({weight for step in weights for weight in step}) > 3
    for kept, others in ((optimizer, True), (copies, False)):
        param = kept.param_groups[0]["params"][0]
        param.grad = torch.ones_like(param)
        grad = param.grad
        kept.step()
        assert (kept.state[param]["previous_grad"] is grad) == others


@pytest.mark.parametrize("kind", MAKERS)
def test_zeroing_in_place_copies_first(kind: str) -> None:
    _, weights = run(kind, lambda model, optimizer: optimizer.zero_grad(set_to_none=False))
    _, expected = run(kind, to_none)
    assert weights == expected


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "zero",
    [
        lambda model, _: model.zero_grad(set_to_none=False),
        lambda model, _: [param.grad.data.zero_() for param in model.parameters()],
    ],
    ids=["zero_", "data.zero_"],
)
def test_gradients_reused_by_others_are_noticed(kind: str, zero: Callable[..., Any]) -> None:
    """One step counts as a first one (the fallback), with one warning; from then on gradients are copied."""
    with pytest.warns(UserWarning, match="4 gradients of the last step were written to") as caught:
        _, weights = run(kind, zero)
    assert len(caught) == 1
    _, expected = run(kind, to_none)
    assert weights[1] == [pytest.approx(0.01)] * 4
    assert weights[0] == expected[0]
    # The average went another way in step 1, but the norms b and c are those of the gradients again.
    copies, others = run(kind, to_none), run(kind, zero, keep_gradients="copy")
    assert copies[1] == others[1]


@pytest.mark.parametrize("kind", MAKERS)
def test_memory_that_is_used_again_is_noticed(kind: str) -> None:
    """Gradients that are views of one buffer are copied from the start; so is a buffer behind an own tensor."""
    torch.manual_seed(0)
    param, twin = nn.Parameter(torch.randn(8)), nn.Parameter(torch.zeros(8))
    twin.data.copy_(param.data)
    buffer, alone = torch.zeros(16), torch.zeros(8)
    optimizer, reference = MAKERS[kind]([param]), MAKERS[kind]([twin], keep_gradients="copy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            grad = 100 * torch.randn(8, generator=torch.Generator().manual_seed(step))
            buffer[:8] = grad
            param.grad, twin.grad = buffer[:8], grad
            optimizer.step()
            reference.step()
            assert optimizer.balance_weights() == reference.balance_weights()
    other = MAKERS[kind]([nn.Parameter(torch.randn(8))])
    hidden = other.param_groups[0]["params"][0]
    hidden.grad = alone.data  # another tensor object each time, over the same memory
    other.step()
    alone.data.add_(1)
    hidden.grad = alone.data
    with pytest.warns(UserWarning, match="their memory used again"):
        other.step()


def test_an_untouched_gradient_is_no_reason_to_warn() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = BalanceEMA(SGD([param], lr=0.1))
    param.grad = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()
    assert optimizer.balance_summary().fallback_fraction == 1.0


@pytest.mark.parametrize("kind", MAKERS)
def test_checkpoints_contain_the_values(kind: str) -> None:
    model = make_model()
    optimizer = MAKERS[kind](model.parameters())
    backward(model, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    expected = [param.grad.clone() for param in model.parameters()]
    optimizer.zero_grad()
    for i, grad in enumerate(expected):
        assert torch.equal(saved["state"][i]["previous_grad"], grad)


def test_clipped_gradients_are_the_ones_kept() -> None:
    model = make_model()
    optimizer = AdamWBalanceEMA(model.parameters())
    backward(model, 0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    kept = [optimizer.state[param]["previous_grad"] for param in model.parameters()]
    assert torch.linalg.vector_norm(torch.cat([each.flatten() for each in kept])) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_with_a_graph_are_copied() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamWBalanceEMA([param])
    loss = (param**3).sum()
    loss.backward(create_graph=True)
    assert param.grad.requires_grad
    optimizer.step()
    kept: Tensor = optimizer.state[param]["previous_grad"]
    assert not kept.requires_grad
    param.grad = None
