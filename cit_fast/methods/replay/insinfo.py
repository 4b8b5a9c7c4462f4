"""InsInfo: how much an instruction says, by how rare its tags are, and which examples that brings back."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

from cit_fast.errors import DataError


def tag_frequencies(tags: Iterable[Iterable[str]]) -> Counter[str]:
    """f_t: the number of instructions that carry tag t; a tag counts once for an instruction."""
    return Counter(tag for own in tags for tag in set(own))


def insinfo(tags: Sequence[Iterable[str]]) -> list[float]:
    """InsInfo of every instruction: the sum over its distinct tags t of log(N / f_t), natural logarithm.

    Args:
        tags: of N instructions, those of the current and of all previous tasks.

    Returns:
        N values >= 0; 0 for an instruction without tags, or with none but those that all carry.

    Source: InsCL (arXiv 2403.11435), section 3.3.

    >>> [round(value, 4) for value in insinfo([["summary", "news"], ["summary"]])]
    [0.6931, 0.0]
    """
    frequencies = tag_frequencies(tags)
    count = len(tags)
    # fsum is exact before its one rounding, so that the order of a set does not show.
    return [math.fsum(math.log(count / frequencies[tag]) for tag in set(own)) for own in tags]


def draw_by_insinfo(
    instances: Sequence[Sequence[int]], scores: Sequence[float], budget: int, rng: random.Random
) -> list[int]:
    """Draw ``budget`` instances of a task, more of those whose instruction says more.

    With fewer draws than instructions the top ones give an instance each. Otherwise instruction k gives
    max(1, floor(s_k * budget)), where s_k is its score's share of the sum (equal shares where all scores are zero), at
    most what it has; instances are then added, or taken away but for an instruction's last one, at random until the
    number is right.

    Args:
        instances: the task's instances by instruction, all different; none of the lists empty.
        scores: InsInfo of each instruction, >= 0; of equal scores the earlier instruction comes first.
        budget: instances to draw, >= 0.
        rng: the only source of chance.

    Returns:
        ``min(budget, all instances)`` different instances, by instruction from the highest score down.

    Raises:
        DataError: an instruction without instances, a score below zero or not finite, or lists of different lengths.

    Source: InsCL (arXiv 2403.11435), algorithm 2.
    """
    if len(instances) != len(scores):
        raise DataError(f"draw_by_insinfo: {len(scores)} scores for {len(instances)} instructions")
    for k, (own, score) in enumerate(zip(instances, scores, strict=True)):
        if not own:
            raise DataError(f"draw_by_insinfo: instruction {k} has no instances")
        if not (math.isfinite(score) and score >= 0):
            raise DataError(f"draw_by_insinfo: the score of instruction {k} is {score}; it must be >= 0 and finite")
    ranked = sorted(range(len(scores)), key=lambda k: -scores[k])
    if budget < len(ranked):
        return [rng.choice(instances[k]) for k in ranked[:budget]]
    # Exact shares, so that ties are ties. Each instruction gives at least one; the rest is drawn.
    exact = [Fraction(score) for score in scores]
    whole = sum(exact)
    shares = [score / whole if whole else Fraction(1, len(exact)) for score in exact]
    drawn = {
        k: rng.sample(list(instances[k]), min(max(1, math.floor(shares[k] * budget)), len(instances[k])))
        for k in ranked
    }
    count = sum(map(len, drawn.values()))
    if count < budget:
        there = {k: set(own) for k, own in drawn.items()}
        rest = [(k, instance) for k in ranked for instance in instances[k] if instance not in there[k]]
        for k, instance in rng.sample(rest, min(budget - count, len(rest))):
            drawn[k].append(instance)
    elif count > budget:
        candidates = [(k, instance) for k in ranked for instance in drawn[k]]
        rng.shuffle(candidates)
        for k, instance in candidates:
            if count > budget and len(drawn[k]) > 1:
                drawn[k].remove(instance)
                count -= 1
    return [instance for k in ranked for instance in drawn[k]]
