"""Key parts named by a chat model; what it names must stand in the instruction, word for word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from cit_fast.data.example import Example
from cit_fast.errors import DataError
from cit_fast.key_parts.clauses import Span
from cit_fast.models.chat import Chat, ask_until_usable, first_list
from cit_fast.text import cut

_PROMPT = """\
An instruction is given to an assistant. Its key parts are the words that decide what the answer contains, how long it \
is, what form it has, or whether it makes sense. Copy the key parts of the instruction below: one to five short spans \
of it, each word for word as it stands there, and not the whole instruction.

Instruction:
<<<
{instruction}
>>>

An input it is given with:
<<<
{input}
>>>

A right answer to that:
<<<
{output}
>>>

Answer with a JSON list of the spans and nothing else, for example ["the author", "in one sentence"]."""
_REMINDERS = (
    "",
    "\n\nThe list must be valid JSON, and every span an exact copy of words of the instruction.",
    "\n\nOnly the list: it starts with [ and ends with ]. Copy letter by letter; change and translate nothing.",
)
_FIELDS = ("span", "text", "key_part", "part")


def ask_for_key_parts(
    chat: Chat, examples: Sequence[Example], *, unusable: Literal["error", "none"] = "error"
) -> tuple[dict[str, tuple[Span, ...]], int]:
    """The key parts of each instruction, and how many spans were dropped because the instruction does not have them.

    The model is shown the instruction with the input and the answer of one example, as in the paper.

    An answer without one usable span (no list, nothing of it in the instruction, or all of the instruction) is asked
    for again, twice, each time in other words.

    Args:
        chat: answers the prompts, and keeps what it answered.
        examples: one for each distinct instruction.
        unusable: ``"error"``, or ``"none"``: no key parts for an instruction that got no usable answer.

    Raises:
        DataError: answers without a usable span, even when asked again. The others' are kept.
        RunError: the model did not answer.
    """
    dropped = 0

    def read(instruction: str, answer: str) -> tuple[Span, ...]:
        nonlocal dropped
        spans, foreign = locate(instruction, read_spans(answer))
        dropped += foreign
        return spans

    prompts = {
        each.instruction: _PROMPT.format(
            instruction=each.instruction, input=cut(each.input, 600) or "(none)", output=cut(each.references[0], 300)
        )
        for each in examples
    }
    found, missing = ask_until_usable(chat, prompts, _REMINDERS, read, forget=unusable == "error")
    if missing and unusable == "error":
        instruction, answer = next(iter(missing.items()))
        raise DataError(
            f"key_parts.llm: {len(missing)} of {len(prompts)} instructions got no usable key part in "
            f"{len(_REMINDERS)} attempts; {cut(instruction)!r} was answered with {cut(answer)!r}. Name a "
            "model that copies spans into a JSON list, or set unusable: none"
        )
    return {text: found.get(text, ()) for text in prompts}, dropped


def read_spans(answer: str) -> list[str]:
    """The texts of the first JSON list in ``answer`` that has any, whatever stands around it.

    Items may be texts or objects with a text under ``span``, ``text``, ``key_part`` or ``part``.

    >>> read_spans('Sure: {"key_parts": ["the year", {"span": "in words"}, 3]}')
    ['the year', 'in words']
    """
    return first_list(
        answer,
        lambda items: [text.strip() for item in items if isinstance(text := _text(item), str) and text.strip()],
    )


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
