"""Build built-in tasks and streams of them."""

from __future__ import annotations

from collections.abc import Iterable

from cit_fast.data.builtin import goods, messages, notes, visual
from cit_fast.data.builtin.kinds import Draw, Kind, Sample, Split, parse_wording, split_of
from cit_fast.data.example import Example, Task, TaskStream
from cit_fast.errors import DataError
from cit_fast.values import choices

_ORDER = (
    "dates",
    "intents",
    "amounts",
    "priority",
    "records",
    "times",
    "plurals",
    "emails",
    "names",
    "units",
    "numbers",
    "sorting",
)
_BY_NAME: dict[str, Kind] = {kind.name: kind for kind in (*notes.KINDS, *goods.KINDS, *messages.KINDS)}
_KINDS: dict[str, Kind] = {name: _BY_NAME[name] for name in _ORDER}
_VISUAL_KINDS: dict[str, Kind] = {kind.name: kind for kind in visual.KINDS}
# A generator that gives nothing new so many times in a row has nothing left.
_MOST_MISSES = 2000


def builtin_task_names() -> tuple[str, ...]:
    """Names of the built-in tasks on texts, in the default order of arrival."""
    return tuple(_KINDS)


def is_builtin_task(name: str) -> bool:
    """Whether :func:`builtin_task` knows the name: a task on texts or one on pictures, in any wording."""
    return name in _KINDS or name in _VISUAL_KINDS


def builtin_task(name: str, *, seed: int = 0, train: int = 320, dev: int = 32, test: int = 32) -> Task:
    """One built-in task.

    The i-th example of a split depends on ``name``, ``seed`` and i alone: a larger split starts with the smaller one,
    on every platform (pictures too, to the byte). No input of one split occurs in another, whatever the seeds and
    sizes; of tasks on pictures an input is the question with what is shown where, whatever the sizes and shades.
    Within a split inputs differ; only a training split larger than the number of different inputs starts over, with
    newly drawn wordings.

    Args:
        name: one of :func:`builtin_task_names` or :func:`visual_task_names`.
        seed: any integer.
        train, dev, test: number of examples, each >= 0.

    Raises:
        DataError: unknown name, a negative size, or more dev or test examples than there are different inputs.

    >>> task = builtin_task("dates", train=1, dev=0, test=0)
    >>> task.metric, task.answer_pattern
    ('exact_match', '\\\\d{4}-\\\\d{2}-\\\\d{2}')
    """
    if not is_builtin_task(name):
        known = _VISUAL_KINDS if name.startswith("visual") else _KINDS
        raise DataError(f"there is no built-in task {name!r}; {choices(name, known)}")
    kind = _KINDS.get(name) or _VISUAL_KINDS[name]
    return Task(
        name=name,
        train=_examples(kind, "train", seed, train),
        dev=_examples(kind, "dev", seed, dev),
        test=_examples(kind, "test", seed, test),
        metric=kind.metric,
        labels=kind.labels,
        answer_pattern=kind.answer_pattern,
        wordy_above=kind.wordy_above,
    )


def builtin_stream(
    names: Iterable[str] | None = None, *, seed: int = 0, train: int = 320, dev: int = 32, test: int = 32
) -> TaskStream:
    """Built-in tasks, in the given order.

    Args:
        names: names of tasks; ``None``: all on texts, in the default order.
        seed, train, dev, test: of every task, as in :func:`builtin_task`.

    Raises:
        DataError: as in :func:`builtin_task`; no name, or a name given twice.
    """
    chosen = builtin_task_names() if names is None else tuple(names)
    return TaskStream(tuple(builtin_task(name, seed=seed, train=train, dev=dev, test=test) for name in chosen))


def _examples(kind: Kind, split: Split, seed: int, count: int) -> tuple[Example, ...]:
    if count < 0:
        raise DataError(f"built-in task {kind.name!r}: {split}={count}; a size is 0 or more")
    draw = Draw(f"{kind.drawn_as or kind.name}/{split}/{seed}", split)
    wordings = [parse_wording(marked) for marked in kind.wordings]
    examples: list[Example] = []
    seen: set[str] = set()
    misses = 0
    while len(examples) < count:
        text, answer, identity, image = Sample(*kind.generate(draw))
        identity = identity or text
        # The input itself decides its split, so that no input is in two of them, whatever the sizes and the seed.
        if identity in seen or split_of(identity) != split:
            misses += 1
            if misses < _MOST_MISSES:
                continue
            if split != "train":
                raise DataError(
                    f"built-in task {kind.name!r}: {split}={count} asked, about {len(seen)} different inputs exist"
                )
            seen.clear()
            misses = 0
            continue
        misses = 0
        seen.add(identity)
        instruction, key_parts = draw.pick(wordings)
        source = f"built-in {kind.name} {split} {len(examples)}, seed {seed}"
        images = () if image is None else (image(),)
        examples.append(Example(instruction, text, (answer,), kind.name, key_parts, images=images, source=source))
    return tuple(examples)
