"""Where images stand in the texts of a record: marks in them, parts between them, or nothing said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cit_fast.data.images import IMAGE_MARK
from cit_fast.data.record_fields import Fields

_MARK = re.escape(IMAGE_MARK)
_AT_THE_START = re.compile(rf"(?:\s*{_MARK})+\s*")

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Content:
    """What a turn holds.

    Args:
        text: with a mark where an image stands.
        images: in their order the names of those that are parts, ``None`` for a part that only holds the place, and
            the mark itself for each in the text.
        other_media: names of videos and recordings.
    """

    text: str
    images: tuple[str | None, ...] = ()
    other_media: tuple[str, ...] = ()


@dataclass(frozen=True)
class Places:
    """An instruction and its conversation without the marks that say no more than none would.

    Args:
        instruction: without them; ``messages``: too. ``removed``: characters that the instruction lost at its start.
    """

    instruction: str
    messages: Turns
    removed: int = 0

    def moved(self, span: tuple[int, int]) -> tuple[int, int]:
        """A span of the instruction as it was, in what is left of it."""
        return max(0, span[0] - self.removed), span[1] - self.removed


class TurnParts:
    """Gathers the parts of a turn."""

    def __init__(self) -> None:
        self._text = ""
        self._after_text = False
        self._images: list[str | None] = []
        self._other_media: list[str] = []

    def add_text(self, text: str) -> None:
        """Texts have a line each; one beside an image stands as it is."""
        self._text += f"\n{text}" if self._after_text else text
        self._after_text = True
        self._images += [IMAGE_MARK] * text.count(IMAGE_MARK)

    def add_image(self, name: str | None) -> None:
        """An image, ``None`` where the part only holds its place."""
        self._text += IMAGE_MARK
        self._after_text = False
        self._images.append(name)

    def add_other_medium(self, name: str) -> None:
        """A video or a recording, which has no place in the text."""
        self._other_media.append(name)

    def content(self) -> Content:
        """All of them."""
        return Content(self._text, tuple(self._images), tuple(self._other_media))


def named_images(fields: Fields, of_turns: Sequence[str | None]) -> tuple[str, ...]:
    """The names of a record's images in their order: those of its own fields stand where its turns name none.

    Args:
        of_turns: what its turns hold, as :attr:`Content.images` has it.

    Raises:
        DataError: a part that holds the place of an image which is not there.
    """
    own = list(fields.images())
    rest, names = list(own), []
    for name in of_turns:
        if name is not None and name != IMAGE_MARK:
            names.append(name)
        elif rest:
            names.append(rest.pop(0))
        elif name is None:
            places = sum(each is None for each in of_turns)
            raise fields.error(f"image parts without a name: {places}, names in 'images': {len(own)}; name each")
    return (*rest, *names)


def places_of(fields: Fields, texts: tuple[str, str, Turns], count: int) -> Places:
    """Take the marks from the start of a record's text, where images stand that nothing is said of.

    They stay where nothing but them is said.

    Args:
        texts: instruction, input and conversation of the record. ``count``: of its images.

    Raises:
        DataError: neither no mark nor one for each image.
    """
    instruction, input_text, messages = texts
    asked = [text for role, text in messages if role == "user"] if messages else [instruction, input_text]
    marks = sum(text.count(IMAGE_MARK) for text in asked) if count else 0
    if marks == 0:
        return Places(instruction, messages)
    if marks != count:
        raise fields.error(
            f"{_images(count)} and {marks} {IMAGE_MARK}; write it once where each stands, or leave it out: "
            "then they stand before the text"
        )
    start = _AT_THE_START.match(asked[0])
    if start is None or start.group().count(IMAGE_MARK) != count:
        return Places(instruction, messages)
    bare = _without_start(instruction)
    first = next((number for number, (role, _) in enumerate(messages) if role == "user"), None)
    turns = tuple(
        (role, _without_start(text) if number == first else text) for number, (role, text) in enumerate(messages)
    )
    return Places(bare, turns, len(instruction) - len(bare))


def _without_start(text: str) -> str:
    start = _AT_THE_START.match(text)
    return text if start is None else text[start.end() :] or text


def _images(count: int) -> str:
    return f"{count or 'no'} image{'' if count == 1 else 's'}"
