"""Do the answers keep to what the task asks of them? P-score and V-score of KPIG (He et al. 2025, arXiv 2403.10056).

=======  ============  ===============================================================================================
``WFR``  wrong format  the answer as a whole does not match the task's ``answer_pattern``, or is no ``answer_format``
``OOS``  out of scope  the answer is not in the closed set ``labels`` (compared as ``accuracy`` does), or, of an
                       ``extractive`` task, is neither a span of the example's input nor a reference
``WR``   wordy         the answer has more words than ``wordy_above`` times the longest reference
=======  ============  ===============================================================================================

Each applies only to the tasks that declare it. The **V-score** is the mean over the tasks of the mean of a task's
rates, in points from 0 to 100, lower is better; the paper leaves open how rates are averaged, so the mean over the
kinds (of each kind's mean over its tasks) stands beside it. The **P-score** is the mean of the tasks' scores, each by
its own metric.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cit_fast.data.constraints import KINDS, Constraints
from cit_fast.errors import DataError
from cit_fast.text import composed, normalise_label, word_count, words

Rates = Mapping[str, float]
"""Kind of violation -> share of the answers that commit it, in points from 0 to 100; only the kinds that apply."""


def violation_rates(
    constraints: Constraints,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    inputs: Sequence[str | None] | None = None,
) -> dict[str, float]:
    """The share of answers that violate each constraint, in points from 0 to 100; of the kinds that apply only.

    Args:
        constraints: what the task declares.
        predictions: N answers, N >= 1; white space around them does not count.
        references: N lists of acceptable answers.
        inputs: N inputs of the examples; only an extractive task needs them.

    Raises:
        DataError: no answer, lengths that differ, or an extractive example without input.

    >>> violation_rates(Constraints(labels=("yes", "no"), wordy_above=2), ["Yes.", "I do not know"], [["yes"], ["no"]])
    {'OOS': 50.0, 'WR': 50.0}
    """
    inputs = [None] * len(predictions) if inputs is None else inputs
    if not predictions:
        raise DataError("violations: no answers to judge; at least one is needed")
    if not len(predictions) == len(references) == len(inputs):
        raise DataError(
            f"violations: {len(predictions)} answers, {len(references)} lists of references and {len(inputs)} inputs"
        )
    if constraints.extractive and any(not (text or "").strip() for text in inputs):
        raise DataError("violations: an extractive task, but an example without the input its answer is a span of")
    judges = {"WFR": _wrong_format(constraints), "OOS": _out_of_scope(constraints), "WR": _wordy(constraints)}
    examples = [
        (composed(prediction.strip()), list(map(composed, answers)), composed(text or ""))
        for prediction, answers, text in zip(predictions, references, inputs, strict=True)
    ]
    counts = {kind: sum(judges[kind](*example) for example in examples) for kind in constraints.kinds}
    return {kind: 100.0 * count / len(examples) for kind, count in counts.items()}


_Judge = Callable[[str, Sequence[str], str], bool]


def _wrong_format(constraints: Constraints) -> _Judge:
    pattern = re.compile(composed(constraints.answer_pattern)) if constraints.answer_pattern else None
    is_format = FORMATS[constraints.answer_format] if constraints.answer_format else None

    def judge(prediction: str, references: Sequence[str], text: str) -> bool:
        return (pattern is not None and not pattern.fullmatch(prediction)) or (
            is_format is not None and not is_format(prediction)
        )

    return judge


def _out_of_scope(constraints: Constraints) -> _Judge:
    known = {normalise_label(label) for label in constraints.labels}

    def judge(prediction: str, references: Sequence[str], text: str) -> bool:
        if known and normalise_label(prediction) not in known:
            return True
        # Annotators mend the grammar of a span now and then: what they wrote is in scope.
        answers = {normalise_label(answer) for answer in references}
        return constraints.extractive and normalise_label(prediction) not in answers and not _is_span(prediction, text)

    return judge


def _wordy(constraints: Constraints) -> _Judge:
    multiple = constraints.wordy_above or math.inf

    def judge(prediction: str, references: Sequence[str], text: str) -> bool:
        return word_count(prediction) > multiple * max(map(word_count, references))

    return judge


def _is_span(prediction: str, text: str) -> bool:
    """Whether the words of the prediction stand in the text in one row; case and punctuation do not count."""
    found = words(prediction)
    if not found:
        return bool(prediction) and prediction in text
    return f" {' '.join(found)} " in f" {' '.join(words(text))} "


# ----------------------------------------------------------------------------------------------------- formats


def _json_value(text: str) -> Any:
    """The value of a JSON text; raises ValueError for what is none, NaN and Infinity among it."""

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refused)


def _is_json(*kinds: type) -> Callable[[str], bool]:
    def judge(text: str) -> bool:
        try:
            value = _json_value(text)
        except (ValueError, RecursionError):
            return False
        return not kinds or isinstance(value, kinds)

    return judge


_NUMBER = re.compile(r"[-+\u2212]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?")
_LIST_ITEM = re.compile(r"\s*([-*•]|\d+[.)])\s+\S.*")

FORMATS: dict[str, Callable[[str], bool]] = {
    "json": _is_json(),
    "json_object": _is_json(dict),
    "json_list": _is_json(list),
    # The pattern's parts are all optional, so a digit is asked for besides.
    "number": lambda text: bool(_NUMBER.fullmatch(text)) and any(map(str.isdigit, text)),
    "list": lambda text: all(map(_LIST_ITEM.fullmatch, filter(str.strip, text.split("\n")))) and bool(text.strip()),
}
"""``json``: any JSON value; ``json_object``, ``json_list``: one of that kind; ``number``: digits with sign, decimals
and commas between thousands, nothing else; ``list``: every line starts with ``-``, ``*``, ``•``, ``1.`` or ``1)``."""


# ------------------------------------------------------------------------------------------------ P and V


@dataclass(frozen=True)
class TaskSetScores:
    """P-score and V-score of some tasks after one stage, in points; ``None`` where undefined.

    Args:
        tasks: how many; ``constrained``: of how many the V-score speaks (the others declare no constraint).
        p: mean of the tasks' scores, higher is better.
        p_by_metric: the same scores, averaged within each metric first and then over the metrics (the paper's macro
            average); ``None`` where the metrics are not known.
        v: mean over the constrained tasks of the mean of each one's rates, lower is better.
        v_by_kind: the same rates, averaged within each kind first and then over the kinds.
        rates: kind -> its mean rate over the tasks it applies to, in points.
    """

    tasks: int
    constrained: int
    p: float | None
    v: float | None
    v_by_kind: float | None
    rates: dict[str, float]
    p_by_metric: float | None = None


def task_set_scores(
    tasks: Iterable[str],
    scores: Mapping[str, float],
    violations: Mapping[str, Rates],
    metrics: Mapping[str, str] | None = None,
) -> TaskSetScores:
    """P-score and V-score of ``tasks``.

    A value is ``None`` where a task lacks a score or was not judged (a record older than the V-score): a mean over
    fewer tasks than its name says would not be comparable.

    Args:
        tasks: names. ``scores``: task -> score in [0, 100]. ``violations``: task -> its rates, empty for a task
            without constraints. ``metrics``: task -> the name of its metric.

    >>> judged = {"a": {"WFR": 50.0, "WR": 0.0}, "b": {"WFR": 0.0}, "c": {}}
    >>> found = task_set_scores("abc", {"a": 40.0, "b": 80.0, "c": 90.0}, judged)
    >>> found.p, found.v, found.v_by_kind, found.rates
    (70.0, 12.5, 12.5, {'WFR': 25.0, 'WR': 0.0})
    """
    names = list(tasks)
    judged = [violations[name] for name in names if name in violations]
    constrained = [rates for rates in judged if rates]
    complete = len(judged) == len(names)
    by_kind = {kind: [rates[kind] for rates in constrained if kind in rates] for kind in KINDS}
    complete_scores = bool(names) and all(name in scores for name in names)
    by_metric: dict[str, list[float]] = {}
    if metrics and complete_scores:
        for name in names:
            by_metric.setdefault(metrics[name], []).append(scores[name])
    means = {kind: _mean(values) for kind, values in by_kind.items() if values} if complete else {}
    return TaskSetScores(
        tasks=len(names),
        constrained=len(constrained),
        p=_mean([scores[name] for name in names]) if complete_scores else None,
        p_by_metric=_mean([_mean(values) for values in by_metric.values()]) if by_metric else None,
        v=_mean([_mean(list(rates.values())) for rates in constrained]) if complete and constrained else None,
        v_by_kind=_mean(list(means.values())) if means else None,
        rates=means,
    )


def task_v_score(rates: Rates | None) -> float | None:
    """V-score of one task in points: the mean of its rates; ``None`` where it has none."""
    return _mean(list(rates.values())) if rates else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
