"""The ops of the information gain as torch knows them: schemas, fakes, gradients; the backend is chosen when one runs.

An option is spelt in the public functions, in ``LogitOptions`` and ``Needed``, and in these schemas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cit_fast.errors import CitFastError
from cit_fast.ops.backends import Backend, Work, narrowest, register_lazily, resolve
from cit_fast.ops.information_gain import reference
from cit_fast.ops.information_gain.checks import (
    check_offsets,
    check_targets,
    check_temperature,
    marked_targets,
    may_wait,
)
from cit_fast.ops.information_gain.native import kernels_cannot
from cit_fast.ops.information_gain.reference import LogitOptions, Needed, TokenGain

_LOGITS = "float? softcap, float scale"
_NEEDED = "bool needs_hidden, bool needs_weight, bool needs_bias"
_GRADIENTS = "(Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast reaches into a custom op's body and would turn sums in float32 back into half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _resolve(op: str, hidden: Tensor, *others: Tensor | None, weights: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The implementation for these tensors; ``weights``: the heads."""

    def work() -> Work:
        dtypes = {tensor.dtype for tensor in (hidden, *others, *weights) if tensor is not None}
        return Work(narrowest(dtypes), hidden.shape[0] * weights[0].shape[0])

    return resolve(op, hidden.device, cannot=kernels_cannot(hidden, *others, weights=weights), work=work)


def _targets(op: str, targets: Tensor, vocabulary: int, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Targets that are tokens, and row weights: on a GPU those of other targets are NaN, and so is what follows."""
    if may_wait(targets):
        check_targets(op, targets, vocabulary, row_weight)
        return targets, row_weight
    targets, outside = marked_targets(targets, vocabulary)
    return targets, torch.where(row_weight == 0, row_weight, row_weight + outside)


@torch.library.custom_op(
    "cit_fast::token_gain",
    mutates_args=(),
    schema=f"(Tensor hidden_full, Tensor hidden_masked, Tensor lm_head_weight, Tensor targets, Tensor? bias, {_LOGITS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def token_gain(
    full: Tensor, masked: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    """See :func:`cit_fast.ops.token_gain`."""
    outside = None
    if may_wait(targets):
        check_targets("token_gain", targets, weight.shape[0])
    else:
        targets, outside = marked_targets(targets, weight.shape[0])
    run = _resolve("token_gain", full, masked, bias, weights=(weight,))
    with _full_precision(full):
        out: tuple[Tensor, ...] = run(full, masked, weight, targets, bias, LogitOptions(*options))
    if outside is None:
        return out
    log_p, log_q, gain, *others = out  # the others do not know the target
    return (log_p + outside, log_q + outside, gain + outside, *others)


@token_gain.register_fake
def _(
    full: Tensor, masked: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    dtype = reference.accumulation_dtype(full, masked, weight, bias)
    return tuple(full.new_empty((targets.shape[0],), dtype=dtype) for _ in TokenGain._fields)


def _no_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise CitFastError(
        "token_gain is for scoring and has no gradient; call it under torch.no_grad(), train with masked_jsd"
    )


token_gain.register_autograd(_no_gradient)


@torch.library.custom_op(
    "cit_fast::token_gain_statistics",
    mutates_args=(),
    schema="(Tensor hidden_full, Tensor hidden_masked, Tensor lm_head_weight, Tensor targets, SymInt first_entry, "
    f"Tensor? bias, {_LOGITS}) -> Tensor",
)
def token_gain_statistics(
    full: Tensor,
    masked: Tensor,
    weight: Tensor,
    targets: Tensor,
    first_entry: int,
    bias: Tensor | None,
    *options: Any,
) -> Tensor:
    """See :func:`cit_fast.ops.token_gain_statistics`."""
    run = _resolve("token_gain_statistics", full, masked, bias, weights=(weight,))
    with _full_precision(full):
        out: Tensor = run(full, masked, weight, targets, first_entry, bias, LogitOptions(*options))
    return out


@token_gain_statistics.register_fake
def _(full: Tensor, masked: Tensor, weight: Tensor, targets: Tensor, *_: Any) -> Tensor:
    return full.new_empty((len(reference.GAIN_STATISTICS), targets.shape[0]), dtype=torch.float64)


token_gain_statistics.register_autograd(_no_gradient)


@torch.library.custom_op(
    "cit_fast::key_part_information_gain",
    mutates_args=(),
    schema="(Tensor probability_gain, Tensor offsets, float alpha) -> Tensor",
)
def key_part_information_gain(probability_gain: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    """See :func:`cit_fast.ops.key_part_information_gain`."""
    if offsets.device.type == "cpu":
        check_offsets(offsets, probability_gain.shape[0])
    # A sum over the tokens of each example: the same for every backend, so that a forced one can score as well.
    return reference.key_part_information_gain(probability_gain, offsets, alpha)


@key_part_information_gain.register_fake
def _(probability_gain: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    return probability_gain.new_empty((offsets.shape[0] - 1,))


def _gain_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    probability_gain, offsets, ctx.alpha = inputs
    ctx.save_for_backward(probability_gain, offsets)


def _gain_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    probability_gain, offsets = ctx.saved_tensors
    share = reference.position_weights(offsets, probability_gain, ctx.alpha)
    return share * gradient[reference.example_of_token(offsets, probability_gain)], None, None


key_part_information_gain.register_autograd(_gain_backward, setup_context=_gain_setup)


@torch.library.custom_op(
    "cit_fast::masked_jsd",
    mutates_args=(),
    schema="(Tensor hidden_live, Tensor hidden_frozen, Tensor weight_live, Tensor weight_frozen, Tensor temperature, "
    f"Tensor row_weight, Tensor? bias_live, Tensor? bias_frozen, {_LOGITS}, {_NEEDED}) -> {_GRADIENTS}",
)
def masked_jsd(
    live: Tensor,
    frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """See :func:`cit_fast.ops.masked_jsd`."""
    check_temperature("masked_jsd", temperature, row_weight)
    hidden_and_rows = (live, frozen, temperature, row_weight, bias_live, bias_frozen)
    heads = (weight_live, weight_frozen)
    run = _resolve("masked_jsd", *hidden_and_rows, weights=heads)
    with _full_precision(live):
        out: tuple[Tensor, ...] = run(
            *(live, frozen, *heads, temperature, row_weight, bias_live, bias_frozen),
            LogitOptions(*options[:-3]),
            Needed(*options[-3:]),
        )
    return out


@masked_jsd.register_fake
def _(live: Tensor, frozen: Tensor, weight_live: Tensor, weight_frozen: Tensor, *more: Any) -> tuple[Tensor, ...]:
    bias_live, bias_frozen = more[2:4]
    dtype = reference.accumulation_dtype(live, frozen, weight_live, weight_frozen, bias_live, bias_frozen)
    return _fake_loss(live, weight_live, bias_live, Needed(*more[-3:]), dtype)


def _fake_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Needed, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape) if needed.hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape) if needed.weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needed.bias else 0, dtype=weight.dtype if bias is None else bias.dtype),
    )


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needed = inputs[-3:]
    ctx.save_for_backward(*output[1:])


def _scaled_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of hidden states, weight and bias."""
    return tuple(
        _times(saved, gradient) if needed else None for saved, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    )


def _times(saved: Tensor, factor: Tensor) -> Tensor:
    """A product rounded once: a factor such as 1 over the number of tokens has more digits than half precision."""
    if saved.dtype not in (torch.bfloat16, torch.float16):
        return saved * factor.to(saved.dtype)
    result = torch.empty_like(saved)
    at_once = max(1, reference.WEIGHT_BLOCK_ELEMENTS // max(1, saved[:1].numel()))
    for rows, into in zip(torch.split(saved, at_once), torch.split(result, at_once), strict=True):
        into.copy_(rows.float() * factor.float())
    return result


def _jsd_backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = _scaled_gradients(ctx, gradient)
    return (hidden, None, weight, None, None, None, bias, *([None] * 6))


masked_jsd.register_autograd(_jsd_backward, setup_context=_loss_setup)


@torch.library.custom_op(
    "cit_fast::linear_kl_divergence",
    mutates_args=(),
    schema="(Tensor hidden_live, Tensor hidden_frozen, Tensor weight_live, Tensor weight_frozen, Tensor temperature, "
    "Tensor row_weight, Tensor? targets, Tensor? bias_live, Tensor? bias_frozen, "
    f"{_LOGITS}, {_NEEDED}) -> {_GRADIENTS}",
)
def linear_kl_divergence(
    live: Tensor,
    frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    targets: Tensor | None,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """See :func:`cit_fast.ops.linear_kl_divergence`."""
    check_temperature("linear_kl_divergence", temperature, row_weight)
    if targets is not None:
        targets, row_weight = _targets("linear_kl_divergence", targets, weight_live.shape[0], row_weight)
    hidden_and_rows = (live, frozen, temperature, row_weight, bias_live, bias_frozen)
    heads = (weight_live, weight_frozen)
    run = _resolve("linear_kl_divergence", *hidden_and_rows, weights=heads)
    with _full_precision(live):
        out: tuple[Tensor, ...] = run(
            *(live, frozen, *heads, temperature, row_weight, targets, bias_live, bias_frozen),
            LogitOptions(*options[:-3]),
            Needed(*options[-3:]),
        )
    return out


@linear_kl_divergence.register_fake
def _(live: Tensor, frozen: Tensor, weight_live: Tensor, weight_frozen: Tensor, *more: Any) -> tuple[Tensor, ...]:
    bias_live, bias_frozen = more[3:5]
    dtype = reference.accumulation_dtype(live, frozen, weight_live, weight_frozen, bias_live, bias_frozen)
    return _fake_loss(live, weight_live, bias_live, Needed(*more[-3:]), dtype)


def _kl_backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = _scaled_gradients(ctx, gradient)
    return (hidden, None, weight, None, None, None, None, bias, *([None] * 6))


linear_kl_divergence.register_autograd(_kl_backward, setup_context=_loss_setup)


@torch.library.custom_op(
    "cit_fast::linear_cross_entropy",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor targets, Tensor row_weight, Tensor? bias, {_LOGITS}, "
    f"float entropy_gate, {_NEEDED}) -> {_GRADIENTS}",
)
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    """See :func:`cit_fast.ops.linear_cross_entropy`."""
    targets, row_weight = _targets("linear_cross_entropy", targets, weight.shape[0], row_weight)
    run = _resolve("linear_cross_entropy", hidden, row_weight, bias, weights=(weight,))
    how = LogitOptions(*options[:2]), options[2], Needed(*options[-3:])
    with _full_precision(hidden):
        out: tuple[Tensor, ...] = run(hidden, weight, targets, row_weight, bias, *how)
    return out


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    dtype = reference.accumulation_dtype(hidden, weight, bias)
    return _fake_loss(hidden, weight, bias, Needed(*options[-3:]), dtype)


def _cross_entropy_backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = _scaled_gradients(ctx, gradient)
    return (hidden, weight, None, None, bias, *([None] * 6))


linear_cross_entropy.register_autograd(_cross_entropy_backward, setup_context=_loss_setup)

for _name in ("token_gain", "token_gain_statistics"):
    register_lazily(_name, Backend.TRITON, f"cit_fast.kernels.information_gain:{_name}")
for _name in ("masked_jsd", "linear_kl_divergence", "linear_cross_entropy"):
    register_lazily(_name, Backend.TRITON, f"cit_fast.kernels.information_gain_losses:{_name}")
