"""How much a model's answers depend on the key parts of their instructions: information gain, example by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from cit_fast.data.example import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.key_parts.head import ROWS, Head, head_of
from cit_fast.key_parts.hidden import PairHidden, hidden_of, pair_collator
from cit_fast.key_parts.layout import GroupingCollator, alike_together
from cit_fast.key_parts.pairs import EncodedPair, encode_pairs, name_of
from cit_fast.models.forward import evaluating
from cit_fast.models.fused_lora import adapters_cast_once
from cit_fast.models.prompts import PromptEncoder
from cit_fast.ops import key_part_information_gain, token_gain

Progress = Callable[[int, int], object]
"""Called with how many pairs are done and how many there are."""


@dataclass(frozen=True, slots=True)
class ExampleGain:
    """What the key parts of one instruction tell a model about the answer."""

    index: int
    """The example's number among those given."""
    gain: float | None
    """G = Info(y|x) - Info(y|mask(x)), at most alpha / (1 - alpha) in size; ``None``: no key parts, nothing masked."""
    info_full: float | None
    """Info(y|x) = sum_k alpha^k p(t_k) after the full instruction, in [0, alpha / (1 - alpha)]."""
    info_masked: float | None
    """The same after the masked instruction."""
    tokens: int
    """The answer's own tokens, >= 1."""


def information_gain(
    model: nn.Module,
    encoder: PromptEncoder,
    examples: Sequence[Example],
    *,
    alpha: float = 0.3,
    batch_size: int = 8,
    share_prefix: bool | Literal["auto"] = "auto",
    missing: Literal["error", "none"] = "error",
    progress: Progress | None = None,
) -> list[ExampleGain]:
    """Key-part information gain of each example under a model, in evaluation mode and without gradients.

    Args:
        model: a causal language model of transformers, in wrappers or not.
        encoder: of its tokenizer.
        examples: with key parts.
        alpha: decay per answer token, in (0, 1].
        batch_size: pairs at a time, >= 1.
        share_prefix: see :func:`cit_fast.key_parts.hidden.pair_collator`.
        missing: what becomes of an example without key parts: ``"error"``, or ``"none"`` for a gain of ``None``.
        progress: see :data:`Progress`.

    Returns:
        One per example, in their order, but for those that the encoder skipped for their length.

    Raises:
        DataError: no key parts (with ``missing="error"``), key parts that cover the whole instruction, an example that
            does not fit, or an answer token that the model does not have.
        ConfigError: ``alpha`` or ``batch_size`` is out of range, or the model has no head that is understood.

    Source: KPIG (arXiv 2403.10056).
    """
    if missing not in {"error", "none"}:
        raise ConfigError(f"missing: {missing!r} is neither 'error' nor 'none'")
    encoded = encode_pairs(encoder, examples, missing="error" if missing == "error" else "keep")
    masked = [pair for pair in encoded.pairs if examples[pair.index].key_parts]
    names = {pair.index: name_of(examples[pair.index], pair.index) for pair in masked}
    scores = pair_gains(
        model, encoder, masked, names, alpha=alpha, batch_size=batch_size, share_prefix=share_prefix, progress=progress
    )
    gains = {pair.index: gain for pair, gain in zip(masked, scores, strict=True)}
    return [
        gains.get(pair.index, ExampleGain(pair.index, None, None, None, pair.scored[1] - pair.scored[0]))
        for pair in encoded.pairs
    ]


def predictive_entropy(
    model: nn.Module, encoder: PromptEncoder, examples: Sequence[Example], *, batch_size: int = 8
) -> list[tuple[int, float]]:
    """How undecided a model is about each answer: the mean entropy, in nats, of what it predicts for its tokens.

    The instruction is read whole, no key part is masked. In evaluation mode and without gradients.

    Args:
        model, encoder, batch_size: as in :func:`information_gain`.
        examples: key parts are not looked at.

    Returns:
        (the example's number, entropy in [0, ln V]) of each, but for those that the encoder skipped for their length.

    Raises:
        DataError, ConfigError: as :func:`information_gain`.

    Source: Mok et al., DYNAINST (ACL 2023), as KPIG's ablation without mask replays by it.
    """
    return _of_answers(model, encoder, examples, batch_size, lambda head, hidden, _: _entropies(head, hidden))


def answer_surprise(
    model: nn.Module, encoder: PromptEncoder, examples: Sequence[Example], *, batch_size: int = 8
) -> list[tuple[int, float]]:
    """How unlikely a model finds each answer: the mean negative log-likelihood, in nats, of its tokens.

    Arguments, result (>= 0) and errors are those of :func:`predictive_entropy`.

    Source: Hazard et al., SuRe (arXiv 2511.22367), which ranks what is replayed by it.
    """
    return _of_answers(model, encoder, examples, batch_size, lambda head, *own: -head.target_log_probabilities(*own))


def _of_answers(
    model: nn.Module,
    encoder: PromptEncoder,
    examples: Sequence[Example],
    batch_size: int,
    measure: Callable[[Head, Tensor, Tensor], Tensor],
) -> list[tuple[int, float]]:
    """(number, mean over the answer's own tokens) of what ``measure`` makes of hidden states [T, d] and targets [T]."""
    pairs = encode_pairs(encoder, [replace(example, key_parts=()) for example in examples]).pairs
    head = head_of(model)
    collate = pair_collator(model, encoder.pad_token_id)
    group = GroupingCollator(collate)
    found: dict[int, float] = {}
    with evaluating(model), adapters_cast_once(model), torch.no_grad():
        for numbers in alike_together(pairs, batch_size, collate.share_prefix):
            scored = hidden_of(model, group, [pairs[number] for number in numbers]).only_scored()
            values = measure(head, scored.full, scored.targets)
            for number, own in zip(numbers, torch.split(values, scored.offsets.diff().tolist()), strict=True):
                found[number] = own.mean().item()
    return [(pairs[number].index, found[number]) for number in range(len(pairs))]


def _entropies(head: Head, hidden: Tensor) -> Tensor:
    """[T], nats, of the distributions after hidden states [T, d]."""
    blocks = map(head.log_probabilities, torch.split(hidden, ROWS))
    return torch.cat([-(block.exp() * block).sum(1) for block in blocks])


def pair_gains(
    model: nn.Module,
    encoder: PromptEncoder,
    pairs: Sequence[EncodedPair],
    names: dict[int, str],
    *,
    alpha: float,
    batch_size: int,
    share_prefix: bool | Literal["auto"],
    progress: Progress | None = None,
) -> list[ExampleGain]:
    """:func:`information_gain` of encoded pairs; ``names`` says for errors what a pair's index stands for."""
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} is below 1")
    if not 0 < alpha <= 1:
        raise ConfigError(f"alpha: {alpha:g}; expected 0 < alpha <= 1")
    head = head_of(model)
    for pair in pairs:
        outside = max(max(one.input_ids) for one in (pair.full, pair.masked) if one is not None)
        if outside >= head.vocabulary:
            raise DataError(
                f"{names[pair.index]}: token {outside} is outside the model's vocabulary of {head.vocabulary}; the "
                "tokenizer is that of another model"
            )
    collate = pair_collator(model, encoder.pad_token_id, share_prefix)
    group = GroupingCollator(collate)
    found: dict[int, ExampleGain] = {}
    with evaluating(model), adapters_cast_once(model), torch.no_grad():
        # The longest batch goes first: memory runs out at once or never.
        for numbers in alike_together(pairs, batch_size, collate.share_prefix):
            hidden = hidden_of(model, group, [pairs[number] for number in numbers])
            rows = _gains(head, hidden.only_scored(), alpha)
            for number, gain, full, masked, tokens in zip(numbers, *rows, strict=True):
                found[number] = ExampleGain(pairs[number].index, gain, full, masked, tokens)
            if progress is not None:
                progress(len(found), len(pairs))
    return [found[number] for number in range(len(pairs))]


def _gains(head: Head, hidden: PairHidden, alpha: float) -> tuple[list[float], list[float], list[float], list[int]]:
    """G, both informations and the number of tokens of each pair."""
    gain = token_gain(hidden.full, hidden.masked, head.weight, hidden.targets, bias=head.bias, **head.options)
    probabilities = gain.log_prob_full.exp(), gain.log_prob_masked.exp()
    values = [key_part_information_gain(each, hidden.offsets, alpha) for each in (gain, *probabilities)]
    # Information is the same weighted sum, of the probabilities themselves.
    of_gain, of_full, of_masked = (value.tolist() for value in values)
    return of_gain, of_full, of_masked, hidden.offsets.diff().tolist()
