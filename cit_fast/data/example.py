"""The data model: Example, Task and TaskStream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cit_fast.data.constraints import Constraints
from cit_fast.errors import DataError
from cit_fast.text import is_file_name

MASK = "[MASK]"


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction with its input and the answers that count as right.

    Args:
        instruction: what is to be done; never empty unless ``messages`` is given.
        input: what it is to be done to; may be empty.
        references: acceptable answers, at least one; training uses the first.
        task: name of the task the example belongs to.
        key_parts: character spans ``(start, end)`` of ``instruction``, ascending, not overlapping, not empty: the
            parts that decide content, length or format of the answer (KPIG).
        messages: the whole conversation as ``(role, content)`` pairs, ending with the assistant's answer, for chat
            data of more than one turn or with a system turn; empty otherwise.
        instruction_span: characters ``(start, end)`` of ``instruction`` that say what the task is, where a turn holds
            more than that (a question and then the instruction); what tells tasks apart reads these alone.
        images: each an absolute path, a ``data:`` URI that holds the file itself, or an address, which a model that
            sees images refuses (:func:`~cit_fast.data.images.open_image`). They stand in their order where
            ``<image>`` is written in instruction and input, or in the user's turns of a conversation: as often as there
            are images, or nowhere, which means before the text of the (first) question.
        other_media: paths or addresses of videos and recordings, which no model sees (:func:`unseen_media` says so).
        source: ``file:line`` (or generator and index) the example came from, for error messages.

    Raises:
        DataError: an empty instruction, no reference, a key part that is not a span of the instruction, or text that
            is not valid Unicode.
    """

    instruction: str
    input: str = ""
    references: tuple[str, ...] = ()
    task: str = ""
    key_parts: tuple[tuple[int, int], ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    images: tuple[str, ...] = ()
    source: str = ""
    other_media: tuple[str, ...] = ()
    instruction_span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        where = self.source or f"task {self.task!r}"
        if not self.instruction.strip() and not self.messages:
            raise DataError(f"{where}: the instruction is empty; every example needs one")
        if not self.references or not self.references[0].strip():
            raise DataError(f"{where}: no reference answer; every example needs at least one non-empty answer")
        try:
            "".join((self.instruction, self.input, *self.references, *(text for _, text in self.messages))).encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: invalid Unicode: a lone surrogate") from None
        end_of_previous = 0
        for start, end in self.key_parts:
            if not (end_of_previous <= start < end <= len(self.instruction)):
                raise DataError(
                    f"{where}: key part ({start}, {end}) is not a span of the instruction "
                    f"({len(self.instruction)} characters); spans ascend, do not overlap and are not empty"
                )
            end_of_previous = end

    @property
    def task_instruction(self) -> str:
        """What says which task this is: ``instruction_span``, or the whole instruction."""
        if self.instruction_span is None:
            return self.instruction
        start, end = self.instruction_span
        return self.instruction[start:end]

    @property
    def key_part_texts(self) -> tuple[str, ...]:
        """The key parts as text, in order."""
        return tuple(self.instruction[start:end] for start, end in self.key_parts)

    @property
    def masked_instruction(self) -> str:
        """``mask(x)``: the instruction with every key part replaced by ``[MASK]`` (KPIG, arXiv 2403.10056)."""
        pieces, position = [], 0
        for start, end in self.key_parts:
            pieces += [self.instruction[position:start], MASK]
            position = end
        return "".join([*pieces, self.instruction[position:]])


def unseen_media(examples: Iterable[Example]) -> str | None:
    """One sentence that counts the examples with images, videos or recordings; ``None`` where there are none.

    For models that see only text, so that nobody takes what they learn for more than it is.
    """
    given = list(examples)
    counts = {
        "images": sum(bool(example.images) for example in given),
        "videos or recordings": sum(bool(example.other_media) for example in given),
    }
    found = [f"{count} have {kind}" for kind, count in counts.items() if count]
    if not found:
        return None
    return f"Of {len(given)} examples {' and '.join(found)}, which this model does not see: only their text is used."


@dataclass(frozen=True)
class Task(Constraints):
    """A set of examples with one way to score them.

    Args:
        name: unique in its stream.
        train, dev, test: the splits; ``dev`` and ``test`` may be empty where nothing is evaluated. Their examples get
            the task's name.
        metric: a name in :data:`cit_fast.evaluation.metrics.METRICS`.
        labels, answer_pattern, answer_format, extractive, wordy_above: what the V-score judges answers by, each
            optional; see :class:`~cit_fast.data.constraints.Constraints`.
    """

    name: str
    train: tuple[Example, ...] = field(repr=False)
    dev: tuple[Example, ...] = field(default=(), repr=False)
    test: tuple[Example, ...] = field(default=(), repr=False)
    metric: str = "rouge_l"

    def __post_init__(self) -> None:
        if not is_file_name(self.name):
            raise DataError(
                f"task name {self.name!r} cannot name a file; use letters, digits, '.', '_', '-' and '+', at most 200 "
                "bytes"
            )
        if not self.train and not self.test:
            raise DataError(f"task {self.name!r} is empty: it has neither training nor test examples")
        for split in ("train", "dev", "test"):
            examples = getattr(self, split)
            if any(example.task != self.name for example in examples):  # replay tells examples apart by their task
                named = tuple(e if e.task == self.name else replace(e, task=self.name) for e in examples)
                object.__setattr__(self, split, named)
        self.check_constraints(f"task {self.name!r}: ")
        if self.extractive:
            for example in (*self.train, *self.dev, *self.test):
                if not example.input.strip():
                    raise DataError(
                        f"{example.source or f'task {self.name!r}'}: no input, but the task is extractive: its answers "
                        "are spans of the input"
                    )

    @property
    def size(self) -> int:
        """Training examples that the task has, or had when it was learned (:mod:`cit_fast.data.kept_task`)."""
        return len(self.train)

    @property
    def instructions(self) -> tuple[str, ...]:
        """The distinct instructions of the training split, in order of first appearance."""
        return tuple(dict.fromkeys(example.task_instruction for example in self.train))


@dataclass(frozen=True)
class TaskStream(Sequence[Task]):
    """Tasks in the order in which they arrive; names are unique."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise DataError("the task stream is empty; name at least one task")
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"the task stream has two tasks of one name: {', '.join(twice)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Task names in order of arrival."""
        return tuple(task.name for task in self.tasks)

    def by_name(self) -> Mapping[str, Task]:
        """Tasks by name."""
        return {task.name: task for task in self.tasks}

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.tasks[index]
