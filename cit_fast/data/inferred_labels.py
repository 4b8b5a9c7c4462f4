"""Infer the closed set of labels of a task that does not declare one, from its answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from cit_fast.text import normalise_label

_MOST_LABELS = 20
_LEAST_REPETITIONS = 10


def inferred_labels(references: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The distinct answers, most frequent first, if they look like a closed set; otherwise an empty tuple.

    A closed set has 2 to 20 answers, and on average at least ten examples for each. Answers that differ only as
    ``accuracy`` overlooks it (case, quotes, a final full stop) are one, in their most frequent spelling.

    Args:
        references: for each example its acceptable answers.

    >>> inferred_labels([["yes"], ["no"], ["yes"], ["Yes."]] * 10)
    ('yes', 'no')
    """
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for answers in references:
        for answer in answers:
            spellings[normalise_label(answer)][answer.strip()] += 1
        if len(spellings) > _MOST_LABELS:
            return ()
    if len(spellings) < 2 or len(references) < _LEAST_REPETITIONS * len(spellings):
        return ()
    by_frequency = sorted(spellings.values(), key=lambda each: (-each.total(), min(each)))
    return tuple(min(each, key=lambda text: (-each[text], text)) for each in by_frequency)
