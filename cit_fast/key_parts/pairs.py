"""Full and masked instructions side by side: examples as pairs of token sequences, and batches of them.

A pair's two sequences have their first tokens in common, up to the first masked key part. With ``share_prefix`` these
are computed once: a row holds the full sequence and, after it, what the masked one has from there on (its *branch*);
positions go on from the prefix, and an attention mask lets the branch see the prefix and itself only::

    [ shared prefix | rest of the full sequence | rest of the masked sequence ]
      0 ........ P-1  P ..................... F-1  P ..................... M-1    position_ids

Both contexts then have the hidden states of separate passes, within rounding. Without it every sequence has a row of
its own (or a place of its own in one packed row, for flash attention).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from cit_fast.data.example import MASK, Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.models.collation import LENGTHS, padded_length
from cit_fast.models.encoder_decoder import DECODER_LENGTHS, cut_rows
from cit_fast.models.image_reader import Pictures, picture_inputs
from cit_fast.models.prompts import IGNORED, Encoded, ExampleTooLongError, PromptEncoder
from cit_fast.text import cut

# ------------------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One example as tokens, full and masked; what :class:`PairCollator` makes batches of.

    Args:
        full: the example as it is.
        masked: the same with its key parts masked, labels as in ``full``; ``None`` where it has no key parts, and then
            the masked context is the full one and costs nothing.
        index: the example's number in the list that was encoded.
        scored: start and end of the answer's own tokens in ``full.input_ids``: those that the information gain sums
            over. What the template adds after them (the end of the turn) is learned, but not scored.
    """

    full: Encoded
    masked: Encoded | None
    index: int
    scored: tuple[int, int]

    def __len__(self) -> int:
        """Tokens of both contexts together."""
        return len(self.full) + (0 if self.masked is None else len(self.masked))


class EncodedPairs(NamedTuple):
    """The result of :func:`encode_pairs`."""

    pairs: list[EncodedPair]
    """The examples that fit, in order; ``index`` says which they are."""
    truncated: int
    """How many of them had their input shortened, in both contexts alike."""
    skipped: tuple[str, ...]
    """Sources of the examples left out because they cannot fit."""


def encode_pairs(
    encoder: PromptEncoder, examples: Iterable[Example], *, missing: Literal["keep", "error"] = "keep"
) -> EncodedPairs:
    """Examples as pairs of full and masked token sequences with the same response tokens.

    Args:
        encoder: of the model's tokenizer.
        examples: with ``key_parts``.
        missing: ``"keep"``: an example without key parts becomes a pair whose contexts are the same; ``"error"``.

    Raises:
        ExampleTooLongError: an example cannot fit and the encoder's ``on_overflow`` is not ``"skip"``.
        DataError: key parts that cover the whole instruction, none at all (with ``missing="error"``), or an answer
            without tokens.
    """
    pairs: list[EncodedPair] = []
    skipped: list[str] = []
    for index, example in enumerate(examples):
        if not example.key_parts and missing == "error":
            raise DataError(
                f"{name_of(example, index)}: no key parts, so there is nothing to mask; mark them, or have them found"
            )
        try:
            pairs.append(encode_pair(encoder, example, index))
        except ExampleTooLongError:
            if encoder.on_overflow != "skip":
                raise
            skipped.append(name_of(example, index))
    return EncodedPairs(pairs, sum(pair.full.truncated for pair in pairs), tuple(skipped))


def encode_pair(encoder: PromptEncoder, example: Example, index: int = 0) -> EncodedPair:
    """One example of :func:`encode_pairs`; one that does not fit raises whatever ``on_overflow`` says."""
    masked: Encoded | None = None
    if example.key_parts:
        if not any(map(str.isalnum, example.masked_instruction.replace(MASK, ""))):
            raise DataError(
                f"{name_of(example, index)}: the key parts cover the whole instruction ({cut(example.instruction)!r}); "
                "leave some of it unmasked"
            )
        full, masked = encoder.pair(example)
        if masked.input_ids == full.input_ids:  # a key part that reads [MASK]
            masked = None
    else:
        full = encoder.example(example)
    start, end = full.prompt_length, len(full.labels)
    end = next((k for k in range(start, end) if full.input_ids[k] in encoder.stop_token_ids), end)
    if start == end:
        raise DataError(
            f"{name_of(example, index)}: the answer {cut(example.references[0])!r} has no tokens of its own"
        )
    return EncodedPair(full, masked, index, (start, end))


# -------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class PairCollator:
    """Makes a batch of E pairs.

    Consecutive pairs with the same ``full`` object share its tokens: several maskings of one example cost the full
    context once, or as often as ``row`` demands.

    Args:
        pad_token_id: token that fills ``input_ids``; nothing sees it.
        share_prefix: compute the tokens that both contexts have in common once (see the module's own words). For
            models that take a mask of their own: :func:`~cit_fast.key_parts.hidden.pair_collator` knows which do.
        packed: put all sequences end to end into one row, for flash attention; without ``share_prefix``.
        window: the shortest sliding window of the model's attention layers. A batch with a longer sequence is not
            shared, because its mask would have to differ from layer to layer.
        row: places a shared row of several maskings should not exceed: attention over a longer row costs more than is
            saved. Another row takes those that are too many.
        lengths: padded lengths in tokens, ascending.
        decoder_start: of an encoder-decoder, the token that its decoder begins with; without the others.

    Raises:
        ConfigError: both ``share_prefix`` and ``packed``.
    """

    pad_token_id: int
    share_prefix: bool = False
    packed: bool = False
    window: int | None = None
    row: int = 1024
    lengths: tuple[int, ...] = LENGTHS
    decoder_start: int | None = None

    def __post_init__(self) -> None:
        if self.share_prefix and self.packed:
            raise ConfigError("PairCollator: share_prefix and packed exclude each other; a packed row takes no mask")

    def __call__(self, features: Sequence[EncodedPair]) -> dict[str, Any]:
        """Collate E pairs with T labelled tokens in all.

        Returns:
            A dict of tensors, int64 unless said otherwise. Of the layout (R rows of S places): ``input_ids`` and
            ``labels`` [R, S], labels being those of the full sequences and -100 elsewhere, so that counting them counts
            T; and one of

            * ``attention_mask`` [R, S]: ordinary rows, the full sequences first, then the masked ones; with what a
              model that takes images takes beside;
            * ``position_ids``, ``branch`` and ``visible`` [R, S]: shared rows. A place sees those before it of its own
              branch (0: full, -1: padding), and the first ``visible`` of its row;
            * ``position_ids`` [1, S], ``cu_seq_lens_q``, ``cu_seq_lens_k`` (int32) and ``max_length_q``,
              ``max_length_k`` (int): one packed row;
            * ``attention_mask`` [R, P] and ``decoder_input_ids`` [R, S], with ``input_ids`` [R, P]: prompts and answers
              apart, of an encoder-decoder (:func:`~cit_fast.models.encoder_decoder.cut_rows`).

            Of the pairs: ``full_at`` and ``masked_at`` [T], the places (in the flattened rows) whose hidden states
            predict the labelled tokens of each pair; ``offsets`` [E + 1], where each pair's tokens start among the T;
            ``scored`` [T] bool; ``index`` [E].
        """
        groups = _by_full(features)
        longest = max(len(one.input_ids) for pair in features for one in (pair.full, pair.masked) if one is not None)
        if self.share_prefix and (self.window is None or longest <= self.window):
            layout = _shared(_short_rows(groups, self.row), self.pad_token_id, self.lengths)
        elif self.packed:
            layout = _pack(_separate(groups))
        elif self.decoder_start is not None:
            layout = _cut(_separate(groups), self.decoder_start, self.pad_token_id, self.lengths)
        else:
            layout = _pad(_separate(groups), self.pad_token_id, self.lengths)
        return of_pairs(features, *layout)


# A layout: the batch's tensors, and of each pair three numbers: the flat place of its full and of its masked sequence's
# token 0, and how many tokens of the masked one stand with the full one (token 0 of a branch is where it would be if
# they stood before it).
_Layout = tuple[dict[str, Any], list[tuple[int, int, int]]]
_Groups = list[tuple[Encoded, list[EncodedPair]]]


def of_pairs(
    features: Sequence[EncodedPair], batch: dict[str, Any], starts: Sequence[tuple[int, int, int]]
) -> dict[str, Any]:
    """A batch with the places of its pairs; what comes back is that of :class:`PairCollator`.

    Args:
        features: E pairs. ``batch``: the layout's own tensors.
        starts: of each pair the flat place of its full and of its masked sequence's token 0, and how many tokens of the
            masked one stand with the full one.

    Raises:
        DataError: a pair whose two sequences do not have the same number of labelled tokens.
    """
    full_at: list[int] = []
    masked_at: list[int] = []
    scored: list[bool] = []
    offsets = [0]
    for pair, (at_full, at_masked, common) in zip(features, starts, strict=True):
        labelled = _labelled(pair.full)
        full_at += [at_full + k - 1 for k in labelled]
        labelled_masked = labelled if pair.masked is None else _labelled(pair.masked)
        # The token before a labelled one predicts it, and may be the last that both sequences have in common.
        masked_at += [(at_full if k <= common else at_masked) + k - 1 for k in labelled_masked]
        scored += [pair.scored[0] <= k < pair.scored[1] for k in labelled]
        offsets.append(len(full_at))
    if len(masked_at) != len(full_at):
        raise DataError("PairCollator: a pair whose two sequences do not have the same number of labelled tokens")
    return {
        **batch,
        "full_at": torch.tensor(full_at),
        "masked_at": torch.tensor(masked_at),
        "offsets": torch.tensor(offsets),
        "scored": torch.tensor(scored, dtype=torch.bool),
        "index": torch.tensor([pair.index for pair in features]),
    }


class BranchedRow:
    """A row that holds a beginning once, and branches that each see the beginning and themselves.

    Args:
        ids, labels: of the beginning.
    """

    def __init__(self, ids: Sequence[int], labels: Sequence[int]) -> None:
        self.columns = {
            "input_ids": list(ids),
            "labels": list(labels),
            "position_ids": list(range(len(ids))),
            "branch": [0] * len(ids),
            "visible": [0] * len(ids),
        }
        self._branches = 0

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def add(self, ids: Sequence[int], labels: Sequence[int], common: int) -> int:
        """Add what a sequence has after its first ``common`` tokens; returns the place where its token 0 would be."""
        place, rest = len(self) - common, len(ids) - common
        self._branches += 1
        self.columns["input_ids"] += ids[common:]
        self.columns["labels"] += labels[common:]
        self.columns["position_ids"] += range(common, len(ids))
        self.columns["branch"] += [self._branches] * rest
        self.columns["visible"] += [common] * rest
        return place

    @staticmethod
    def stacked(rows: Sequence[BranchedRow], width: int, pad: int) -> dict[str, Any]:
        """The rows as tensors [rows, width], filled with padding that nothing sees."""
        fill = {"input_ids": pad, "labels": IGNORED, "position_ids": 0, "branch": -1, "visible": 0}
        return {
            name: torch.tensor([row.columns[name] + [value] * (width - len(row)) for row in rows])
            for name, value in fill.items()
        }


def _by_full(features: Sequence[EncodedPair]) -> _Groups:
    runs = [list(run) for _, run in itertools.groupby(features, key=lambda pair: id(pair.full))]
    return [(run[0].full, run) for run in runs]


def _short_rows(groups: _Groups, limit: int) -> _Groups:
    """The groups, those cut up whose shared row would be longer than ``limit``; every piece has a pair."""
    short: _Groups = []
    for full, pairs in groups:
        room = 0
        for pair in pairs:
            masked = full if pair.masked is None else pair.masked
            rest = len(masked.input_ids) - shared_prefix(full.input_ids, masked.input_ids)
            if room < rest or not short or short[-1][0] is not full:
                short.append((full, []))
                room = limit - len(full.input_ids)
            short[-1][1].append(pair)
            room -= rest
    return short


def _labelled(one: Encoded) -> list[int]:
    return [k for k, label in enumerate(one.labels) if label != IGNORED]


def _shared(groups: _Groups, pad: int, lengths: Sequence[int]) -> _Layout:
    rows: list[BranchedRow] = []
    places: list[tuple[int, int, int]] = []  # row, place of the masked sequence's token 0 in it, tokens in common
    for number, (full, pairs) in enumerate(groups):
        row = BranchedRow(full.input_ids, full.labels)
        for pair in pairs:
            if pair.masked is None:
                places.append((number, 0, 0))
                continue
            masked = pair.masked.input_ids
            common = shared_prefix(full.input_ids, masked)
            places.append((number, row.add(masked, [IGNORED] * len(masked), common), common))
        rows.append(row)
    width = padded_length(max(map(len, rows)), lengths)
    starts = [(number * width, number * width + place, common) for number, place, common in places]
    return BranchedRow.stacked(rows, width, pad), starts


class _Sequences(NamedTuple):
    """Sequences one after another, labels of full ones only; of each pair, the numbers of its two."""

    ids: list[list[int]]
    labels: list[list[int]]
    prompts: list[int]
    pictures: list[Pictures | None]
    full: list[int]
    masked: list[int]


def _separate(groups: _Groups) -> _Sequences:
    fulls = [full for full, _ in groups]
    masked = [pair.masked for _, pairs in groups for pair in pairs if pair.masked is not None]
    numbers = itertools.count(len(fulls))
    of = [(number, pair) for number, (_, pairs) in enumerate(groups) for pair in pairs]
    return _Sequences(
        [list(one.input_ids) for one in (*fulls, *masked)],
        [*(list(one.labels) for one in fulls), *([IGNORED] * len(one.input_ids) for one in masked)],
        [one.prompt_length for one in (*fulls, *masked)],
        [one.pictures for one in (*fulls, *masked)],
        [number for number, _ in of],
        [number if pair.masked is None else next(numbers) for number, pair in of],
    )


def _pad(sequences: _Sequences, pad: int, lengths: Sequence[int]) -> _Layout:
    width = padded_length(max(map(len, sequences.ids)), lengths)
    batch = {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences.ids]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for labels in sequences.labels]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences.ids]),
        **picture_inputs(list(zip(sequences.ids, sequences.pictures, strict=True)), width),
    }
    return batch, [
        (width * full, width * masked, 0) for full, masked in zip(sequences.full, sequences.masked, strict=True)
    ]


def _cut(sequences: _Sequences, start: int, pad: int, lengths: Sequence[int]) -> _Layout:
    def width_of(longest: int, answers: bool) -> int:
        return padded_length(longest, (*DECODER_LENGTHS, *lengths) if answers else lengths)

    rows = list(zip(sequences.ids, sequences.labels, sequences.prompts, strict=True))
    batch = cut_rows(rows, start, pad, width_of)
    width = batch["labels"].shape[1]
    zero = [row * width - prompt + 1 for row, prompt in enumerate(sequences.prompts)]
    return batch, [(zero[full], zero[masked], 0) for full, masked in zip(sequences.full, sequences.masked, strict=True)]


def _pack(sequences: _Sequences) -> _Layout:
    sizes = list(map(len, sequences.ids))
    starts = [0, *itertools.accumulate(sizes)]
    bounds = torch.tensor(starts, dtype=torch.int32)
    batch = {
        "input_ids": torch.tensor([list(itertools.chain.from_iterable(sequences.ids))]),
        "labels": torch.tensor([list(itertools.chain.from_iterable(sequences.labels))]),
        "position_ids": torch.tensor([[k for size in sizes for k in range(size)]]),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(sizes),
        "max_length_k": max(sizes),
    }
    return batch, [
        (starts[full], starts[masked], 0) for full, masked in zip(sequences.full, sequences.masked, strict=True)
    ]


def shared_prefix(full: Sequence[int], masked: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((k for k, (a, b) in enumerate(zip(full, masked, strict=False)) if a != b), min(len(full), len(masked)))


def name_of(example: Example, index: int) -> str:
    """What an error calls an example: where it was read from, or its number."""
    return example.source or f"example {index} of task {example.task!r}"
