"""Key-part information gain and the losses of KPIG in C++ on the CPU (``native``).

csrc/cpu/information_gain/information_gain.h says how it is done. Bias, temperatures and row weights are handed over in
float32; hidden states and heads as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register
from cit_fast.ops.information_gain.reference import GAIN_STATISTICS, LogitOptions, Needed, gains_from_statistics

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/dtype.h
_KERNELS = (Backend.NATIVE, Backend.TRITON)


@register("token_gain", Backend.NATIVE)
def _token_gain(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: LogitOptions,
) -> tuple[Tensor, ...]:
    statistics = _statistics(hidden_full, hidden_masked, lm_head_weight, targets, 0, bias, options)
    return tuple(gain.float() for gain in gains_from_statistics(statistics))


@register("token_gain_statistics", Backend.NATIVE)
def _statistics(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    first_entry: int,
    bias: Tensor | None,
    options: LogitOptions,
) -> Tensor:
    from cit_fast import _native

    full, masked = rows_of(hidden_full), rows_of(hidden_masked)
    targets = targets.long().contiguous()
    bias = _float(bias)
    statistics = torch.empty(len(GAIN_STATISTICS), targets.shape[0], dtype=torch.float64)
    _native.token_gain_statistics(
        _matrix(full),
        _matrix(masked),
        _matrix(lm_head_weight),
        bias=_address(bias),
        targets=targets.data_ptr(),
        first_entry=first_entry,
        **_how(options),
        statistics=statistics.data_ptr(),
    )
    return statistics


@register("masked_jsd", Backend.NATIVE)
def _masked_jsd(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    options: LogitOptions,
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cit_fast import _native

    live, frozen = rows_of(hidden_live), rows_of(hidden_frozen)
    temperature, row_weight = temperature.float().contiguous(), row_weight.float().contiguous()
    bias_live_float, bias_frozen_float = _float(bias_live), _float(bias_frozen)
    gradients = _empty_gradients(hidden_live, weight_live, needed)
    loss = _native.masked_jsd(
        _matrix(live),
        _matrix(frozen),
        _matrix(weight_live),
        _matrix(weight_frozen),
        bias_live=_address(bias_live_float),
        bias_frozen=_address(bias_frozen_float),
        temperature=temperature.data_ptr(),
        row_weight=row_weight.data_ptr(),
        **_how(options),
        gradients=_addresses(gradients, needed),
    )
    return torch.tensor(loss, dtype=torch.float32), *_cast(gradients, hidden_live, weight_live, bias_live)


@register("linear_kl_divergence", Backend.NATIVE)
def _linear_kl_divergence(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    targets: Tensor | None,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    options: LogitOptions,
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cit_fast import _native

    live, frozen = rows_of(hidden_live), rows_of(hidden_frozen)
    temperature, row_weight = temperature.float().contiguous(), row_weight.float().contiguous()
    targets = None if targets is None else targets.long().contiguous()
    bias_live_float, bias_frozen_float = _float(bias_live), _float(bias_frozen)
    gradients = _empty_gradients(hidden_live, weight_live, needed)
    loss = _native.linear_kl_divergence(
        _matrix(live),
        _matrix(frozen),
        _matrix(weight_live),
        _matrix(weight_frozen),
        bias_live=_address(bias_live_float),
        bias_frozen=_address(bias_frozen_float),
        temperature=temperature.data_ptr(),
        row_weight=row_weight.data_ptr(),
        targets=_address(targets),
        **_how(options),
        gradients=_addresses(gradients, needed),
    )
    return torch.tensor(loss, dtype=torch.float32), *_cast(gradients, hidden_live, weight_live, bias_live)


@register("linear_cross_entropy", Backend.NATIVE)
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    options: LogitOptions,
    entropy_gate: float,
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cit_fast import _native

    rows = rows_of(hidden)
    targets, row_weight = targets.long().contiguous(), row_weight.float().contiguous()
    bias_float = _float(bias)
    gradients = _empty_gradients(hidden, weight, needed)
    loss = _native.linear_cross_entropy(
        _matrix(rows),
        _matrix(weight),
        bias=_address(bias_float),
        targets=targets.data_ptr(),
        row_weight=row_weight.data_ptr(),
        entropy_gate=entropy_gate,
        **_how(options),
        gradients=_addresses(gradients, needed),
    )
    return torch.tensor(loss, dtype=torch.float32), *_cast(gradients, hidden, weight, bias)


def kernels_cannot(*tensors: Tensor | None, weights: tuple[Tensor, ...]) -> dict[Backend, str]:
    """Why the kernels, C++ or Triton, cannot take these tensors; empty when they can.

    Args:
        tensors: Everything in floating point.
        weights: The heads, which are read where they lie.
    """
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in (*tensors, *weights)):
        return dict.fromkeys(_KERNELS, "it takes no float64")
    if any(weight.stride(1) != 1 and weight.shape[1] > 1 for weight in weights):
        return dict.fromkeys(_KERNELS, "the elements of a row of the head do not lie side by side")
    return {}


def rows_of(hidden: Tensor) -> Tensor:
    """``hidden`` itself where the elements of a row lie side by side, else a copy; the caller keeps it alive."""
    return hidden if hidden.stride(1) == 1 and hidden.stride(0) > 0 else hidden.contiguous()


def _matrix(tensor: Tensor) -> tuple[int, int, int, int, int]:
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape[0], tensor.shape[1], tensor.stride(0)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _how(options: LogitOptions) -> dict[str, Any]:
    return {"scale": options.scale, "softcap": options.softcap or 0.0, "threads": torch.get_num_threads()}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _empty_gradients(hidden: Tensor, weight: Tensor, needed: Needed) -> tuple[Tensor, Tensor, Tensor]:
    """In float32: hidden states (all of it is written), weight and bias (added to)."""
    return (
        torch.empty(hidden.shape if needed.hidden else 0, dtype=torch.float32),
        torch.zeros(weight.shape if needed.weight else 0, dtype=torch.float32),
        torch.zeros(weight.shape[0] if needed.bias else 0, dtype=torch.float32),
    )


def _addresses(gradients: tuple[Tensor, Tensor, Tensor], needed: Needed) -> tuple[int, int, int]:
    hidden, weight, bias = (
        tensor.data_ptr() if wanted else 0 for tensor, wanted in zip(gradients, needed, strict=True)
    )
    return hidden, weight, bias


def _cast(
    gradients: tuple[Tensor, Tensor, Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return gradients[0].to(hidden.dtype), gradients[1].to(weight.dtype), gradients[2].to(bias_dtype)
