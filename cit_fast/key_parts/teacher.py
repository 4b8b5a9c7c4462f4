"""The teacher of KPIG and of distillation: hidden states of the model before the stage, computed once and kept with it.

They compare the live model with M_{t-1}, which no longer changes: one pass without gradients gives the final hidden
states that predict each example's answer, and the information gain of its key parts. Hidden states, because they are
what the losses take: d numbers a token where logits are V.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cit_fast.errors import RunError
from cit_fast.key_parts.head import Head, head_of
from cit_fast.key_parts.hidden import hidden_of
from cit_fast.key_parts.layout import GroupingCollator, alike_together
from cit_fast.key_parts.pairs import EncodedPair, PairCollator
from cit_fast.models.digests import fingerprint
from cit_fast.models.forward import evaluating
from cit_fast.models.fused_lora import adapters_cast_once
from cit_fast.models.kept_tensors import read_tensors, write_tensors
from cit_fast.models.prompts import IGNORED
from cit_fast.ops import key_part_information_gain, token_gain
from cit_fast.processes import rank_and_count, wait_for_all


@dataclass(frozen=True)
class TeacherStates:
    """Hidden states and information gains of the teacher M_{t-1}, by the pairs' ``index``.

    Args:
        states: per process that worked on them, [tokens, d]; read from the disk as they are needed.
        places: index -> (which of ``states``, first token, number of tokens).
        gains: index -> G, in [-alpha / (1 - alpha), alpha / (1 - alpha)]; empty where none were asked for.
        seconds: what the pass took, on the slowest process.
    """

    states: tuple[Tensor, ...]
    places: dict[int, tuple[int, int, int]]
    gains: dict[int, float]
    seconds: float

    def rows(self, index: int) -> Tensor:
        """[tokens, d], in the model's dtype, on the CPU."""
        which, start, count = self.places[index]
        return self.states[which][start : start + count]


def teacher_states(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    collate: PairCollator,
    *,
    alpha: float | None,
    context: Literal["masked", "full"] = "masked",
    batch_size: int = 16,
    folder: Path | None = None,
) -> TeacherStates:
    """Compute the hidden states and gains of every pair under the model as it is now (the teacher).

    Several processes share the work and read each other's files. What an earlier part of the run left in ``folder`` is
    taken up, if it is of the same weights, tokens and options.

    Args:
        model: a causal language model, whole on this process.
        pairs: all of them with a masked sequence, unless there is no ``alpha``.
        collate: of the model, see :func:`cit_fast.key_parts.hidden.pair_collator`.
        alpha: of the information gain; ``None``: it is not computed.
        context: whose hidden states are kept.
        batch_size: pairs at a time.
        folder: where the states are kept, the same for all processes; ``None``: in memory, of this process alone.

    Raises:
        RunError: the states cannot be written, or those of another process cannot be read.
    """
    batches = alike_together(pairs, batch_size, collate.share_prefix)
    if folder is None:
        return _joined([_pass(model, pairs, batches, collate, alpha, context)])
    rank, world = rank_and_count()
    key = _key(model, pairs, alpha, context, batch_size, world)
    path = _path(folder, rank, world)
    if read_tensors(path, key, check=True) is None:
        write_tensors(path, key, _pass(model, pairs, batches[rank::world], collate, alpha, context))
    wait_for_all()
    shards = []
    for other in range(world):
        shard = read_tensors(_path(folder, other, world), key)
        if shard is None:
            raise RunError(
                f"{_path(folder, other, world)}: process {other} left no hidden states of this stage there; "
                "all processes need the same output folder"
            )
        shards.append(shard)
    return _joined(shards)


# ------------------------------------------------------------------------------------------------------ the pass


@torch.no_grad()
def _pass(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    batches: Sequence[Sequence[int]],
    collate: PairCollator,
    alpha: float | None,
    context: str,
) -> dict[str, Tensor]:
    """``states`` [tokens, d], and per pair ``index``, ``tokens`` and ``gain``, if any; in the order of the batches."""
    started = time.perf_counter()
    order = [number for batch in batches for number in batch]
    counts = [_labelled(pairs[number]) for number in order]
    gains: list[float] = []
    done = 0
    group = GroupingCollator(collate)
    with evaluating(model), adapters_cast_once(model):
        head = head_of(model)
        states = torch.empty(sum(counts), head.weight.shape[1], dtype=head.weight.dtype)
        for batch in tqdm(batches, desc="the model before this stage", unit="batch", leave=False, disable=None):
            hidden = hidden_of(model, group, [pairs[number] for number in batch])
            kept = hidden.masked if context == "masked" else hidden.full
            states = states.to(kept.dtype) if done == 0 else states
            states[done : done + len(kept)] = kept.cpu()
            done += len(kept)
            if alpha is not None:
                gains += _gains(head, hidden.only_scored(), alpha)
    return {
        "states": states,
        "index": torch.tensor([pairs[number].index for number in order], dtype=torch.int64),
        "tokens": torch.tensor(counts, dtype=torch.int64),
        "gain": torch.tensor(gains, dtype=torch.float64),
        "seconds": torch.tensor(time.perf_counter() - started, dtype=torch.float64),
    }


def _gains(head: Head, hidden: Any, alpha: float) -> list[float]:
    compared = token_gain(hidden.full, hidden.masked, head.weight, hidden.targets, bias=head.bias, **head.options)
    gains: list[float] = key_part_information_gain(compared, hidden.offsets, alpha).tolist()
    return gains


def _labelled(pair: EncodedPair) -> int:
    return sum(label != IGNORED for label in pair.full.labels)


def _joined(shards: Sequence[dict[str, Tensor]]) -> TeacherStates:
    places: dict[int, tuple[int, int, int]] = {}
    gains: dict[int, float] = {}
    for which, shard in enumerate(shards):
        counts = shard["tokens"].tolist()
        starts = itertools.accumulate(counts, initial=0)
        indices = shard["index"].tolist()
        places.update({index: (which, start, n) for index, start, n in zip(indices, starts, counts, strict=False)})
        gains.update(zip(indices, shard["gain"].tolist(), strict=False))
    seconds = max(float(shard["seconds"]) for shard in shards)
    return TeacherStates(tuple(shard["states"] for shard in shards), places, gains, seconds)


# ------------------------------------------------------------------------------------------------------- on disk


def _path(folder: Path, rank: int, world: int) -> Path:
    return folder / f"frozen-{rank:05d}-of-{world:05d}.safetensors"


def _key(
    model: nn.Module, pairs: Sequence[EncodedPair], alpha: float | None, context: str, size: int, world: int
) -> str:
    """Digest of all that decides the states and the files they are in."""
    digest = hashlib.blake2b(f"{alpha}/{context}/{size}/{world}".encode(), digest_size=16)
    for pair in pairs:
        masked = None if pair.masked is None else pair.masked.input_ids
        digest.update(repr((pair.index, pair.full.input_ids, masked, pair.scored)).encode())
        digest.update(repr(pair.full.labels).encode())
    digest.update(fingerprint(model).encode())
    return digest.hexdigest()
