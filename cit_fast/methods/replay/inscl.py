"""InsCL: tasks far from the new one come back more, and of each task the instructions that say most.

Source: Wang et al., NAACL 2024, arXiv 2403.11435.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cit_fast.cache import JsonCache
from cit_fast.data.example import Task
from cit_fast.embeddings.build import build_embedder
from cit_fast.embeddings.embedder import Embedder
from cit_fast.embeddings.measure import task_clouds
from cit_fast.errors import ConfigError
from cit_fast.evaluation.records import RankedInstruction, ReplayRecord
from cit_fast.methods.replay.allocation import Budget, allocate
from cit_fast.methods.replay.insinfo import draw_by_insinfo, insinfo
from cit_fast.methods.replay.surprise import most_surprising
from cit_fast.methods.replay.tags import LLMTagger, OfflineTagger, Tagger, merge_similar, normalise
from cit_fast.methods.stage import Selection, Stage
from cit_fast.models.chat import build_chat
from cit_fast.ops import wasserstein_matrix

_RECORDED = 50  # instructions in a stage's record
_RECORDED_LENGTH = 300


class InsCLReplay:
    """Replay by Wasserstein distances between tasks, and by InsInfo within them.

    When task i arrives, task j < i gets the share W_j,i / sum_k W_k,i of the budget, where W is the Wasserstein
    distance between the tasks' measures over their distinct instructions. Within a task the budget goes to its
    instructions by InsInfo: the rarer an instruction's tags among those of all tasks so far, the more of its instances.

    Args:
        fraction: size of the replay, as a share of every earlier task's training examples, in (0, 1]; the total is that
            of :class:`RandomReplay`, and only its distribution differs.
        per_task: examples per earlier task on average, instead of a fraction (200 in the paper).
        weights: mass of an instruction: ``"real"``, the share of the task's training examples that carry it, or
            ``"uniform"``.
        within: which examples of a task: drawn by ``"insinfo"``, at ``"random"``, or those that the model finds most
            surprising, ``"surprise"`` (with the defaults of :class:`~cit_fast.methods.replay.SurpriseReplay`).
        embedder: makes instructions and tags points: ``"tokens"``, the mean of the training model's token embeddings;
            ``"sentence"``, all-MiniLM-L6-v2; or a model's folder or hub name.
        distance: ``"exact"``, or ``"sinkhorn"`` for tasks of many thousand instructions.
        tagger: ``"offline"``; or a chat model, ``{base_url, model, ...}`` with the options of
            :class:`~cit_fast.models.chat.ChatEndpoint` or ``{local: folder or hub name}`` with those of
            :class:`~cit_fast.models.chat.LocalChat`, beside them ``unusable`` (see
            :class:`~cit_fast.methods.replay.tags.LLMTagger`); or a tagger of your own.
        tag_embedder: makes tags points, as ``embedder``; ``None``: the same one. (The paper: token means of the model
            for instructions, phrase-BERT for tags.)
        eps, min_samples: of the clustering that merges tags, see :func:`~cit_fast.methods.replay.tags.merge_similar`.
            ``None``: 0.1 and 5 as in the paper for tags of a chat model; 0.2 and 2 for offline ones, which are phrases
            of the instructions and further apart.

    Raises:
        ConfigError: an option out of range or unknown.
    """

    def __init__(
        self,
        fraction: float = 0.1,
        per_task: int | None = None,
        weights: Literal["real", "uniform"] = "real",
        within: Literal["insinfo", "random", "surprise"] = "insinfo",
        embedder: str = "tokens",
        distance: Literal["exact", "sinkhorn"] = "exact",
        tagger: str | dict[str, Any] | Tagger = "offline",
        eps: float | None = None,
        min_samples: int | None = None,
        tag_embedder: str | None = None,
    ) -> None:
        Budget(fraction, per_task)
        for name, value, known in (
            ("weights", weights, ("real", "uniform")),
            ("distance", distance, ("exact", "sinkhorn")),
            ("within", within, ("insinfo", "random", "surprise")),
        ):
            if value not in known:
                raise ConfigError(f"{name}: {value!r} is unknown; expected one of {', '.join(known)}")
        if isinstance(tagger, str) and tagger != "offline":
            raise ConfigError(f"tagger: {tagger!r} is unknown; expected 'offline' or a chat model like {{local: ...}}")
        if isinstance(tagger, Mapping):
            _check_chat(tagger)
        offline = isinstance(tagger, str)
        eps = (0.2 if offline else 0.1) if eps is None else eps
        min_samples = (2 if offline else 5) if min_samples is None else min_samples
        if not (eps > 0 and min_samples >= 1):
            raise ConfigError(f"eps, min_samples: {eps}, {min_samples}; expected above 0, at least 1")
        self.fraction, self.per_task, self.weights, self.within = fraction, per_task, weights, within
        self.embedder, self.distance, self.tagger = embedder, distance, tagger
        self.eps, self.min_samples, self.tag_embedder = eps, min_samples, tag_embedder
        self._loaded: dict[str, Any] = {}

    def select(self, stage: Stage) -> Selection:
        """Examples of every earlier task, in order."""
        if not stage.seen:
            return Selection([])
        rng = stage.rng()
        embedder = self._embedder(stage)
        distances = self._distances(stage, embedder)
        sizes = [len(task.train) for task in stage.seen]
        wanted = sum(Budget(self.fraction, self.per_task).wanted(task.size) for task in stage.seen)
        names = [task.name for task in stage.seen]
        # Distances say how much of each task comes back, InsInfo which of it.
        allocation = allocate(distances, wanted, sizes, names)
        record = ReplayRecord(
            budgets=dict(zip(names, allocation.shares, strict=True)),
            distances=dict(zip(names, distances, strict=True)),
            notes=list(allocation.notes),
        )
        if self.within == "insinfo":
            own = self.tag_embedder
            ranked = self._rank(stage, embedder if own is None else embedder_for(own, stage, self._loaded))
            record.notes += ranked.notes
            drawn = [
                draw_by_insinfo(list(places.values()), scores, share, rng)
                for places, scores, share in zip(ranked.places, ranked.scores, allocation.shares, strict=True)
            ]
            ranking = ranked.records(names, drawn)
            record.instructions, record.instruction_count = ranking[:_RECORDED], len(ranking)
        elif self.within == "surprise":
            drawn, found = most_surprising(stage, allocation.shares, rng)
            record.scored, record.details = found.scored, found.details
        else:
            drawn = [rng.sample(range(size), share) for size, share in zip(sizes, allocation.shares, strict=True)]
        chosen = [task.train[k] for task, own in zip(stage.seen, drawn, strict=True) for k in own]
        return Selection(chosen, record)

    # -- distances -----------------------------------------------------------------------------------------------

    def _distances(self, stage: Stage, embedder: Embedder) -> list[float]:
        """W of each earlier task to the new one: one row, kept with the run so that it is computed once."""
        tasks = [*stage.seen, stage.task]
        setting = {"embedder": embedder.name, "weights": self.weights, "distance": self.distance}
        kept = JsonCache(None if stage.kept is None else stage.kept / "distances", setting)
        key = _digest([[example.task_instruction for example in task.train] for task in tasks])
        found = (kept.get(key) or {}).get("distances")
        if isinstance(found, list) and len(found) == len(stage.seen):
            return [float(distance) for distance in found]
        clouds, weights = task_clouds(tasks, embedder, self.weights)
        pairs = [(earlier, len(stage.seen)) for earlier in range(len(stage.seen))]
        row: list[float] = wasserstein_matrix(clouds, weights, method=self.distance, pairs=pairs).distances.tolist()
        kept.put(key, {"distances": row})
        return row

    # -- instructions --------------------------------------------------------------------------------------------

    def _rank(self, stage: Stage, embedder: Embedder) -> _Ranked:
        """InsInfo of every earlier task's instructions."""
        places = [instances_by_instruction(task) for task in stage.seen]
        # The new task's instructions count, too: what they share with earlier ones is no longer rare.
        every = [text for own in places for text in own] + list(stage.task.instructions)
        tagger = self._tagger(stage)
        given = tagger.tags(every)
        tags = merge_similar(given, embedder, eps=self.eps, min_samples=self.min_samples)
        before, after = (len({normalise(tag) for own in each for tag in own}) for each in (given, tags))
        replaced = getattr(tagger, "replaced", 0)
        notes = [f"Of {before} tags {before - after} were merged with another that says the same."]
        if replaced:
            count = len(set(every))
            notes.append(
                f"{replaced} of {count} instructions got their tags offline: the chat model's answers held none."
            )
        scores = insinfo(tags)
        ends = list(itertools.accumulate(map(len, places), initial=0))
        own = [slice(start, end) for start, end in itertools.pairwise(ends)]
        return _Ranked(places, [scores[s] for s in own], [tags[s] for s in own], notes)

    # -- models, loaded once -------------------------------------------------------------------------------------

    def _embedder(self, stage: Stage) -> Embedder:
        return embedder_for(self.embedder, stage, self._loaded)

    def _tagger(self, stage: Stage) -> Tagger:
        if isinstance(self.tagger, str):
            return OfflineTagger()
        if not isinstance(self.tagger, Mapping):
            return self.tagger
        if "tagger" not in self._loaded:
            options = dict(self.tagger)
            unusable = options.pop("unusable", "error")
            chat = build_chat(options, None if stage.cache is None else stage.cache / "chat")
            self._loaded["tagger"] = LLMTagger(chat, unusable)
        tagger: Tagger = self._loaded["tagger"]
        return tagger


@dataclass(frozen=True)
class _Ranked:
    """Instructions of the earlier tasks, a list of each for every task in order.

    Args:
        places: instruction -> its examples; ``scores``: InsInfo of each instruction; ``tags``: its merged tags.
        notes: what to say about how they were found.
    """

    places: list[dict[str, list[int]]]
    scores: list[list[float]]
    tags: list[list[list[str]]]
    notes: list[str]

    def records(self, names: Sequence[str], drawn: Sequence[Sequence[int]]) -> list[RankedInstruction]:
        """All instructions, those with the highest InsInfo first; ``drawn``: the places replayed of each task."""
        ranking = []
        for name, places, scores, tags, chosen in zip(names, self.places, self.scores, self.tags, drawn, strict=True):
            taken = set(chosen)
            for (text, own), score, with_tags in zip(places.items(), scores, tags, strict=True):
                shown = text[:_RECORDED_LENGTH] + ("…" if len(text) > _RECORDED_LENGTH else "")
                ranking.append(
                    RankedInstruction(name, shown, score, list(with_tags), sum(k in taken for k in own), len(own))
                )
        return sorted(ranking, key=lambda entry: -entry.insinfo)


def embedder_for(spec: str, stage: Stage, loaded: dict[str, Any]) -> Embedder:
    """The embedder that ``spec`` names; that of the training model anew for every task, as training may change it."""
    if spec == "tokens":
        return build_embedder(spec, model=stage.model, tokenizer=stage.encoder.tokenizer)
    if spec not in loaded:
        cache = None if stage.cache is None else stage.cache / "embeddings"
        loaded[spec] = build_embedder(spec, cache=cache)
    embedder: Embedder = loaded[spec]
    return embedder


def instances_by_instruction(task: Task) -> dict[str, list[int]]:
    """Distinct instruction -> places of its training examples, in order of first appearance."""
    instances: dict[str, list[int]] = {}
    for place, example in enumerate(task.train):
        instances.setdefault(example.task_instruction, []).append(place)
    return instances


def _check_chat(spec: Mapping[str, Any]) -> None:
    """What is wrong with a chat model's options should not wait until the second task arrives."""
    options = {key: value for key, value in spec.items() if key != "unusable"}
    LLMTagger(None, spec.get("unusable", "error"))  # type: ignore[arg-type]  # for its check alone
    if "local" not in options:
        build_chat(options, None)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
