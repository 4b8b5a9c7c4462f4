"""Key-part information gain (KPIG): how much a model's answer depends on the words that define the task.

``token_gain`` compares two contexts of the same answer token by token, ``key_part_information_gain`` sums the
result over each example, ``masked_jsd`` is the loss that keeps the masked predictions near those of an
earlier model. None of them returns logits. They see the head as
``logits = cap(scale * (hidden @ weight.T + bias))`` with ``cap(z) = softcap * tanh(z / softcap)``, or z itself
where ``softcap`` is None.

Values (targets, offsets, temperatures) are checked on CPU tensors only; on another device a check would have
to wait for it, and right values are the caller's promise.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cit_fast.backends import resolve
from cit_fast.errors import CitFastError, ConfigError, DataError
from cit_fast.reference import information_gain as reference

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


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
    _check_head("token_gain", hidden_full, lm_head_weight, bias, softcap, scale)
    if hidden_masked.shape != hidden_full.shape:
        raise DataError(
            f"token_gain: hidden_masked is {_shape(hidden_masked)} and hidden_full {_shape(hidden_full)}; "
            f"they hold the same tokens, so their shapes must be equal"
        )
    _check_float("token_gain", hidden_masked=hidden_masked)
    _check_index("token_gain", "targets", targets, hidden_full.shape[0], "one per row of hidden_full")
    _check_device(
        "token_gain",
        hidden_full,
        hidden_masked=hidden_masked,
        lm_head_weight=lm_head_weight,
        targets=targets,
        bias=bias,
    )
    return TokenGain(
        *torch.ops.cit_fast.token_gain(hidden_full, hidden_masked, lm_head_weight, targets, bias, softcap, float(scale))
    )


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
    _check_float("key_part_information_gain", probability_gain=gain)
    if gain.dim() != 1:
        raise DataError(f"key_part_information_gain: the probability gains are {_shape(gain)}; expected [T]")
    if offsets.dtype not in INDEX_DTYPES or offsets.dim() != 1 or offsets.shape[0] == 0:
        raise DataError(
            f"key_part_information_gain: offsets is {_shape(offsets)} {offsets.dtype}; "
            f"expected [examples + 1] int32 or int64"
        )
    if not 0 < alpha <= 1:
        raise ConfigError(f"key_part_information_gain: alpha is {alpha}; expected 0 < alpha <= 1")
    _check_device("key_part_information_gain", gain, offsets=offsets)
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
    _check_head("masked_jsd", hidden_live, weight_live, bias_live, softcap, scale, "_live")
    _check_head("masked_jsd", hidden_frozen, weight_frozen, bias_frozen, softcap, scale, "_frozen")
    if hidden_frozen.shape[0] != hidden_live.shape[0] or weight_frozen.shape[0] != weight_live.shape[0]:
        raise DataError(
            f"masked_jsd: {hidden_live.shape[0]} live and {hidden_frozen.shape[0]} frozen tokens, "
            f"{weight_live.shape[0]} live and {weight_frozen.shape[0]} frozen vocabulary entries; "
            f"expected the same number of each"
        )
    rows = hidden_live.shape[0]
    dtype = reference.accumulation_dtype(hidden_live, hidden_frozen, weight_live, weight_frozen, bias_live, bias_frozen)
    if isinstance(temperature, Tensor):
        _check_row_vector("temperature", temperature, rows, or_scalar=True)
        temperature = temperature.detach().to(dtype).expand(rows)
    elif temperature > 0 and math.isfinite(temperature):
        temperature = hidden_live.new_full((rows,), temperature, dtype=dtype)
    else:
        raise DataError(f"masked_jsd: temperature is {temperature}; expected a positive number")
    if row_weight is not None:
        _check_row_vector("row_weight", row_weight, rows)
        row_weight = row_weight.detach().to(dtype)
    elif rows == 0:
        raise DataError("masked_jsd: no tokens, so there is no mean; pass at least one row, or a row_weight")
    else:
        row_weight = hidden_live.new_full((rows,), 1 / rows, dtype=dtype)
    _check_device(
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
        softcap,
        float(scale),
        recording and hidden_live.requires_grad,
        recording and weight_live.requires_grad,
        recording and bias_live is not None and bias_live.requires_grad,
    )[0]
    return loss


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
    vocabulary = lm_head_weight.shape[0]
    if targets.device.type == "cpu":
        outside = ((targets < 0) | (targets >= vocabulary)).nonzero()
        if len(outside):
            row = int(outside[0])
            raise DataError(f"token_gain: targets[{row}] is {int(targets[row])}; expected a token in [0, {vocabulary})")
    run = resolve("token_gain", hidden_full.device)
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
    return tuple(hidden_full.new_empty((targets.shape[0],), dtype=dtype) for _ in TokenGain._fields)


def _token_gain_backward(ctx: Any, *gradients: Tensor) -> None:
    raise CitFastError(
        "token_gain is for scoring and has no gradient; call it under torch.no_grad(), train with masked_jsd"
    )


_token_gain.register_autograd(_token_gain_backward)


# --- registration: key_part_information_gain ----------------------------------------------------------------


@torch.library.custom_op(
    "cit_fast::key_part_information_gain",
    mutates_args=(),
    schema="(Tensor probability_gain, Tensor offsets, float alpha) -> Tensor",
)
def _key_part_information_gain(probability_gain: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    if offsets.device.type == "cpu":
        _check_offsets(offsets, probability_gain.shape[0])
    run = resolve("key_part_information_gain", probability_gain.device)
    gain: Tensor = run(probability_gain, offsets, alpha)
    return gain


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
    run = resolve("masked_jsd", hidden_live.device)
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
        torch.empty_like(hidden_live) if needs_hidden else hidden_live.new_empty(0),
        torch.empty_like(weight_live) if needs_weight else weight_live.new_empty(0),
        weight_live.new_empty(weight_live.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


def _jsd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-3:]
    ctx.save_for_backward(*output[1:])


def _jsd_backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = (
        saved * gradient.to(saved.dtype) if needed else None
        for saved, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return (hidden, None, weight, None, None, None, bias, *([None] * 6))


_masked_jsd.register_autograd(_jsd_backward, setup_context=_jsd_setup)


# --- checks -------------------------------------------------------------------------------------------------


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast reaches into a custom op's body and would turn the accumulation in float32 back into half
    precision.
    """
    return torch.autocast(tensor.device.type, enabled=False)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_float(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise DataError(f"{op}: {name} is {tensor.dtype}; expected float16, bfloat16, float32 or float64")


def _check_index(op: str, name: str, tensor: Tensor, length: int, meaning: str) -> None:
    if tensor.dtype not in INDEX_DTYPES or tensor.shape != (length,):
        raise DataError(
            f"{op}: {name} is {_shape(tensor)} {tensor.dtype}; expected [{length}] int32 or int64, {meaning}"
        )


def _check_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise DataError(
                f"{op}: {name} is on {tensor.device} and the first argument on {first.device}; expected one"
            )


def _check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    side: str = "",
) -> None:
    _check_float(op, **{f"hidden{side}": hidden, f"weight{side}": weight, f"bias{side}": bias})
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise DataError(
            f"{op}: hidden{side} is {_shape(hidden)} and the head's weight{side} {_shape(weight)}; "
            f"expected [T, d] and [V, d]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise DataError(f"{op}: bias{side} is {_shape(bias)}; expected [{weight.shape[0]}]")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ConfigError(f"{op}: softcap is {softcap}; expected a positive number or None")
    if not math.isfinite(scale):
        raise ConfigError(f"{op}: scale is {scale}; expected a finite number")


def _check_row_vector(name: str, tensor: Tensor, rows: int, *, or_scalar: bool = False) -> None:
    _check_float("masked_jsd", **{name: tensor})
    if tensor.shape != (rows,) and not (or_scalar and tensor.dim() == 0):
        expected = f"[{rows}] or a scalar" if or_scalar else f"[{rows}]"
        raise DataError(f"masked_jsd: {name} is {_shape(tensor)}; expected {expected}, one per row of hidden_live")


def _check_offsets(offsets: Tensor, tokens: int) -> None:
    lengths = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != tokens or bool((lengths < 0).any()):
        raise DataError(
            f"key_part_information_gain: offsets runs from {int(offsets[0])} to {int(offsets[-1])}; "
            f"expected ascending numbers from 0 to {tokens}, the number of tokens"
        )
    empty = (lengths == 0).nonzero()
    if len(empty):
        raise DataError(f"key_part_information_gain: example {int(empty[0])} has no response tokens")
