"""The reference: chunks, vocabulary blocks and special logits change nothing beyond rounding."""

from __future__ import annotations

import pytest
import torch

from cit_fast.ops.information_gain import reference
from cit_fast.ops.information_gain.reference import LogitOptions, Needed


def random_case(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": make(9, 5),
        "other": make(9, 5),
        "weight": make(41, 5),
        "bias": make(41),
        "targets": torch.randint(0, 41, (9,), generator=generator),
        "temperature": torch.rand(9, generator=generator, dtype=torch.float64) + 1,
        "row_weight": torch.rand(9, generator=generator, dtype=torch.float64),
    }


def token_gain(case: dict[str, torch.Tensor], chunk_size: int | None = None) -> torch.Tensor:
    out = reference.token_gain(
        case["hidden"], case["other"], case["weight"], case["targets"], case["bias"], LogitOptions(4.0, 0.5), chunk_size
    )
    return torch.stack(out)


def masked_jsd(case: dict[str, torch.Tensor], chunk_size: int | None = None) -> tuple[torch.Tensor, ...]:
    return reference.masked_jsd(
        case["hidden"],
        case["other"],
        case["weight"],
        case["weight"] * 2,
        case["temperature"],
        case["row_weight"],
        case["bias"],
        None,
        LogitOptions(4.0, 0.5),
        Needed(True, True, True),
        chunk_size,
    )


def linear_kl_divergence(case: dict[str, torch.Tensor], chunk_size: int | None = None) -> tuple[torch.Tensor, ...]:
    return reference.linear_kl_divergence(
        *(case["hidden"], case["other"], case["weight"], case["weight"] * 2, case["temperature"], case["row_weight"]),
        *(case["targets"], case["bias"], None, LogitOptions(4.0, 0.5), Needed(True, True, True), chunk_size),
    )


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 9, 1000])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    case = random_case()
    torch.testing.assert_close(token_gain(case, chunk_size), token_gain(case), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(masked_jsd(case, chunk_size), masked_jsd(case), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        linear_kl_divergence(case, chunk_size), linear_kl_divergence(case), rtol=1e-12, atol=1e-14
    )


def test_default_chunk_follows_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = list(reference._chunks(10, 41, None))
    assert chunks == [slice(0, reference.CHUNK_ELEMENTS // 41)]
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 100)
    assert [each.start for each in reference._chunks(5, 41, None)] == [0, 2, 4]
    assert [each.start for each in reference._chunks(2, 101, None)] == [0, 1], "a row that exceeds the limit still fits"


@pytest.mark.parametrize("block", [1, 7 * 5, 41 * 5])
def test_widening_the_head_in_blocks_changes_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(torch.bfloat16)
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in case.items()}
    expected_gain, expected_jsd = token_gain(wide), masked_jsd(wide)
    monkeypatch.setattr(reference, "WEIGHT_BLOCK_ELEMENTS", block)
    torch.testing.assert_close(token_gain(case), expected_gain, rtol=1e-5, atol=1e-6)
    loss, *gradients = masked_jsd(case)
    torch.testing.assert_close(loss, expected_jsd[0], rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(gradients, expected_jsd[1:], strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, expected.bfloat16(), rtol=2**-7, atol=1e-6)


def test_repeats_bit_for_bit() -> None:
    case = random_case(torch.float32)
    assert torch.equal(token_gain(case, 2), token_gain(case, 2))
    for first, second in zip(masked_jsd(case, 2), masked_jsd(case, 2), strict=True):
        assert torch.equal(first, second)


def test_bias_of_minus_infinity_takes_a_token_out_of_the_vocabulary() -> None:
    case = random_case()
    keep = torch.arange(41) != 17
    case["targets"] = case["targets"].masked_fill(case["targets"] == 17, 0)
    small_targets = case["targets"] - (case["targets"] > 17).long()
    banned = case["bias"].masked_fill(~keep, -torch.inf)
    out = reference.token_gain(case["hidden"], case["other"], case["weight"], case["targets"], banned)
    small = reference.token_gain(case["hidden"], case["other"], case["weight"][keep], small_targets, case["bias"][keep])
    torch.testing.assert_close(torch.stack(out), torch.stack(small), rtol=1e-12, atol=1e-14)

    common = (case["temperature"], case["row_weight"])
    heads = (case["weight"], case["weight"])
    big = reference.masked_jsd(
        case["hidden"], case["other"], *heads, *common, banned, banned, reference.PLAIN, Needed(True, True, True)
    )
    heads, bias = (case["weight"][keep], case["weight"][keep]), case["bias"][keep]
    cut = reference.masked_jsd(
        case["hidden"], case["other"], *heads, *common, bias, bias, reference.PLAIN, Needed(True, True, True)
    )
    torch.testing.assert_close(big[:2], cut[:2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((big[2][keep], big[3][keep]), cut[2:], rtol=1e-12, atol=1e-14)
    assert (big[2][17] == 0).all()
    assert big[3][17] == 0
