"""The splits of a source once it is open, and which of their examples a task takes."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cit_fast.data.example import Example
from cit_fast.data.records import UnansweredError
from cit_fast.errors import DataError
from cit_fast.text import normalise_label

_log = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
Limits = Mapping[str, "int | None"]


@dataclass(frozen=True)
class Opened:
    """A source's splits, counted but not necessarily read: ``read(split, positions)`` gives examples."""

    counts: dict[str, int]
    read: Callable[[str, Sequence[int]], list[Example]]
    labels: tuple[str, ...] = ()


def in_memory(examples: Mapping[str, list[Example]], labels: tuple[str, ...]) -> Opened:
    """Splits that are read already."""
    return Opened(
        counts={split: len(found) for split, found in examples.items()},
        read=lambda split, positions: [examples[split][position] for position in positions],
        labels=labels,
    )


def read_splits(parts: Mapping[str, Sequence[Callable[[], list[Example]]]]) -> dict[str, list[Example]]:
    """Read every split, given its files or shards as what reads them.

    A split without any answer, where such records are left out, counts as absent, which a warning says.

    Raises:
        UnansweredError: no answer in the training set, or nowhere.
        DataError: one cannot be read.
    """
    found: dict[str, list[Example]] = {}
    unanswered: dict[str, UnansweredError] = {}
    for split, reads in parts.items():
        examples: list[Example] = []
        for read in reads:
            try:
                examples += read()
            except UnansweredError as error:
                unanswered.setdefault(split, error)
                _log.warning("%s; they are left out", error)
        if examples:
            found[split] = examples
    if unanswered and (not found or "train" in unanswered.keys() - found.keys()):
        raise unanswered.get("train") or next(iter(unanswered.values()))
    return found


def among_labels(opened: Opened, labels: tuple[str, ...], where: str) -> Opened:
    """The examples of which an answer is one of the labels; they are read here to be counted."""
    known = {normalise_label(label) for label in labels}
    kept: dict[str, list[Example]] = {}
    outside: list[Example] = []
    for split, count in opened.counts.items():
        kept[split] = []
        for example in opened.read(split, range(count)):
            right = tuple(answer for answer in example.references if normalise_label(answer) in known)
            if right:
                kept[split].append(dataclasses.replace(example, references=right))
            else:
                outside.append(example)
    if outside and not any(kept.values()):
        raise DataError(not_a_label(outside[0], outside[0].references[0], labels))
    if outside:
        first = not_a_label(outside[0], outside[0].references[0], labels)
        _log.warning("%s: skipped %d records, the first %s", where, len(outside), first)
    return in_memory({split: found for split, found in kept.items() if found or split == "train"}, labels)


def not_a_label(example: Example, answer: str, labels: Sequence[str]) -> str:
    """What to say of an answer outside the closed set."""
    few = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
    return f"{example.source}: answer {answer!r} is not one of the labels: {few}"


def joined(parts: Sequence[Opened]) -> Opened:
    """Several sources as one, in their order; labels are a closed set only where each has one."""
    counts = {split: sum(part.counts.get(split, 0) for part in parts) for split in SPLITS}

    def read(split: str, positions: Sequence[int]) -> list[Example]:
        examples: list[Example] = []
        start = 0
        for part in parts:
            end = start + part.counts.get(split, 0)
            own = [position - start for position in positions if start <= position < end]
            examples += part.read(split, own) if own else []
            start = end
        return examples

    labels = {normalise_label(label): label for part in parts for label in part.labels}
    closed = all(part.labels for part in parts)
    there = {split: count for split, count in counts.items() if any(split in part.counts for part in parts)}
    return Opened(there, read, tuple(labels.values()) if closed else ())


def with_test_set(part: Opened, limits: Limits, seed_text: str) -> Opened:
    """A source, with a test set held out of its training set as :func:`choose_examples` does where it has none."""
    if "test" in part.counts or not part.counts.get("train"):
        return part
    chosen = choose_examples(part.counts, {"train": None, "dev": 0, "test": limits["test"]}, seed_text)
    own = {split: (split, list(range(count))) for split, count in part.counts.items()}
    own |= {split: chosen[split] for split in ("train", "test")}

    def read(split: str, positions: Sequence[int]) -> list[Example]:
        origin, indices = own[split]
        return part.read(origin, [indices[position] for position in positions])

    return Opened({split: len(indices) for split, (_, indices) in own.items()}, read, part.labels)


def choose_examples(counts: Mapping[str, int], limits: Limits, seed_text: str) -> dict[str, tuple[str, list[int]]]:
    """Which examples make up each split.

    Args:
        counts: split -> number of examples the source has.
        limits: split -> upper limit, ``None`` for all.
        seed_text: equal texts choose equal examples, on every machine.

    Returns:
        Split -> (the source's split its examples come from, their positions there, ascending). Splits held
        out of the training set and what remains of it are disjoint.
    """
    chosen: dict[str, tuple[str, list[int]]] = {}
    pool = _shuffled(counts.get("train", 0), f"{seed_text}/train")
    quarter = len(pool) // 4
    for split in ("test", "dev"):
        if split in counts:
            order = _shuffled(counts[split], f"{seed_text}/{split}")
            chosen[split] = (split, sorted(order[: limits[split]]))
        elif pool:
            limit = limits[split]
            size = min(max(1, len(pool) // 10) if limit is None else limit, quarter)
            # Test examples from one end and dev examples from the other: neither depends on the other's size.
            held_out = pool[len(pool) - size :] if split == "test" else pool[:size]
            chosen[split] = ("train", sorted(held_out))
    taken = {index for origin, indices in chosen.values() if origin == "train" for index in indices}
    left = [index for index in pool if index not in taken]
    chosen["train"] = ("train", sorted(left[: limits["train"]]))
    return chosen


def say_repeated(splits: Mapping[str, Sequence[Example]], held_out_splits: Collection[str], task: str) -> None:
    """Warn of prompts held out of the training set that stand in it as well: whoever learns them knows the answer."""
    held = [example for split in held_out_splits for example in splits[split]]
    if not held:
        return
    trained = set(map(_prompt, splits["train"]))
    twice = [example for example in held if _prompt(example) in trained]
    if twice:
        _log.warning(
            "task %s: %d of the %d examples held out of its training set have a prompt that is in it as well, the "
            "first %s; remove what is there twice, or give test and dev sets",
            *(task, len(twice), len(held), twice[0].source),
        )


def _prompt(example: Example) -> tuple[object, ...]:
    return example.instruction, example.input, example.messages[:-1], example.images, example.other_media


def _shuffled(count: int, seed_text: str) -> list[int]:
    order = list(range(count))
    random.Random(seed_text).shuffle(order)  # noqa: S311 - a sample, not a secret
    return order
