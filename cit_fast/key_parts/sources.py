"""Where the key parts of instructions come from: the data, a search under the model itself, or a chat model.

Discovery masks one clause of an instruction at a time and asks how much information each carries: the gain G (KPIG) of
the clause alone, averaged over a few examples of the instruction. The clauses that carry the most are its key parts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from cit_fast.cache import JsonCache
from cit_fast.data.example import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.key_parts.by_chat import ask_for_key_parts
from cit_fast.key_parts.clauses import Span, clauses
from cit_fast.key_parts.gain import pair_gains
from cit_fast.key_parts.pairs import EncodedPair, encode_pair, name_of
from cit_fast.models.chat import Chat, build_chat
from cit_fast.models.prompts import ExampleTooLongError, PromptEncoder
from cit_fast.processes import from_rank_zero

SOURCES = ("data", "discover", "llm")
KeyPartSource = str | Mapping[str, Any]
Progress = Callable[[int, int], object]

_AT_A_TIME = 16  # instructions between two writes to the cache
_VERSION = 1  # of what discovery does; results of another are not taken from the cache


class FoundKeyParts(NamedTuple):
    """What :func:`find_key_parts` returns."""

    examples: list[Example]
    """The examples given, in order, with the key parts of the source chosen."""
    summary: dict[str, Any]
    """For the record of a run: ``source``; ``instructions``, ``with_key_parts`` and ``without`` (distinct ones),
    ``spans`` (their key parts in all) and ``dropped`` (spans that a chat model made up)."""


def check_source(source: KeyPartSource) -> tuple[str, dict[str, Any]]:
    """The name and the options of a source.

    ``"data"``: the key parts that the examples have. ``"discover"``, or ``{"discover": {...}}`` with

    * ``share`` (0.5): the fewest clauses are kept that carry this share of the gain of all clauses, in (0, 1];
    * ``examples`` (4): of each instruction, whose gains are averaged, >= 1.

    ``{"llm": {...}}``: a chat model as :func:`cit_fast.models.chat.build_chat` takes it, and ``unusable``: ``"error"``,
    or ``"none"`` to leave instructions without key parts whose answers were of no use.

    Raises:
        ConfigError: another name, or an option out of range.
    """
    spec: Mapping[str, Any] = {source: {}} if isinstance(source, str) else source
    if len(spec) != 1 or next(iter(spec)) not in SOURCES:
        raise ConfigError(f"key_parts: {source!r} is none of {', '.join(SOURCES)}")
    name, given = next(iter(spec.items()))
    options = dict(given or {})
    if name == "llm":
        if not options:
            raise ConfigError("key_parts: llm needs a chat model, e.g. {llm: {base_url: ..., model: ...}}")
        unusable = options.setdefault("unusable", "error")
        if unusable not in {"error", "none"}:
            raise ConfigError(f"key_parts.llm.unusable: {unusable!r} is neither 'error' nor 'none'")
        return name, options
    known = {"share": 0.5, "examples": 4} if name == "discover" else {}
    unknown = set(options) - set(known)
    if unknown:
        takes = f"takes {' and '.join(known)}" if known else "takes no options"
        raise ConfigError(f"key_parts.{name}: {min(unknown)!r} is unknown; it {takes}")
    options = {**known, **options}
    if name == "discover" and not (0 < options["share"] <= 1 and options["examples"] >= 1):
        raise ConfigError(f"key_parts.discover: {options}; expected 0 < share <= 1 and examples >= 1")
    return name, options


def find_key_parts(
    examples: Sequence[Example],
    source: KeyPartSource = "data",
    *,
    model: nn.Module | None = None,
    encoder: PromptEncoder | None = None,
    identity: str = "",
    alpha: float = 0.3,
    batch_size: int = 8,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> FoundKeyParts:
    """Give examples the key parts of a source, the same to all examples of one instruction.

    Any source but ``"data"`` replaces what the data has.

    Args:
        examples: of any number of tasks.
        source: see :func:`check_source`.
        model, encoder: for ``"discover"``, which runs the model; else not used.
        identity: what tells the model from any other, in the cache; empty: nothing discovered is kept there.
        alpha: decay of the information gain per token.
        batch_size: maskings at a time.
        cache: folder where what was found is kept by content (model, instruction and options; answers of a chat
            model), so that a resumed run finds the same. ``None``: nowhere.
        progress: called with how many instructions are done and how many there are.

    Raises:
        ConfigError: an unknown source or option, or no model to discover with.
        DataError: answers of a chat model without one usable span, and ``unusable`` is ``"error"``.
        RunError: the chat model did not answer.
    """
    name, options = check_source(source)
    if name == "data":
        by_instruction = {example.instruction: example.key_parts for example in reversed(examples)}
        return FoundKeyParts(list(examples), _summary(name, by_instruction, 0))
    dropped = 0
    distinct = list(dict.fromkeys(example.instruction for example in examples))
    found: dict[str, tuple[Span, ...]]
    if name == "llm":
        unusable = options.pop("unusable")
        one_of = {example.instruction: example for example in reversed(examples)}
        shown = [one_of[text] for text in distinct]
        found, dropped = ask_for_key_parts(chat_of(options, cache), shown, unusable=unusable)
        if progress is not None:
            progress(len(distinct), len(distinct))
    else:
        if model is None or encoder is None:
            raise ConfigError("key_parts: 'discover' needs a model and its encoder")
        found = _discovered(examples, model, encoder, options, identity, alpha, batch_size, cache, progress)
    given = [replace(example, key_parts=found[example.instruction]) for example in examples]
    return FoundKeyParts(given, _summary(name, found, dropped))


def _summary(source: str, found: Mapping[str, Sequence[Span]], dropped: int) -> dict[str, Any]:
    having = sum(bool(spans) for spans in found.values())
    return {
        "source": source,
        "instructions": len(found),
        "with_key_parts": having,
        "without": len(found) - having,
        "spans": sum(map(len, found.values())),
        "dropped": dropped,
    }


# ------------------------------------------------------------------------------------------------- of a whole run


def check_key_parts(source: KeyPartSource) -> None:
    """Refuse a run's source of key parts that is neither ``"auto"`` nor what :func:`check_source` takes.

    Raises:
        ConfigError: what is wrong with it.
    """
    if source == "auto":
        return
    try:
        name, options = check_source(source)
    except ConfigError as error:
        raise ConfigError(f"{error}; or auto: data where it gives key parts, else discover") from None
    if name == "llm" and "local" not in options:
        chat_of({key: value for key, value in options.items() if key != "unusable"}, None)


def key_parts_for_run(
    examples: Sequence[Example],
    source: KeyPartSource,
    model: nn.Module,
    encoder: PromptEncoder,
    *,
    alpha: float = 0.3,
    run: Path | None = None,
    cache: Path | None = None,
) -> list[Example]:
    """Give a run's examples their key parts, found once in a run and the same on every process.

    Args:
        examples: of any tasks.
        source: ``"auto"``: those of the data, and for instructions without any what ``"discover"`` finds; or a source
            of :func:`find_key_parts`.
        model: as it is now, for what is discovered; an instruction is searched once in a run.
        encoder: turns examples into the model's tokens.
        alpha: of the information gain that discovery ranks clauses by.
        run: folder of the run, where what was discovered is kept.
        cache: shared by all runs, where a chat model's answers are kept.

    Raises:
        DataError, RunError: as :func:`find_key_parts`.
    """
    if source == "data":
        return list(examples)
    open_ones = [example for example in examples if source != "auto" or not example.key_parts]
    if not open_ones:
        return list(examples)
    asked = "discover" if source == "auto" else source
    discovers = check_source(asked)[0] == "discover"

    def find() -> dict[str, tuple[tuple[int, int], ...]]:
        found = find_key_parts(
            open_ones,
            asked,
            model=model,
            encoder=encoder,
            identity="the model of this run when it met the instruction",
            alpha=alpha,
            cache=run if discovers else cache,
        )
        return {example.instruction: example.key_parts for example in found.examples}

    # One process searches: others may differ in a last bit, and replay and loss must mask the same words.
    spans = from_rank_zero(find)
    chosen = {id(example) for example in open_ones}
    return [
        replace(example, key_parts=spans[example.instruction]) if id(example) in chosen else example
        for example in examples
    ]


def discovered_note(before: Sequence[Example], after: Sequence[Example], source: KeyPartSource) -> list[str]:
    """One sentence for the record where key parts were discovered: nobody wrote them down, the model itself chose.

    Args:
        before, after: the examples as :func:`key_parts_for_run` was given them, and as it returned them.
        source: what it was told.
    """
    if source != "auto" and check_source(source)[0] != "discover":
        return []
    pairs = zip(before, after, strict=True)
    found = {new.instruction for old, new in pairs if new.key_parts and (source != "auto" or not old.key_parts)}
    if not found:
        return []
    return [f"Key parts of {len(found)} instructions are discovered: clauses that the model itself heeds most."]


def chat_of(spec: Mapping[str, Any], cache: Path | None) -> Chat:
    """The chat model of a configuration, with its answers kept in the cache shared by all runs."""
    return build_chat(spec, None if cache is None else cache / "chat")


# ------------------------------------------------------------------------------------------------------ discovery


def _discovered(
    examples: Sequence[Example],
    model: nn.Module,
    encoder: PromptEncoder,
    options: Mapping[str, Any],
    identity: str,
    alpha: float,
    batch_size: int,
    cache: Path | None,
    progress: Progress | None,
) -> dict[str, tuple[Span, ...]]:
    """The key parts of each distinct instruction; no span for one that cannot be told apart into clauses."""
    of: dict[str, list[Example]] = {}
    for example in examples:
        of.setdefault(example.instruction, []).append(example)
    setting = {"version": _VERSION, "model": identity, "alpha": alpha, **options}
    kept = JsonCache(None if cache is None or not identity else cache / "key-parts", setting)
    found = {text: spans for text in of if (spans := _kept_spans(kept, text)) is not None}
    missing = [text for text in of if text not in found]
    for start in range(0, len(missing), _AT_A_TIME):
        some = missing[start : start + _AT_A_TIME]
        samples = {text: _spread(of[text], options["examples"]) for text in some}
        gains = clause_gains(model, encoder, samples, alpha=alpha, batch_size=batch_size)
        for text in some:
            found[text] = choose_clauses(gains[text], options["share"])
            kept.put(
                text,
                {
                    "key_parts": [list(span) for span in found[text]],
                    "clauses": [
                        {"span": list(span), "text": text[slice(*span)], "gain": gain} for span, gain in gains[text]
                    ],
                },
            )
        if progress is not None:
            progress(len(found), len(of))
    return found


def clause_gains(
    model: nn.Module,
    encoder: PromptEncoder,
    samples: Mapping[str, Sequence[Example]],
    *,
    alpha: float = 0.3,
    batch_size: int = 8,
) -> dict[str, list[tuple[Span, float]]]:
    """The information gain of each clause alone, averaged over an instruction's examples.

    The maskings of one example share its full context and the tokens before the masked clause, where the model takes
    shared rows.

    Args:
        samples: instruction -> some of its examples. Those that do not fit the encoder's limit are left out.

    Returns:
        instruction -> ``(clause, G)``, clauses ascending; none where there is a single one or no example fits.
    """
    pairs: list[EncodedPair] = []
    of: list[tuple[str, Span]] = []
    names: dict[int, str] = {}
    for text, some in samples.items():
        candidates = clauses(text)
        for number, example in enumerate(some if len(candidates) > 1 else ()):
            try:
                maskings = [
                    encode_pair(encoder, replace(example, key_parts=(clause,)), number) for clause in candidates
                ]
            except ExampleTooLongError:
                continue
            names[len(pairs)] = name_of(example, number)
            full = maskings[0].full  # one object, so that the collator shares it
            pairs += [replace(one, full=full if one.full == full else one.full, index=len(pairs)) for one in maskings]
            of += [(text, clause) for clause in candidates]
    scores = pair_gains(model, encoder, pairs, names, alpha=alpha, batch_size=batch_size, share_prefix="auto")
    gains: dict[tuple[str, Span], list[float]] = {}
    for key, score in zip(of, scores, strict=True):
        gains.setdefault(key, []).append(score.gain or 0.0)
    result: dict[str, list[tuple[Span, float]]] = {text: [] for text in samples}
    for (text, clause), values in gains.items():
        result[text].append((clause, statistics.fmean(values)))
    return result


def choose_clauses(gains: Sequence[tuple[Span, float]], share: float) -> tuple[Span, ...]:
    """The fewest clauses that carry ``share`` of the gain of all that carry any; neighbours become one span.

    At least one, also where none carries any, and never all: a masked instruction has to keep something. Of equal
    gains the earlier clause counts as larger.

    >>> choose_clauses([((0, 4), 0.1), ((6, 9), 0.3), ((10, 14), 0.2)], share=0.8)
    ((6, 14),)
    """
    order = sorted(range(len(gains)), key=lambda k: -gains[k][1])
    wanted = share * sum(max(gain, 0.0) for _, gain in gains)
    chosen: list[int] = []
    carried = 0.0
    for k in order[: len(gains) - 1]:
        if chosen and (carried >= wanted * (1 - 1e-9) or gains[k][1] <= 0):
            break
        chosen.append(k)
        carried += gains[k][1]
    runs = itertools.groupby(enumerate(sorted(chosen)), key=lambda item: item[1] - item[0])
    numbers = [[number for _, number in run] for _, run in runs]
    return tuple((gains[run[0]][0][0], gains[run[-1]][0][1]) for run in numbers)


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of the examples, evenly over all of them: neighbours in a file are often alike."""
    count = min(count, len(examples))
    return [examples[k * len(examples) // count] for k in range(count)]


def _kept_spans(kept: JsonCache, text: str) -> tuple[Span, ...] | None:
    """The key parts that were discovered in an instruction, if they are spans of it."""
    try:
        spans = tuple((int(start), int(end)) for start, end in (kept.get(text) or {})["key_parts"])
        Example(text, references=("-",), key_parts=spans)
    except (ValueError, KeyError, TypeError, DataError):
        return None
    return spans
