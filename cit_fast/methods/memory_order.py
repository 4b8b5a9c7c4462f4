"""In which order a run gives up the training examples of a task that it has learned: the last of the order first.

A memory that shrinks keeps a beginning of the order, so what it holds does not depend on how often it shrank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from cit_fast.data.example import Example
from cit_fast.embeddings.build import build_embedder
from cit_fast.embeddings.embedder import Embedder
from cit_fast.key_parts.gain import information_gain
from cit_fast.key_parts.sources import key_parts_for_run
from cit_fast.methods.replay.inscl import instances_by_instruction
from cit_fast.methods.replay.insinfo import insinfo
from cit_fast.methods.replay.tags import OfflineTagger, merge_similar
from cit_fast.methods.stage import Stage
from cit_fast.processes import split_over_ranks

Choice = Literal["random", "insinfo", "gain", "diverse"]

_SCORED = 256
"""Examples whose gain is measured."""


def memory_order(stage: Stage, choose: Choice, most: int | None = None) -> list[int]:
    """Places of the training examples of ``stage.task``, those to keep first.

    Args:
        stage: with the model that has just learned the task.
        choose: ``"random"``; ``"insinfo"``: as many examples of an instruction as its InsInfo among all instructions of
            the run says (InsCL, arXiv 2403.11435); ``"gain"``: those first on whose key parts the answer depends least
            (KPIG, arXiv 2403.10056), of a random sample; ``"diverse"``: each the one least like those before it.
        most: how many can be kept; the order of the others does not matter.
    """
    rng = stage.rng("memory")
    order = rng.sample(range(len(stage.task.train)), len(stage.task.train))
    return _diverse(stage, order, most) if choose == "diverse" else _ORDERS[choose](stage, order)


def _random(_stage: Stage, order: list[int]) -> list[int]:
    return order


def _by_insinfo(stage: Stage, order: list[int]) -> list[int]:
    """Instruction k with InsInfo s_k gives its j-th example (j = 0, 1, ...) the turn (j + 1) / s_k."""
    places = instances_by_instruction(stage.task)
    every = [*places, *(text for task in stage.seen for text in task.instructions)]
    tags = merge_similar(OfflineTagger().tags(every), _tokens(stage), eps=0.2, min_samples=2)
    scores = insinfo(tags)[: len(places)]
    least = min((score for score in scores if score > 0), default=1.0)
    rank = {place: position for position, place in enumerate(order)}
    turns = {
        place: (number + 1) / max(score, least / 2)
        for own, score in zip(places.values(), scores, strict=True)
        for number, place in enumerate(sorted(own, key=rank.__getitem__))
    }
    return sorted(order, key=turns.__getitem__)


def _by_gain(stage: Stage, order: list[int]) -> list[int]:
    some = [stage.task.train[place] for place in order[:_SCORED]]
    marked = key_parts_for_run(some, "auto", stage.model, stage.encoder, run=stage.kept, cache=stage.cache)
    numbered = [(place, each) for place, each in zip(order, marked, strict=False) if each.key_parts]

    def score(mine: Sequence[tuple[int, Example]]) -> list[tuple[int, float]]:
        found = information_gain(stage.model, stage.encoder, [each for _, each in mine])
        return [(mine[each.index][0], each.gain) for each in found if each.gain is not None]

    gains = dict(split_over_ranks(numbered, score))
    scored = sorted(gains, key=gains.__getitem__)
    return [*scored, *(place for place in order if place not in gains)]


def _diverse(stage: Stage, order: list[int], most: int | None) -> list[int]:
    """Greedy k-centre: the first is drawn, each next one has the least similarity to its most similar before it."""
    texts = [f"{each.instruction}\n\n{each.input}".strip() for each in (stage.task.train[place] for place in order)]
    points = _tokens(stage).embed(texts).numpy().astype(np.float64)
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    chosen, nearest = [0], points @ points[0]
    nearest[0] = np.inf
    for _ in range(min(len(order), most or len(order)) - 1):
        chosen.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, points @ points[chosen[-1]])
        nearest[chosen[-1]] = np.inf
    rest = set(range(len(order))) - set(chosen)
    return [order[k] for k in (*chosen, *sorted(rest))]


def _tokens(stage: Stage) -> Embedder:
    return build_embedder("tokens", model=stage.model, tokenizer=stage.encoder.tokenizer)


_ORDERS: dict[Choice, Callable[[Stage, list[int]], list[int]]] = {
    "random": _random,
    "insinfo": _by_insinfo,
    "gain": _by_gain,
}
