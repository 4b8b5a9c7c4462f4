"""Generated tasks with known answers, and those that the small model is pretrained on.

Operations on words and lists, kinds of things, and short tasks of the package reasoning-gym.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cit_fast.data import Example, Task

_THINGS = """
animal: horse goat otter raven salmon lizard beetle rabbit donkey badger falcon turtle
fruit: apple pear plum cherry lemon grape melon peach fig mango papaya apricot
tool: hammer saw chisel wrench drill pliers file shovel rake axe trowel clamp
garment: shirt scarf glove boot jacket sock hat belt skirt vest cloak sandal
vessel: cup bowl jug bucket bottle kettle barrel vase pot flask basin crate
instrument: flute drum violin trumpet harp cello organ banjo oboe guitar lute bell
"""
KINDS = {kind: words.split() for kind, words in (line.split(": ") for line in _THINGS.strip().splitlines())}
WORDS = [word for words in KINDS.values() for word in words]
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}

Draw = Callable[[random.Random], tuple[str, str]]
"""Draws an input and its answer."""


@dataclass(frozen=True)
class Generator:
    """A task that makes its examples.

    Args:
        name: of the task.
        wordings: of its instruction; a key part stands between ``[`` and ``]``.
        draw: draws an input and its answer.
        labels: the closed set of answers, where there is one.
    """

    name: str
    wordings: tuple[str, ...]
    draw: Draw
    labels: tuple[str, ...] = ()

    def examples(self, count: int, seed: str) -> tuple[Example, ...]:
        """``count`` examples with different inputs where there are so many, the wordings in turn."""
        rng = random.Random(f"{self.name}/{seed}")
        seen: set[str] = set()
        found: list[Example] = []
        while len(found) < count:
            for _ in range(100):
                text, answer = self.draw(rng)
                if text not in seen:
                    break
            seen.add(text)
            instruction, parts = _marked(self.wordings[len(found) % len(self.wordings)])
            found.append(Example(instruction, text, (answer,), self.name, parts))
        rng.shuffle(found)
        return tuple(found)

    def task(self, train: int, test: int, seed: str) -> Task:
        """Training and test examples, and as many for development as for the test; no input is in two of them."""
        every = self.examples(train + 2 * test, seed)
        return Task(
            self.name,
            every[:train],
            every[train : train + test],
            every[train + test :],
            metric="accuracy" if self.labels else "exact_match",
            labels=self.labels,
        )


def _marked(wording: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The instruction without its brackets, and where they stood."""
    text, parts = "", list[tuple[int, int]]()
    for piece in wording.replace("]", "[").split("["):
        parts.append((len(text), len(text) + len(piece)))
        text += piece
    return text, tuple(parts[1::2])


def some(rng: random.Random, low: int, high: int, pool: Sequence[str] = WORDS) -> list[str]:
    return rng.sample(list(pool), rng.randint(low, high))


# ----------------------------------------------------------------------------------------------------- pretraining


def _of_list(answer: Callable[[list[str]], str], low: int = 2, high: int = 5) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        items = some(rng, low, high)
        return ", ".join(items), answer(items)

    return draw


_LETTERS = "abcdefghiklmnoprstuw"


def _of_word(answer: Callable[[str], str]) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        word = (
            rng.choice(WORDS)
            if rng.random() < 0.5
            else "".join(rng.choices("abcdefghiklmnoprstuw", k=rng.randint(3, 7)))
        )
        return word, answer(word)

    return draw


def _kind(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return word, KIND_OF[word]


def _odd_one_out(rng: random.Random) -> tuple[str, str]:
    kind, other = rng.sample(sorted(KINDS), 2)
    odd = rng.choice(KINDS[other])
    items = [*some(rng, 3, 3, KINDS[kind]), odd]
    rng.shuffle(items)
    return ", ".join(items), odd


def _holds(rng: random.Random) -> tuple[str, str]:
    items, kind = some(rng, 2, 4), rng.choice(sorted(KINDS))
    return f"{', '.join(items)} / {kind}", "yes" if any(KIND_OF[item] == kind for item in items) else "no"


def _larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(100), 2)
    return f"{a}, {b}", str(max(a, b))


def _next_number(rng: random.Random) -> tuple[str, str]:
    start, step = rng.randint(0, 30), rng.randint(1, 9)
    return ", ".join(str(start + step * k) for k in range(4)), str(start + step * 4)


PRETRAINING = (
    Generator("copy", ("Repeat the list.", "Write the list again as it is."), _of_list(", ".join)),
    Generator("first", ("Name the first item.", "Which item comes first?"), _of_list(lambda x: x[0])),
    Generator("last", ("Name the last item.", "Which item is at the end?"), _of_list(lambda x: x[-1])),
    Generator("second", ("Name the second item.", "Which item stands in second place?"), _of_list(lambda x: x[1])),
    Generator("count", ("How many items are there?", "Count the items."), _of_list(lambda x: str(len(x)), 1)),
    Generator(
        "reverse",
        ("Write the list from the end to the start.", "Reverse the list."),
        _of_list(lambda x: ", ".join(x[::-1])),
    ),
    Generator(
        "sort",
        ("Sort the list by the alphabet.", "Put the items in alphabetical order."),
        _of_list(lambda x: ", ".join(sorted(x))),
    ),
    Generator(
        "without-first",
        ("Leave out the first item.", "Drop the item at the start."),
        _of_list(lambda x: ", ".join(x[1:])),
    ),
    Generator("dashes", ("Join the items with dashes.", "Put a dash between the items."), _of_list("-".join)),
    Generator("bars", ("Join the items with bars.", "Put a bar between the items."), _of_list("|".join)),
    Generator(
        "initials",
        ("Give the first letter of each item.", "What do the items begin with?"),
        _of_list(lambda x: " ".join(w[0] for w in x)),
    ),
    Generator("capitals", ("Write it in capitals.", "Use capital letters only."), _of_word(str.upper)),
    Generator("spell", ("Spell the word.", "Give the letters of the word one by one."), _of_word(" ".join)),
    Generator(
        "ends-with", ("Which letter ends the word?", "Give the last letter of the word."), _of_word(lambda w: w[-1])
    ),
    Generator(
        "kind",
        ("What kind of thing is it?", "Name the kind of thing."),
        _kind,
        tuple(sorted(KINDS)),
    ),
    Generator(
        "kinds",
        ("Name the kind of each item.", "What kinds of things are these?"),
        _of_list(lambda x: ", ".join(KIND_OF[w] for w in x), 2, 4),
    ),
    Generator("odd-one-out", ("Which item is of another kind?", "Name the odd one out."), _odd_one_out),
    Generator(
        "holds", ("Is a thing of this kind in the list?", "Say if the kind is among the items."), _holds, ("yes", "no")
    ),
    Generator("larger", ("Which number is larger?", "Name the larger number."), _larger),
    Generator("next-number", ("Which number comes next?", "Go on with the numbers."), _next_number),
)

GYM: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "operators": ("+", "-")},
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "spell_backward": {"min_word_len": 3, "max_word_len": 6},
    "letter_counting": {"min_words": 2, "max_words": 4},
    "gcd": {"min_value": 2, "max_value": 30},
    "syllogism": {},
    "family_relationships": {"max_family_size": 5},
    "word_sequence_reversal": {"min_words": 3, "max_words": 4},
    "calendar_arithmetic": {},
    "number_sequence": {},
}
"""Tasks of reasoning-gym and their options: short, and within reach of a small model or not quite."""


def gym_examples(name: str, count: int, seed: int) -> tuple[Example, ...]:
    """Examples of a task of reasoning-gym, of at most 240 characters and 24 of the answer."""
    import reasoning_gym  # needed for pretraining and for general ability alone

    data = reasoning_gym.create_dataset(name, size=2 * count, seed=seed, **GYM[name])
    found = []
    for entry in data:
        question, answer = str(entry["question"]).strip(), str(entry["answer"]).strip()
        if answer and len(question) <= 240 and len(answer) <= 24:
            found.append(Example(question, "", (answer,), name))
        if len(found) == count:
            break
    return tuple(found)


def general(test: int) -> list[Task]:
    """The pretraining tasks with test examples alone: what the model could do before, the same for every seed."""
    own = [Task(g.name, (), (), g.examples(test, "general"), metric="exact_match") for g in PRETRAINING]
    gym = [Task(name, (), (), gym_examples(name, test, 1), metric="exact_match") for name in GYM]
    return [*own, *gym]
