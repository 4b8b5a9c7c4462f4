"""What PyTorch must know of the ops of KPIG (registration, compilation, backends), and what they say of bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cit_fast
from cit_fast import backend
from cit_fast.errors import ConfigError, DataError
from cit_fast.ops.information_gain import (
    key_part_information_gain,
    library,
    linear_cross_entropy,
    linear_kl_divergence,
    masked_jsd,
    token_gain,
)


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# --- registration ---


def opcheck_arguments() -> list[tuple[str, tuple[object, ...]]]:
    live, frozen, weight = make(4, 3), make(4, 3, seed=1), make(7, 3)
    row = torch.ones(4, dtype=torch.float64)
    with_grad = [each.clone().requires_grad_() for each in (live, weight, make(7))]
    turned = live.float().T.contiguous().T.requires_grad_()
    head, flat = weight.float().requires_grad_(), weight.float().T.contiguous().T.requires_grad_()
    return [
        ("token_gain", (live, frozen, weight, torch.arange(4), None, None, 1.0)),
        ("token_gain", (live.float(), frozen.float(), weight.float(), torch.arange(4), make(7).float(), 2.0, 0.5)),
        ("key_part_information_gain", (row.clone().requires_grad_(), torch.tensor([0, 1, 4]), 0.3)),
        ("token_gain_statistics", (live.float(), frozen.float(), weight.float(), torch.arange(4), 0, None, None, 1.0)),
        ("linear_cross_entropy", (live, weight, torch.arange(4), row, None, 2.0, 1.0, 0.0, False, False, False)),
        (
            "linear_cross_entropy",
            (with_grad[0], with_grad[1], torch.arange(4), row, with_grad[2], None, 0.5, 1.5, True, True, True),
        ),
        ("masked_jsd", (live, frozen, weight, weight.clone(), row, row.clone(), *[None] * 3, 1.0, *[False] * 3)),
        (
            "masked_jsd",
            (
                *(with_grad[0], frozen, with_grad[1], weight, row, row.clone()),
                *(with_grad[2], make(7), 2.0, 0.5, True, True, True),
            ),
        ),
        # The native kernels; a gradient has the layout of its own, whatever that of its tensor.
        ("linear_cross_entropy", (turned, head, torch.arange(4), row.float(), None, None, 1.0, 1.0, True, True, False)),
        (
            "masked_jsd",
            (
                turned,
                frozen.float(),
                head,
                weight.float(),
                row.float(),
                row.float(),
                *[None] * 3,
                1.0,
                True,
                True,
                False,
            ),
        ),
        (
            "linear_kl_divergence",
            (live, frozen, weight, weight.clone(), row, row.clone(), *[None] * 4, 1.0, *[False] * 3),
        ),
        (
            "linear_kl_divergence",
            (
                *(with_grad[0], frozen, with_grad[1], weight, row, row.clone(), torch.arange(4)),
                *(with_grad[2], make(7), 2.0, 0.5, True, True, True),
            ),
        ),
        (
            "linear_kl_divergence",
            (
                *(turned, frozen.float(), head, weight.float(), row.float(), row.float(), torch.arange(4)),
                *(None, None, None, 1.0, True, True, False),
            ),
        ),
        # The reference, with a head whose rows it takes as columns.
        ("linear_cross_entropy", (turned, flat, torch.arange(4), row.float(), None, None, 1.0, 1.0, True, True, False)),
    ]


@pytest.mark.parametrize("case", range(14))
def test_opcheck(case: int) -> None:
    name, arguments = opcheck_arguments()[case]
    torch.library.opcheck(getattr(torch.ops.cit_fast, name).default, arguments)


def test_compile_without_a_graph_break() -> None:
    live, frozen, weight = make(6, 3), make(6, 3, seed=1), make(7, 3)
    targets, offsets = torch.arange(6), torch.tensor([0, 2, 6])

    def score(full: Tensor, masked: Tensor) -> Tensor:
        return key_part_information_gain(token_gain(full, masked, weight, targets, softcap=3.0), offsets) * 2

    def loss(hidden: Tensor, head: Tensor, temperature: Tensor) -> Tensor:
        return (
            masked_jsd(hidden * 2, frozen, head, weight, temperature, scale=0.5)
            + linear_cross_entropy(hidden, head, targets)
            + linear_kl_divergence(hidden, frozen, head, weight, 2.0, targets=targets)
            + hidden.sum()
        )

    compiled_score = torch.compile(score, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_score(live, frozen), score(live, frozen))
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    temperature = torch.linspace(1, 2, 6)
    eager, traced = ([each.clone().requires_grad_() for each in (live, weight)] for _ in range(2))
    loss(*eager, temperature).backward()
    compiled_loss(*traced, temperature).backward()
    for one, other in zip(eager, traced, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# --- bad input ---

H, W, TARGETS = torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 2])
OFFSETS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_gain(H, H[:2], W, TARGETS), DataError, r"hidden_masked is \[2, 4\] and hidden_full \[3, 4\]"),
        (lambda: token_gain(H, H, W[:, :3], TARGETS), DataError,
         r"head's weight \[5, 3\]; expected \[T, d\] and \[V, d\]"),
        (lambda: token_gain(H[0], H[0], W, TARGETS), DataError, r"hidden is \[4\]"),
        (lambda: token_gain(H, H, W[:0], TARGETS), DataError, r"head's weight \[0, 4\]"),
        (lambda: token_gain(H.int(), H, W, TARGETS), DataError, r"hidden is torch.int32; expected float16"),
        (lambda: token_gain(H, H.int(), W, TARGETS), DataError, r"hidden_masked is torch.int32"),
        (lambda: token_gain(H, H, W.int(), TARGETS), DataError, r"weight is torch.int32"),
        (lambda: token_gain(H, H, W, TARGETS.float()), DataError,
         r"targets is \[3\] torch.float32; expected \[3\] int32"),
        (lambda: token_gain(H, H, W, TARGETS[:2]), DataError, r"targets is \[2\]"),
        (lambda: token_gain(H, H, W, TARGETS + 3), DataError, r"targets\[2\] is 5; expected a token"),
        (lambda: token_gain(H, H, W, TARGETS - 100), DataError, r"targets\[0\] is -100"),
        (lambda: token_gain(H, H, W, TARGETS, bias=torch.ones(4)), DataError, r"bias is \[4\]; expected \[5\]"),
        (lambda: token_gain(H, H, W, TARGETS, softcap=0), ConfigError, r"softcap is 0; expected a positive number"),
        (lambda: token_gain(H, H, W, TARGETS, scale=math.nan), ConfigError, r"scale is nan"),
        (lambda: token_gain(H, H, W.to("meta"), TARGETS), DataError, r"lm_head_weight is on meta"),
        (lambda: key_part_information_gain(TARGETS, OFFSETS), DataError, r"probability_gain is torch.int64"),
        (lambda: key_part_information_gain(H, OFFSETS), DataError, r"probability gains are \[3, 4\]; expected \[T\]"),
        (lambda: key_part_information_gain(H[:, 0], OFFSETS.float()), DataError, r"offsets is \[2\] torch.float32"),
        (lambda: key_part_information_gain(H[:, 0], OFFSETS[:0]), DataError, r"offsets is \[0\]"),
        (lambda: key_part_information_gain(H[:, 0], OFFSETS + 1), DataError,
         r"offsets runs from 1 to 4; .* from 0 to 3"),
        (lambda: key_part_information_gain(H[:, 0], torch.tensor([0, 4, 3])), DataError, r"ascending numbers"),
        (lambda: key_part_information_gain(H[:, 0], torch.tensor([0, 3, 3])), DataError, r"example 1 has no response"),
        (lambda: key_part_information_gain(H[:, 0], OFFSETS, 0.0), ConfigError,
         r"alpha is 0.0; expected 0 < alpha <= 1"),
        (lambda: masked_jsd(H, H[:2], W, W, 1.0), DataError, r"3 live and 2 frozen tokens"),
        (lambda: masked_jsd(H, H, W, W[:4], 1.0), DataError, r"5 live and 4 frozen vocabulary entries"),
        (lambda: masked_jsd(H, H, W, W[:, :3], 1.0), DataError,
         r"hidden_frozen is \[3, 4\] and the head's weight_frozen"),
        (lambda: masked_jsd(H, H, W, W, 0.0), DataError, r"temperature is 0.0; expected a positive number"),
        (lambda: masked_jsd(H, H, W, W, torch.tensor([1, 1, -1.0])), DataError, r"temperature\[2\] is -1.0"),
        (lambda: masked_jsd(H, H, W, W, torch.ones(2)), DataError, r"temperature is \[2\]; expected \[3\] or a scalar"),
        (lambda: masked_jsd(H, H, W, W, TARGETS), DataError, r"temperature is torch.int64"),
        (lambda: masked_jsd(H, H, W, W, 1.0, torch.ones(2)), DataError,
         r"row_weight is \[2\]; expected \[3\], one per row"),
        (lambda: masked_jsd(H[:0], H[:0], W, W, 1.0), DataError, r"no tokens, so there is no mean"),
        (lambda: linear_kl_divergence(H, H[:2], W, W), DataError, r"linear_kl_divergence: 3 live and 2 frozen tokens"),
        (lambda: linear_kl_divergence(H, H, W, W, -1.0), DataError, r"temperature is -1.0; expected a positive"),
        (lambda: linear_kl_divergence(H, H, W, W, torch.zeros(3)), DataError, r"temperature\[0\] is 0.0"),
        (lambda: linear_kl_divergence(H, H, W, W, targets=TARGETS[:2]), DataError, r"targets is \[2\] torch.int64"),
        (lambda: linear_kl_divergence(H, H, W, W, targets=TARGETS + 3), DataError, r"targets\[2\] is 5; expected a"),
        (lambda: linear_kl_divergence(H, H, W, W, targets=TARGETS.to("meta")), DataError, r"targets is on meta"),
        (lambda: linear_cross_entropy(H, W[:, :3], TARGETS), DataError, r"linear_cross_entropy: hidden is \[3, 4\]"),
        (lambda: linear_cross_entropy(H, W, TARGETS[:2]), DataError, r"targets is \[2\] torch.int64; expected \[3\]"),
        (lambda: linear_cross_entropy(H, W, TARGETS + 3), DataError, r"targets\[2\] is 5; expected a token"),
        (lambda: linear_cross_entropy(H, W, TARGETS, torch.ones(2)), DataError, r"row_weight is \[2\]; expected \[3\]"),
        (lambda: linear_cross_entropy(H[:0], W, TARGETS[:0]), DataError, r"no tokens, so there is no mean"),
        (lambda: linear_cross_entropy(H, W, TARGETS, softcap=-1), ConfigError, r"softcap is -1"),
        (lambda: linear_cross_entropy(H, W, TARGETS, entropy_gate=-1), ConfigError, r"entropy_gate is -1"),
        (lambda: linear_cross_entropy(H, W, TARGETS, entropy_gate=math.inf), ConfigError, r"entropy_gate is inf"),
        (lambda: masked_jsd(H, H, W, W, 1.0, bias_frozen=torch.ones(4)), DataError, r"bias_frozen is \[4\]"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["reference", "native"])
def test_examples_are_summed_whatever_backend_is_forced(name):
    with cit_fast.backend(name):
        gain = key_part_information_gain(torch.tensor([0.5, 1.0, 0.25]), torch.tensor([0, 2, 3]), 0.5)
    assert gain.tolist() == [0.5, 0.125]


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_target_outside_on_a_gpu_is_nan_and_the_rest_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is not waited for, so nothing can be raised; an index of it would end the process."""
    monkeypatch.setattr(library, "may_wait", lambda tensor: False)
    generator = torch.Generator().manual_seed(0)
    hidden, other, weight = (torch.randn(n, 6, generator=generator) for n in (5, 5, 9))
    right = torch.tensor([0, 8, 3, 8, 2])
    targets = torch.tensor([0, 9, 3, -1, -100])
    row_weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 0.0])
    wrong = torch.tensor([False, True, False, True, True])
    with backend(name):
        gain, expected = token_gain(hidden, other, weight, targets), token_gain(hidden, other, weight, right)
        losses = {
            "ce": lambda h, t: linear_cross_entropy(h, weight, t, row_weight),
            "kl": lambda h, t: linear_kl_divergence(h, other, weight, weight, 1.0, row_weight, targets=t),
        }
        gradients = {}
        for loss, call in losses.items():
            for which, those in (("found", targets), ("right", right)):
                leaf = hidden.clone().requires_grad_()
                value = call(leaf, those)
                value.backward()
                assert bool(value.isnan()) == (which == "found")
                gradients[loss, which] = leaf.grad
    for field in ("log_prob_full", "log_prob_masked", "probability_gain"):
        found = getattr(gain, field)
        assert torch.equal(found.isnan(), wrong)
        assert torch.equal(found[~wrong], getattr(expected, field)[~wrong])
    assert torch.equal(gain.entropy_full, expected.entropy_full)
    for loss in losses:
        found, those = gradients[loss, "found"], gradients[loss, "right"]
        assert found is not None
        assert those is not None
        assert found[1].isnan().all()
        assert torch.equal(found[[0, 2, 3, 4]], those[[0, 2, 3, 4]])  # rows of weight 0 may hold any target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_of_half_precision_is_scaled_by_the_factor_itself(dtype: torch.dtype) -> None:
    """1 / 301 has more digits than the gradient; it is rounded once, in the product."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 40, generator=generator).to(dtype).requires_grad_() for n in (6, 50))
    rows = torch.ones(6)
    found = {}
    for factor in (1.0, 1 / 301):
        (linear_cross_entropy(hidden, weight, torch.arange(6), rows) * factor).backward()
        found[factor] = [hidden.grad, weight.grad]
        hidden.grad = weight.grad = None
    for whole, part in zip(*found.values(), strict=True):
        assert whole is not None
        assert part is not None
        assert torch.equal(part, (whole.float() * torch.tensor(1 / 301)).to(dtype))
