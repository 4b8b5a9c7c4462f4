"""What the tiny vision-language model is pretrained on: pictures, and what is said of them in whole sentences.

The pictures are drawn as those of the built-in visual tasks; the answers are worded as none of the tasks wants them, so
that a task has a form to teach. What is asked for comes first in them, so that it is known where an answer begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from cit_fast.data.builtin import visual, visual_wordings
from cit_fast.data.builtin.kinds import Draw, parse_wording
from cit_fast.data.builtin.visual_drawing import COLOURS, SHAPES, Mark, Picture, draw_background

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ORDINALS = ("first", "second", "third")
_MOST_TURNS = 5
# The words of questions and of answers here.
_SENTENCES = """
What colour is the shape? nothing it is. none there are. right, wrong that is. How many? 1 to 2.
Take notes. Which shape, which digit is on the left, the right? What number is shown? Which bar is the highest?
"""

Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class Shown:
    """A picture with questions and answers about it, in the order of a conversation."""

    picture: Picture
    turns: Turns


def drawn_conversation(draw: Draw, ease: float = 0.0) -> Shown:
    """A picture of any kind, with up to five questions on it.

    Args:
        ease: probability of an easy one: a few different shapes, with nothing before the question.
    """
    easy = draw.chance(ease)
    marks, turns = _different(draw) if easy else draw.pick(_SCENES)(draw)
    turns = draw.distinct(turns, min(len(turns), _MOST_TURNS))
    first, answer = turns[0]
    before = "" if easy else _preamble(draw)
    return Shown(Picture(draw_background(draw), tuple(marks)), [(before + first, answer), *turns[1:]])


def _preamble(draw: Draw) -> str:
    """What stands before a question: an instruction that has nothing to do with it, words, or nothing."""
    if draw.chance(0.5):
        return ""
    if draw.chance(0.5):
        return draw.pick(instructions()) + "\n\n"
    words = [draw.pick(vocabulary()) + draw.pick((" ", " ", "\n")) for _ in range(draw.between(1, 12))]
    return "".join(words).strip() + "\n\n"


@cache
def instructions() -> tuple[str, ...]:
    """Every instruction of the visual tasks."""
    several = (wording for wordings in visual_wordings.SEVERAL.values() for wording in wordings)
    single = (*visual_wordings.ORIGIN.values(), *visual_wordings.DIVERSE.values())
    return tuple(dict.fromkeys(parse_wording(wording)[0] for wording in (*several, *single)))


@cache
def vocabulary() -> tuple[str, ...]:
    """The words of instructions, questions and answers."""
    names = (*COLOURS, *SHAPES, *map(visual.plural, SHAPES))
    answers = (*visual.LETTERS, "Yes", "No", *(name.capitalize() for name in SHAPES), *(c.upper() for c in COLOURS))
    words = (word.strip(".,:;?") for text in (*instructions(), _SENTENCES) for word in text.split())
    return tuple(dict.fromkeys((*names, *answers, *NUMBERS, *_ORDINALS, *words)))


def _about_one(draw: Draw, mark: Mark, others: Sequence[Mark]) -> Iterator[tuple[str, str]]:
    """Questions on one of at most three different shapes."""
    yield f"What colour is the {mark.what}?", f"{mark.colour} it is."
    yield f"What shape is {mark.colour}?", f"{mark.what} it is."
    yield f"the {mark.colour} {mark.what}", _extent(mark)
    absent = visual.absent_colours([mark, *others])
    said = mark.colour if draw.chance(0.5) else draw.pick(absent)
    yield f"Is the {mark.what} {said}?", f"{'right' if said == mark.colour else 'wrong'} that is."
    right = draw.between(0, len(_ORDINALS) - 1)
    options = draw.distinct(absent, len(_ORDINALS))
    options[right] = mark.colour
    question = f"What colour is the {mark.what}?\n{visual.listed_options(options)}"
    yield question, f"{_ORDINALS[right]} it is."


def _extent(mark: Mark) -> str:
    x1, y1, x2, y2 = mark.box
    return f"{x1} {y1} to {x2} {y2} it is."


# In these notes a word is followed at once by what belongs to it in the picture: the first that is learned.
def _notes(words: Sequence[str]) -> tuple[str, str]:
    return "Take notes.", ", ".join(words) + "."


def _different(draw: Draw) -> tuple[list[Mark], Turns]:
    marks = visual.draw_different(draw, draw.between(1, 3))
    turns = [turn for mark in marks for turn in _about_one(draw, mark, [m for m in marks if m is not mark])]
    turns = draw.distinct(turns, min(len(turns), _MOST_TURNS - 1))
    mixed = draw.distinct(marks, len(marks))
    if draw.chance(0.5):
        return marks, [*turns, _notes([f"{mark.what} {mark.colour}" for mark in mixed])]
    return marks, [*turns, _notes([f"{mark.colour} {mark.what}" for mark in mixed])]


def _judged(draw: Draw) -> tuple[list[Mark], Turns]:
    """Claims and options, for which what is seen is compared with what is said."""
    marks = visual.draw_different(draw, draw.between(1, 3))
    turns = []
    for mark in marks:
        about = list(_about_one(draw, mark, [other for other in marks if other is not mark]))
        turns += about[-2:]
    return marks, turns


def _extents(draw: Draw) -> tuple[list[Mark], Turns]:
    """Where things are to the pixel: the hardest question of all."""
    marks = visual.draw_different(draw, draw.between(1, 4))
    return marks, [(f"the {mark.colour} {mark.what}", _extent(mark)) for mark in marks]


def _alike(draw: Draw) -> tuple[list[Mark], Turns]:
    marks = visual.draw_alike(draw, 5)
    count, several = NUMBERS[len(marks)], visual.plural(marks[0].what)
    return marks, [(f"How many {several} are there?", f"{count} there are.")]


def _sides(draw: Draw) -> tuple[list[Mark], Turns]:
    marks = visual.draw_sides(draw)
    pairs = list(zip(visual.SIDES, marks, strict=True))
    turns = [(f"Which shape is on the {side}?", f"{mark.what} it is.") for side, mark in pairs]
    return marks, [*turns, _notes([f"{side} {mark.colour} {mark.what}" for side, mark in draw.distinct(pairs, 2)])]


def _number(draw: Draw) -> tuple[list[Mark], Turns]:
    marks = visual.draw_number(draw)
    words = [NUMBERS[int(mark.what)] for mark in marks]
    pairs = list(zip(visual.SIDES, words, strict=True))
    turns = [(f"Which digit is on the {side}?", f"{word} it is.") for side, word in pairs]
    turns.append(_notes([f"{side} {word}" for side, word in draw.distinct(pairs, 2)]))
    return marks, [*turns, ("What number is shown?", f"{' '.join(words)} it is.")]


def _bars(draw: Draw) -> tuple[list[Mark], Turns]:
    marks, steps = visual.draw_bars(draw)
    mixed = draw.distinct(list(zip(marks, steps, strict=True)), len(marks))
    turns = [
        ("Which bar is the highest?", f"{marks[steps.index(max(steps))].colour} it is."),
        _notes([f"{mark.colour} {NUMBERS[step]}" for mark, step in mixed]),
    ]
    return marks, turns


_SCENES: tuple[Callable[[Draw], tuple[list[Mark], Turns]], ...] = (
    _different, _different, _judged, _judged, _extents, _extents, _alike, _sides, _number, _number, _number, _bars,
)  # fmt: skip
