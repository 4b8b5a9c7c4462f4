"""What the information-gain ops accept: shapes, dtypes, devices, and on the CPU values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cit_fast.errors import ConfigError, DataError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def shape(tensor: Tensor) -> str:
    """The shape of a tensor as messages show it."""
    return str(list(tensor.shape))


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Raise DataError for a tensor that is not floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise DataError(f"{op}: {name} is {tensor.dtype}; expected float16, bfloat16, float32 or float64")


def check_index(op: str, name: str, tensor: Tensor, length: int, meaning: str) -> None:
    """Raise DataError unless ``tensor`` is [length], int32 or int64."""
    if tensor.dtype not in INDEX_DTYPES or tensor.shape != (length,):
        raise DataError(
            f"{op}: {name} is {shape(tensor)} {tensor.dtype}; expected [{length}] int32 or int64, {meaning}"
        )


def check_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise DataError for a tensor on another device than the first."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise DataError(
                f"{op}: {name} is on {tensor.device} and the first argument on {first.device}; expected one"
            )


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    side: str = "",
) -> None:
    """Raise DataError or ConfigError unless hidden states, head and options fit each other."""
    check_float(op, **{f"hidden{side}": hidden, f"weight{side}": weight, f"bias{side}": bias})
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise DataError(
            f"{op}: hidden{side} is {shape(hidden)} and the head's weight{side} {shape(weight)}; "
            f"expected [T, d] and [V, d]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise DataError(f"{op}: bias{side} is {shape(bias)}; expected [{weight.shape[0]}]")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ConfigError(f"{op}: softcap is {softcap}; expected a positive number or None")
    if not math.isfinite(scale):
        raise ConfigError(f"{op}: scale is {scale}; expected a finite number")


def check_row_vector(op: str, name: str, tensor: Tensor, rows: int, *, or_scalar: bool = False) -> None:
    """Raise DataError unless ``tensor`` has one number for each row."""
    check_float(op, **{name: tensor})
    if tensor.shape != (rows,) and not (or_scalar and tensor.dim() == 0):
        expected = f"[{rows}] or a scalar" if or_scalar else f"[{rows}]"
        raise DataError(f"{op}: {name} is {shape(tensor)}; expected {expected}, one per row of the hidden states")


def check_offsets(offsets: Tensor, tokens: int) -> None:
    """Raise DataError unless the offsets describe ``tokens`` tokens, each example at least one."""
    lengths = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != tokens or bool((lengths < 0).any()):
        raise DataError(
            f"key_part_information_gain: offsets runs from {int(offsets[0])} to {int(offsets[-1])}; "
            f"expected ascending numbers from 0 to {tokens}, the number of tokens"
        )
    empty = (lengths == 0).nonzero()
    if len(empty):
        raise DataError(f"key_part_information_gain: example {int(empty[0])} has no response tokens")


def may_wait(tensor: Tensor) -> bool:
    """Whether looking at values stops nothing: a GPU would have to be waited for."""
    return tensor.device.type == "cpu"


def check_targets(op: str, targets: Tensor, vocabulary: int, row_weight: Tensor | None = None) -> None:
    """Raise DataError for a target that is no token; rows of weight 0 may hold any."""
    wrong = (targets < 0) | (targets >= vocabulary)
    outside = (wrong if row_weight is None else wrong & (row_weight != 0)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise DataError(f"{op}: targets[{row}] is {int(targets[row])}; expected a token in [0, {vocabulary})")


def marked_targets(targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Targets of a device that is not waited for: brought into the vocabulary, and what that is to be seen by.

    Returns:
        Targets [T] in [0, vocabulary), and [T] float32: NaN where one was outside, else 0.
    """
    inside = targets.clamp(0, vocabulary - 1)
    return inside, torch.zeros_like(targets, dtype=torch.float32).masked_fill(inside != targets, math.nan)


def check_temperature(op: str, temperature: Tensor, row_weight: Tensor) -> None:
    """On CPU tensors only; rows of weight 0 may hold any."""
    if not may_wait(temperature):
        return
    wrong = (~((temperature > 0) & temperature.isfinite()) & (row_weight != 0)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"{op}: temperature[{row}] is {float(temperature[row])}; expected a positive number")


def check_contexts(
    op: str,
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> None:
    """Raise DataError or ConfigError unless two contexts of the same tokens, head, targets and options fit."""
    check_head(op, hidden_full, lm_head_weight, bias, softcap, scale)
    if hidden_masked.shape != hidden_full.shape:
        raise DataError(
            f"{op}: hidden_masked is {shape(hidden_masked)} and hidden_full {shape(hidden_full)}; "
            f"they hold the same tokens, so their shapes must be equal"
        )
    check_float(op, hidden_masked=hidden_masked)
    check_index(op, "targets", targets, hidden_full.shape[0], "one per row of hidden_full")
    check_device(
        op, hidden_full, hidden_masked=hidden_masked, lm_head_weight=lm_head_weight, targets=targets, bias=bias
    )
