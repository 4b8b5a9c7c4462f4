"""Where the images of an example stand in its turns: see ``Example.images``."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from cit_fast.data.example import Example
from cit_fast.data.images import IMAGE_MARK
from cit_fast.errors import DataError
from cit_fast.models.chat_template import Turns


def with_places(turns: Turns, count: int, parts: bool, place: str, where: str) -> Turns:
    """The turns with a place for each image.

    Args:
        turns: up to the question. ``count``: of the images.
        parts: whether a turn with an image becomes a list of parts, as chat templates have them; else ``place`` stands
            in its text. ``where``: the example, for messages.

    Raises:
        DataError: as many marks as images are neither there nor left out.
    """
    users = [turn for turn in turns if turn["role"] == "user"]
    marks = sum(turn["content"].count(IMAGE_MARK) for turn in users)
    if marks not in (0, count) or not users:
        raise DataError(f"{where}: {count} images and {marks} places for them ({IMAGE_MARK} in the text)")
    first = users[0]

    def placed(turn: dict[str, Any]) -> dict[str, Any]:
        text = turn["content"]
        if marks == 0 and turn is first:
            text = IMAGE_MARK * count + ("" if parts else "\n") + text
        if turn["role"] != "user" or IMAGE_MARK not in text:
            return turn
        if not parts:
            return {**turn, "content": text.replace(IMAGE_MARK, place)}
        pieces = [
            {"type": "image"} if piece == IMAGE_MARK else {"type": "text", "text": piece}
            for piece in re.split(f"({re.escape(IMAGE_MARK)})", text)
            if piece
        ]
        return {**turn, "content": pieces}

    return list(map(placed, turns))


def least_input(example: Example) -> int:
    """How many characters of its input an example cannot do without: up to the last image in it."""
    return example.input.rfind(IMAGE_MARK) + len(IMAGE_MARK) if example.images and IMAGE_MARK in example.input else 0


def from_turn(example: Example, start: int, system: tuple[tuple[str, str], ...]) -> Example:
    """A conversation from a turn on, with the images that it has from there; the system turn stays."""
    kept, before = example.messages[start:], example.messages[:start]
    images = example.images
    marks = [sum(text.count(IMAGE_MARK) for role, text in some if role == "user") for some in (before, kept)]
    if images and sum(marks):
        images = images[marks[0] :]
    elif images and any(role == "user" for role, _ in before):  # all of them stand before the first question
        images = ()
    return replace(example, messages=system + kept, images=images)


def without_images(example: Example) -> Example:
    """The example as a text."""
    if not example.images:
        return example

    def bare(text: str) -> str:
        return text.replace(IMAGE_MARK, "").strip() if IMAGE_MARK in text else text

    instruction = bare(example.instruction)
    return replace(
        example,
        images=(),
        instruction=instruction or example.instruction,
        input=bare(example.input),
        messages=tuple((role, bare(text)) for role, text in example.messages),
        key_parts=example.key_parts if instruction == example.instruction else (),
        instruction_span=example.instruction_span if instruction == example.instruction else None,
    )
