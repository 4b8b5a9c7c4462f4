"""The streams: eight tasks that pretraining does not have, with several wordings each.

Some contradict each other (the same inputs, other answers), some are related (the same skill with another rule), and a
few words of the instruction tell which is meant; these are marked as its key parts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from bench.testbed.pretraining_tasks import KIND_OF, KINDS, WORDS, Draw, Generator, some
from bench.testbed.pretraining_tasks import _marked as marked
from cit_fast.data import Task, TaskStream

ROMAN = ("i", "ii", "iii", "iv", "v", "vi")


def _consignment(rng: random.Random) -> list[str]:
    return some(rng, 2, 5)


def _parcel(answer: Callable[[list[str]], str]) -> Draw:
    """Lists in a sentence; the answer is made of the list."""

    def draw(rng: random.Random) -> tuple[str, str]:
        items = _consignment(rng)
        carrier = rng.choice(("parcel", "crate", "sack", "van", "cart"))
        return f"The {carrier} brings {', '.join(items[:-1])} and {items[-1]}.", answer(items)

    return draw


def _thing(answers: dict[str, str]) -> Draw:
    """One thing in a sentence; the answer goes by its kind."""

    def draw(rng: random.Random) -> tuple[str, str]:
        word = rng.choice(WORDS)
        who = rng.choice(("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon"))
        return f"{who} {rng.choice(('found', 'bought', 'lost', 'sent', 'wants'))} a {word}.", answers[KIND_OF[word]]

    return draw


def _reading(words: Sequence[str], limits: Sequence[int]) -> Draw:
    """A number in a sentence; the answer is the word of the range that it is in."""

    def draw(rng: random.Random) -> tuple[str, str]:
        value = rng.randint(0, 99)
        place = rng.choice(("north", "south", "east", "west", "upper", "lower"))
        what = rng.choice(("gauge", "meter", "dial", "sensor"))
        return f"The {place} {what} shows {value}.", words[sum(value >= limit for limit in limits)]

    return draw


def _by_kind(*answers: str) -> dict[str, str]:
    return dict(zip(sorted(KINDS), answers, strict=True))


SHELVES, MOVED = _by_kind("A1", "B2", "C3", "D4", "E5", "F6"), _by_kind("D4", "A1", "F6", "B2", "C3", "E5")
CARE = _by_kind("with care", "with care", "as usual", "as usual", "with care", "as usual")

STREAM = (
    Generator(
        "shelf",
        (
            "Say on [which shelf] it goes.",
            "Name [the shelf] where it belongs.",
            "Give the code of [its shelf].",
            "[Which shelf] is it for?",
        ),
        _thing(SHELVES),
        tuple(sorted(SHELVES.values())),
    ),
    Generator(
        "last-two",
        (
            "Give [the last two things], the later first, [with a slash between].",
            "Write [the two last things] in reverse, [slash in the middle].",
            "[The final two things], last one first, [split by a slash].",
        ),
        _parcel(lambda x: f"{x[-1]}/{x[-2]}"),
    ),
    Generator(
        "level",
        (
            "Is the reading [low, fine or high]?",
            "Call the reading [low, fine or high].",
            "Say [low, fine or high] for what it shows.",
        ),
        _reading(("low", "fine", "high"), (40, 70)),
        ("low", "fine", "high"),
    ),
    Generator(
        "handling",
        ("Say [how to carry] it.", "[How should one carry] it?", "Give the rule for [carrying] it."),
        _thing(CARE),
        ("as usual", "with care"),
    ),
    Generator(
        "shelf-moved",
        (
            "[After the move], say on which shelf it goes.",
            "Name the shelf where it belongs [since the move].",
            "Give the code of its shelf [in the new hall].",
            "Which shelf is it for [in the new hall]?",
        ),
        _thing(MOVED),
        tuple(sorted(MOVED.values())),
    ),
    Generator(
        "roman-count",
        (
            "Count the things [in Roman numerals].",
            "How many things, [in Roman numerals]?",
            "Give [the Roman number] of things.",
        ),
        _parcel(lambda x: ROMAN[len(x) - 1]),
        ROMAN[1:5],
    ),
    Generator(
        "first-two",
        (
            "Give [the first two things] in order, [with a plus between].",
            "Write [the two first things] as they come, [plus in the middle].",
            "[The opening two things], first one first, [joined by a plus].",
        ),
        _parcel(lambda x: f"{x[0]}+{x[1]}"),
    ),
    Generator(
        "alarm",
        (
            "Which [alarm colour] does the reading call for?",
            "Give the [alarm colour] for what it shows.",
            "Name the [colour of the alarm].",
        ),
        _reading(("green", "amber", "red"), (20, 50)),
        ("amber", "green", "red"),
    ),
)
UNSEEN = {
    "shelf": "Tell [the shelf] that it is put on.",
    "last-two": "Name [the last two things] from the end, [a slash in between].",
    "level": "Which is it: [low, fine or high]?",
    "handling": "With what [care] is it to be carried?",
    "shelf-moved": "Tell the shelf that it is put on [since the move].",
    "roman-count": "Say [in Roman numerals] how many things it brings.",
    "first-two": "Name [the first two things] from the start, [a plus in between].",
    "alarm": "Say what [colour the alarm] has.",
}
"""A wording of each task that training never has."""
REWORDED = "-reworded"
ORDERS = {
    1: tuple(g.name for g in STREAM),
    2: ("alarm", "shelf-moved", "first-two", "handling", "roman-count", "level", "shelf", "last-two"),
}


def stream(order: int, seed: int, train: int, test: int) -> TaskStream:
    """The eight tasks of a stream; every seed draws other examples."""
    by_name = {generator.name: generator for generator in STREAM}
    return TaskStream(tuple(by_name[name].task(train, test, str(seed)) for name in ORDERS[order]))


def reworded(tasks: TaskStream) -> list[Task]:
    """The test examples of a stream's tasks in a wording that training never has."""
    found = []
    for task in tasks:
        instruction, parts = marked(UNSEEN[task.name])
        test = tuple(replace(each, instruction=instruction, key_parts=parts) for each in task.test)
        found.append(replace(task, name=task.name + REWORDED, train=(), dev=(), test=test))
    return found
