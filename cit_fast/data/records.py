"""Convert records of every supported format to :class:`~cit_fast.data.example.Example`.

=====================  =================================================================================
format                 one record
=====================  =================================================================================
``super_ni``           a whole Super-NI task file: ``Definition``, ``Instances`` of ``input``/``output``
``alpaca``             ``instruction``, optional ``input``, ``output`` (a text or a list of accepted texts); a
                       ``system`` that is not empty makes it a conversation
``prompt_completion``  ``prompt`` and ``completion``, each a text or a list of ``{"role", "content"}`` turns
``trace``              ``prompt`` and ``answer`` (TRACE)
``messages``           a list of ``{"role", "content"}`` turns that ends with the assistant's; optional ``system``
``conversations``      the same as ``{"from": "human"|"gpt", "value"}`` (LLaVA, CoIN, ShareGPT)
=====================  =================================================================================

Every record may also carry ``image`` or ``images``, ``video(s)`` and ``audio(s)`` (paths, or objects with ``path``
and ``bytes`` as Parquet files of the hub have them) and ``key_parts``: a list of substrings of the instruction or of
``[start, end]`` character spans. Videos and recordings are kept by name. What images are called and where they stand in
the texts is said in :class:`~cit_fast.data.example.Example`; questions of LLaVA, CoIN and UCIT that are to be answered
(``text``, ``answer``, ``image``) are read as ``trace`` with ``columns: {prompt: text}``.

Apart from marks of images, texts are never stripped or changed; numbers, truth values and dates are taken as they are
written; NaN and null are missing values. Alpaca's ``history`` is not read; a warning counts it.

Every error starts with where it is: ``file:line`` for JSON lines, ``file: record N`` (from 1) for JSON
arrays.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cit_fast.data.example import Example
from cit_fast.data.image_marks import Content, TurnParts, named_images, places_of
from cit_fast.data.images import IMAGE_MARK
from cit_fast.data.record_fields import ANSWER_OF, FIELDS, FORMATS, Fields, ReadOptions, kind_of
from cit_fast.errors import DataError

_log = logging.getLogger(__name__)

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class UnansweredError(DataError):
    """None of the records has an answer, though those without one may be left out."""


def read_records(records: Iterable[tuple[str, Any]], options: ReadOptions, *, where: str = "records") -> list[Example]:
    """Bring records to examples.

    Args:
        records: ``(source, record)`` pairs; ``source`` goes into ``Example.source`` and into every error.
        options: how to understand them.
        where: what the records are, for the error when there are none.

    Raises:
        DataError: no records, or one that cannot be read; an ``UnansweredError`` where ``skip_unanswered`` leaves none.
    """
    examples: list[Example] = []
    skipped: list[Fields] = []
    unread: list[Fields] = []
    data_format, records = tell_format(records, options)
    for source, record in records:
        fields = _fields(source, record, options)
        normalise = _NORMALISERS[data_format]
        # A Super-NI file is one record that holds all instances of its task.
        for one in _instances(fields) if data_format == "super_ni" else [fields]:
            parts = normalise(one)
            if parts.references:
                examples.append(_example(parts, one))
                unread += [one] if data_format == "alpaca" and one.get("history") else []
            elif options.skip_unanswered:
                skipped.append(one)
            else:
                raise one.error(_no_answer(one, data_format))
    if skipped and not examples:
        why = f"{_no_answer(skipped[0], data_format)}; nor has any other of {len(skipped)} records"
        raise UnansweredError(f"{skipped[0].source}: {why}")
    if skipped:
        _log.warning("%s: skipped %d records without an answer, the first %s", where, len(skipped), skipped[0].source)
    if unread:
        _log.warning(
            "%s: %d records have a 'history', which is not read, the first %s; write conversations as 'messages'",
            *(where, len(unread), unread[0].source),
        )
    if not examples:
        raise DataError(f"{where}:1: no records; at least one is needed")
    return examples


def tell_format(records: Iterable[tuple[str, Any]], options: ReadOptions) -> tuple[str, Iterable[tuple[str, Any]]]:
    """The format of records, and the records, none of them lost.

    The first record tells it. One without an answer may not have the fields that do: where such records are left out,
    the first that tells it counts.

    Raises:
        DataError: none tells it.
    """
    if options.format is not None:
        return options.format, records
    rest, looked_at = iter(records), list[tuple[str, Any]]()
    for source, record in rest:
        looked_at.append((source, record))
        fields = _fields(source, record, options)
        found = _detect(fields, {name for name in FIELDS if fields.get(name) is not None})
        if found is not None:
            return found, itertools.chain(looked_at, rest)
        if not options.skip_unanswered:
            break
    if not looked_at:
        return FORMATS[0], []  # nothing to read: any will do
    first = _fields(*looked_at[0], options)
    found = _detect(first, set(filter(first.has, FIELDS)))
    if found is None:
        there = ", ".join(map(repr, first.record)) or "none"
        raise first.error(
            f"cannot tell the format from the fields {there}; name the format ({', '.join(FORMATS)}) "
            "and map its fields with columns"
        )
    return found, itertools.chain(looked_at, rest)


def _fields(source: str, record: Any, options: ReadOptions) -> Fields:
    if not isinstance(record, Mapping):
        raise DataError(f"{source}: a record must be an object, not {kind_of(record)}")
    return Fields(record, options, source)


def _no_answer(fields: Fields, data_format: str) -> str:
    """Why a record has no answer: the field is missing, or has nothing in it."""
    name = ANSWER_OF.get(data_format)
    if name is not None and not fields.has(name):
        return fields.missing(name)
    option = "" if fields.options.skip_unanswered else " (skip_unanswered leaves such records out)"
    return f"no reference answer; every record needs at least one that is not empty{option}"


@dataclass(frozen=True)
class _Parts:
    """The parts of an example that a normaliser finds in a record."""

    instruction: str
    references: tuple[str, ...]  # without empty ones
    input: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    images: tuple[str | None, ...] = ()  # of the turns, as Content has them
    other_media: tuple[str, ...] = ()


def _detect(fields: Fields, has: set[str]) -> str | None:
    """The format of a record that has these fields; ``None`` where they do not tell it."""
    if "Instances" in has or "Definition" in has:
        return "super_ni"
    if "messages" in has or "conversations" in has:
        return "messages" if "messages" in has else "conversations"
    if "instruction" in has or fields.options.instruction is not None:
        return "alpaca"
    if "prompt" in has and has & {"completion", "answer"}:
        return "prompt_completion" if "completion" in has else "trace"
    return None


def _instances(fields: Fields) -> Iterator[Fields]:
    """The instances of one Super-NI task file as Alpaca records."""
    options = fields.options
    if options.instruction is not None:
        raise fields.error("a Super-NI task has its instruction in 'Definition'; leave out the option instruction")
    instruction = "\n".join(fields.texts("Definition")) + _shown_examples(fields, options.positive_examples)
    instances = fields.required("Instances")
    if not isinstance(instances, list):
        raise fields.error(f"'Instances' must be a list, not {kind_of(instances)}")
    path = fields.source.removesuffix(": record 1")
    for number, instance in enumerate(instances, 1):
        source = f"{path}: record {number}"
        if not isinstance(instance, Mapping):
            raise DataError(f"{source}: an instance must be an object, not {kind_of(instance)}")
        key_parts = instance.get("key_parts", fields.get("key_parts"))
        yield Fields(
            {**instance, "instruction": instruction, "key_parts": key_parts},
            ReadOptions(
                task=options.task,
                instruction_part=options.instruction_part,
                key_parts=options.key_parts,
                key_part_markers=options.key_part_markers,
                images=options.images,
                skip_unanswered=options.skip_unanswered,
            ),
            source,
        )


def _shown_examples(fields: Fields, count: int) -> str:
    """The first ``count`` of a Super-NI task's ``Positive Examples`` as text."""
    shown = (fields.get("Positive Examples") or []) if count else []
    if not isinstance(shown, list):
        raise fields.error(f"'Positive Examples' must be a list, not {kind_of(shown)}")
    text = ""
    for number, shot in enumerate(shown[:count], 1):
        source = f"{fields.source}, positive example {number}"
        if not isinstance(shot, Mapping):
            raise DataError(f"{source}: must be an object with 'input' and 'output', not {kind_of(shot)}")
        example = Fields(shot, ReadOptions(), source)
        answers = example.answers("output")
        if not answers:
            raise example.error(example.missing("output"))
        text += f"\n\nExample {number}\nInput: {example.text('input')}\nOutput: {answers[0]}"
    return text


def _alpaca(fields: Fields) -> _Parts:
    fixed, system = fields.options.instruction, fields.get("system")
    instruction = fields.text("instruction") if fixed is None or fields.get("instruction") else fixed
    value = fields.get("input")
    text = "" if value is None else fields.as_text(value, "input")
    references = fields.answers("output")
    messages: tuple[tuple[str, str], ...] = ()
    if system and references:
        question = f"{instruction}\n\n{text}" if text.strip() else instruction
        turns = ("system", fields.as_text(system, "system")), ("user", question), ("assistant", references[0])
        messages = turns if turns[0][1].strip() else ()
    return _Parts(instruction=instruction, input=text, references=references, messages=messages)


def _trace(fields: Fields) -> _Parts:
    return _Parts(fields.text("prompt"), fields.answers("answer"))


def _prompt_completion(fields: Fields) -> _Parts:
    prompt, completion = fields.required("prompt"), fields.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(fields, prompt + completion, "role", "content")
    if isinstance(prompt, list):  # turns, answered by a plain text
        answer = {"role": "assistant", "content": next(iter(fields.answers("completion")), "")}
        return _conversation(fields, [*prompt, answer], "role", "content")
    return _Parts(fields.text("prompt"), fields.answers("completion"))


def _messages(fields: Fields) -> _Parts:
    turns, system = fields.required("messages"), fields.get("system")
    if not isinstance(turns, list) or not system:
        return _conversation(fields, turns, "role", "content")
    first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
    if first.get("role") != "system":
        turns = [{"role": "system", "content": system}, *turns]
    elif first.get("content") != system:
        raise fields.error("'system' says something else than the system turn of 'messages'; keep one of them")
    return _conversation(fields, turns, "role", "content")


def _conversations(fields: Fields) -> _Parts:
    turns, system = fields.required("conversations"), fields.get("system")
    if isinstance(turns, list) and system:
        turns = [{"from": "system", "value": system}, *turns]
    return _conversation(fields, turns, "from", "value")


def _conversation(fields: Fields, turns: Any, role_key: str, content_key: str) -> _Parts:
    """A conversation; one question with one answer becomes a plain instruction."""
    if not isinstance(turns, list) or not turns:
        raise fields.error(f"a conversation must be a non-empty list of turns, not {kind_of(turns)}")
    messages: list[tuple[str, str]] = []
    images: list[str | None] = []
    other_media: list[str] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            raise fields.error(f"turn {number} must be an object with {role_key!r} and {content_key!r}")
        role = _ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None or turn.get("tool_calls"):
            what = "tool calls" if role else f"role {turn[role_key]!r}"
            raise fields.error(f"turn {number}: {what} cannot be used; roles are {', '.join(sorted(_ROLES))}")
        content = turn[content_key]
        if content is None and role == "assistant" and number == len(turns):
            content = ""  # no answer, which the caller knows how to treat
        found = _content(fields, content, number)
        if role == "user":
            images += found.images
        elif any(name != IMAGE_MARK for name in found.images):
            raise fields.error(f"turn {number}: an image in the {role}'s turn; images stand in the user's turns")
        other_media += found.other_media
        messages.append((role, found.text))
    if messages[-1][0] != "assistant":
        raise fields.error(f"the last turn is the {messages[-1][0]}'s; it must be the assistant's answer")
    questions = [content for role, content in messages if role == "user"]
    if not questions:
        raise fields.error("the conversation has no user turn")
    plain = [role for role, _ in messages] == ["user", "assistant"]
    return _Parts(
        instruction=questions[-1],
        references=(messages[-1][1],) if messages[-1][1].strip() else (),
        messages=() if plain else tuple(messages),
        images=tuple(images),
        other_media=tuple(other_media),
    )


def _content(fields: Fields, content: Any, number: int) -> Content:
    """The text of one turn, with a mark where an image stands, and the media in it."""
    found = TurnParts()
    if not isinstance(content, list):
        found.add_text(fields.as_text(content, f"content of turn {number}"))
        return found.content()
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            found.add_text(fields.as_text(part.get("text"), f"text of turn {number}"))
        elif kind in ("image", "image_url"):
            found.add_image(_image_of_part(fields, part, number))
        elif kind in ("video", "audio"):
            address = _address(part, kind, "url", "path")
            if address is not None:  # a bare placeholder: the addresses are in the record's own field
                found.add_other_medium(fields.medium(address, f"{kind} of turn {number}"))
        else:
            raise fields.error(
                f"turn {number}: a part of the content must be of type 'text', 'image', 'image_url', 'video' or 'audio'"
            )
    return found.content()


def _image_of_part(fields: Fields, part: Mapping[str, Any], number: int) -> str | None:
    """The name of the image in a part of a turn; ``None`` for a bare placeholder."""
    address = _address(part, "image", "image_url", "url", "path", "bytes")
    if address is None and isinstance(part.get("base64"), str):
        address = f"data:image/png;base64,{part['base64']}"
    return None if address is None else fields.image(address, f"image of turn {number}")


def _address(part: Mapping[str, Any], *keys: str) -> Any:
    return next((part[key] for key in keys if part.get(key) is not None), None)


_NORMALISERS: dict[str, Callable[[Fields], _Parts]] = {
    "super_ni": _alpaca,  # of each instance
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "trace": _trace,
    "messages": _messages,
    "conversations": _conversations,
}


# ---------------------------------------------------------------------------------------------- to an Example


def _example(parts: _Parts, fields: Fields) -> Example:
    instruction = parts.instruction
    spans: list[tuple[int, int]] = []
    markers = fields.options.key_part_markers
    if markers is not None:
        marked = instruction
        instruction, spans = _unmark(fields, marked, *markers)
        if parts.messages and instruction != marked:
            raise fields.error("key part marks work in single instructions, not in conversations; use key_parts")
    spans += _key_parts(fields, instruction)
    images = named_images(fields, parts.images)
    places = places_of(fields, (instruction, parts.input, parts.messages), len(images))
    return Example(
        instruction=places.instruction,
        input=parts.input,
        references=parts.references,
        task=fields.options.task,
        key_parts=tuple(sorted(places.moved(span) for span in spans)),
        messages=places.messages,
        images=images,
        other_media=(*fields.other_media(), *parts.other_media),
        instruction_span=_instruction_span(fields, places.instruction),
        source=fields.source,
    )


def _instruction_span(fields: Fields, text: str) -> tuple[int, int] | None:
    """Where the instruction stands in a text that may hold more."""
    part = fields.options.instruction_part
    if part is None or part == "whole":
        return None
    if isinstance(part, dict):
        match = re.search(part["regex"], text)
        span = None if match is None else match.span(1 if match.re.groups else 0)
        if span is None or not text[slice(*span)].strip():
            raise fields.error(f"instruction_part.regex {part['regex']!r} matches nothing in {_shorten(text)}")
        return span
    lines = [match.span() for match in re.finditer(r"[^\n]+", text) if match.group().strip()]
    return lines[0 if part == "first-line" else -1]


def _key_parts(fields: Fields, instruction: str) -> list[tuple[int, int]]:
    """Spans of the record's key parts; a text stands for its first occurrence that is not taken yet."""
    wanted = fields.get("key_parts")
    if wanted is None or wanted == "":  # an empty cell of a table
        wanted = list(fields.options.key_parts)
    if not isinstance(wanted, list):
        raise fields.error(f"'key_parts' must be a list of texts or [start, end] spans, not {kind_of(wanted)}")
    spans: list[tuple[int, int]] = []
    for part in wanted:
        if isinstance(part, str) and part:
            found = (match.span() for match in re.finditer(re.escape(part), instruction))
            span = next((s for s in found if all(s[1] <= a or b <= s[0] for a, b in spans)), None)
            if span is None:
                again = " once more" if part in instruction else ""
                raise fields.error(f"key part {part!r} is not in the instruction{again}: {_shorten(instruction)}")
        elif isinstance(part, list) and len(part) == 2 and all(type(end) is int for end in part):
            span = (part[0], part[1])
        else:
            raise fields.error(f"key part {part!r} must be a non-empty text or [start, end]")
        spans.append(span)
    return spans


def _unmark(fields: Fields, text: str, opening: str, closing: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and the spans that were between them."""
    plain, spans, rest = "", [], text
    while opening in rest:
        before, _, after = rest.partition(opening)
        part, mark, rest = after.partition(closing)
        if not mark or not part or opening in part:
            raise fields.error(f"a key part opened by {opening!r} is not closed by {closing!r}: {_shorten(text)}")
        spans.append((len(plain) + len(before), len(plain) + len(before) + len(part)))
        plain += before + part
    return plain + rest, spans


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
