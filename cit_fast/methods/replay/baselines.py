"""What InsCL is compared with besides no replay and random replay: prototypes, and instructions unlike the new ones.

Each gives every earlier task the same budget as random replay does. Source: Wang et al., NAACL 2024, arXiv 2403.11435,
section 4; where its description leaves a choice open, the docstring says what was chosen.
"""

from __future__ import annotations

import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cit_fast.data.example import Example, Task
from cit_fast.embeddings.embedder import Embedder
from cit_fast.errors import ConfigError
from cit_fast.methods.replay.allocation import Budget
from cit_fast.methods.replay.inscl import embedder_for, instances_by_instruction
from cit_fast.methods.stage import Selection, Stage

Points = NDArray[np.float64]


class _EqualShares(ABC):
    """A budget per earlier task, filled by the order of preference that a subclass gives.

    Args:
        fraction: share of each earlier task's training examples, in (0, 1].
        per_task: examples per earlier task instead of a fraction (all, where a task has fewer).
        embedder: see :class:`~cit_fast.methods.replay.InsCLReplay`.
    """

    def __init__(self, fraction: float = 0.1, per_task: int | None = None, embedder: str = "tokens") -> None:
        Budget(fraction, per_task)
        self.fraction, self.per_task, self.embedder = fraction, per_task, embedder
        self._loaded: dict[str, Any] = {}

    def select(self, stage: Stage) -> Selection:
        """Examples of every earlier task, in order."""
        if not stage.seen:
            return Selection([])
        rng = stage.rng()
        embedder = embedder_for(self.embedder, stage, self._loaded)
        chosen: list[Example] = []
        for task in stage.seen:
            share = Budget(self.fraction, self.per_task).wanted(task.size)
            chosen += [task.train[place] for place in self._preferred(task, stage, embedder, rng)[:share]]
        return Selection(chosen)

    @abstractmethod
    def _preferred(self, task: Task, stage: Stage, embedder: Embedder, rng: random.Random) -> list[int]:
        """Places of all of the task's training examples, those to replay first."""


class PrototypeDataReplay(_EqualShares):
    """The examples nearest to the centres of as many k-means clusters as the task has distinct instructions.

    Examples (instruction and input) are embedded on the unit sphere and ordered by the cosine of each to its own
    centre.
    """

    def _preferred(self, task: Task, stage: Stage, embedder: Embedder, rng: random.Random) -> list[int]:
        points = _unit(embedder, [f"{each.instruction}\n\n{each.input}".strip() for each in task.train])
        labels, centres = _clusters(points, len(task.instructions), rng)
        order: list[int] = np.argsort(-_nearness(points, labels, centres), kind="stable").tolist()
        return order


class PrototypeInstructionReplay(_EqualShares):
    """Examples of the instructions nearest to the centres of the task's clusters of instructions, drawn at random.

    The number of k-means clusters is the one with the best silhouette. Where the prototypes have fewer examples than
    the budget, others are drawn at random.

    Args:
        most_clusters: clusters to try, at most; >= 2.
    """

    def __init__(
        self,
        fraction: float = 0.1,
        per_task: int | None = None,
        embedder: str = "tokens",
        most_clusters: int = 16,
    ) -> None:
        super().__init__(fraction, per_task, embedder)
        if most_clusters < 2:
            raise ConfigError(f"most_clusters: {most_clusters} is below 2")
        self.most_clusters = most_clusters

    def _preferred(self, task: Task, stage: Stage, embedder: Embedder, rng: random.Random) -> list[int]:
        instances = list(instances_by_instruction(task).values())
        points = _unit(embedder, task.instructions)
        labels, centres = _best_clusters(points, self.most_clusters, rng)
        near = _nearness(points, labels, centres)
        prototypes = {max(np.flatnonzero(labels == label).tolist(), key=lambda k: near[k]) for label in set(labels)}
        first = [place for k in sorted(prototypes) for place in instances[k]]
        rest = [place for k, own in enumerate(instances) if k not in prototypes for place in own]
        return _shuffled(first, rng) + _shuffled(rest, rng)


class DiverseInstructionReplay(_EqualShares):
    """Examples of the instruction least like the new task's instructions, drawn at random; then of the next.

    Likeness is the sum of the cosines to all of the new task's distinct instructions.
    """

    def _preferred(self, task: Task, stage: Stage, embedder: Embedder, rng: random.Random) -> list[int]:
        instances = list(instances_by_instruction(task).values())
        likeness = (_unit(embedder, task.instructions) @ _unit(embedder, stage.task.instructions).T).sum(axis=1)
        order = np.argsort(likeness, kind="stable").tolist()
        return [place for k in order for place in _shuffled(instances[k], rng)]


def _unit(embedder: Embedder, texts: Sequence[str]) -> Points:
    points: Points = embedder.embed(texts).numpy().astype(np.float64)
    lengths: Points = np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return points / lengths


def _clusters(points: Points, count: int, rng: random.Random) -> tuple[NDArray[np.int64], Points]:
    """k-means: label per point ``[n]`` and centres ``[k, d]``; no more clusters than distinct points."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    count = min(count, len(np.unique(points, axis=0)))
    with warnings.catch_warnings():
        # Points that differ in their last bits are one to k-means; a cluster without points harms nobody here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(count, n_init=4, random_state=rng.randrange(2**31)).fit(points)
    return fitted.labels_.astype(np.int64), fitted.cluster_centers_


def _best_clusters(points: Points, most: int, rng: random.Random) -> tuple[NDArray[np.int64], Points]:
    """k-means with the number of clusters whose silhouette is best; one cluster where two say nothing."""
    from sklearn.metrics import silhouette_score

    best, best_score = _clusters(points, 1, rng), -np.inf
    for count in range(2, min(most, len(np.unique(points, axis=0)) - 1) + 1):
        found = _clusters(points, count, rng)
        if len(set(found[0].tolist())) < 2:
            continue
        score = silhouette_score(points, found[0], metric="cosine")
        if score > best_score:
            best, best_score = found, score
    return best


def _nearness(points: Points, labels: NDArray[np.int64], centres: Points) -> Points:
    """Cosine of each point (of unit length) to its cluster's centre ``[n]``."""
    directions: Points = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    nearness: Points = (points * directions[labels]).sum(axis=1)
    return nearness


def _shuffled(places: Sequence[int], rng: random.Random) -> list[int]:
    return rng.sample(list(places), len(places))
