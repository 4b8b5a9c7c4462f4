"""Measure, task by task, how much a model's answers depend on the key parts of their instructions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cit_fast.analysis.read_tasks import Progress, read_tasks, silent
from cit_fast.cache import cache_folder
from cit_fast.data.example import Example, Task, unseen_media
from cit_fast.errors import ConfigError, DataError
from cit_fast.inference.load_any import load_any_model
from cit_fast.key_parts.gain import ExampleGain, information_gain
from cit_fast.key_parts.sources import KeyPartSource, check_source, find_key_parts
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run.yaml_file import parse_yaml

THRESHOLD = 0.05
"""A gain below this counts as half-listened to: the key parts raise the first token's probability by less than 0.17."""


@dataclass(frozen=True)
class TaskGains:
    """The gains of one task.

    Args:
        task: its name.
        examples: those scored, with their key parts; ``gains``: theirs, in the same order.
        without: examples that have no key parts; ``too_long``: examples that do not fit. Neither is scored.
    """

    task: str
    examples: tuple[Example, ...]
    gains: tuple[ExampleGain, ...]
    without: int
    too_long: int

    @property
    def values(self) -> list[float]:
        """G of each example."""
        return [gain.gain for gain in self.gains if gain.gain is not None]

    @property
    def mean(self) -> float:
        """Mean G."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation of G."""
        return statistics.pstdev(self.values)

    @property
    def info(self) -> float:
        """Mean Info(y|x): how sure of the right answer the model is with the full instruction."""
        return statistics.fmean(gain.info_full for gain in self.gains if gain.info_full is not None)

    def below(self, threshold: float) -> float:
        """Share of the examples with a gain below ``threshold``."""
        return sum(value < threshold for value in self.values) / len(self.values)


@dataclass(frozen=True)
class Scores:
    """Gains of one model on some tasks, and how they were measured.

    Args:
        model: as it was named.
        tasks: the one with the lowest mean gain first.
        alpha: decay per answer token; gains are at most ``alpha / (1 - alpha)`` in size.
        threshold: below it a gain is low.
        key_parts: summary of :func:`cit_fast.key_parts.sources.find_key_parts`.
        unseen: a sentence about images and other media that the model was not shown; ``None`` without any.
    """

    model: str
    tasks: tuple[TaskGains, ...]
    alpha: float
    threshold: float
    key_parts: dict[str, Any]
    unseen: str | None = None

    @property
    def limit(self) -> float:
        """The largest gain there can be, for answers of any length."""
        return self.alpha / (1 - self.alpha) if self.alpha < 1 else max(g.tokens for t in self.tasks for g in t.gains)

    @property
    def values(self) -> list[float]:
        """G of every example."""
        return [value for task in self.tasks for value in task.values]

    def edges(self, most: int) -> list[float]:
        """Edges of at most ``most`` equal bins that hold every gain, at round numbers; 0 is one of them."""
        low, high = min(0.0, *self.values), max(0.0, *self.values)
        widths = (factor * 10.0**power for power in range(-6, 1) for factor in (1, 2, 5))
        for width in widths:
            first = math.floor(low / width)
            last = max(math.ceil(high / width), first + 1)
            if last - first <= most:
                break
        return [k * width for k in range(first, last + 1)]


def counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many values are in each bin; a value on an edge is in the upper bin, the largest one in the last."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)[0].tolist()  # type: ignore[no-any-return]


def score_model(
    model: str,
    data: Sequence[str],
    *,
    key_parts: str = "data",
    markers: tuple[str, str] | None = None,
    examples: int = 50,
    alpha: float = 0.3,
    threshold: float = THRESHOLD,
    max_length: int | None = None,
    batch_size: int = 8,
    stage: int | None = None,
    progress: Progress = silent,
) -> Scores:
    """Load a model, read the tasks at some places and score them.

    Args:
        model: see :func:`cit_fast.inference.load_any.load_any_model`; ``max_length``: its limit in tokens;
            ``stage``: of a run.
        data: files, folders and names of built-in tasks; see :func:`cit_fast.data.sources.find_tasks`.
        key_parts: the name of a source, or YAML of a mapping; see :func:`cit_fast.key_parts.sources.check_source`.
        markers: what stands around key parts in the text of instructions.
        examples: per task at most.
        alpha, threshold, batch_size, progress: see :func:`score_tasks`.

    Raises:
        ConfigError: an option out of range, or no such model.
        DataError: data that cannot be read or scored.
        RunError: a run without a trained stage.
    """
    source = check_options(key_parts, alpha, threshold)
    tasks = read_tasks(data, train=examples, markers=markers, progress=progress)
    loaded = load_any_model(model, max_length, stage)
    return score_tasks(
        loaded.model,
        loaded.encoder,
        tasks,
        name=model,
        key_parts=source,
        alpha=alpha,
        threshold=threshold,
        batch_size=batch_size,
        identity=loaded.identity,
        cache=cache_folder(),
        progress=progress,
    )


def score_tasks(
    model: nn.Module,
    encoder: PromptEncoder,
    tasks: Sequence[Task],
    *,
    name: str,
    key_parts: KeyPartSource = "data",
    alpha: float = 0.3,
    threshold: float = THRESHOLD,
    batch_size: int = 8,
    identity: str = "",
    cache: Path | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score the training examples of tasks.

    Args:
        model, encoder: see :func:`cit_fast.key_parts.gain.information_gain`.
        tasks: with training examples.
        name: of the model, for the result.
        key_parts: where they come from; see :func:`cit_fast.key_parts.sources.check_source`.
        alpha, batch_size: of the gain.
        threshold: see :class:`Scores`.
        identity, cache: see :func:`cit_fast.key_parts.sources.find_key_parts`.
        progress: called with what is going on, how much of it is done and how much there is.

    Raises:
        DataError: a task none of whose examples can be scored, or an example that cannot be used.
        ConfigError: an unknown source, or an option out of range.
    """
    source, _ = check_source(key_parts)
    examples = [example for task in tasks for example in task.train]
    found = find_key_parts(
        examples, key_parts, model=model, encoder=encoder, identity=identity, alpha=alpha, batch_size=batch_size,
        cache=cache, progress=lambda done, total: progress("Finding key parts", done, total),
    )  # fmt: skip
    of = [task.name for task in tasks for _ in task.train]
    for task in tasks:
        own = [example for example, name_ in zip(found.examples, of, strict=True) if name_ == task.name]
        if not any(example.key_parts for example in own):
            raise DataError(_no_key_parts(task, own, source))
    # All tasks go through the model together: batches are fuller, and equal instructions are searched once.
    marked = [k for k, example in enumerate(found.examples) if example.key_parts]
    gains = information_gain(
        model, encoder, [found.examples[k] for k in marked], alpha=alpha, batch_size=batch_size,
        progress=lambda done, total: progress("Scoring", done, total),
    )  # fmt: skip
    scored = {marked[gain.index]: gain for gain in gains}
    results = []
    for task in tasks:
        numbers = [k for k, name_ in enumerate(of) if name_ == task.name]
        here = [k for k in numbers if k in scored]
        without = sum(not found.examples[k].key_parts for k in numbers)
        if not here:
            raise DataError(f"task {task.name!r}: no example with key parts fits the limit; raise --max-length")
        results.append(
            TaskGains(
                task.name,
                tuple(found.examples[k] for k in here),
                tuple(scored[k] for k in here),
                without,
                len(numbers) - len(here) - without,
            )
        )
    ordered = sorted(results, key=lambda result: result.mean)
    return Scores(name, tuple(ordered), alpha, threshold, found.summary, unseen_media(examples))


def _no_key_parts(task: Task, examples: Sequence[Example], source: str) -> str:
    where = f"task {task.name!r}: none of its {len(examples)} examples has key parts"
    if source == "data":
        return f"{where}; name them in the data (key_parts), or have them found: --key-parts discover"
    if source == "discover":
        return f"{where}: no instruction has two clauses or more, or no example fits --max-length"
    return f"{where}: no answer of the chat model was of use"


def check_options(key_parts: str, alpha: float, threshold: float) -> KeyPartSource:
    """Refuse options of the command line that are out of range, before a model is loaded.

    Returns:
        ``key_parts`` as :func:`cit_fast.key_parts.sources.check_source` takes it: a name, or what its YAML says.

    Raises:
        ConfigError: which, and what it may be.
    """
    if not 0 < alpha <= 1:
        raise ConfigError(f"--alpha: {alpha:g}; expected 0 < alpha <= 1")
    if not -1 < threshold < 1:
        raise ConfigError(f"--threshold: {threshold:g}; expected a gain between -1 and 1")
    source: KeyPartSource = key_parts
    if key_parts.lstrip().startswith("{"):
        source = parse_yaml(key_parts, "--key-parts")
    check_source(source)
    return source


def how_scored(scores: Scores) -> str:
    """What the numbers mean, in a sentence or two."""
    summary = scores.key_parts
    kinds = {"data": "from the data", "discover": "discovered under the model itself", "llm": "named by a chat model"}
    words = (
        f"Gain: how much the key parts raise the probability of the right answer, its first tokens above all (alpha "
        f"{scores.alpha:g}); at most {scores.limit:.2f}, near 0 the model answers as if they were not there. "
        "Info: the same of the whole instruction, 0 where the right answer is improbable even so. "
        f"Key parts {kinds[summary['source']]}: {summary['spans']} in {summary['with_key_parts']} instructions"
    )
    if summary["dropped"]:
        words += f", {summary['dropped']} dropped because the instruction does not have them"
    without, too_long = (sum(getattr(task, name) for task in scores.tasks) for name in ("without", "too_long"))
    left_out = [f"{count} {why}" for count, why in ((without, "without key parts"), (too_long, "too long")) if count]
    return f"{words}. " + (f"Left out: {' and '.join(left_out)}." if left_out else "")
