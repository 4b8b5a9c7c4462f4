"""The information-gain family as torch.library ops: one per public function; the backend is chosen when the op runs.

What a backend registers is called by position:

    token_gain(hidden_full, hidden_masked, lm_head_weight, targets, bias, softcap, scale) -> the fields of TokenGain
    token_gain_statistics(hidden_full, hidden_masked, lm_head_weight, targets, first_entry, bias, softcap, scale)
        -> statistics [10, T] float64
    key_part_information_gain(probability_gain, offsets, alpha) -> [E]
    masked_jsd(hidden_live, hidden_frozen, weight_live, weight_frozen, temperature, row_weight, bias_live, bias_frozen,
        softcap, scale, needs_grad) -> loss, grad_hidden, grad_weight, grad_bias
    linear_cross_entropy(hidden, weight, targets, row_weight, bias, softcap, scale, needs_grad)
        -> loss, grad_hidden, grad_weight, grad_bias

``needs_grad`` says which of the three gradients to compute; the others are empty tensors. Gradients are contiguous,
whatever their tensors are. ``temperature`` and ``row_weight`` are [T]; rows of weight 0 may hold any value, NaN and
targets outside the vocabulary too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cit_fast.errors import CitFastError, DataError
from cit_fast.ops.backends import resolve
from cit_fast.ops.information_gain import reference
from cit_fast.ops.information_gain.checks import check_offsets, check_targets
from cit_fast.ops.information_gain.native import kernels_cannot

# Fields of TokenGain.
_GAINS = 7

# --- registration: token_gain -------------------------------------------------------------------------------


@torch.library.custom_op(
    "cit_fast::token_gain",
    mutates_args=(),
    schema="(Tensor hidden_full, Tensor hidden_masked, Tensor lm_head_weight, Tensor targets, Tensor? bias, "
    "float? softcap, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _token_gain(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, ...]:
    check_targets("token_gain", targets, lm_head_weight.shape[0])
    cannot = kernels_cannot(hidden_full, hidden_masked, bias, weights=(lm_head_weight,))
    run = resolve("token_gain", hidden_full.device, cannot=cannot)
    with _full_precision(hidden_full):
        out: tuple[Tensor, ...] = run(hidden_full, hidden_masked, lm_head_weight, targets, bias, softcap, scale)
    return out


@_token_gain.register_fake
def _(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, ...]:
    dtype = reference.accumulation_dtype(hidden_full, hidden_masked, lm_head_weight, bias)
    return tuple(hidden_full.new_empty((targets.shape[0],), dtype=dtype) for _ in range(_GAINS))


def _token_gain_backward(ctx: Any, *gradients: Tensor) -> None:
    raise CitFastError(
        "token_gain is for scoring and has no gradient; call it under torch.no_grad(), train with masked_jsd"
    )


_token_gain.register_autograd(_token_gain_backward)


# --- registration: token_gain_statistics ---------------------------------------------------------------------


@torch.library.custom_op(
    "cit_fast::token_gain_statistics",
    mutates_args=(),
    schema="(Tensor hidden_full, Tensor hidden_masked, Tensor lm_head_weight, Tensor targets, SymInt first_entry, "
    "Tensor? bias, float? softcap, float scale) -> Tensor",
)
def _token_gain_statistics(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    first_entry: int,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    cannot = kernels_cannot(hidden_full, hidden_masked, bias, weights=(lm_head_weight,))
    run = resolve("token_gain_statistics", hidden_full.device, cannot=cannot)
    with _full_precision(hidden_full):
        out: Tensor = run(hidden_full, hidden_masked, lm_head_weight, targets, first_entry, bias, softcap, scale)
    return out


@_token_gain_statistics.register_fake
def _(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    first_entry: int,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    return hidden_full.new_empty((len(reference.GAIN_STATISTICS), targets.shape[0]), dtype=torch.float64)


_token_gain_statistics.register_autograd(_token_gain_backward)


# --- registration: key_part_information_gain ----------------------------------------------------------------


@torch.library.custom_op(
    "cit_fast::key_part_information_gain",
    mutates_args=(),
    schema="(Tensor probability_gain, Tensor offsets, float alpha) -> Tensor",
)
def _key_part_information_gain(probability_gain: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    if offsets.device.type == "cpu":
        check_offsets(offsets, probability_gain.shape[0])
    # A sum over the tokens of each example: the same for every backend, so that a forced one can score as well.
    return reference.key_part_information_gain(probability_gain, offsets, alpha)


@_key_part_information_gain.register_fake
def _(probability_gain: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    return probability_gain.new_empty((offsets.shape[0] - 1,))


def _gain_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    probability_gain, offsets, ctx.alpha = inputs
    ctx.save_for_backward(probability_gain, offsets)


def _gain_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    probability_gain, offsets = ctx.saved_tensors
    share = reference.position_weights(offsets, probability_gain, ctx.alpha)
    return share * gradient[reference.example_of_token(offsets, probability_gain)], None, None


_key_part_information_gain.register_autograd(_gain_backward, setup_context=_gain_setup)


# --- registration: masked_jsd -------------------------------------------------------------------------------


@torch.library.custom_op(
    "cit_fast::masked_jsd",
    mutates_args=(),
    schema="(Tensor hidden_live, Tensor hidden_frozen, Tensor weight_live, Tensor weight_frozen, "
    "Tensor temperature, Tensor row_weight, Tensor? bias_live, Tensor? bias_frozen, float? softcap, "
    "float scale, bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
def _masked_jsd(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    softcap: float | None,
    scale: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    if temperature.device.type == "cpu":
        wrong = (~((temperature > 0) & temperature.isfinite()) & (row_weight != 0)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"masked_jsd: temperature[{row}] is {float(temperature[row])}; expected a positive number")
    cannot = kernels_cannot(
        *(hidden_live, hidden_frozen, temperature, row_weight, bias_live, bias_frozen),
        weights=(weight_live, weight_frozen),
    )
    run = resolve("masked_jsd", hidden_live.device, cannot=cannot)
    with _full_precision(hidden_live):
        out: tuple[Tensor, ...] = run(
            hidden_live,
            hidden_frozen,
            weight_live,
            weight_frozen,
            temperature,
            row_weight,
            bias_live,
            bias_frozen,
            softcap,
            scale,
            (needs_hidden, needs_weight, needs_bias),
        )
    return out


@_masked_jsd.register_fake
def _(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    softcap: float | None,
    scale: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    dtype = reference.accumulation_dtype(hidden_live, hidden_frozen, weight_live, weight_frozen, bias_live, bias_frozen)
    bias_dtype = weight_live.dtype if bias_live is None else bias_live.dtype
    return (
        hidden_live.new_empty((), dtype=dtype),
        hidden_live.new_empty(hidden_live.shape) if needs_hidden else hidden_live.new_empty(0),
        weight_live.new_empty(weight_live.shape) if needs_weight else weight_live.new_empty(0),
        weight_live.new_empty(weight_live.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-3:]
    ctx.save_for_backward(*output[1:])


def _scaled_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of hidden states, weight and bias."""
    return tuple(
        saved * gradient.to(saved.dtype) if needed else None
        for saved, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )


def _jsd_backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = _scaled_gradients(ctx, gradient)
    return (hidden, None, weight, None, None, None, bias, *([None] * 6))


_masked_jsd.register_autograd(_jsd_backward, setup_context=_loss_setup)


# --- registration: linear_cross_entropy ----------------------------------------------------------------------


@torch.library.custom_op(
    "cit_fast::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor row_weight, Tensor? bias, float? softcap, "
    "float scale, bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    check_targets("linear_cross_entropy", targets, weight.shape[0], row_weight)
    cannot = kernels_cannot(hidden, row_weight, bias, weights=(weight,))
    run = resolve("linear_cross_entropy", hidden.device, cannot=cannot)
    with _full_precision(hidden):
        out: tuple[Tensor, ...] = run(
            *(hidden, weight, targets, row_weight, bias, softcap, scale), (needs_hidden, needs_weight, needs_bias)
        )
    return out


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    dtype = reference.accumulation_dtype(hidden, weight, bias)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape) if needs_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape) if needs_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=weight.dtype if bias is None else bias.dtype),
    )


def _cross_entropy_backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = _scaled_gradients(ctx, gradient)
    return (hidden, weight, None, None, bias, *([None] * 5))


_linear_cross_entropy.register_autograd(_cross_entropy_backward, setup_context=_loss_setup)


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast reaches into a custom op's body and would turn the accumulation in float32 back into half
    precision.
    """
    return torch.autocast(tensor.device.type, enabled=False)
