"""Key-part information gain (KPIG): how much a model's answer depends on the words that define the task.

``token_gain`` compares two contexts of the same answer token by token, ``key_part_information_gain`` sums the
result over each example, ``masked_jsd`` is the loss that keeps the masked predictions near those of an
earlier model and ``linear_cross_entropy`` the one of the full instruction; ``linear_kl_divergence`` is the usual
distance to an earlier model. None of them returns logits. They
see the head as ``logits = cap(scale * (hidden @ weight.T + bias))`` with
``cap(z) = softcap * tanh(z / softcap)``, or z itself where ``softcap`` is None.

A head whose vocabulary is split over devices gives ``token_gain_statistics`` on each, which
``token_gain_from_statistics`` merges.

Values (targets, offsets, temperatures) are checked on CPU tensors only; on another device a check would have
to wait for it, and right values are the caller's promise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cit_fast.errors import ConfigError, DataError
from cit_fast.ops.information_gain import library, reference
from cit_fast.ops.information_gain.checks import (
    INDEX_DTYPES,
    check_contexts,
    check_device,
    check_float,
    check_head,
    check_index,
    check_row_vector,
    shape,
)
from cit_fast.ops.information_gain.reference import LogitOptions, TokenGain

__all__ = [
    "TokenGain",
    "key_part_information_gain",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "masked_jsd",
    "token_gain",
    "token_gain_from_statistics",
    "token_gain_statistics",
]


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
        DataError: Shapes, dtypes or devices do not fit, or a target is outside the vocabulary (on a GPU, which is not
            waited for, what follows from it is NaN instead).
        ConfigError: ``softcap`` or ``scale`` is out of range.

    Source: KPIG (arXiv 2403.10056); ``probability_gain`` is the summand p(t_k) - p_masked(t_k) of its G.
    """
    check_contexts("token_gain", hidden_full, hidden_masked, lm_head_weight, targets, bias, softcap, scale)
    return TokenGain(
        *library.token_gain(
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
    result: Tensor = library.token_gain_statistics(
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
    result: Tensor = library.key_part_information_gain(gain, offsets, float(alpha))
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
    live, frozen = (hidden_live, weight_live, bias_live), (hidden_frozen, weight_frozen, bias_frozen)
    temperature, row_weight = _two_sides("masked_jsd", live, frozen, temperature, row_weight, softcap, scale)
    recording = torch.is_grad_enabled()
    loss: Tensor = library.masked_jsd(
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


def linear_kl_divergence(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor | float = 1.0,
    row_weight: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    bias_live: Tensor | None = None,
    bias_frozen: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence KL(q || p), in nats, of a live model's predictions p from a frozen model's q.

    The gradient goes to the live side only, as in :func:`masked_jsd`, and is computed in the forward pass.

    Args:
        hidden_live, hidden_frozen, weight_live, weight_frozen, temperature, row_weight: As in :func:`masked_jsd`.
        targets: [T] int32 or int64, in [0, V), or None. Given: each row's divergence is between the predictions of the
            other tokens, q_i / (1 - q_y) and p_i / (1 - p_y) for i unlike y, which leaves the probability of the target
            itself free. Rows of weight 0 may hold any.
        bias_live, bias_frozen, softcap, scale: As in :func:`masked_jsd`.

    Returns:
        0-dim, float32 (float64 where an input is), at least 0 but for rounding.

    Raises:
        DataError: Shapes, dtypes or devices do not fit, there is no row to take the mean of, a temperature is not
            positive, or a target is outside the vocabulary (on a GPU the loss is NaN instead).
        ConfigError: ``softcap`` or ``scale`` is out of range.

    Source: Knowledge distillation (Hinton et al., arXiv 1503.02531) as in learning without forgetting (Li and Hoiem,
    arXiv 1606.09282), whose loss also has the factor temperature^2; over the other tokens: arXiv 2605.29498.
    """
    op = "linear_kl_divergence"
    live, frozen = (hidden_live, weight_live, bias_live), (hidden_frozen, weight_frozen, bias_frozen)
    temperature, row_weight = _two_sides(op, live, frozen, temperature, row_weight, softcap, scale)
    if targets is not None:
        check_index(op, "targets", targets, hidden_live.shape[0], "one per row of the hidden states")
        check_device(op, hidden_live, targets=targets)
    recording = torch.is_grad_enabled()
    loss: Tensor = library.linear_kl_divergence(
        hidden_live,
        hidden_frozen.detach(),
        weight_live,
        weight_frozen.detach(),
        temperature,
        row_weight,
        targets,
        bias_live,
        None if bias_frozen is None else bias_frozen.detach(),
        *LogitOptions(softcap, float(scale)),
        recording and hidden_live.requires_grad,
        recording and weight_live.requires_grad,
        recording and bias_live is not None and bias_live.requires_grad,
    )[0]
    return loss


def _two_sides(
    op: str,
    live: tuple[Tensor, Tensor, Tensor | None],
    frozen: tuple[Tensor, Tensor, Tensor | None],
    temperature: Tensor | float,
    row_weight: Tensor | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Check hidden states, weight and bias of both sides; temperatures and weights of the rows, [T] each."""
    check_head(op, *live, softcap, scale, "_live")
    check_head(op, *frozen, softcap, scale, "_frozen")
    count, entries = len(live[0]), len(live[1])
    if len(frozen[0]) != count or len(frozen[1]) != entries:
        raise DataError(
            f"{op}: {count} live and {len(frozen[0])} frozen tokens, {entries} live and {len(frozen[1])} frozen "
            f"vocabulary entries; expected the same number of each"
        )
    dtype = reference.accumulation_dtype(*live, *frozen)
    if isinstance(temperature, Tensor):
        check_row_vector(op, "temperature", temperature, count, or_scalar=True)
        temperature = temperature.detach().to(dtype).expand(count)
    elif temperature > 0 and math.isfinite(temperature):
        temperature = live[0].new_full((count,), temperature, dtype=dtype)
    else:
        raise DataError(f"{op}: temperature is {temperature}; expected a positive number")
    if row_weight is not None:
        check_row_vector(op, "row_weight", row_weight, count)
        row_weight = row_weight.detach().to(dtype)
    elif count == 0:
        raise DataError(f"{op}: no tokens, so there is no mean; pass at least one row, or a row_weight")
    else:
        row_weight = live[0].new_full((count,), 1 / count, dtype=dtype)
    check_device(
        op,
        live[0],
        hidden_frozen=frozen[0],
        weight_live=live[1],
        weight_frozen=frozen[1],
        temperature=temperature,
        row_weight=row_weight,
        bias_live=live[2],
        bias_frozen=frozen[2],
    )
    return temperature, row_weight


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy_gate: float = 0.0,
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
        entropy_gate: Exponent, at least 0 and finite. Row r counts min(1, H(p_r) / ln 20)^entropy_gate times, where
            H(p_r) is the entropy of its prediction in nats; the factor has no gradient. 0: every row counts in full.

    Returns:
        0-dim, float32 (float64 where an input is), at least 0 for weights that are.

    Raises:
        DataError: Shapes, dtypes or devices do not fit, there is no row to take the mean of, or a target is
            outside the vocabulary (on a GPU the loss is NaN instead).
        ConfigError: ``softcap``, ``scale`` or ``entropy_gate`` is out of range.

    Source: L_CE of KPIG (arXiv 2403.10056); the gate of EAFT (arXiv 2601.02151), whose entropy is that of the 20
    likeliest tokens alone, over 3.
    """
    op = "linear_cross_entropy"
    check_head(op, hidden, weight, bias, softcap, scale)
    rows = hidden.shape[0]
    check_index(op, "targets", targets, rows, "one per row of hidden")
    if not (entropy_gate >= 0 and math.isfinite(entropy_gate)):
        raise ConfigError(f"{op}: entropy_gate is {entropy_gate}; expected a finite number of at least 0")
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
    loss: Tensor = library.linear_cross_entropy(
        *(hidden, weight, targets, row_weight, bias, *LogitOptions(softcap, float(scale)), float(entropy_gate)),
        recording and hidden.requires_grad,
        recording and weight.requires_grad,
        recording and bias is not None and bias.requires_grad,
    )[0]
    return loss
