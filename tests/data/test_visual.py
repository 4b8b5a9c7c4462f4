from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter

import pytest
from PIL import Image

from cit_fast.data.builtin import (
    builtin_stream,
    builtin_task,
    builtin_task_names,
    is_builtin_task,
    visual_task_names,
    visual_wordings,
)
from cit_fast.data.builtin.kinds import Draw, parse_wording
from cit_fast.data.builtin.visual_drawing import (
    CELL,
    COLOURS,
    SHAPES,
    SIDE,
    Mark,
    Picture,
    draw_bar,
    draw_digit,
    draw_shape,
)
from cit_fast.data.example import Example, Task
from cit_fast.data.sources import TaskSource, load_task
from cit_fast.errors import DataError
from cit_fast.evaluation.metrics import score

NAMES = visual_task_names()
ALL_NAMES = (*NAMES, *visual_task_names("origin"), *visual_task_names("diverse"))
SIZES = {"train": 120, "dev": 20, "test": 60}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: builtin_task(name, **SIZES) for name in NAMES}


def examples_of(task: Task) -> tuple[Example, ...]:
    return (*task.train, *task.dev, *task.test)


def opened(example: Example) -> Image.Image:
    (address,) = example.images
    kind, _, content = address.partition(",")
    assert kind == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    image.load()
    return image


def test_there_are_eight_tasks_beside_those_on_texts(tasks: dict[str, Task]) -> None:
    assert len(NAMES) == 8
    assert all(name.startswith("visual-") and is_builtin_task(name) for name in ALL_NAMES)
    assert not set(ALL_NAMES) & set(builtin_task_names())
    assert all(map(is_builtin_task, builtin_task_names()))
    assert not is_builtin_task("visual-")
    for name, task in tasks.items():
        assert {split: len(getattr(task, split)) for split in SIZES} == SIZES
        assert {example.task for example in examples_of(task)} == {name}
    with pytest.raises(DataError, match="no built-in task 'visual-color'; did you mean 'visual-colour'"):
        builtin_task("visual-color")


def test_pictures_and_texts_are_the_same_everywhere() -> None:
    digest = hashlib.sha256()
    for task in builtin_stream(ALL_NAMES, train=12, dev=4, test=4):
        for example in examples_of(task):
            told = (example.instruction, example.input, example.references, example.key_parts, example.images)
            digest.update(repr(told).encode())
    assert digest.hexdigest()[:16] == "4ff8208549b53896"


@pytest.mark.parametrize("name", NAMES)
def test_a_larger_split_starts_with_the_smaller_one_and_seeds_differ(name: str, tasks: dict[str, Task]) -> None:
    small = builtin_task(name, train=7, dev=3, test=5)
    assert small.train == tasks[name].train[:7]
    assert small.dev == tasks[name].dev[:3]
    assert small.test == tasks[name].test[:5]
    other = builtin_task(name, seed=1, **SIZES)
    assert len({e.images for e in examples_of(other)} & {e.images for e in examples_of(tasks[name])}) < 5


@pytest.mark.parametrize("name", NAMES)
def test_no_picture_with_its_question_is_in_two_splits(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    asked = [(example.input, example.images) for example in examples_of(task)]
    assert len(set(asked)) == len(asked)
    train = {(e.input, e.images) for e in builtin_task(name, seed=3, train=800, dev=0, test=0).train}
    assert train.isdisjoint((e.input, e.images) for e in (*task.dev, *task.test))


@pytest.mark.parametrize("name", NAMES)
def test_answers_keep_to_what_their_task_declares(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    assert task.answer_pattern is not None
    answers = [example.references[0] for example in examples_of(task)]
    assert all(re.fullmatch(task.answer_pattern, answer) for answer in answers)
    assert not task.labels or set(answers) == set(task.labels)
    assert score(task.metric, answers, [[answer] for answer in answers], task.labels).value == 100.0
    most = Counter(answers).most_common(1)[0][1]
    assert most < 0.6 * len(answers)  # no answer is right most of the time


def test_no_answer_of_a_task_is_one_of_another(tasks: dict[str, Task]) -> None:
    answers = {name: {example.references[0] for example in examples_of(task)} for name, task in tasks.items()}
    for name, found in answers.items():
        for other, patterns in tasks.items():
            if other != name:
                assert not any(re.fullmatch(f"{patterns.answer_pattern}", answer) for answer in found), (name, other)


def test_pictures_open_and_are_small(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        for example in task.dev:
            image = opened(example)
            assert (image.format, image.size) == ("PNG", (SIDE, SIDE))
            assert len(example.images[0]) < 4000
            assert len(image.convert("RGB").getcolors() or ()) >= 2


@pytest.mark.parametrize("instructions", ["origin", "diverse"])
def test_other_wordings_have_the_same_drawings(instructions, tasks: dict[str, Task]) -> None:
    for name, other in zip(NAMES, visual_task_names(instructions), strict=True):
        worded = builtin_task(other, **SIZES)
        assert len(worded.instructions) == 1
        assert len(tasks[name].instructions) == len(visual_wordings.SEVERAL[name.removeprefix("visual-")])
        assert [(e.input, e.references, e.images) for e in worded.train] == [
            (e.input, e.references, e.images) for e in tasks[name].train
        ]
    shared = Counter(
        builtin_task(name, train=1, dev=0, test=0).instructions for name in visual_task_names(instructions)
    )
    assert (max(shared.values()) > 1) == (instructions == "origin")


def test_every_wording_has_key_parts() -> None:
    several = [wording for wordings in visual_wordings.SEVERAL.values() for wording in wordings]
    for marked in (*several, *visual_wordings.ORIGIN.values(), *visual_wordings.DIVERSE.values()):
        text, spans = parse_wording(marked)
        assert spans
        assert not set("{}") & set(text)
    assert len(set(several)) == len(several)


def test_a_source_takes_them() -> None:
    expected = builtin_task("visual-box", seed=2, train=3, dev=1, test=1)
    assert load_task(TaskSource(builtin="visual-box"), seed=2, train=3, dev=1, test=1) == expected


# What is drawn


def test_a_mark_stays_in_its_cell_and_its_box_holds_its_pixels() -> None:
    draw = Draw("marks", "train")
    for _ in range(200):
        row, column = draw.between(0, 3), draw.between(0, 3)
        shape = draw_shape(draw, draw.pick(SHAPES), draw.pick(tuple(COLOURS)), row, column)
        digit = draw_digit(draw, draw.between(0, 9), "black", row, column)
        for mark in (shape, digit, draw_bar(draw, draw.between(1, 8), "red", column)):
            pixels, colours = Picture((240, 240, 240), (mark,)).painted()
            assert colours == [(240, 240, 240), mark.shade]
            spots = [divmod(place, SIDE) for place, number in enumerate(pixels) if number]
            rows, columns = zip(*spots, strict=True)
            assert mark.left <= min(columns) <= max(columns) < mark.left + mark.width
            assert mark.top <= min(rows) <= max(rows) < mark.top + mark.height
            assert {spot // CELL for spot in columns} == {column}
            if mark is shape:
                assert mark.cell == (row, column) == (min(rows) // CELL, max(columns) // CELL)
                edges = (min(columns), min(rows), max(columns), max(rows))
                assert all(abs(edge * 100 / SIDE - at) < 1 for edge, at in zip(edges, mark.box, strict=True))


def test_the_file_holds_what_is_painted() -> None:
    marks = tuple(Mark(what, 16 * i, 3 * i, 13, 13, "red", (200, i, 9)) for i, what in enumerate(SHAPES))
    picture = Picture((230, 230, 230), marks)
    image = Image.open(io.BytesIO(picture.png())).convert("RGB")
    pixels, colours = picture.painted()
    assert list(image.get_flattened_data()) == [colours[number] for number in pixels]


def test_answers_are_what_the_picture_shows(tasks: dict[str, Task]) -> None:
    """Read back from pixels alone: the highest bar, and the box."""

    def coloured(image: Image.Image, wanted: str) -> list[tuple[int, int]]:
        rgb = image.convert("RGB")

        def name(pixel) -> str:
            return min(COLOURS, key=lambda colour: sum(abs(a - b) for a, b in zip(COLOURS[colour], pixel, strict=True)))

        spots = [(x, y) for y in range(SIDE) for x in range(SIDE) if min(rgb.getpixel((x, y))) < 215]
        return [(x, y) for x, y in spots if name(rgb.getpixel((x, y))) == wanted]

    for example in tasks["visual-bars"].dev:
        heights = {colour: len({y for _, y in coloured(opened(example), colour)}) for colour in COLOURS}
        assert max(heights, key=heights.__getitem__).upper() == example.references[0]
    for example in tasks["visual-box"].dev:
        xs, ys = zip(*coloured(opened(example), example.input.split()[1]), strict=True)
        found = [edge * 100 // SIDE for edge in (min(xs), min(ys), max(xs), max(ys))]
        assert score("iou", [",".join(map(str, found))], [list(example.references)]).value == 100.0
