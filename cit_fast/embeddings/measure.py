"""A task as a discrete measure: its distinct instructions as points, weighted by their share of the task (InsCL)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cit_fast.data.example import Example, Task
from cit_fast.embeddings.embedder import Embedder
from cit_fast.errors import ConfigError, DataError

WEIGHTS = ("real", "uniform")
_BLOCK = 1024  # texts between two reports of progress


def instruction_measure(examples: Task | Sequence[Example], weights: str = "real") -> tuple[list[str], Tensor]:
    """The discrete measure of a task over its distinct instructions (InsCL, arXiv 2403.11435).

    Args:
        examples: a task, for its training split, or examples.
        weights: ``"real"``: the share of examples that carry the instruction; ``"uniform"``.

    Returns:
        The instructions in order of first appearance, and their weights, [instructions] float64 with sum 1.

    Raises:
        DataError: no examples, or an empty instruction.
        ConfigError: unknown ``weights``.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights: {weights!r} is unknown; expected one of {', '.join(WEIGHTS)}")
    where = "the examples"
    if isinstance(examples, Task):
        where, examples = f"task {examples.name!r}", examples.train
    if not examples:
        raise DataError(f"{where}: no training examples, so it has no instructions to measure")
    for example in examples:
        if not example.task_instruction.strip():
            raise DataError(f"{example.source or where}: the instruction is empty, so it has no embedding")
    counts = Counter(example.task_instruction for example in examples)  # in order of first appearance
    share = torch.tensor(list(counts.values()) if weights == "real" else [1] * len(counts), dtype=torch.float64)
    return list(counts), share / share.sum()


def task_clouds(
    tasks: Sequence[Task | Sequence[Example]],
    embedder: Embedder,
    weights: str = "real",
    *,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Tasks as weighted point clouds, ready for :func:`cit_fast.ops.wasserstein_matrix`.

    An instruction that several tasks share is embedded once.

    Args:
        tasks, weights: see :func:`instruction_measure`.
        embedder: makes the points.
        progress: called with the number of instructions embedded so far and in all.

    Returns:
        Clouds [n_i, d] float32 and weights [n_i] float64, one of each per task.

    Raises:
        DataError, ConfigError: as :func:`instruction_measure` and the embedder do.
    """
    measures = [instruction_measure(task, weights) for task in tasks]
    position: dict[str, int] = {}
    for instructions, _ in measures:
        for text in instructions:
            position.setdefault(text, len(position))
    texts, blocks = list(position), []
    for start in range(0, len(texts), _BLOCK):
        blocks.append(embedder.embed(texts[start : start + _BLOCK]))
        if progress is not None:
            progress(min(start + _BLOCK, len(texts)), len(texts))
    points = torch.cat(blocks) if blocks else torch.empty(0, 0)
    clouds = [points[[position[text] for text in instructions]] for instructions, _ in measures]
    return clouds, [share for _, share in measures]
