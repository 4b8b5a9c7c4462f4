"""Key parts named by a chat model; what it names must stand in the instruction, word for word."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from cit_fast.errors import DataError
from cit_fast.key_parts.clauses import Span
from cit_fast.text import cut

if TYPE_CHECKING:
    from cit_fast.models.chat import Chat

_PROMPT = """\
An instruction is given to an assistant. Its key parts are the words that decide what the answer contains, how long it \
is, or what form it has. Copy the key parts of the instruction below: one to five short spans of it, each word for \
word as it stands there, and not the whole instruction.

Instruction:
<<<
{instruction}
>>>

Answer with a JSON list of the spans and nothing else, for example ["the author", "in one sentence"]."""
_REMINDERS = (
    "",
    "\n\nThe list must be valid JSON, and every span an exact copy of words of the instruction.",
    "\n\nOnly the list: it starts with [ and ends with ]. Copy letter by letter; change and translate nothing.",
)
_FIELDS = ("span", "text", "key_part", "part")


def ask_for_key_parts(
    chat: Chat, instructions: Sequence[str], *, unusable: Literal["error", "none"] = "error"
) -> tuple[dict[str, tuple[Span, ...]], int]:
    """The key parts of each instruction, and how many spans were dropped because the instruction does not have them.

    An answer without one usable span (no list, nothing of it in the instruction, or all of the instruction) is asked
    for again, twice, each time in other words.

    Args:
        chat: answers the prompts, and keeps what it answered.
        instructions: distinct ones.
        unusable: ``"error"``, or ``"none"``: no key parts for an instruction that got no usable answer.

    Raises:
        DataError: answers without a usable span, even when asked again. The others' are kept.
        RunError: the model did not answer.
    """
    found: dict[str, tuple[Span, ...]] = {}
    answers: dict[str, str] = {}
    dropped = 0
    for reminder in _REMINDERS:
        asked = [text for text in instructions if text not in found]
        replies = chat.complete([_prompt(text, reminder) for text in asked]) if asked else []
        answers = dict(zip(asked, replies, strict=True))
        for text, answer in answers.items():
            spans, foreign = locate(text, read_spans(answer))
            dropped += foreign
            if spans:
                found[text] = spans
    missing = [text for text in instructions if text not in found]
    if missing and unusable == "error":
        chat.forget([_prompt(text, reminder) for text in missing for reminder in _REMINDERS])
        raise DataError(
            f"key_parts.llm: {len(missing)} of {len(instructions)} instructions got no usable key part in "
            f"{len(_REMINDERS)} attempts; {cut(missing[0])!r} was answered with {cut(answers[missing[0]])!r}. Name a "
            "model that copies spans into a JSON list, or set unusable: none"
        )
    return {text: found.get(text, ()) for text in instructions}, dropped


def _prompt(instruction: str, reminder: str) -> str:
    return _PROMPT.format(instruction=instruction) + reminder


def read_spans(answer: str) -> list[str]:
    """The texts of the first JSON list in ``answer`` that has any, whatever stands around it.

    Items may be texts or objects with a text under ``span``, ``text``, ``key_part`` or ``part``.

    >>> read_spans('Sure: {"key_parts": ["the year", {"span": "in words"}, 3]}')
    ['the year', 'in words']
    """
    decoder = json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\[", answer)):
        try:
            value, _ = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            continue
        items = [_text(item) for item in value]
        if texts := [item.strip() for item in items if isinstance(item, str) and item.strip()]:
            return texts
    return []


def _text(item: Any) -> Any:
    return next((item[name] for name in _FIELDS if name in item), None) if isinstance(item, dict) else item


def locate(instruction: str, texts: Sequence[str]) -> tuple[tuple[Span, ...], int]:
    """Where the texts stand in the instruction, and how many do not stand there at all.

    A text that occurs more than once means its first occurrence, named again the next one. Spans that overlap become
    one. If together they are the whole instruction, there is none.

    >>> locate("Name the year in words.", ["the year", "year in", "briefly"])
    (((5, 16),), 1)
    """
    spans: list[Span] = []
    foreign = 0
    for text in texts:
        places = [match.span() for match in re.finditer(re.escape(text), instruction)]
        foreign += not places
        spans += next(([place] for place in places if place not in spans), [])
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    edges = [0, *(edge for span in merged for edge in span), len(instruction)]
    rest = "".join(instruction[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
    return (tuple(merged), foreign) if any(map(str.isalnum, rest)) else ((), foreign)
