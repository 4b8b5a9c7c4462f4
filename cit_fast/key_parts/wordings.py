"""Instruction diversity: several wordings of a task's instruction, one drawn at random for each example (KPIG).

A model that has seen one wording only learns the wording. The pool of a task is what the data has, or up to 31
wordings that a chat model evolves from one another by the paper's four strategies, each with its own key parts. A pool
is a file: made once (``cit-fast pool``), reviewed, and shared.

Source: He et al., ACL 2025, arXiv 2403.10056.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cit_fast.data.example import MASK, Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.files import write_json
from cit_fast.models.chat import Chat, first_list
from cit_fast.text import cut

_log = logging.getLogger(__name__)

POOL_VERSION = 1
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


def chat_pools(
    examples: Sequence[Example], chat: Chat, size: int = LARGEST_POOL, seed: int = 0
) -> dict[str, tuple[Wording, ...]]:
    """Each task's most frequent wording, and what a chat model evolves from it: the paper's recursive evolution.

    An evolution draws a member of the pool and one of the strategies at random, and asks for one rewording of that
    member with its key parts, shown an example's input and answer; a usable one joins the pool and can be drawn next.
    What cannot be used is left out: a wording without key parts, key parts that are no literal part of it or that leave
    nothing of it, a repetition; so a pool may end with fewer. All tasks evolve at a time. Answers are kept by ``chat``.

    Args:
        examples: of the tasks; those that :func:`data_pools` leaves out are left out here.
        chat: answers one prompt per evolution and task.
        size: wordings per task at most, the first one included, in [2, 31]; one evolution fewer is made.
        seed: of the draws.

    Raises:
        DataError: no answer of a task's first evolutions could be used.
        RunError: the model did not answer.
    """
    if not 2 <= size <= LARGEST_POOL:
        raise ConfigError(f"size: {size} wordings per task; expected 2 to {LARGEST_POOL}")
    pools: dict[str, list[Wording]] = {}
    shown: dict[str, Example] = {}
    for task, pool in data_pools(examples).items():
        counts = Counter(example.instruction for example in examples if example.task == task)
        pools[task] = [max(pool, key=lambda wording, counts=counts: counts[wording.instruction])]  # type: ignore[misc]
        shown[task] = next(example for example in examples if example.task == task)
    draws = {task: random.Random(f"{seed}/{task}") for task in pools}  # noqa: S311 - a seed, not a secret
    asked: dict[str, list[str]] = {task: [] for task in pools}
    for evolution in range(1, size):
        for task, rng in draws.items():
            member, strategy = rng.choice(pools[task]), rng.choice(list(STRATEGIES))
            asked[task].append(_prompt(member, strategy, evolution, shown[task]))
        answers = chat.complete([prompts[-1] for prompts in asked.values()])
        for (task, grown), answer in zip(pools.items(), answers, strict=True):
            known = {wording.instruction for wording in grown}
            grown.extend([one for one in read_wordings(answer) if one.instruction not in known][:1])
            if len(grown) == 1 and evolution == min(len(STRATEGIES), size - 1):
                chat.forget(asked[task])
                raise DataError(
                    f"instructions: the chat model gave no usable rewording for task {task!r} in {evolution} attempts; "
                    f"{cut(grown[0].instruction)!r} was answered with {cut(answer)!r}. Name a model that answers in "
                    "JSON"
                )
    for task, grown in pools.items():
        if len(grown) < size:
            _log.info("instructions: %d of %d wordings for task %s", len(grown), size, task)
    return {task: tuple(pool) for task, pool in pools.items()}


def write_pools(path: Path, pools: Pools, made_by: Mapping[str, Any]) -> None:
    """Write pools as JSON that can be read, changed by hand, and shared.

    Args:
        path: the file. ``made_by``: how they were made, for its readers.
    """
    tasks = {
        task: [
            {"instruction": one.instruction, "key_parts": [one.instruction[a:b] for a, b in one.key_parts]}
            for one in pool
        ]
        for task, pool in pools.items()
    }
    write_json(path, {"format_version": POOL_VERSION, "made_by": dict(made_by), "tasks": tasks})


def read_pools(path: Path) -> dict[str, tuple[Wording, ...]]:
    """The pools of a file, each wording with key parts that stand in it.

    Raises:
        DataError: no such file, broken JSON, another version, or a wording that cannot be used, by task and number.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; cit-fast pool makes one") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: broken ({error})") from None
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, dict) or not all(isinstance(entries, list) for entries in tasks.values()):
        raise DataError(f"{path}: no pool of wordings: 'tasks' must hold a list for each task")
    if content.get("format_version") != POOL_VERSION:
        raise DataError(f"{path}: format version {content.get('format_version')}; this cit-fast reads {POOL_VERSION}")
    pools: dict[str, tuple[Wording, ...]] = {}
    for task, entries in tasks.items():
        if not 1 <= len(entries) <= LARGEST_POOL:
            raise DataError(f"{path}: tasks.{task}: {len(entries)} wordings; expected 1 to {LARGEST_POOL}")
        pools[task] = tuple(_checked(entry, f"{path}: tasks.{task}.{k}") for k, entry in enumerate(entries))
    return pools


def given_pools(pool: str | None) -> dict[str, tuple[Wording, ...]]:
    """The pools of the file that an option ``pool`` names; none without one.

    Raises:
        ConfigError: as :func:`read_pools`.
    """
    try:
        return {} if pool is None else read_pools(Path(pool))
    except DataError as error:
        raise ConfigError(f"pool: {error}") from None


def _checked(entry: Any, where: str) -> Wording:
    if not isinstance(entry, dict) or not isinstance(entry.get("instruction"), str):
        raise DataError(f"{where}: expected an object with 'instruction' and 'key_parts'")
    for part in entry.get("key_parts") or ():
        if not isinstance(part, str) or part.strip() not in entry["instruction"]:
            raise DataError(f"{where}: key part {part!r} is not in its wording, {cut(entry['instruction'])!r}")
    found = _wording(entry)
    if found is None and not entry.get("key_parts"):  # given by the data, which may have none
        found = Wording(entry["instruction"])
    if found is None:
        raise DataError(f"{where}: its key parts overlap, are empty, or leave nothing of {cut(entry['instruction'])!r}")
    return found


def draw_wordings(examples: Sequence[Example], pools: Pools, rng: random.Random) -> list[Example]:
    """Each example with a wording drawn at random from its task's pool; one of a task without a pool as it is.

    So is a conversation, whose instruction stands in its turns; the draw is made all the same.

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
            own = replace(example, instruction=wording.instruction, key_parts=wording.key_parts, instruction_span=None)
            drawn.append(example if example.messages else own)
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


def _prompt(wording: Wording, strategy: str, evolution: int, example: Example) -> str:
    parts = [wording.instruction[start:end] for start, end in wording.key_parts]
    known = f"\nIts key parts: {json.dumps(parts, ensure_ascii=False)}" if parts else ""
    return (
        f"Reword the instruction between <<< and >>> (rewording {evolution}, strategy: {strategy}): "
        f"{STRATEGIES[strategy]}. Every right answer to the instruction must stay a right answer, in the same format, "
        "and the other way round.\n"
        "With the rewording give its key parts: the one to four shortest phrases, copied from it letter by letter, "
        "that decide content, length or format of the answer. They must not be the whole rewording.\n"
        'Answer with a JSON list only: [{"instruction": "...", "key_parts": ["...", "..."]}]\n'
        f"<<<{wording.instruction}>>>{known}\n"
        f"An input: {cut(example.input, 600)}\nIts answer: {cut(example.references[0], 300)}"
    )
