"""Instruction diversity: several wordings of a task's instruction, one drawn at random for each example (KPIG).

A model that has seen one wording only learns the wording. The pool of a task is what the data has, or up to 31
rewordings by a chat model, by the paper's four strategies, each with its own key parts.

Source: He et al., ACL 2025, arXiv 2403.10056.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cit_fast.data.example import MASK, Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.models.chat import Chat, first_list
from cit_fast.text import cut

_log = logging.getLogger(__name__)

LARGEST_POOL = 31
"""Wordings that a pool holds at most, the task's own included (the paper's number)."""

STRATEGIES: dict[str, str] = {
    "concretizing": "replace general words by more concrete ones, so that it says the same more precisely",
    "reasoning": "ask explicitly for the steps of thought that lead to the answer, to be taken silently, "
    "the answer itself staying exactly what it was",
    "constraint": "state explicitly a constraint on the answer that it already fulfils, such as its format or length",
    "breadth": "say it in a different style and with a different structure, for another kind of reader",
}
"""The paper's strategies of rewording; what is right as an answer stays the same under each of them."""


@dataclass(frozen=True, slots=True)
class Wording:
    """One way to say what is to be done.

    Args:
        instruction: the words.
        key_parts: character spans of it, as in :class:`~cit_fast.data.Example`; may be empty.
    """

    instruction: str
    key_parts: tuple[tuple[int, int], ...] = ()


Pools = Mapping[str, Sequence[Wording]]
"""Task name -> its wordings."""


def data_pools(examples: Sequence[Example]) -> dict[str, tuple[Wording, ...]]:
    """The distinct wordings that each task has in its own examples, in order of first appearance.

    A task whose instructions say what they are about (an example without an input, a conversation) or that has more
    than 31 of them gets no pool: its instructions cannot stand for one another.

    >>> one = Example("Say it in words.", "4", ("four",), "numbers")
    >>> pools = data_pools([one, replace(one, instruction="Write the number out."), one])
    >>> [wording.instruction for wording in pools["numbers"]]
    ['Say it in words.', 'Write the number out.']
    """
    pools: dict[str, dict[str, Wording]] = {}
    own: set[str] = set()
    for example in examples:
        if example.messages or not example.input.strip():
            own.add(example.task)
        pool = pools.setdefault(example.task, {})
        known = pool.get(example.instruction)
        if known is None or not known.key_parts:
            pool[example.instruction] = Wording(example.instruction, example.key_parts)
    return {task: tuple(pool.values()) for task, pool in pools.items() if task not in own and len(pool) <= LARGEST_POOL}


def chat_pools(examples: Sequence[Example], chat: Chat, size: int = LARGEST_POOL) -> dict[str, tuple[Wording, ...]]:
    """Each task's most frequent wording, and rewordings of it by a chat model.

    An answer is a JSON list of ``{"instruction", "key_parts"}``; what in it cannot be used is left out: a wording
    without key parts, key parts that are no literal part of the wording, or that leave nothing of it, a repetition.
    Answers are kept by ``chat`` itself.

    Args:
        examples: of the tasks; those that :func:`data_pools` leaves out are left out here.
        chat: answers one prompt per strategy and task.
        size: wordings per task at most, the first one included, in [2, 31].

    Raises:
        DataError: no answer about a task could be used.
        RunError: the model did not answer.
    """
    if not 2 <= size <= LARGEST_POOL:
        raise ConfigError(f"size: {size} wordings per task; expected 2 to {LARGEST_POOL}")
    first: dict[str, Wording] = {}
    for task, pool in data_pools(examples).items():
        counts = Counter(example.instruction for example in examples if example.task == task)
        first[task] = max(pool, key=lambda wording, counts=counts: counts[wording.instruction])  # type: ignore[misc]
    each = -(-(size - 1) // len(STRATEGIES))
    prompts = {(task, name): _prompt(first[task], each, how) for task in first for name, how in STRATEGIES.items()}
    answers = dict(zip(prompts, chat.complete(list(prompts.values())), strict=True))
    pools = {}
    for task, wording in first.items():
        by_strategy = [read_wordings(answers[task, name])[:each] for name in STRATEGIES]
        # One of each strategy in turn: a pool that is cut off has them all.
        found = [one for row in _in_turns(by_strategy) for one in row if one.instruction != wording.instruction]
        pool = tuple({one.instruction: one for one in (wording, *found)}.values())[:size]
        if len(pool) == 1:
            chat.forget([prompts[task, name] for name in STRATEGIES])
            raise DataError(
                f"instructions: the chat model gave no usable rewording for task {task!r}; "
                f"{cut(wording.instruction)!r} was answered with {cut(answers[task, next(iter(STRATEGIES))])!r}. "
                "Name a model that answers in JSON"
            )
        if len(pool) < size:
            _log.info("instructions: %d of %d wordings for task %s", len(pool), size, task)
        pools[task] = pool
    return pools


def draw_wordings(examples: Sequence[Example], pools: Pools, rng: random.Random) -> list[Example]:
    """Each example with a wording drawn at random from its task's pool; one of a task without a pool as it is.

    Args:
        examples: of any tasks.
        pools: see :func:`data_pools`, :func:`chat_pools`.
        rng: is asked once for every example of a task with a pool, in order.
    """
    drawn = []
    for example in examples:
        pool = pools.get(example.task)
        if pool:
            wording = pool[int(rng.random() * len(pool))]
            drawn.append(replace(example, instruction=wording.instruction, key_parts=wording.key_parts))
        else:
            drawn.append(example)
    return drawn


# ------------------------------------------------------------------------------------------------ the chat's words


def read_wordings(answer: str) -> list[Wording]:
    """The usable wordings of the first JSON list in ``answer`` that has any; what is said around it is left alone.

    >>> read_wordings('Sure! [{"instruction": "Name the town.", "key_parts": ["the town"]}]')
    [Wording(instruction='Name the town.', key_parts=((5, 13),))]
    """
    return first_list(answer, lambda items: [one for item in items if (one := _wording(item)) is not None])


def _wording(item: Any) -> Wording | None:
    if not isinstance(item, dict):
        return None
    text, parts = item.get("instruction"), item.get("key_parts")
    if not isinstance(text, str) or not text.strip() or not isinstance(parts, list) or not parts:
        return None
    text = text.strip()
    spans: list[tuple[int, int]] = []
    for part in parts:
        if not isinstance(part, str) or not part.strip():
            return None
        start = text.find(part.strip())
        end = start + len(part.strip())
        if start < 0 or any(start < other_end and other_start < end for other_start, other_end in spans):
            return None
        spans.append((start, end))
    try:
        example = Example(text, "", ("-",), key_parts=tuple(sorted(spans)))
    except DataError:  # invalid Unicode
        return None
    if not any(map(str.isalnum, example.masked_instruction.replace(MASK, ""))):
        return None
    return Wording(text, example.key_parts)


def _prompt(wording: Wording, count: int, strategy: str) -> str:
    parts = [wording.instruction[start:end] for start, end in wording.key_parts]
    known = f"\nIts key parts: {json.dumps(parts, ensure_ascii=False)}" if parts else ""
    return (
        f"Reword the instruction between <<< and >>> in {count} different ways. In each of them: {strategy}. "
        "Every right answer to the instruction must stay a right answer, in the same format, and the other way round.\n"
        "With each rewording give its key parts: the one to four shortest phrases, copied from it letter by letter, "
        "that decide content, length or format of the answer. They must not be the whole rewording.\n"
        'Answer with a JSON list only: [{"instruction": "...", "key_parts": ["...", "..."]}, ...]\n'
        f"<<<{wording.instruction}>>>{known}"
    )


def _in_turns(lists: Sequence[Sequence[Wording]]) -> Iterator[list[Wording]]:
    for k in range(max(map(len, lists), default=0)):
        yield [one[k] for one in lists if k < len(one)]
