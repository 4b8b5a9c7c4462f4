"""Replay of the model's own answers: earlier prompts come back, answered by the model as the stage before left it.

Source: Chen et al., On-Policy Replay, arXiv 2605.29495, and its released code.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from cit_fast.data.example import Example, Task
from cit_fast.errors import ConfigError
from cit_fast.evaluation.metrics import JUDGE
from cit_fast.evaluation.records import ReplayRecord
from cit_fast.key_parts.gain import answer_surprise
from cit_fast.methods.config import Part
from cit_fast.methods.own_answers import draw_answers, metric_scores, with_answer
from cit_fast.methods.registry import build_part
from cit_fast.methods.replay.allocation import Budget
from cit_fast.methods.replay.anchor import Anchor
from cit_fast.methods.replay.self_generated import SelfGenerated
from cit_fast.methods.stage import Selection, Stage
from cit_fast.processes import split_over_ranks

_SHOWN, _SHOWN_LENGTH = 2, 80  # own answers of a task in the record, and characters of one in a note


class _Own(NamedTuple):
    """An answer of the model's own and how good it is; more is better."""

    text: str
    worth: float


@dataclass
class _Counts:
    """What became of a task's prompts."""

    asked: int = 0
    kept: int = 0
    too_long: int = 0
    unended: int = 0


class OnPolicyReplay:
    """Replay of earlier prompts with answers that the model gives itself, where these are good enough.

    Before the stage is trained, M_{t-1} answers every chosen prompt ``samples`` times. The best of the answers takes
    the place of the example's references; where none is good enough, the references stay, so that the budget is
    spent either way. The model's own answers are what it would say anyway: they hold it where it is, and a reference
    pulls it to words that it would not use.

    Args:
        fraction: share of each earlier task's training examples, in (0, 1].
        per_task: examples per earlier task instead of a fraction (all, where a task has fewer).
        choose: whose prompts are answered. A replay policy: ``"random"``, ``"inscl"``, ``"kpig"``, ``"surprise"``, or
            one with options, ``{name: kpig, tasks: 10}``, at this budget if it names none. Or ``"answers"``, the
            paper's way: of every earlier task ``candidates`` times as many prompts are answered, and those with the
            best answers come back.
        candidates: for ``choose: answers``, prompts answered for each that is replayed, >= 1; ``None``: all of the
            task's.
        keep: what makes an answer good. ``"metric"``: the score of the task's metric, at least ``least`` (the paper's
            rule-based reward). ``"confidence"``: its mean log-likelihood; the ``share`` of a task's answers with the
            highest are kept (the paper's self-confidence). A task that a judge scores goes by confidence.
        samples: answers per prompt, >= 1; of those equally good the first counts.
        temperature: of the draws, > 0; 0 for the most likely answer, of which there is one.
        least: the score that passes, in [0, 100].
        share: in (0, 1], where references stand in for the rest: not with ``choose: answers``, of which the budget
            keeps the best, nor with ``references: false``.
        references: whether an example comes back with its references where no answer is good enough; without them
            confidence judges every task, for a metric needs them, too.
        max_new_tokens: of an answer, >= 1; one that has not ended by then is not kept.
        batch_size: prompts answered at a time, >= 1.
        anchor: prompts of no task that hold general ability: a text file with one in each line, or what ``data.tasks``
            takes as text; the base model answers them once, and ``anchor_examples`` of them come back in every stage,
            the first one, too, beyond the budget.
        anchor_examples: >= 1.
        generated: prompts, beyond the budget, that the model itself writes and answers before every stage but the
            first (:mod:`cit_fast.methods.replay.self_generated`); nothing of a task needs to be kept for them.

    Raises:
        ConfigError: an option out of range or unknown.
    """

    def __init__(
        self,
        fraction: float = 0.1,
        per_task: int | None = None,
        choose: str | dict[str, Any] = "random",
        candidates: int | None = 4,
        keep: Literal["metric", "confidence"] = "metric",
        samples: int = 4,
        temperature: float = 1.0,
        least: float = 50.0,
        share: float = 0.5,
        references: bool = True,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        anchor: str | None = None,
        anchor_examples: int = 64,
        generated: int | None = None,
    ) -> None:
        Budget(fraction, per_task)
        sizes = {
            "anchor_examples": anchor_examples,
            "generated": generated,
            "samples": samples,
            "candidates": candidates,
            "max_new_tokens": max_new_tokens,
        }
        for name, size in {**sizes, "batch_size": batch_size}.items():
            if size is not None and size < 1:
                raise ConfigError(f"{name}: {size} is below 1")
        if keep not in ("metric", "confidence"):
            raise ConfigError(f"keep: {keep!r} is unknown; expected metric or confidence")
        if not 0 <= temperature < float("inf"):
            raise ConfigError(f"temperature: {temperature} is negative or not finite")
        if temperature == 0 and samples > 1:
            raise ConfigError(f"samples: {samples} at temperature 0 are {samples} times the same answer; use 1")
        if not 0 <= least <= 100:
            raise ConfigError(f"least: {least} is outside [0, 100]")
        if not 0 < share <= 1:
            raise ConfigError(f"share: {share} is outside (0, 1]")
        if not references and keep == "metric":
            raise ConfigError("references: false leaves a metric nothing to compare with; use keep: confidence")
        self.fraction, self.per_task, self.choose, self.candidates = fraction, per_task, choose, candidates
        self.keep, self.samples, self.temperature, self.least = keep, samples, temperature, least
        self.share, self.references = share, references
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.anchor, self.anchor_examples, self.generated = anchor, anchor_examples, generated
        self._policy = None if choose == "answers" else self._built(choose)
        self._anchor = None if anchor is None else Anchor(anchor, anchor_examples, max_new_tokens, batch_size)
        own = (generated or 0, temperature or 1.0, max_new_tokens, batch_size)
        self._self_generated = None if generated is None else SelfGenerated(*own)

    def _built(self, choose: str | dict[str, Any]) -> Any:
        if not isinstance(choose, (str, Mapping)):
            raise ConfigError(f"choose: {choose!r} is no replay policy")
        part = Part.model_validate(choose)
        if part.name in ("none", "on-policy"):
            raise ConfigError(f"choose: {part.name} chooses no examples; use random, inscl, kpig, surprise or answers")
        budget = {"fraction": self.fraction, "per_task": self.per_task}
        return build_part("replay", part.model_copy(update={"options": budget | part.options}), "on-policy, choose")

    @property
    def from_first(self) -> bool:
        """Whether something comes back where nothing of a task can: in the first stage, or from no memory."""
        return self._anchor is not None or self._self_generated is not None

    def select(self, stage: Stage) -> Selection:
        """Examples of every earlier task, in order, with the model's own answers where these are good enough."""
        selection = self._of_tasks(stage) if stage.seen else Selection([])
        beside = [self._anchor, self._self_generated if stage.index > 1 else None]
        for drawn, note in (each.draw(stage) for each in beside if each is not None):
            record = replace(selection.record, notes=[*selection.record.notes, note])
            selection = Selection([*selection.examples, *drawn], record)
        return selection

    def _of_tasks(self, stage: Stage) -> Selection:
        chosen, most = self._chosen(stage)
        counts = {task.name: _Counts() for task in stage.seen}
        answers = self._answered(stage, chosen.examples, counts)
        judge = {task.name: self._judges(task) for task in stage.seen}
        best = self._best(stage, chosen.examples, answers, judge)
        kept: list[tuple[Example, Example]] = []  # as it was chosen, as it comes back
        for task in stage.seen:
            numbers = [k for k, example in enumerate(chosen.examples) if example.task == task.name]
            good = self._good(numbers, best, judge[task.name])
            if most is not None:  # the best answers first, then the prompts without one, as they were drawn
                first = sorted(good, key=lambda k: -best[k].worth)[: most[task.name]]
                rest = [k for k in numbers if k not in good] if self.references else []
                numbers = sorted([*first, *rest[: most[task.name] - len(first)]])
            for k in numbers:
                if k in good:
                    kept.append((chosen.examples[k], with_answer(chosen.examples[k], best[k].text)))
                    counts[task.name].kept += 1
                elif self.references:
                    kept.append((chosen.examples[k], chosen.examples[k]))
        return Selection([own for _, own in kept], self._recorded(chosen.record, counts, judge, kept))

    def _chosen(self, stage: Stage) -> tuple[Selection, dict[str, int] | None]:
        """The examples whose prompts are answered; and how many of each task come back, where not all do."""
        if self._policy is not None:
            return self._policy.select(stage), None
        rng, drawn = stage.rng(), list[Example]()
        budget, most = Budget(self.fraction, self.per_task), dict[str, int]()
        for task in stage.seen:
            size = len(task.train)
            most[task.name] = min(budget.wanted(task.size), size)
            count = size if self.candidates is None else min(self.candidates * most[task.name], size)
            drawn += rng.sample(task.train, count)
        return Selection(drawn, ReplayRecord(budgets=dict(most))), most

    def _answered(self, stage: Stage, examples: Sequence[Example], counts: dict[str, _Counts]) -> dict[int, list[str]]:
        """Number of an example -> its answers that are of use, in the order they were drawn."""
        own = draw_answers(
            *(stage, examples),
            part="on-policy",
            samples=self.samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        for number, example in enumerate(examples):
            counts[example.task].asked += 1
            counts[example.task].too_long += number in own.too_long
            counts[example.task].unended += own.unended[number]
        return own.texts

    def _judges(self, task: Task) -> Literal["metric", "confidence"]:
        return "confidence" if task.metric == JUDGE else self.keep

    def _best(
        self,
        stage: Stage,
        examples: Sequence[Example],
        answers: Mapping[int, Sequence[str]],
        judge: Mapping[str, str],
    ) -> dict[int, _Own]:
        """Number of an example -> its best answer."""
        tasks = {task.name: task for task in stage.seen}
        found = [(number, text) for number, own in answers.items() for text in own]
        by_metric, by_confidence = list[tuple[int, str]](), list[tuple[int, str]]()
        for number, text in found:
            (by_metric if judge[examples[number].task] == "metric" else by_confidence).append((number, text))
        worth = dict(zip(by_confidence, self._log_likelihoods(stage, examples, by_confidence), strict=True))
        for name, task in tasks.items():
            own = [each for each in by_metric if examples[each[0]].task == name]
            if own:
                worth |= zip(own, metric_scores(task, [(examples[number], text) for number, text in own]), strict=True)
        best: dict[int, _Own] = {}
        for number, text in found:
            if worth[number, text] == float("-inf"):
                continue
            if number not in best or worth[number, text] > best[number].worth:
                best[number] = _Own(text, worth[number, text])
        return best

    def _log_likelihoods(
        self, stage: Stage, examples: Sequence[Example], found: Sequence[tuple[int, str]]
    ) -> list[float]:
        """Mean over an answer's tokens, under the model; -inf of one that does not fit beside its prompt."""

        def work(mine: Sequence[int]) -> list[tuple[int, float]]:
            own = [with_answer(examples[found[k][0]], found[k][1]) for k in mine]
            encoder = stage.encoder.with_limit(stage.encoder.max_length, "skip")
            surprises = answer_surprise(stage.model, encoder, own, batch_size=self.batch_size)
            return [(mine[index], -value) for index, value in surprises]

        likelihoods = dict(split_over_ranks(range(len(found)), work))
        return [likelihoods.get(k, float("-inf")) for k in range(len(found))]

    def _good(self, numbers: Sequence[int], best: Mapping[int, _Own], judge: str) -> set[int]:
        """Those of a task's examples whose own answers may be trained."""
        known = [number for number in numbers if number in best]
        if judge == "metric":
            return {number for number in known if best[number].worth >= self.least}
        if self._policy is None or not self.references:
            return set(known)
        return set(sorted(known, key=lambda number: -best[number].worth)[: round(self.share * len(numbers))])

    def _recorded(
        self,
        record: ReplayRecord,
        counts: Mapping[str, _Counts],
        judge: Mapping[str, str],
        kept: Sequence[tuple[Example, Example]],
    ) -> ReplayRecord:
        """What the policy that chose recorded, and what became of the prompts."""
        shown = defaultdict[str, list[dict[str, str]]](list)
        for chosen, own in kept:
            reference, answer = chosen.references[0], own.references[0]
            if answer != reference and len(shown[own.task]) < _SHOWN:
                shown[own.task].append({"reference": reference, "own answer": answer})
        answered = [f"{count.kept} of {count.asked} prompts of {name}" for name, count in counts.items()]
        notes = [*record.notes, f"The model's own answers come back for {', '.join(answered)}.{_first(shown)}"]
        if self.keep == "metric":
            notes += [
                f"{name}: a judge scores this task, so the model's confidence decides which of its answers come back."
                for name, by in judge.items()
                if by == "confidence"
            ]
        for name, count in counts.items():
            if count.too_long:
                notes.append(f"{name}: {count.too_long} of {count.asked} prompts are too long to be answered.")
        details = {
            "own answers": {name: count.kept for name, count in counts.items()},
            "prompts": {name: count.asked for name, count in counts.items()},
            "answers without an end": {name: count.unended for name, count in counts.items() if count.unended},
            "differing": dict(shown),
        }
        return replace(record, notes=notes, details={**record.details, **details})


def _first(shown: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """One of the answers, for whoever reads the report."""
    if not shown:
        return ""
    task, (one, *_) = next(iter(shown.items()))
    texts = (textwrap.shorten(one[name], _SHOWN_LENGTH, placeholder=" …") for name in ("own answer", "reference"))
    return " For example, of {}, “{}” where the reference is “{}”.".format(task, *texts)
