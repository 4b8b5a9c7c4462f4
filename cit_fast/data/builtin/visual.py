"""Tasks on pictures: eight in the spirit of CoIN, drawn from a seed, whose answers contradict one another in form.

Most ask about the same kind of picture, so that only the text says what is wanted and in which form: a model that was
tuned to the last of them forgets the others. ``visual-colour`` has several wordings; ``visual-origin-colour`` and
``visual-diverse-colour`` are the same drawings and questions under one wording (:mod:`.visual_wordings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cit_fast.data.builtin import visual_wordings
from cit_fast.data.builtin.kinds import Draw, Kind, Sample
from cit_fast.data.builtin.visual_drawing import (
    CELLS,
    COLOURS,
    SHAPES,
    Mark,
    Picture,
    draw_background,
    draw_bar,
    draw_digit,
    draw_shape,
)

Instructions = Literal["several", "origin", "diverse"]
"""How the visual tasks are worded: several wordings a task, or CoIN's Origin or Diverse, with one."""

LETTERS = ("A", "B", "C")
SIDES = ("left", "right")


@dataclass(frozen=True)
class _Visual:
    """A visual task before its wordings: what :class:`Kind` says of the rest."""

    name: str
    generate: Callable[[Draw], Sample]
    answer_pattern: str
    labels: tuple[str, ...] = ()
    metric: str = "exact_match"


def _sample(question: str, answer: str, draw: Draw, marks: Sequence[Mark], *, layout: str = "") -> Sample:
    """An example, told apart from others by its question and by what lies where, not by sizes and shades."""
    if not layout:
        layout = ";".join(sorted(f"{mark.colour} {mark.what} {mark.cell}" for mark in marks))
    picture = Picture(draw_background(draw), tuple(marks))
    return Sample(question, answer, f"{question}|{layout}", picture.address)


def _places(draw: Draw, count: int) -> list[tuple[int, int]]:
    """Different cells."""
    cells = draw.distinct(range(CELLS * CELLS), count)
    return [divmod(cell, CELLS) for cell in cells]


def draw_different(draw: Draw, count: int, *, smallest: int = 10) -> list[Mark]:
    """Shapes no two of which are of one kind or of one colour, the smallest of that many pixels."""
    whats, colours = draw.distinct(SHAPES, count), draw.distinct(tuple(COLOURS), count)
    places = _places(draw, count)
    return [
        draw_shape(draw, what, colour, *place, smallest=smallest)
        for what, colour, place in zip(whats, colours, places, strict=True)
    ]


def _colour(draw: Draw) -> Sample:
    marks = draw_different(draw, draw.between(2, 4))
    return _sample(f"What colour is the {marks[0].what}?", marks[0].colour, draw, marks)


def draw_alike(draw: Draw, most: int = 4) -> list[Mark]:
    """One to ``most`` shapes of one kind, in any colours."""
    what, count = draw.pick(SHAPES), draw.between(1, most)
    return [draw_shape(draw, what, draw.pick(tuple(COLOURS)), *place) for place in _places(draw, count)]


def plural(what: str) -> str:
    """The plural of a shape's name."""
    return f"{what}es" if what.endswith("s") else f"{what}s"


def _count(draw: Draw) -> Sample:
    marks = draw_alike(draw)
    return _sample(f"How many {plural(marks[0].what)} are there?", str(len(marks)), draw, marks)


def draw_sides(draw: Draw) -> list[Mark]:
    """A shape in the left half of the picture and another in the right half, in this order."""
    whats, colours = draw.distinct(SHAPES, 2), draw.distinct(tuple(COLOURS), 2)
    return [
        draw_shape(draw, what, colour, draw.between(0, CELLS - 1), half + draw.between(0, CELLS // 2 - 1))
        for what, colour, half in zip(whats, colours, (0, CELLS // 2), strict=True)
    ]


def _left(draw: Draw) -> Sample:
    marks, asked = draw_sides(draw), draw.between(0, 1)
    return _sample(f"Which shape is on the {SIDES[asked]}?", marks[asked].what.capitalize(), draw, marks)


def draw_number(draw: Draw) -> list[Mark]:
    """Two digits of one colour in a row, one in each half of the picture, from left to right."""
    colour, row = draw.pick(tuple(COLOURS)), draw.between(0, CELLS - 1)
    columns = draw.between(0, CELLS // 2 - 1), CELLS // 2 + draw.between(0, CELLS // 2 - 1)
    return [draw_digit(draw, draw.between(0, 9), colour, row, column) for column in columns]


def _digits(draw: Draw) -> Sample:
    marks = draw_number(draw)
    return _sample("What number is shown?", "".join(mark.what for mark in marks), draw, marks)


def _box(draw: Draw) -> Sample:
    marks = draw_different(draw, draw.between(1, 2), smallest=13)
    return _sample(f"the {marks[0].colour} {marks[0].what}", ",".join(map(str, marks[0].box)), draw, marks)


def absent_colours(marks: Sequence[Mark]) -> list[str]:
    """The colours that nothing there has."""
    return [colour for colour in COLOURS if colour not in {mark.colour for mark in marks}]


def _yesno(draw: Draw) -> Sample:
    marks, right = draw_different(draw, draw.between(1, 3)), draw.chance(0.5)
    asked = marks[0].colour if right else draw.pick(absent_colours(marks))
    return _sample(f"Is the {marks[0].what} {asked}?", "Yes" if right else "No", draw, marks)


def _choice(draw: Draw) -> Sample:
    marks, right = draw_different(draw, draw.between(1, 3)), draw.between(0, len(LETTERS) - 1)
    options = draw.distinct(absent_colours(marks), len(LETTERS))
    options[right] = marks[0].colour
    question = f"What colour is the {marks[0].what}?\n" + listed_options(options)
    return _sample(question, LETTERS[right], draw, marks)


def listed_options(options: Sequence[str]) -> str:
    """Options with their letters, one a line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))


def draw_bars(draw: Draw) -> tuple[list[Mark], list[int]]:
    """Four bars and their heights in steps; the highest is at least two steps above the others."""
    colours = draw.distinct(tuple(COLOURS), CELLS)
    highest, top = draw.between(0, CELLS - 1), draw.between(4, 8)
    steps = [top if column == highest else draw.between(1, top - 2) for column in range(CELLS)]
    return [draw_bar(draw, steps[column], colours[column], column) for column in range(CELLS)], steps


def _bars(draw: Draw) -> Sample:
    marks, steps = draw_bars(draw)
    highest = marks[steps.index(max(steps))]
    layout = ";".join(f"{mark.colour} {step}" for mark, step in zip(marks, steps, strict=True))
    return _sample("Which bar is the highest?", highest.colour.upper(), draw, marks, layout=layout)


_COLOUR = "|".join(COLOURS)
_TASKS = (
    _Visual("colour", _colour, _COLOUR, tuple(COLOURS)),
    _Visual("count", _count, r"\d"),
    _Visual("left", _left, "|".join(SHAPES).title(), tuple(shape.capitalize() for shape in SHAPES)),
    _Visual("box", _box, r"\d\d?(,\d\d?){3}", metric="iou"),
    _Visual("yesno", _yesno, "Yes|No", ("Yes", "No")),
    _Visual("digits", _digits, r"\d\d"),
    _Visual("choice", _choice, "|".join(LETTERS), LETTERS),
    _Visual("bars", _bars, _COLOUR.upper(), tuple(colour.upper() for colour in COLOURS)),
)
_PREFIX: dict[Instructions, str] = {"several": "visual-", "origin": "visual-origin-", "diverse": "visual-diverse-"}


def visual_task_names(instructions: Instructions = "several") -> tuple[str, ...]:
    """Names of the built-in tasks on pictures, in their default order of arrival.

    Args:
        instructions: how they are worded; the drawings and questions of a task are the same in all three.
    """
    return tuple(_PREFIX[instructions] + task.name for task in _TASKS)


def _wordings(name: str, instructions: Instructions) -> tuple[str, ...]:
    if instructions == "several":
        return visual_wordings.SEVERAL[name]
    return ((visual_wordings.ORIGIN if instructions == "origin" else visual_wordings.DIVERSE)[name],)


KINDS = tuple(
    Kind(
        name=_PREFIX[instructions] + task.name,
        metric=task.metric,
        answer_pattern=task.answer_pattern,
        wordings=_wordings(task.name, instructions),
        generate=task.generate,
        labels=task.labels,
        drawn_as="visual-" + task.name,
    )
    for instructions in get_args(Instructions)
    for task in _TASKS
)
"""Every visual task in every wording."""
