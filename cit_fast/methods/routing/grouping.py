"""LCIA's instruction grouping: reuse the adapter set whose instructions are most alike, or grow a new one.

Source: Qiao et al., ICML 2025, arXiv 2410.10868, section 4.4, and its released code. :class:`LCIARouter` is theirs;
:class:`GroupingRouter` is ours, which answers per prompt, and none of the sets may be the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cit_fast.data.example import Example, Task
from cit_fast.embeddings.build import build_embedder
from cit_fast.embeddings.embedder import Embedder
from cit_fast.errors import ConfigError, RunError
from cit_fast.methods.routing import similarity as similarities
from cit_fast.methods.routing.features import base_token_embedder
from cit_fast.methods.routing.rejection import Rejection
from cit_fast.methods.routing.router import (
    Reads,
    SavedRouter,
    SetStart,
    check_reads,
    check_start,
    routing_text,
    set_name,
)
from cit_fast.methods.routing.similarity import SIMILARITIES, Matrix
from cit_fast.methods.stage import Assignment, Learned, Stage
from cit_fast.models.adapter_bank import BASE

_HIGHEST = 8  # scores that the record of an assignment has
_BLOCK = 256  # prompts compared with the whole codebook at a time


Linkage = Literal["mean", "max"]


class GroupingRouter(SavedRouter):
    """A codebook of distinct instructions per adapter set decides, by similarity.

    The similarity of texts to a set follows from the pairs (text, stored instruction), see ``linkage``. A task whose
    instructions reach ``threshold`` at the most similar set trains that set again and adds its instructions to the
    set's codebook; another task grows a new set. A prompt is answered by the set that it is most similar to, or by the
    base model if that similarity is below what known prompts have (see
    :class:`~cit_fast.methods.routing.rejection.Rejection`).

    Args:
        similarity: ``"tfidf"``, frequencies counted over the codebook; ``"tfidf-pairwise"``, over each pair, as the
            authors do; ``"embedding"``.
        threshold: from which a set is reused. 0.9 for a task with one plain instruction, 0.3 for tasks with many
            wordings each (the authors' values, for TF-IDF).
        embedder: for ``"embedding"``: ``"tokens"``, the mean of the base model's token embeddings; ``"sentence"``,
            all-MiniLM-L6-v2; or a model's folder or hub name.
        reads: what of a prompt is compared, ``"prompt"`` (instruction and input, as a plain text has them) or
            ``"instruction"``.
        reject: share of the known prompts that may go to the base model, in [0, 1); 0: every prompt goes to some set.
        held_out: tasks that are never trained (built-in names, files, folders), whose prompts the threshold for "none
            of these" must keep out; without any, it follows from known prompts alone.
        linkage: ``"mean"`` over all pairs (the authors' code), or ``"max"``: of each text its most similar stored
            instruction counts (the paper), and then the mean over the texts.
        start: how a new set starts: ``"random"`` (the paper); ``"previous"``, from the set trained last (the authors'
            code); or ``"nearest"``, from the most similar one.

    Raises:
        ConfigError: an option out of range or unknown.
    """

    name = "grouping"
    adopts = "examples"

    def __init__(
        self,
        similarity: Literal["tfidf", "tfidf-pairwise", "embedding"] = "tfidf",
        threshold: float = 0.9,
        embedder: str = "tokens",
        reads: Reads = "prompt",
        reject: float = 0.01,
        held_out: Sequence[str] = (),
        linkage: Linkage = "mean",
        start: SetStart = "random",
    ) -> None:
        if similarity not in SIMILARITIES:
            raise ConfigError(f"similarity: {similarity!r} is unknown; expected one of {', '.join(SIMILARITIES)}")
        if not threshold >= 0:
            raise ConfigError(f"threshold: {threshold}; expected at least 0 (above 1, no set is ever reused)")
        check_reads(reads)
        if linkage not in ("mean", "max"):
            raise ConfigError(f"linkage: {linkage!r} is unknown; expected mean or max")
        check_start(start)
        self.linkage, self.start = linkage, start
        self.similarity, self.threshold, self.embedder, self.reads = similarity, threshold, embedder, reads
        self._rejection = Rejection(reject, held_out)
        self.reject, self.held_out = reject, self._rejection.held_out
        self._codebook: dict[str, list[str]] = {}
        self._known: list[float] = []
        self._latest: str | None = None
        self._loaded: Embedder | None = None

    @property
    def sets(self) -> tuple[str, ...]:
        """In the order in which they were made."""
        return tuple(self._codebook)

    @property
    def codebook(self) -> dict[str, tuple[str, ...]]:
        """Set -> its distinct instructions, in order of arrival."""
        return {name: tuple(instructions) for name, instructions in self._codebook.items()}

    def assign(self, stage: Stage) -> Assignment:
        """The most similar set from ``threshold`` on, else a new one.

        Raises:
            DataError: an instruction of the task is empty.
        """
        self._rejection.unknown_prompts()  # what cannot be read is better known before anything is trained
        # In order of first appearance; a conversation's own turns where it has no instruction apart.
        instructions = list(dict.fromkeys(routing_text(example, "instruction") for example in stage.task.train))
        scores: dict[str, float] = {}
        if self._codebook:
            means = self._similarities(instructions, stage, self.linkage).mean(axis=0)
            scores = {name: float(score) for name, score in zip(self._codebook, means, strict=True)}
        best = max(scores, key=lambda name: scores[name]) if scores else None
        reused = best is not None and scores[best] >= self.threshold
        name = best if best is not None and reused else self._new_set(stage.task)
        self._store(name, instructions)
        start_from = None if reused else {"random": None, "previous": self._latest, "nearest": best}[self.start]
        self._latest = name
        highest = dict(sorted(scores.items(), key=lambda each: -each[1])[:_HIGHEST])
        return Assignment(name, highest, self.threshold, start_from=start_from)

    def _store(self, name: str, instructions: Sequence[str]) -> None:
        stored = self._codebook.setdefault(name, [])
        stored += [text for text in instructions if text not in stored]

    def adopt(self, stage: Stage, adapter: str) -> None:
        """Store the task's instructions under its set, as if it had been assigned that one."""
        self._store(adapter, list(dict.fromkeys(routing_text(each, "instruction") for each in stage.task.train)))
        self._latest = adapter
        self.learn(stage)

    def learn(self, stage: Stage) -> Learned:
        """Look how similar prompts are that the codebook should and should not know."""
        known, unknown = self._rejection.known_prompts(stage.task), self._rejection.unknown_prompts()
        # A prompt is as far from the codebook as it was when its task was learned; its text need not be kept.
        self._known += self._best(known, stage)
        return Learned(self._rejection.learn(self._known, self._best(unknown, stage)))

    def answer(self, examples: Sequence[Example], stage: Stage) -> list[str]:
        """The most similar set of each, or the base model.

        Raises:
            DataError: an empty prompt.
            RunError: nothing was learned yet.
        """
        if not self._codebook:
            raise RunError(f"router {self.name}: the codebook is empty; no task has trained a set yet")
        names, below = list(self._codebook), self._rejection.below
        found: list[str] = []
        damaged = [index for index, name in enumerate(names) if name in stage.damaged]
        if len(damaged) == len(names):
            return [BASE] * len(examples)
        for scores in self._blocks(examples, stage):
            scores[:, damaged] = -np.inf
            best = scores.argmax(axis=1)
            sure = scores.max(axis=1) >= (-np.inf if below is None else below)
            found += [names[index] if trusted else BASE for index, trusted in zip(best, sure, strict=True)]
        return found

    # -- similarity ----------------------------------------------------------------------------------------------

    def _best(self, examples: Sequence[Example], stage: Stage) -> list[float]:
        """The similarity of each prompt to the set it is most similar to."""
        return [float(score) for scores in self._blocks(examples, stage) for score in scores.max(axis=1)]

    def _blocks(self, examples: Sequence[Example], stage: Stage) -> Iterator[Matrix]:
        """Similarities [at most 256, sets] of prompts, all in order."""
        texts = [routing_text(example, self.reads) for example in examples]
        for start in range(0, len(texts), _BLOCK):
            yield self._similarities(texts[start : start + _BLOCK], stage)

    def _similarities(self, texts: Sequence[str], stage: Stage, linkage: Linkage = "mean") -> Matrix:
        """[texts, sets]: of each text to each set, the mean over the set's instructions, or the largest of them."""
        stored = [text for own in self._codebook.values() for text in own]
        if self.similarity == "embedding":
            pairs = similarities.embedding(texts, stored, self._embedder(stage))
        else:
            compare = similarities.tfidf if self.similarity == "tfidf" else similarities.tfidf_pairwise
            pairs = compare(texts, stored)
        ends = np.cumsum([len(own) for own in self._codebook.values()])
        of_sets = np.split(pairs, ends[:-1], axis=1)
        return np.stack([part.max(axis=1) if linkage == "max" else part.mean(axis=1) for part in of_sets], axis=1)

    def _embedder(self, stage: Stage) -> Embedder:
        if self._loaded is None:
            cache = None if stage.cache is None else stage.cache / "embeddings"
            if self.embedder != "tokens":
                self._loaded = build_embedder(self.embedder, cache=cache)
            else:
                self._loaded = base_token_embedder(stage)
        return self._loaded

    def _new_set(self, task: Task) -> str:
        return f"set-{len(self._codebook) + 1:02d}"

    # -- memory --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The codebook, and the scores of known prompts."""
        remembered = {"codebook": self._codebook, "known": self._known, "latest": self._latest}
        return remembered | {"reject_below": self._rejection.below}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take them back."""
        codebook = {str(name): [str(text) for text in own] for name, own in state["codebook"].items()}
        if not all(codebook.values()):
            raise ValueError("a set without instructions")
        self._codebook = codebook
        self._known = [float(score) for score in state["known"]]
        self._latest = None if state["latest"] is None else str(state["latest"])
        self._rejection.below = None if state["reject_below"] is None else float(state["reject_below"])


class LCIARouter(GroupingRouter):
    """The published grouping: TF-IDF fitted on each pair of instructions, one answer for all prompts of a task.

    A task's test prompts are answered by the set that their distinct instructions are most similar to, from
    ``threshold`` on; below it by the set that was made last, as in the authors' code. A prompt that names no task is a
    task of its own. The input is never read.

    Args:
        threshold: from which a set is reused: 0.9 for plain instructions (CoIN "Origin"), 0.3 for diverse ones
            ("Diverse").
        linkage, start: see :class:`GroupingRouter`; the authors' code has ``"mean"`` and ``"previous"``, the paper
            writes ``"max"`` and ``"random"``.

    Raises:
        ConfigError: an option out of range or unknown.
    """

    name = "lcia"

    def __init__(self, threshold: float = 0.9, linkage: Linkage = "mean", start: SetStart = "previous") -> None:
        super().__init__("tfidf-pairwise", threshold, reads="instruction", reject=0.0, linkage=linkage, start=start)

    def learn(self, stage: Stage) -> Learned:
        """Nothing to learn: the codebook is all that answers."""
        return Learned()

    def answer(self, examples: Sequence[Example], stage: Stage) -> list[str]:
        """The most similar set of each task, or the last.

        Raises:
            DataError: an empty prompt.
            RunError: nothing was learned yet.
        """
        if not self._codebook:
            raise RunError(f"router {self.name}: the codebook is empty; no task has trained a set yet")
        names = [name for name in self._codebook if name not in stage.damaged]
        if not names:
            return [BASE] * len(examples)
        groups: dict[str, list[int]] = {}
        for place, example in enumerate(examples):
            groups.setdefault(example.task or f"\0{place}", []).append(place)
        found = [BASE] * len(examples)
        for places in groups.values():
            texts = list(dict.fromkeys(routing_text(examples[place], "instruction") for place in places))
            means = self._similarities(texts, stage, self.linkage).mean(axis=0)
            scores = {name: float(score) for name, score in zip(self._codebook, means, strict=True) if name in names}
            best = max(scores, key=lambda name: scores[name])
            answers = best if scores[best] >= self.threshold else names[-1]
            for place in places:
                found[place] = answers
        return found


class PerTaskRouter(GroupingRouter):
    """A set per task, and the most similar instructions answer: :class:`GroupingRouter` that never reuses a set.

    Args:
        similarity, embedder, reads, reject, held_out: as there.
    """

    name = "per-task"

    def __init__(
        self,
        similarity: Literal["tfidf", "tfidf-pairwise", "embedding"] = "tfidf",
        embedder: str = "tokens",
        reads: Reads = "prompt",
        reject: float = 0.01,
        held_out: Sequence[str] = (),
    ) -> None:
        super().__init__(similarity, 2.0, embedder, reads, reject, held_out)

    def _new_set(self, task: Task) -> str:
        return set_name(task, self.sets)
