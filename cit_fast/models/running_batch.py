"""A batch that prompts join and leave while it is being answered."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from cit_fast.models.prefix_cache import (
    CACHE,
    Beginnings,
    PromptReader,
    check_kept,
    joined_caches,
    padded,
    used_columns,
    with_beginnings,
)

AT_A_TIME = 8
"""New tokens after which rows that have ended leave the batch."""


class Chance:
    """How one prompt's tokens are drawn instead of the most likely ones, whatever batch it is in.

    Args:
        temperature: divides the logits, > 0 and finite.
        seed: of the draws, any whole number.
        top_p: from 0 to 1; only the likeliest tokens are drawn that have so much of the probability together, at least
            the first.
    """

    def __init__(self, temperature: float, seed: int, top_p: float = 1.0) -> None:
        self.temperature, self.top_p = temperature, top_p
        # Of a number, the sign is left out.
        self._random = random.Random(seed if seed >= 0 else str(seed))  # noqa: S311  # no secret

    def uniform(self) -> float:
        """The next draw, in [0, 1)."""
        return self._random.random()


class Drawing(LogitsProcessor):  # type: ignore[misc]
    """Leaves greedy search one token to choose in rows whose tokens are drawn: the one that is drawn."""

    def __init__(self, chances: Sequence[Chance | None]) -> None:
        self._chances = {row: chance for row, chance in enumerate(chances) if chance is not None}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, V]: of drawn rows 0 where the cumulated probability first exceeds the uniform draw, else -inf."""
        rows = torch.tensor(list(self._chances), device=scores.device)
        temperatures, shares, uniforms = (
            torch.tensor([[x] for x in found], dtype=torch.float64, device=scores.device)
            for found in zip(*((c.temperature, c.top_p, c.uniform()) for c in self._chances.values()), strict=True)
        )
        drawn_from = scores[rows].double()
        # Of the smallest temperature nothing becomes infinite but what is below the largest.
        probabilities = ((drawn_from - drawn_from.amax(1, keepdim=True)) / temperatures).softmax(1)
        if any(chance.top_p < 1 for chance in self._chances.values()):
            probabilities = _likeliest(probabilities, shares)
        cumulated = probabilities.cumsum(1)
        place = torch.searchsorted(cumulated, uniforms * cumulated[:, -1:], right=True)
        drawn = torch.full_like(cumulated, -math.inf, dtype=scores.dtype)
        return scores.index_copy(0, rows, drawn.scatter_(1, place.clamp_(max=scores.shape[1] - 1), 0.0))


def _likeliest(probabilities: Tensor, shares: Tensor) -> Tensor:
    """[rows, V]: 0 but for the likeliest tokens that have a row's share [rows, 1] together; all, of a share of 1."""
    ordered, order = probabilities.sort(stable=True, dim=1, descending=True)
    before = ordered.cumsum(1) - ordered
    return probabilities.scatter(1, order, ordered.masked_fill_((before >= shares) & (before > 0) & (shares < 1), 0))


def drawing(chances: Sequence[Chance | None]) -> LogitsProcessorList | None:
    """What draws the rows' tokens; ``None`` where none are drawn."""
    return LogitsProcessorList([Drawing(chances)]) if any(chances) else None


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """An answer's tokens up to the first one that ends it, and whether there is one."""
    end = next((k for k, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:end]), end < len(tokens)


@dataclass(eq=False)
class Row:
    """A prompt and its answer so far.

    Args:
        prompt: its tokens, one or more. ``longest``: tokens of the answer, >= 1.
        adapter: the set that answers; ``None``: the active one, as for all other rows.
        chance: draws its tokens; ``None``: the most likely ones.
    """

    prompt: Sequence[int]
    longest: int
    adapter: str | None = None
    chance: Chance | None = None
    tokens: list[int] = field(default_factory=list)
    """Of the answer, without the token that ended it."""
    ended: bool = False
    """Whether such a token came."""

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.longest - len(self.tokens)


class RunningBatch:
    """Rows that are answered together, each as it would be alone but for rounding.

    Args:
        reader: reads what joins, and knows the model and its adapter sets.
        pad_token_id: any token. ``eos_token_ids``: that end an answer.

    Example::

        done = batch.join(rows)
        while batch.rows:
            done += batch.step()
    """

    def __init__(self, reader: PromptReader, pad_token_id: int, eos_token_ids: Sequence[int]) -> None:
        self.rows: list[Row] = []
        self._reader, self._pad, self._ends = reader, pad_token_id, list(eos_token_ids)
        self._beginnings = Beginnings()
        self._cache: DynamicCache | None = None  # of all tokens but the last
        self._ids = self._mask = torch.empty(0, 0, dtype=torch.long)  # [rows, columns], padded on the left

    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Read the prompts of some rows, in one pass that leaves out what is known of their beginnings, and answer a
        first token of each; from then on they are answered with the others.

        Where that fails, the batch is as it was.

        Returns:
            Those that have ended with it.
        """
        try:
            return self._join(rows)
        except BaseException:
            self._beginnings = Beginnings()  # their memory may be what there is too little of
            raise

    def _join(self, rows: Sequence[Row]) -> list[Row]:
        found = [self._beginnings.find(row.adapter, row.prompt) for row in rows]
        # All are read from as many tokens before their end as the one of which least is known.
        rest = max(max(1, len(row.prompt) - known) for row, (known, _) in zip(rows, found, strict=True))
        counts = [max(0, len(row.prompt) - rest) for row in rows]
        room = rest + max(row.longest for row in rows)
        cache = with_beginnings(self._reader.model, [kv for _, kv in found], counts, room)
        fresh = RunningBatch(self._reader, self._pad, self._ends)
        fresh.join_read(rows, cache)
        new = fresh._generate(1)
        for index, row in enumerate(rows):
            own = slice(fresh._ids.shape[1] - 1 - len(row.prompt), None)
            kept = [(layer.keys[index, :, own], layer.values[index, :, own]) for layer in cache.layers]
            self._beginnings.keep(row.adapter, row.prompt, kept)
        done = fresh._note(new)
        if fresh.rows and fresh._cache is not None:
            self._take(fresh.rows, fresh._cache, fresh._ids, fresh._mask)
        return done

    def join_read(self, rows: Sequence[Row], cache: DynamicCache) -> None:
        """Answer prompts that have been read, all but their last token, in the order of ``rows``."""
        self._take(rows, cache, *padded([row.prompt for row in rows], self._pad, self._reader.model.device))

    def _take(self, rows: Sequence[Row], cache: DynamicCache, ids: Tensor, mask: Tensor) -> None:
        if self._cache is not None:
            both = [*self.rows, *rows]
            cache = joined_caches(
                (self._cache, cache), (self._mask[:, :-1], mask[:, :-1]), 1 + max(row.left for row in both)
            )
            ids, mask = _beside(self._ids, ids, self._pad, self._mask, mask)
        self._cache, self._ids, self._mask = cache, ids, mask
        self.rows = [*self.rows, *rows]

    def leave(self, rows: Sequence[Row]) -> None:
        """Forget some rows."""
        stay = [index for index, row in enumerate(self.rows) if row not in rows]
        if len(stay) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in stay]
        if not stay or self._cache is None:
            self._cache = None
            return
        kept = torch.tensor(stay, device=self._ids.device)
        # Columns that are padding in all rows go, too: no row is longer than the model can read.
        start = self._mask.shape[1] - used_columns(self._mask[kept])
        self._ids, self._mask = self._ids[kept, start:], self._mask[kept, start:]
        for layer in self._cache.layers:
            layer.keep(kept, start)

    def step(self, tokens: int = AT_A_TIME) -> list[Row]:
        """At most so many further tokens for every row; returns the rows that have ended, which leave."""
        return self._note(self._generate(tokens))

    def _generate(self, tokens: int) -> Tensor:
        """[rows, new tokens].

        Raises:
            CacheLostError: they do not come from the cache.
        """
        config = GenerationConfig(
            do_sample=False, num_beams=1, use_cache=True, pad_token_id=self._pad, eos_token_id=self._ends,
            max_new_tokens=min(tokens, *(row.left for row in self.rows)),
        )  # fmt: skip
        sets = None if self.rows[0].adapter is None else [str(row.adapter) for row in self.rows]
        options: dict[str, Any] = {CACHE: self._cache}
        with self._reader.having(sets):
            output: Tensor = self._reader.model.generate(
                input_ids=self._ids,
                attention_mask=self._mask,
                generation_config=config,
                logits_processor=drawing([row.chance for row in self.rows]),
                **options,
            )
        if self._cache is not None:
            check_kept(self._reader.model, self._cache, output.shape[1] - 1)
        new = output[:, self._ids.shape[1] :]
        self._ids, self._mask = output, torch.cat([self._mask, self._mask.new_ones(new.shape)], 1)
        return new

    def _note(self, new: Tensor) -> list[Row]:
        done = []
        for row, found in zip(self.rows, new.tolist(), strict=True):
            tokens, row.ended = until_end(found, self._ends)
            row.tokens += tokens
            if row.ended or not row.left:
                done.append(row)
        self.leave(done)
        return done


def _beside(ids: Tensor, more: Tensor, pad: int, mask: Tensor, more_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and masks of both, padded on the left, without columns that are padding in all rows."""
    width = max(used_columns(mask), used_columns(more_mask))
    pairs = ((ids, more, pad), (mask, more_mask, 0))
    found = [torch.cat([_of_width(each, width, fill) for each in two]) for *two, fill in pairs]
    return found[0], found[1]


def _of_width(x: Tensor, width: int, fill: int) -> Tensor:
    """The last ``width`` columns, with columns before them where there are fewer."""
    missing = width - x.shape[1]
    return x[:, -width:] if missing <= 0 else torch.nn.functional.pad(x, (missing, 0), value=fill)
