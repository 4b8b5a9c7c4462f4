"""The Triton kernels of the information-gain family against the reference in float64.

Not collected by itself: test_information_gain.py here and in tests/gpu run it in a process of its own. Without a GPU
the kernels are interpreted, where bfloat16 does not exist.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from cit_fast.kernels import information_gain as kernels
from cit_fast.kernels import information_gain_losses as losses
from gain_problems import (
    DEVICE,
    DTYPES,
    HEADS,
    INTERPRETED,
    PTX,
    both,
    close,
    close_gains,
    gradient_error,
    gradients_close,
    logit_error,
    loss_and_gradients,
    make,
    options_of,
)
from torch import Tensor

from cit_fast import backend
from cit_fast.errors import BackendError, DataError
from cit_fast.ops import (
    linear_cross_entropy,
    linear_kl_divergence,
    masked_jsd,
    token_gain,
    token_gain_from_statistics,
    token_gain_statistics,
)
from cit_fast.ops.information_gain.reference import PLAIN, Needed

# The interpreter is numpy, which warns of arithmetic with infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# One of everything; around a tile of 32 or 128 tokens, 64 or 128 entries and 32 or 64 columns; several sweeps of a row.
SHAPES = [(130, 64, 257)] if PTX else [(1, 1, 1), (3, 7, 5), (33, 33, 65), (37, 70, 1003), (130, 64, 257)]
# A program a row; of less than a block, of whole blocks alone, of both.
LOSS_SHAPES = [(1, 1, 1), (7, 33, 65), (4, 9, 1024), (13, 70, 1003)]
if not INTERPRETED:
    LOSS_SHAPES = [(7, 33, 65), (4, 70, 5003)] if PTX else [*SHAPES, (4, 9, 16384)]
# The interpreter is slow, and takes half precision for a rounding of the operands; the host has bfloat16 beside it.
EVERY_HEAD = DTYPES if DEVICE == "cuda" else DTYPES[-1:] if PTX else DTYPES[:1]
KINDS = [(dtype, head) for dtype in DTYPES for head in HEADS if dtype in EVERY_HEAD or head == "softcap"]


@pytest.fixture(autouse=True)
def tiles_that_make_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(
            kernels,
            "_TILINGS",
            {
                (kind, bits): kernels._Tiling(32, 64, 32 * bits // 16, 4, 1)
                for kind in ("any", "unaligned")
                for bits in (16, 32)
            },
        )
        monkeypatch.setattr(kernels, "_tiles", lambda blocks, tiles, processors: 5)
        monkeypatch.setitem(losses._CROSS_ENTROPY, "BLOCK", 512)
        monkeypatch.setitem(losses._DIVERGENCE, "BLOCK", 512)
    if PTX:
        monkeypatch.setattr(kernels, "_architecture", lambda device: "sm_80")
        monkeypatch.setattr(kernels, "_tiles", lambda blocks, tiles, processors: 2)


@pytest.mark.parametrize(("dtype", "head"), KINDS, ids=str)
@pytest.mark.parametrize(("tokens", "d", "vocabulary"), SHAPES)
def test_token_gain(tokens: int, d: int, vocabulary: int, dtype: torch.dtype, head: str) -> None:
    full, masked = make(tokens, d, seed=1, dtype=dtype), make(tokens, d, seed=2, dtype=dtype)
    weight, options = make(vocabulary, d, seed=3, dtype=dtype), options_of(head, vocabulary)
    targets = (torch.arange(tokens, device=DEVICE) * 7) % vocabulary
    got, exact = both(
        lambda to: token_gain(to(full), to(masked), to(weight), targets, **{k: to(v) for k, v in options.items()})
    )
    close_gains(got, exact, 4 * max(logit_error(each, weight, options["scale"]) for each in (full, masked)))


DIVERGENCES = {"jsd": masked_jsd, "kl": linear_kl_divergence, "kl of the rest": linear_kl_divergence}


@pytest.mark.parametrize(("dtype", "head"), KINDS, ids=str)
@pytest.mark.parametrize(("tokens", "d", "vocabulary"), LOSS_SHAPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(
    divergence: str,
    tokens: int,
    d: int,
    vocabulary: int,
    dtype: torch.dtype,
    head: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "_workspace_bytes", lambda device: 1 << 16)  # several chunks of rows
    options = options_of(head, vocabulary)
    bias = options.pop("bias")
    live, weight = make(tokens, d, seed=1, dtype=dtype), make(vocabulary, d, seed=3, dtype=dtype)
    frozen, weight_frozen = make(tokens, d + 3, seed=2, dtype=dtype), make(vocabulary, d + 3, seed=4, dtype=dtype)
    if divergence == "kl of the rest":
        options["targets"] = (torch.arange(tokens, device=DEVICE) * 7) % vocabulary
    temperature = 1 + torch.rand(tokens, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    row_weight = torch.rand(tokens, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (loss, gradients), (exact, exact_gradients) = both(
        lambda to: loss_and_gradients(
            lambda hidden, head, bias: DIVERGENCES[divergence](
                *(hidden, to(frozen), head, to(weight_frozen), to(temperature), to(row_weight)),
                bias_live=bias,
                bias_frozen=None if bias is None else bias.detach().flip(0),
                **options,
            ),
            *(to(each) for each in (live, weight, bias)),
        )
    )
    bound = 16 * (logit_error(live, weight, options["scale"]) + logit_error(frozen, weight_frozen, options["scale"]))
    assert loss.dtype == torch.float32
    close(loss, exact, bound * tokens, "loss")
    gradients_close(gradients, exact_gradients, bound, dtype)


@pytest.mark.parametrize(("dtype", "head"), KINDS, ids=str)
@pytest.mark.parametrize(("tokens", "d", "vocabulary"), LOSS_SHAPES)
@pytest.mark.parametrize("gate", [0.0, 1.5])
def test_linear_cross_entropy(
    tokens: int, d: int, vocabulary: int, dtype: torch.dtype, head: str, gate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_workspace_bytes", lambda device: 1 << 15)
    options = options_of(head, vocabulary)
    bias = options.pop("bias")
    hidden, weight = make(tokens, d, seed=1, dtype=dtype), make(vocabulary, d, seed=3, dtype=dtype)
    targets = (torch.arange(tokens, device=DEVICE) * 7) % vocabulary
    row_weight = torch.rand(tokens, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (loss, gradients), (exact, exact_gradients) = both(
        lambda to: loss_and_gradients(
            lambda hidden, head, bias: linear_cross_entropy(
                hidden, head, targets, to(row_weight), bias=bias, entropy_gate=gate, **options
            ),
            *(to(each) for each in (hidden, weight, bias)),
        )
    )
    bound = 16 * logit_error(hidden, weight, options["scale"]) * (1 + gate)
    close(loss, exact, bound * tokens, "loss")
    gradients_close(gradients, exact_gradients, bound, dtype)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)], ids=str)
def test_only_what_is_needed(needed: tuple[bool, bool]) -> None:
    live, frozen, weight = make(9, 6), make(9, 6, seed=1), make(300, 6)
    for loss_of in (
        lambda hidden, head: masked_jsd(hidden, frozen, head, weight, 1.5),
        lambda hidden, head: linear_kl_divergence(hidden, frozen, head, weight),
        lambda hidden, head: linear_cross_entropy(hidden, head, torch.arange(9, device=DEVICE)),
    ):
        with backend("triton"):
            loss, (of_hidden, of_weight) = loss_and_gradients(loss_of, live, weight)
            leaves = [x.clone().requires_grad_(need) for x, need in zip((live, weight), needed, strict=True)]
            again = loss_of(*leaves)
            assert torch.equal(again.detach(), loss)
            assert again.requires_grad == any(needed)
            if any(needed):
                again.backward()
        for leaf, need, right in zip(leaves, needed, (of_hidden, of_weight), strict=True):
            assert torch.equal(leaf.grad, right) if need else leaf.grad is None


@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_operands_of_two_dtypes(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_WIDENED", 1000)  # several blocks of the head
    full, weight = make(9, 12, dtype=hidden_dtype), make(300, 12, seed=3, dtype=weight_dtype)
    masked, targets = make(9, 12, seed=2, dtype=torch.float16), torch.arange(9, device=DEVICE)
    got, exact = both(lambda to: token_gain(to(full), to(masked), to(weight), targets))
    close_gains(got, exact, 8 * logit_error(full, weight, 1.0))
    (loss, gradients), (right, exact_gradients) = both(
        lambda to: loss_and_gradients(
            lambda hidden, head: (
                masked_jsd(hidden, to(masked), head, to(weight), 1.5) + linear_cross_entropy(hidden, head, targets)
            ),
            to(full),
            to(weight),
        )
    )
    close(loss, right, 1e-4, "loss")
    assert [each.dtype for each in gradients] == [hidden_dtype, weight_dtype]
    gradients_close(gradients, exact_gradients, 1e-4, torch.promote_types(hidden_dtype, weight_dtype))


def test_rows_and_heads_of_any_stride() -> None:
    tokens, d, vocabulary = 20, 24, 130
    for dtype in DTYPES:
        full, masked, weight = (
            make(*s, seed=i, dtype=dtype) for i, s in enumerate(((tokens, d), (tokens, d), (vocabulary, d)))
        )
        targets = torch.arange(2 * tokens, dtype=torch.int32, device=DEVICE)[::2]
        wide = torch.full((vocabulary, d + 5), math.nan, dtype=dtype, device=DEVICE)
        wide[:, :d] = weight
        with backend("triton"):
            plain = token_gain(full, masked, weight, targets.long())
            for value, right in zip(
                token_gain(full.T.contiguous().T, masked, wide[:, :d], targets), plain, strict=True
            ):
                torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)
            expanded = token_gain(full[:1].expand(tokens, d), masked, weight, targets)
            assert torch.equal(expanded.log_prob_full[0], plain.log_prob_full[0])
            rows = full.T.contiguous().T.detach().requires_grad_()
            linear_cross_entropy(rows, wide[:, :d], targets).backward()
            same = full.clone().requires_grad_()
            linear_cross_entropy(same, weight, targets).backward()
            error = (rows.grad.double() - same.grad.double()).abs()
            assert (error <= 2 * gradient_error(full, weight, targets)).all()


@pytest.mark.skipif(PTX, reason="it keeps account of every byte")
def test_a_head_whose_rows_are_far_apart() -> None:
    """A view of something larger: its last row begins beyond 2^31 elements. The memory between is never touched."""
    tokens, d, vocabulary, apart = 5, 16, 131, 1 << 24
    full, masked, weight = (make(*s, seed=i) for i, s in enumerate(((tokens, d), (tokens, d), (vocabulary, d))))
    targets = torch.arange(tokens, device=DEVICE) * 26
    memory = torch.empty((vocabulary - 1) * apart + d, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((vocabulary, d), (apart, 1))
    far.copy_(weight)
    with backend("triton"):
        got = token_gain(full.half(), masked.half(), far, targets)
        near = token_gain(full.half(), masked.half(), far.contiguous(), targets)
    assert all(torch.equal(x, y) for x, y in zip(got, near, strict=True))


def test_launches_of_some_rows_and_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    full, masked, weight = make(90, 16), make(90, 16, seed=1), make(700, 16)
    targets = torch.arange(90, device=DEVICE) * 7
    with backend("triton"):
        whole, statistics = (
            token_gain(full, masked, weight, targets),
            token_gain_statistics(full, masked, weight, targets),
        )
        monkeypatch.setattr(kernels, "_MOST_ROWS", 64)
        assert all(torch.equal(x, y) for x, y in zip(token_gain(full, masked, weight, targets), whole, strict=True))
        assert torch.equal(token_gain_statistics(full, masked, weight, targets), statistics)
        monkeypatch.setattr(kernels, "_GROUP_BYTES", 1)
        assert torch.equal(token_gain_statistics(full, masked, weight, targets), statistics)
        monkeypatch.setattr(kernels, "_tiles", lambda blocks, tiles, processors: 1)
        for value, right in zip(token_gain(full, masked, weight, targets), whole, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_pieces_of_the_vocabulary_merge_to_the_whole(head: str) -> None:
    full, masked, weight = (make(*s, seed=i) for i, s in enumerate(((19, 6), (19, 6), (1000, 6))))
    options = options_of(head, 1000)
    bias = options.pop("bias")
    targets = torch.arange(19, device=DEVICE) * 52
    with backend("triton"):
        whole = token_gain(full, masked, weight, targets, bias=bias, **options)
        pieces = [
            token_gain_statistics(
                *(full, masked, weight[start:end], targets, start),
                bias=None if bias is None else bias[start:end],
                **options,
            )
            for start, end in itertools.pairwise([0, 1, 400, 401, 1000])
        ]
    with backend("reference"):
        right = token_gain_statistics(full.double(), masked.double(), weight[:400].double(), targets, **options)
    for order in (pieces, pieces[::-1]):
        merged = token_gain_from_statistics(torch.stack(order))
        for value, exact in zip(merged, whole, strict=True):
            torch.testing.assert_close(value.float(), exact, rtol=2e-5, atol=2e-6)
    if bias is None:  # what another device's reference would send
        with backend("triton"):
            first = token_gain_statistics(full, masked, weight[:400], targets, **options)
        torch.testing.assert_close(first, right, rtol=2e-5, atol=2e-6)


def test_no_tokens() -> None:
    hidden, weight = make(0, 4), make(11, 4)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    with backend("triton"):
        assert [each.shape for each in token_gain(hidden, hidden, weight, none)] == [(0,)] * 7
        assert token_gain_statistics(hidden, hidden, weight, none).shape == (10, 0)
        loss, gradients = loss_and_gradients(
            lambda hidden, head: linear_cross_entropy(hidden, head, none, torch.empty(0, device=DEVICE)), hidden, weight
        )
    assert loss == 0
    assert [each.shape for each in gradients] == [(0, 4), (11, 4)]
    assert not gradients[1].any()


def test_extreme_logits() -> None:
    full = torch.tensor([[1e4], [-1e4]], device=DEVICE)
    weight, targets = torch.tensor([[1.0], [-1.0]], device=DEVICE), torch.tensor([0, 0], device=DEVICE)
    with backend("triton"):
        gain = token_gain(full, -full, weight, targets)
        assert gain.probability_gain.tolist() == [1.0, -1.0]
        assert gain.kl_full_masked.tolist() == pytest.approx([2e4, 2e4], rel=1e-6)
        assert gain.log_prob_full.tolist() == pytest.approx([0.0, -2e4], rel=1e-6)
        assert masked_jsd(full, -full, weight, weight, 1.0).item() == pytest.approx(1.0, rel=1e-6)
        assert linear_kl_divergence(full, -full, weight, weight).item() == pytest.approx(2e4, rel=1e-6)
        assert linear_kl_divergence(full, -full, weight, weight, targets=targets).item() == 0
        assert linear_cross_entropy(full, weight, targets).item() == pytest.approx(1e4, rel=1e-6)


def test_equal_contexts_gain_nothing() -> None:
    hidden, weight = make(40, 20), make(500, 20)
    with backend("triton"):
        gain = token_gain(hidden, hidden, weight, torch.arange(40, device=DEVICE))
        none = [gain.probability_gain, gain.kl_full_masked, gain.kl_masked_full]
        for divergence in (masked_jsd, linear_kl_divergence):
            loss, gradients = loss_and_gradients(lambda x, of=divergence: of(x, hidden, weight, weight, 1.3), hidden)
            none += [loss, *gradients]
    assert not any(value.any() for value in none)


def test_nearly_equal_sides_keep_their_digits() -> None:
    """As when training starts: divergences near 1e-6, of which logarithms of rounded numbers would leave nothing."""
    live, weight = make(12, 20), make(500, 20) / 4
    frozen = live + 1e-3 * make(12, 20, seed=1)
    (loss, gradients), (exact, exact_gradients) = both(
        lambda to: loss_and_gradients(lambda x: masked_jsd(x, to(frozen), to(weight), to(weight), 1.3), to(live))
    )
    assert exact < 1e-5
    assert loss.item() == pytest.approx(exact.item(), rel=0.02, abs=1e-8)
    torch.testing.assert_close(gradients[0].double(), exact_gradients[0], rtol=0, atol=0.01 * exact_gradients[0].max())


def test_a_bias_of_minus_infinity_takes_tokens_out() -> None:
    full, masked, weight = make(18, 6), make(18, 6, seed=1), make(1100, 6)
    bias = torch.full((1100,), -math.inf, device=DEVICE)
    kept = torch.tensor([3, 100, 1000], device=DEVICE)
    bias[kept] = torch.tensor([0.0, 1.0, -1.0], device=DEVICE)
    few, few_bias = weight[kept].contiguous(), bias[kept]
    targets = torch.arange(18, device=DEVICE) % 3
    with backend("triton"):
        gain = token_gain(full, masked, weight, kept[targets], bias=bias)
        for value, right in zip(gain, token_gain(full, masked, few, targets, bias=few_bias), strict=True):
            torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)

        def jsd(hidden: Tensor, head: Tensor, bias: Tensor, index: Tensor) -> Tensor:
            return masked_jsd(hidden, masked, head, head.detach(), 1.5, bias_live=bias, bias_frozen=bias)

        def cross_entropy(hidden: Tensor, head: Tensor, bias: Tensor, index: Tensor) -> Tensor:
            return linear_cross_entropy(hidden, head, index[targets], bias=bias)

        def kl(hidden: Tensor, head: Tensor, bias: Tensor, index: Tensor) -> Tensor:
            return linear_kl_divergence(
                *(hidden, masked, head, head.detach(), 1.5),
                targets=index[targets],
                bias_live=bias,
                bias_frozen=bias,
            )

        for loss_of in (jsd, kl, cross_entropy):
            many, many_gradients = loss_and_gradients(partial(loss_of, bias=bias, index=kept), full, weight)
            index = torch.arange(3, device=DEVICE)
            right, right_gradients = loss_and_gradients(partial(loss_of, bias=few_bias, index=index), full, few)
            torch.testing.assert_close(many, right, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(many_gradients[0], right_gradients[0], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(many_gradients[1][kept], right_gradients[1], rtol=1e-4, atol=1e-6)
            assert many_gradients[1].count_nonzero(dim=1).count_nonzero() <= 3


def test_nan_is_seen() -> None:
    full, masked, weight = make(40, 6), make(40, 6, seed=1), make(200, 6)
    full[17, 2] = math.nan
    targets = torch.arange(40, device=DEVICE)
    with backend("triton"):
        gain = token_gain(full, masked, weight, targets)
        for name, value in gain._asdict().items():
            expected = [] if name in ("log_prob_masked", "entropy_masked") else [17]
            assert value.isnan().nonzero().flatten().tolist() == expected, name
        assert masked_jsd(full, masked, weight, weight, 1.5).isnan()
        assert linear_kl_divergence(full, masked, weight, weight).isnan()
        assert linear_kl_divergence(full, masked, weight, weight, targets=targets).isnan()
        assert linear_cross_entropy(full, weight, targets).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_may_hold_anything(dtype: torch.dtype) -> None:
    hidden, frozen, weight = (make(*s, seed=i, dtype=dtype) for i, s in enumerate(((40, 6), (40, 6), (200, 6))))
    kept = torch.ones(40, device=DEVICE)
    kept[[3, 20, 39]] = 0
    targets = torch.arange(40, device=DEVICE)
    with backend("triton"):
        for dirty in (False, True):
            if dirty:
                hidden[kept == 0], frozen[kept == 0] = math.nan, math.inf
                targets[kept == 0] = -100
            temperature = torch.where(kept == 0, math.nan if dirty else 1.0, 1.5)
            got = loss_and_gradients(
                lambda x, head, temperature=temperature: (
                    linear_cross_entropy(x, head, targets, kept)
                    + masked_jsd(x, frozen, head, weight, temperature, kept)
                    + linear_kl_divergence(x, frozen, head, weight, temperature, kept, targets)
                ),
                hidden,
                weight,
            )
            if not dirty:
                clean = got
        assert torch.equal(got[0], clean[0])
        assert all(torch.equal(x, y) for x, y in zip(got[1], clean[1], strict=True))
        assert (got[1][0][kept == 0] == 0).all()


def test_a_target_outside_the_vocabulary_reads_nothing_beyond_it() -> None:
    """On a GPU, where values are not checked: the row is wrong and no other."""
    full, masked, weight = make(6, 8), make(6, 8, seed=1), make(30, 8)
    targets = torch.tensor([0, 30, -1, 2**40, 4, 5], device=DEVICE)
    right = targets.clamp(0, 5)
    arguments = (None, PLAIN)
    good = [0, 4, 5]
    gains = kernels.token_gain(full, masked, weight, targets, *arguments)
    for value, exact in zip(gains, kernels.token_gain(full, masked, weight, right, *arguments), strict=True):
        assert torch.equal(value[good], exact[good])
    assert (gains[0][[1, 2, 3]] == -math.inf).all()
    needs = Needed(True, False, False)
    ones = torch.ones(6, device=DEVICE)
    got = losses.linear_cross_entropy(full, weight, targets, ones, *arguments, 0.0, needs)
    exact = losses.linear_cross_entropy(full, weight, right, ones, *arguments, 0.0, needs)
    assert got[0] == math.inf
    assert torch.equal(got[1][good], exact[1][good])


def test_the_same_call_gives_the_same_bits() -> None:
    dtype = DTYPES[-1]
    full, masked, weight = (make(*s, seed=i, dtype=dtype) for i, s in enumerate(((20, 40), (20, 40), (900, 40))))
    targets = torch.arange(20, device=DEVICE)

    def everything() -> list[Tensor]:
        out = list(token_gain(full, masked, weight, targets))
        for loss_of in (
            lambda hidden, head: masked_jsd(hidden, masked, head, weight, 1.5),
            lambda hidden, head: linear_kl_divergence(hidden, masked, head, weight, targets=targets),
            lambda hidden, head: linear_cross_entropy(hidden, head, targets),
        ):
            loss, gradients = loss_and_gradients(loss_of, full, weight)
            out += [loss, *gradients]
        return out

    with backend("triton"):
        assert all(torch.equal(x, y) for x, y in zip(everything(), everything(), strict=True))


def test_what_the_kernels_do_not_take() -> None:
    full, weight = make(3, 4), make(4, 7)
    targets = torch.arange(3, device=DEVICE)
    with backend("triton"):
        with pytest.raises(BackendError, match="do not lie side by side"):
            token_gain(full, full, weight.T, targets)
        with pytest.raises(BackendError, match="it takes no float64"):
            linear_cross_entropy(full.double(), weight.T.contiguous().double(), targets)
        with pytest.raises(DataError, match=r"expected \[T, d\] and \[V, d\]"):
            token_gain(full, full, weight, targets)
    if not INTERPRETED:  # unforced, float64 goes to the reference
        assert token_gain(full.double(), full.double(), weight.T.double(), targets).entropy_full.dtype == torch.float64


def test_a_row_whose_weight_is_not_a_number_is_seen() -> None:
    """So are targets outside the vocabulary, which a GPU cannot refuse."""
    hidden, weight = make(3, 16, seed=1), make(70, 16, seed=3)
    row_weight = torch.tensor([1.0, math.nan, 0.0], device=DEVICE)
    targets = torch.tensor([4, 0, 0], device=DEVICE)
    leaf = hidden.clone().requires_grad_()
    with backend("triton"):
        loss = linear_cross_entropy(leaf, weight, targets, row_weight)
        loss.backward()
    assert loss.isnan()
    assert leaf.grad is not None
    assert leaf.grad.isnan().all(dim=1).tolist() == [False, True, False]
    assert (leaf.grad[2] == 0).all()
