"""From encoded examples to batches: padded to a few fixed lengths, or packed without padding.

On a CPU a new batch shape costs more than some padding does (memory is laid out, kernels are chosen per
shape), so padding goes to the next of a few lengths. Where flash attention is there, packing computes no
padding at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cit_fast.errors import ConfigError
from cit_fast.models.encoder_decoder import DECODER_LENGTHS, cut_rows
from cit_fast.models.image_reader import Pictures, picture_inputs
from cit_fast.models.prompts import IGNORED, Encoded

LENGTHS: tuple[int, ...] = (
    *(32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024),
    *range(1280, 4097, 256),
)
"""Default padded lengths in tokens; the longest example of a batch is padded by at most a third of the length
between the first and the last of them. Beyond the last one come its multiples."""

Batch = dict[str, Any]
Feature = Encoded | Mapping[str, Any]
Collator = Callable[[Sequence[Feature]], Batch]


@dataclass(frozen=True)
class PaddingCollator:
    """Pads a batch on the right to the smallest fixed length that holds it.

    Args:
        pad_token_id: token that fills ``input_ids``; it is masked out and never learned, so EOS may serve.
        lengths: the lengths in tokens, ascending.
        max_length: never pad beyond this length, e.g. the model's number of positions.
        decoder_start: of an encoder-decoder, the token that its decoder begins with.

    Raises:
        ConfigError: no lengths, or lengths that do not ascend.
    """

    pad_token_id: int
    lengths: tuple[int, ...] = LENGTHS
    max_length: int | None = None
    decoder_start: int | None = None

    def __post_init__(self) -> None:
        _check_lengths(self.lengths)

    def __call__(self, features: Sequence[Feature]) -> Batch:
        """Collate B features.

        Returns:
            ``input_ids``, ``attention_mask`` (1 for tokens, 0 for padding) and ``labels`` (-100 for padding):
            int64, ``[B, T]``; and what a model that takes images takes beside
            (:func:`~cit_fast.models.image_reader.picture_inputs`). For an encoder-decoder what
            :func:`~cit_fast.models.encoder_decoder.cut_rows` makes.
        """
        rows = [_row(feature) for feature in features]
        if self.decoder_start is not None:
            cut = [(*row, _prompt_length(feature)) for row, feature in zip(rows, features, strict=True)]
            return dict(cut_rows(cut, self.decoder_start, self.pad_token_id, self._width))
        length = self._width(max(len(ids) for ids, _ in rows))
        shape = (len(rows), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, (ids, targets) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(targets)
            attention_mask[row, : len(ids)] = 1
        pictures = picture_inputs(
            [(ids, _pictures(feature)) for (ids, _), feature in zip(rows, features, strict=True)], length
        )
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **pictures}

    def _width(self, longest: int, answers: bool = False) -> int:
        length = padded_length(longest, (*DECODER_LENGTHS, *self.lengths) if answers else self.lengths)
        return length if self.max_length is None else max(longest, min(length, self.max_length))


class PackingCollator:
    """Puts a batch end to end into one row, for attention that knows where each sequence starts.

    A thin face of ``transformers.DataCollatorWithFlattening``.
    """

    def __init__(self) -> None:
        from transformers import DataCollatorWithFlattening

        self._flatten = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)

    def __call__(self, features: Sequence[Feature]) -> Batch:
        """Collate B features of T_1, ..., T_B tokens.

        Returns:
            ``input_ids``, ``labels`` (-100 for the first token of each sequence) and ``position_ids`` (from 0
            in each sequence): int64, ``[1, sum T]``; ``cu_seq_lens_q``, ``cu_seq_lens_k``: int32,
            ``[B + 1]``, cumulative lengths from 0; ``max_length_q``, ``max_length_k``: int. No
            ``attention_mask``: there is no padding to mask.
        """
        rows = [_row(feature) for feature in features]
        return dict(self._flatten([{"input_ids": ids, "labels": labels} for ids, labels in rows]))


def row_sizes(feature: Any) -> list[int]:
    """Tokens of each row that an example takes in a batch where nothing is shared: one, or two of a masked pair."""
    parts = [getattr(feature, name, None) for name in ("full", "masked")]
    return [len(part) for part in parts if part is not None] or [len(feature)]


def is_packed(collator: Any) -> bool:
    """Whether a collator puts a batch end to end instead of padding it."""
    return isinstance(collator, PackingCollator) or bool(getattr(collator, "packed", False))


def choose_collator(
    attn_implementation: str,
    device: torch.device | str,
    *,
    pad_token_id: int,
    lengths: Sequence[int] = LENGTHS,
    max_length: int | None = None,
    images: bool = False,
    decoder_start: int | None = None,
) -> Collator:
    """Packing where the attention is a flash attention on CUDA and the model a causal one without images, else padding.

    Args:
        attn_implementation: ``"auto"`` or a name that transformers takes; see :func:`resolve_attention`.
        device: where the model runs.
        pad_token_id, lengths, max_length: of :class:`PaddingCollator`.
        images: whether the model takes images. ``decoder_start``: of an encoder-decoder.
    """
    name = resolve_attention(attn_implementation, device)
    if not images and decoder_start is None and torch.device(device).type == "cuda" and "flash" in name:
        return PackingCollator()
    return PaddingCollator(pad_token_id, tuple(lengths), max_length, decoder_start)


def resolve_attention(attn_implementation: str, device: torch.device | str) -> str:
    """Resolve ``"auto"``: the newest flash attention that runs on the device, else ``sdpa``.

    Any other name is returned as it is: transformers knows more of them than are listed here.
    """
    if attn_implementation != "auto":
        return attn_implementation
    if torch.device(device).type == "cuda":
        from transformers import utils

        major, _ = torch.cuda.get_device_capability(device)
        if major >= 9 and utils.is_flash_attn_4_available():
            return "flash_attention_4"
        if major == 9 and utils.is_flash_attn_3_available():
            return "flash_attention_3"
        if major >= 8 and utils.is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"


def padded_length(length: int, lengths: Sequence[int] = LENGTHS) -> int:
    """The smallest of ``lengths``, or else multiple of the last one, that is at least ``length``."""
    last = lengths[-1]
    return next((one for one in lengths if one >= length), -(-length // last) * last)


def _check_lengths(lengths: Sequence[int]) -> None:
    ascending = all(a < b for a, b in itertools.pairwise(lengths))
    if not lengths or lengths[0] < 1 or not ascending:
        raise ConfigError(f"lengths must be one or more ascending positive numbers of tokens, not {list(lengths)}")


def _prompt_length(feature: Feature) -> int:
    if isinstance(feature, Encoded):
        return feature.prompt_length
    return next((k for k, label in enumerate(feature["labels"]) if label != IGNORED), len(feature["labels"]))


def _pictures(feature: Feature) -> Pictures | None:
    return feature.pictures if isinstance(feature, Encoded) else None


def _row(feature: Feature) -> tuple[list[int], list[int]]:
    if isinstance(feature, Encoded):
        return feature.input_ids, feature.labels
    return feature["input_ids"], feature["labels"]
