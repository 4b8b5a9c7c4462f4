"""Batch layouts in which sequences share their common prefix, where that is less work than separate rows.

The examples of a task begin with the same template and often with the same instruction, full ones with full ones and
masked ones with masked ones. A row then holds that beginning once and, after it, what each sequence has of its own::

    [ common beginning | rest of sequence 1 | rest of sequence 2 | ... ]
      0 ........ P-1     P ......... A-1      P ......... B-1           position_ids

with the attention mask of :class:`~cit_fast.key_parts.pairs.PairCollator`: a rest sees the beginning and itself. A task
whose one instruction is long costs less in this way, both contexts together, than its plain rows without any masking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from cit_fast.key_parts.pairs import BranchedRow, EncodedPair, PairCollator, of_pairs, shared_prefix
from cit_fast.models.collation import PaddingCollator, padded_length
from cit_fast.models.prompts import IGNORED, Encoded

# Attention over a row of so many places costs as much as everything else a place goes through; roughly, for any model.
_ATTENTION = 1024


_Plan = list[tuple[list[int], int]]
"""Rows: the numbers of their sequences, and how many tokens these have in common."""


class _Sequence(NamedTuple):
    ids: list[int]
    labels: list[int]
    first: int
    """Place of the first labelled token: the one before it, which predicts it, must not be shared."""


@dataclass(frozen=True)
class GroupingCollator:
    """Makes the batches of ``pairs``, in the layout that takes least work.

    Three are weighed: a row for each sequence, a row for each pair, and rows of common beginnings.

    Args:
        pairs: the collator of the model; one that does not share prefixes is left as it is.
    """

    pairs: PairCollator

    def __call__(self, features: Sequence[EncodedPair]) -> dict[str, Any]:
        """Collate E pairs; what comes back is that of :class:`PairCollator`."""
        longest = max(len(one.input_ids) for pair in features for one in (pair.full, pair.masked) if one is not None)
        window = self.pairs.window
        if not self.pairs.share_prefix or (window is not None and longest > window):
            return self.pairs(features)
        sequences: list[_Sequence] = []
        numbers: list[tuple[int, int]] = []  # of each pair's two sequences
        before: EncodedPair | None = None
        for pair in features:
            if before is not None and pair.full is before.full:  # another masking of the same example
                full = numbers[-1][0]
            else:
                full = len(sequences)
                sequences.append(_Sequence(pair.full.input_ids, pair.full.labels, _first_label(pair.full)))
            masked = full
            if pair.masked is not None:
                masked = len(sequences)
                ids = pair.masked.input_ids
                sequences.append(_Sequence(ids, [IGNORED] * len(ids), _first_label(pair.masked)))
            numbers.append((full, masked))
            before = pair
        lengths = self.pairs.lengths
        plan = _least_work(sequences, lengths)
        if _cost(list(map(joint_length, features)), lengths) <= _cost(_widths(sequences, plan), lengths):
            return self.pairs(features)
        if len(plan) == len(sequences):
            return replace(self.pairs, share_prefix=False)(features)
        return self._laid_out(features, sequences, numbers, plan)

    def _laid_out(
        self,
        features: Sequence[EncodedPair],
        sequences: Sequence[_Sequence],
        numbers: Sequence[tuple[int, int]],
        plan: _Plan,
    ) -> dict[str, Any]:
        width = padded_length(max(_widths(sequences, plan)), self.pairs.lengths)
        rows: list[BranchedRow] = []
        starts = [0] * len(sequences)  # the flat place where token 0 of a sequence would be
        for number, (members, common) in enumerate(plan):
            row = BranchedRow(sequences[members[0]].ids[:common], [IGNORED] * common)
            for member in members:
                starts[member] = number * width + row.add(sequences[member].ids, sequences[member].labels, common)
            rows.append(row)
        batch = BranchedRow.stacked(rows, width, self.pairs.pad_token_id)
        return of_pairs(features, batch, [(starts[full], starts[masked], 0) for full, masked in numbers])


@dataclass(frozen=True)
class PrefixCollator:
    """Makes batches of plain examples, padded, or in rows of common beginnings where that is less work.

    Args:
        padded: makes the batches of separate rows.
        window: the shortest sliding window of the model's attention layers; longer examples have rows of their own.
    """

    padded: PaddingCollator
    window: int | None = None

    def __call__(self, features: Sequence[Encoded]) -> dict[str, Any]:
        """Collate B examples.

        Returns:
            What :class:`~cit_fast.models.collation.PaddingCollator` returns; or, with R < B rows of S places,
            ``input_ids``, ``labels``, ``position_ids``, ``branch`` and ``visible`` [R, S] int64, which
            :func:`~cit_fast.key_parts.hidden.model_inputs` makes inputs of the model of. The token before a labelled
            one is its neighbour in both.
        """
        if self.window is not None and max(map(len, features)) > self.window:
            return self.padded(features)
        lengths = self.padded.lengths
        sequences = [_Sequence(one.input_ids, one.labels, _first_label(one)) for one in features]
        if any(one.first == 0 for one in sequences):  # nothing predicts such a token, so nothing may stand before it
            return self.padded(features)
        plan = _least_work(sequences, lengths)
        if len(plan) == len(sequences):
            return self.padded(features)
        width = padded_length(max(_widths(sequences, plan)), lengths)
        rows = []
        for members, common in plan:
            row = BranchedRow(sequences[members[0]].ids[:common], [IGNORED] * common)
            for member in members:
                row.add(sequences[member].ids, sequences[member].labels, common)
            rows.append(row)
        return BranchedRow.stacked(rows, width, self.padded.pad_token_id)


def alike_together(pairs: Sequence[EncodedPair], size: int, share_prefix: bool) -> list[list[int]]:
    """Indices of the pairs in batches of similar length, longest first, so that memory runs out at once or never.

    With ``share_prefix`` those that begin alike are together, else those of like length.
    """

    def alike(number: int) -> Any:
        return pairs[number].full.input_ids if share_prefix else -len(pairs[number].full.input_ids)

    order = sorted(range(len(pairs)), key=alike)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return sorted(batches, key=lambda batch: -max(len(pairs[number].full.input_ids) for number in batch))


def _first_label(one: Encoded) -> int:
    return next((k for k, label in enumerate(one.labels) if label != IGNORED), len(one.labels))


def joint_length(pair: EncodedPair) -> int:
    """The row length of a pair whose two sequences share their common prefix."""
    full = len(pair.full.input_ids)
    if pair.masked is None:
        return full
    return full + len(pair.masked.input_ids) - shared_prefix(pair.full.input_ids, pair.masked.input_ids)


def _least_work(sequences: Sequence[_Sequence], lengths: Sequence[int]) -> _Plan:
    """The rows of common beginnings, of one padded length, that cost least; no sharing where nothing is saved.

    In the order of their tokens neighbours begin alike, and for a given length of the rows it takes fewest if each
    holds as many neighbours as go in.
    """
    order = sorted(range(len(sequences)), key=lambda k: sequences[k].ids)
    alike = [0, *(shared_prefix(sequences[a].ids, sequences[b].ids) for a, b in pairwise(order))]
    longest = padded_length(max(len(one.ids) for one in sequences), lengths)
    best: _Plan = [([number], sequences[number].first - 1) for number in order]
    least = _cost([len(one.ids) for one in sequences], lengths)
    for width in [longest, *(length for length in lengths if length > longest)]:
        plan = _filled(sequences, order, alike, width)
        cost = _cost([width] * len(plan), lengths)
        if cost < least:
            best, least = plan, cost
        if len(plan) == 1:
            break
    return best


def _filled(sequences: Sequence[_Sequence], order: Sequence[int], alike: Sequence[int], width: int) -> _Plan:
    """Rows of at most ``width`` places; ``alike``: what each of ``order`` has in common with the one before it."""
    plan: _Plan = []
    tokens = 0  # of the last row's sequences
    for number, begins_alike in zip(order, alike, strict=True):
        one = sequences[number]
        common = one.first - 1  # the token before the first labelled one predicts it: each has its own
        if plan:
            members, before = plan[-1]
            shared = min(before, begins_alike, common)
            if tokens + len(one.ids) - len(members) * shared <= width:
                plan[-1], tokens = ([*members, number], shared), tokens + len(one.ids)
                continue
        plan.append(([number], common))
        tokens = len(one.ids)
    return plan


def _widths(sequences: Sequence[_Sequence], plan: _Plan) -> list[int]:
    """Places of each row."""
    return [common + sum(len(sequences[k].ids) - common for k in members) for members, common in plan]


def _cost(places: Sequence[int], lengths: Sequence[int]) -> float:
    width = padded_length(max(places), lengths)
    return len(places) * width * (1 + width / _ATTENTION)
