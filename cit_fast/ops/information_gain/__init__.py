"""Key-part information gain (KPIG): how much a model's answer depends on the words that define the task.

``token_gain`` compares two contexts of the same answer token by token, ``key_part_information_gain`` sums the
result over each example, ``masked_jsd`` is the loss that keeps the masked predictions near those of an
earlier model and ``linear_cross_entropy`` the one of the full instruction. None of them returns logits. They
see the head as ``logits = cap(scale * (hidden @ weight.T + bias))`` with
``cap(z) = softcap * tanh(z / softcap)``, or z itself where ``softcap`` is None.

A head whose vocabulary is split over devices gives ``token_gain_statistics`` on each, which
``token_gain_from_statistics`` merges.

Values (targets, offsets, temperatures) are checked on CPU tensors only; on another device a check would have
to wait for it, and right values are the caller's promise.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cit_fast.errors import CitFastError, ConfigError, DataError
from cit_fast.ops.backends import Backend, register_lazily, resolve
from cit_fast.ops.information_gain import reference
from cit_fast.ops.information_gain.checks import (
    INDEX_DTYPES,
    check_contexts,
    check_device,
    check_float,
    check_head,
    check_index,
    check_offsets,
    check_row_vector,
    check_targets,
    shape,
)
from cit_fast.ops.information_gain.native import kernels_cannot
from cit_fast.ops.information_gain.reference import LogitOptions, Needed


class TokenGain(NamedTuple):
    """What the key parts tell about each token: p predicted from the full instruction, q from the masked one.

    Every field is [T], float32 (float64 for float64 inputs); entropies and divergences are in nats.
    """

    log_prob_full: Tensor
    """log p(target), at most 0."""
    log_prob_masked: Tensor
    """log q(target), at most 0."""
    probability_gain: Tensor
    """p(target) - q(target), in [-1, 1]."""
    entropy_full: Tensor
    """H(p), in [0, log V]."""
    entropy_masked: Tensor
    """H(q), in [0, log V]."""
    kl_full_masked: Tensor
    """KL(p || q), at least 0."""
    kl_masked_full: Tensor
    """KL(q || p), at least 0."""


def token_gain(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> TokenGain:
    """Compare the predictions of the same tokens after the full and after the masked instruction.

    For scoring: the result carries no gradient, and calling backward through it raises. Call it under
    ``torch.no_grad()``. Pass response tokens only: padding and prompt would be computed for nothing.

    Args:
        hidden_full: [T, d] float16, bfloat16, float32 or float64. Final hidden states that predict
            ``targets``, from the full instruction.
        hidden_masked: [T, d]. The same tokens' hidden states when the key parts are masked.
        lm_head_weight: [V, d]. The output embedding.
        targets: [T] int32 or int64, in [0, V).
        bias: [V] or None. Without a cap, a bias of -inf takes a token out of the vocabulary.
        softcap: Positive cap of the logits (Gemma), or None.
        scale: Finite factor of the logits (Cohere, Granite).

    Returns:
        :class:`TokenGain`, seven tensors [T].

    Raises:
        DataError: Shapes, dtypes or devices do not fit, or a target is outside the vocabulary.
        ConfigError: ``softcap`` or ``scale`` is out of range.

    Source: KPIG (arXiv 2403.10056); ``probability_gain`` is the summand p(t_k) - p_masked(t_k) of its G.
    """
    check_contexts("token_gain", hidden_full, hidden_masked, lm_head_weight, targets, bias, softcap, scale)
    return TokenGain(
        *torch.ops.cit_fast.token_gain(
            hidden_full, hidden_masked, lm_head_weight, targets, bias, *LogitOptions(softcap, float(scale))
        )
    )


def token_gain_statistics(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    first_entry: int = 0,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """What :func:`token_gain` needs to know of one piece of the vocabulary: sums that can be merged.

    For a head whose rows are split over devices: each takes its rows, the statistics are gathered and
    :func:`token_gain_from_statistics` gives the same result as :func:`token_gain` with the whole head, but for
    rounding. Ten numbers per token travel.

    Args:
        hidden_full, hidden_masked: [T, d], as in :func:`token_gain`.
        lm_head_weight: [v, d]. Rows ``first_entry`` to ``first_entry + v`` of the output embedding.
        targets: [T] int32 or int64, positions in the whole vocabulary.
        first_entry: Position in the vocabulary of this piece's first row.
        bias: [v] or None, of the same rows.
        softcap, scale: As in :func:`token_gain`.

    Returns:
        [10, T] float64, rows as in ``cit_fast.ops.information_gain.reference.GAIN_STATISTICS``; a target outside the
        piece has the logit -inf. No gradient.

    Raises:
        DataError: Shapes, dtypes or devices do not fit.
        ConfigError: ``softcap`` or ``scale`` is out of range.
    """
    op = "token_gain_statistics"
    check_contexts(op, hidden_full, hidden_masked, lm_head_weight, targets, bias, softcap, scale)
    result: Tensor = torch.ops.cit_fast.token_gain_statistics(
        hidden_full, hidden_masked, lm_head_weight, targets, first_entry, bias, *LogitOptions(softcap, float(scale))
    )
    return result


def token_gain_from_statistics(statistics: Tensor) -> TokenGain:
    """Merge the statistics of all pieces of a vocabulary.

    Args:
        statistics: [P, 10, T] float64, what :func:`token_gain_statistics` gave for each of P pieces, in any
            order; every token's target is in one of them.

    Returns:
        :class:`TokenGain`, seven tensors [T], float64.

    Raises:
        DataError: The shape or dtype is another.
    """
    rows = len(reference.GAIN_STATISTICS)
    if statistics.dim() != 3 or statistics.shape[:2] != (max(1, len(statistics)), rows):
        raise DataError(f"token_gain_from_statistics: statistics is {shape(statistics)}; expected [pieces, {rows}, T]")
    if statistics.dtype != torch.float64:
        raise DataError(f"token_gain_from_statistics: statistics is {statistics.dtype}; expected float64")
    return TokenGain(*reference.gains_from_statistics(reference.merge_statistics(statistics)))


def key_part_information_gain(token_gain: TokenGain | Tensor, offsets: Tensor, alpha: float = 0.3) -> Tensor:
    """Information gain of the key parts per example: G = sum_{k=1..K} alpha^k (p(t_k) - p_masked(t_k)).

    Near 0: the model answers as if the key parts were not there. Differentiable in the probability gains.

    Args:
        token_gain: The result of :func:`token_gain`, or its ``probability_gain``, [T], floating point.
        offsets: [E+1] int32 or int64, from 0 to T, ascending: example e is tokens offsets[e] to offsets[e+1],
            at least one. The convention of ``cu_seqlens``.
        alpha: Decay per token, in (0, 1]; k counts from 1 in every example.

    Returns:
        [E], float32 (float64 for float64 input), at most alpha / (1 - alpha) in size.

    Raises:
        DataError: ``offsets`` does not describe T tokens, or an example has none.
        ConfigError: ``alpha`` is out of range.

    Source: KPIG (arXiv 2403.10056), Info(y|x) - Info(y|mask(x)).
    """
    gain = token_gain.probability_gain if isinstance(token_gain, TokenGain) else token_gain
    check_float("key_part_information_gain", probability_gain=gain)
    if gain.dim() != 1:
        raise DataError(f"key_part_information_gain: the probability gains are {shape(gain)}; expected [T]")
    if offsets.dtype not in INDEX_DTYPES or offsets.dim() != 1 or offsets.shape[0] == 0:
        raise DataError(
            f"key_part_information_gain: offsets is {shape(offsets)} {offsets.dtype}; "
            f"expected [examples + 1] int32 or int64"
        )
    if not 0 < alpha <= 1:
        raise ConfigError(f"key_part_information_gain: alpha is {alpha}; expected 0 < alpha <= 1")
    check_device("key_part_information_gain", gain, offsets=offsets)
    gain = gain.to(reference.accumulation_dtype(gain))
    result: Tensor = torch.ops.cit_fast.key_part_information_gain(gain, offsets, float(alpha))
    return result


def masked_jsd(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor | float,
    row_weight: Tensor | None = None,
    *,
    bias_live: Tensor | None = None,
    bias_frozen: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Jensen-Shannon divergence, in bits, between a live and a frozen model's predictions of the same tokens.

    The gradient goes to the live side only (hidden states, head and bias, each where it requires one); the
    frozen side, ``temperature`` and ``row_weight`` are constants. It is computed in the forward pass, so
    backward costs a multiplication and cannot itself be differentiated.

    Args:
        hidden_live: [T, d] float16, bfloat16, float32 or float64. Final hidden states of the model in
            training.
        hidden_frozen: [T, d'] Those of the earlier model, for the same tokens.
        weight_live: [V, d]. Output embedding of the live model.
        weight_frozen: [V, d']. Output embedding of the frozen model; may be ``weight_live`` itself.
        temperature: [T], 0-dim tensor or float, positive. Divides the (capped) logits of both sides.
        row_weight: [T] floating point or None. None: the mean over the rows. Given: the sum of row_weight_r
            JSD_r, not divided by anything; rows of weight 0 are padding and may hold any value, NaN too.
        bias_live, bias_frozen: [V] or None.
        softcap: Positive cap of the logits (Gemma), or None.
        scale: Finite factor of the logits (Cohere, Granite).

    Returns:
        0-dim, float32 (float64 where an input is); the mean lies in [0, 1].

    Raises:
        DataError: Shapes, dtypes or devices do not fit, there is no row to take the mean of, or a temperature
            is not positive.
        ConfigError: ``softcap`` or ``scale`` is out of range.

    Source: L_JSD of KPIG (arXiv 2403.10056), whose temperature for each example is 2 - min(G, 1). The paper divides
    probabilities; here the logits are divided, with base-2 logarithms.
    """
    check_head("masked_jsd", hidden_live, weight_live, bias_live, softcap, scale, "_live")
    check_head("masked_jsd", hidden_frozen, weight_frozen, bias_frozen, softcap, scale, "_frozen")
    if hidden_frozen.shape[0] != hidden_live.shape[0] or weight_frozen.shape[0] != weight_live.shape[0]:
        raise DataError(
            f"masked_jsd: {hidden_live.shape[0]} live and {hidden_frozen.shape[0]} frozen tokens, "
            f"{weight_live.shape[0]} live and {weight_frozen.shape[0]} frozen vocabulary entries; "
            f"expected the same number of each"
        )
    rows = hidden_live.shape[0]
    dtype = reference.accumulation_dtype(hidden_live, hidden_frozen, weight_live, weight_frozen, bias_live, bias_frozen)
    if isinstance(temperature, Tensor):
        check_row_vector("masked_jsd", "temperature", temperature, rows, or_scalar=True)
        temperature = temperature.detach().to(dtype).expand(rows)
    elif temperature > 0 and math.isfinite(temperature):
        temperature = hidden_live.new_full((rows,), temperature, dtype=dtype)
    else:
        raise DataError(f"masked_jsd: temperature is {temperature}; expected a positive number")
    if row_weight is not None:
        check_row_vector("masked_jsd", "row_weight", row_weight, rows)
        row_weight = row_weight.detach().to(dtype)
    elif rows == 0:
        raise DataError("masked_jsd: no tokens, so there is no mean; pass at least one row, or a row_weight")
    else:
        row_weight = hidden_live.new_full((rows,), 1 / rows, dtype=dtype)
    check_device(
        "masked_jsd",
        hidden_live,
        hidden_frozen=hidden_frozen,
        weight_live=weight_live,
        weight_frozen=weight_frozen,
        temperature=temperature,
        row_weight=row_weight,
        bias_live=bias_live,
        bias_frozen=bias_frozen,
    )
    recording = torch.is_grad_enabled()
    loss: Tensor = torch.ops.cit_fast.masked_jsd(
        hidden_live,
        hidden_frozen.detach(),
        weight_live,
        weight_frozen.detach(),
        temperature,
        row_weight,
        bias_live,
        None if bias_frozen is None else bias_frozen.detach(),
        *LogitOptions(softcap, float(scale)),
        recording and hidden_live.requires_grad,
        recording and weight_live.requires_grad,
        recording and bias_live is not None and bias_live.requires_grad,
    )[0]
    return loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Cross-entropy, in nats, of a head's predictions: the loss of the full instruction beside :func:`masked_jsd`.

    The gradient (hidden states, head and bias, each where it requires one) is computed in the forward pass, so
    backward costs a multiplication and cannot itself be differentiated.

    Args:
        hidden: [T, d] float16, bfloat16, float32 or float64. Final hidden states that predict ``targets``.
        weight: [V, d]. The output embedding.
        targets: [T] int32 or int64, in [0, V).
        row_weight: [T] floating point or None. None: the mean over the rows. Given: the sum of row_weight_r
            (-log p_r(target_r)), not divided by anything; rows of weight 0 are padding and may hold any value,
            NaN, and any target, -100 too.
        bias: [V] or None.
        softcap: Positive cap of the logits (Gemma), or None.
        scale: Finite factor of the logits (Cohere, Granite).

    Returns:
        0-dim, float32 (float64 where an input is), at least 0 for weights that are.

    Raises:
        DataError: Shapes, dtypes or devices do not fit, there is no row to take the mean of, or a target is
            outside the vocabulary.
        ConfigError: ``softcap`` or ``scale`` is out of range.

    Source: L_CE of KPIG (arXiv 2403.10056).
    """
    op = "linear_cross_entropy"
    check_head(op, hidden, weight, bias, softcap, scale)
    rows = hidden.shape[0]
    check_index(op, "targets", targets, rows, "one per row of hidden")
    dtype = reference.accumulation_dtype(hidden, weight, bias)
    if row_weight is not None:
        check_row_vector(op, "row_weight", row_weight, rows)
        row_weight = row_weight.detach().to(dtype)
    elif rows == 0:
        raise DataError(f"{op}: no tokens, so there is no mean; pass at least one row, or a row_weight")
    else:
        row_weight = hidden.new_full((rows,), 1 / rows, dtype=dtype)
    check_device(op, hidden, weight=weight, targets=targets, row_weight=row_weight, bias=bias)
    recording = torch.is_grad_enabled()
    loss: Tensor = torch.ops.cit_fast.linear_cross_entropy(
        *(hidden, weight, targets, row_weight, bias, *LogitOptions(softcap, float(scale))),
        recording and hidden.requires_grad,
        recording and weight.requires_grad,
        recording and bias is not None and bias.requires_grad,
    )[0]
    return loss


# The ops as torch knows them; the backend is chosen when one runs. An option is spelt in the functions above, in
# LogitOptions and Needed, and in these schemas.

_LOGITS = "float? softcap, float scale"
_NEEDED = "bool needs_hidden, bool needs_weight, bool needs_bias"
_GRADIENTS = "(Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast reaches into a custom op's body and would turn sums in float32 back into half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


@torch.library.custom_op(
    "cit_fast::token_gain",
    mutates_args=(),
    schema=f"(Tensor hidden_full, Tensor hidden_masked, Tensor lm_head_weight, Tensor targets, Tensor? bias, {_LOGITS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _token_gain(
    full: Tensor, masked: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    check_targets("token_gain", targets, weight.shape[0])
    run = resolve("token_gain", full.device, cannot=kernels_cannot(full, masked, bias, weights=(weight,)))
    with _full_precision(full):
        out: tuple[Tensor, ...] = run(full, masked, weight, targets, bias, LogitOptions(*options))
    return out


@_token_gain.register_fake
def _(
    full: Tensor, masked: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    dtype = reference.accumulation_dtype(full, masked, weight, bias)
    return tuple(full.new_empty((targets.shape[0],), dtype=dtype) for _ in TokenGain._fields)


def _no_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise CitFastError(
        "token_gain is for scoring and has no gradient; call it under torch.no_grad(), train with masked_jsd"
    )


_token_gain.register_autograd(_no_gradient)


@torch.library.custom_op(
    "cit_fast::token_gain_statistics",
    mutates_args=(),
    schema="(Tensor hidden_full, Tensor hidden_masked, Tensor lm_head_weight, Tensor targets, SymInt first_entry, "
    f"Tensor? bias, {_LOGITS}) -> Tensor",
)
def _token_gain_statistics(
    full: Tensor,
    masked: Tensor,
    weight: Tensor,
    targets: Tensor,
    first_entry: int,
    bias: Tensor | None,
    *options: Any,
) -> Tensor:
    run = resolve("token_gain_statistics", full.device, cannot=kernels_cannot(full, masked, bias, weights=(weight,)))
    with _full_precision(full):
        out: Tensor = run(full, masked, weight, targets, first_entry, bias, LogitOptions(*options))
    return out


@_token_gain_statistics.register_fake
def _(full: Tensor, masked: Tensor, weight: Tensor, targets: Tensor, *_: Any) -> Tensor:
    return full.new_empty((len(reference.GAIN_STATISTICS), targets.shape[0]), dtype=torch.float64)


_token_gain_statistics.register_autograd(_no_gradient)


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


@torch.library.custom_op(
    "cit_fast::masked_jsd",
    mutates_args=(),
    schema="(Tensor hidden_live, Tensor hidden_frozen, Tensor weight_live, Tensor weight_frozen, Tensor temperature, "
    f"Tensor row_weight, Tensor? bias_live, Tensor? bias_frozen, {_LOGITS}, {_NEEDED}) -> {_GRADIENTS}",
)
def _masked_jsd(
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
    if temperature.device.type == "cpu":
        wrong = (~((temperature > 0) & temperature.isfinite()) & (row_weight != 0)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"masked_jsd: temperature[{row}] is {float(temperature[row])}; expected a positive number")
    hidden_and_rows = (live, frozen, temperature, row_weight, bias_live, bias_frozen)
    heads = (weight_live, weight_frozen)
    run = resolve("masked_jsd", live.device, cannot=kernels_cannot(*hidden_and_rows, weights=heads))
    with _full_precision(live):
        out: tuple[Tensor, ...] = run(
            *(live, frozen, *heads, temperature, row_weight, bias_live, bias_frozen),
            LogitOptions(*options[:-3]),
            Needed(*options[-3:]),
        )
    return out


@_masked_jsd.register_fake
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
        saved * gradient.to(saved.dtype) if needed else None
        for saved, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    )


def _jsd_backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = _scaled_gradients(ctx, gradient)
    return (hidden, None, weight, None, None, None, bias, *([None] * 6))


_masked_jsd.register_autograd(_jsd_backward, setup_context=_loss_setup)


@torch.library.custom_op(
    "cit_fast::linear_cross_entropy",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor targets, Tensor row_weight, Tensor? bias, {_LOGITS}, {_NEEDED})"
    f" -> {_GRADIENTS}",
)
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    check_targets("linear_cross_entropy", targets, weight.shape[0], row_weight)
    cannot = kernels_cannot(hidden, row_weight, bias, weights=(weight,))
    run = resolve("linear_cross_entropy", hidden.device, cannot=cannot)
    how = LogitOptions(*options[:-3]), Needed(*options[-3:])
    with _full_precision(hidden):
        out: tuple[Tensor, ...] = run(hidden, weight, targets, row_weight, bias, *how)
    return out


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    dtype = reference.accumulation_dtype(hidden, weight, bias)
    return _fake_loss(hidden, weight, bias, Needed(*options[-3:]), dtype)


def _cross_entropy_backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = _scaled_gradients(ctx, gradient)
    return (hidden, weight, None, None, bias, *([None] * 5))


_linear_cross_entropy.register_autograd(_cross_entropy_backward, setup_context=_loss_setup)

for _name in ("token_gain", "token_gain_statistics"):
    register_lazily(_name, Backend.TRITON, f"cit_fast.kernels.information_gain:{_name}")
for _name in ("masked_jsd", "linear_cross_entropy"):
    register_lazily(_name, Backend.TRITON, f"cit_fast.kernels.information_gain_rows:{_name}")
