"""A task as a file of a run: what is kept of it once it is learned, when its data may be gone.

The file holds the evaluation splits whole and some of the training examples, in the order in which they would be given
up last. It knows the digest and the size of the task as it was learned, and its instructions by their hashes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cit_fast.data.constraints import Constraints
from cit_fast.data.example import Example, Task
from cit_fast.errors import CitFastError, RunError
from cit_fast.files import read_checked_json, write_checked_json

FORMAT_VERSION = 1
_SPLITS = ("train", "dev", "test")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Example)}


@dataclass(frozen=True)
class RecalledTask(Task):
    """A task from a run's memory.

    Args:
        digest: of the task as it was learned; ``full_size``: its training examples then, of which ``train`` has those
            that are kept.
        instruction_hashes: SHA-256 of each of its distinct instructions.
        dropped: whether its texts have been removed; it has no examples then.
    """

    digest: str = ""
    full_size: int = 0
    instruction_hashes: tuple[str, ...] = ()
    dropped: bool = False

    def __post_init__(self) -> None:
        if not self.dropped:
            super().__post_init__()

    @property
    def size(self) -> int:
        """Training examples that the task had when it was learned."""
        return self.full_size


def hash_of(text: str) -> str:
    """What a text is known by when it is gone."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def kept(task: Task, digest: str, order: Sequence[int], instructions: Iterable[str] = ()) -> RecalledTask:
    """What is kept of a task: its training examples in this order."""
    plain = {field.name: getattr(task, field.name) for field in dataclasses.fields(Task)}
    return RecalledTask(
        **{**plain, "train": tuple(task.train[k] for k in order)},
        digest=digest,
        full_size=task.size,
        instruction_hashes=tuple(sorted(map(hash_of, instructions))),
    )


def write_kept(path: Path, task: RecalledTask) -> None:
    """Write a task's file, atomically."""
    write_checked_json(
        path,
        {
            "format_version": FORMAT_VERSION,
            "task": task.name,
            "digest": task.digest,
            "size": task.full_size,
            "dropped": task.dropped,
            "metric": task.metric,
            "constraints": Constraints.of(task).to_record(),
            "instruction_hashes": list(task.instruction_hashes),
            **{split: [_plain(example) for example in getattr(task, split)] for split in _SPLITS},
        },
    )


def read_kept(path: Path) -> RecalledTask:
    """Read a task's file.

    Raises:
        RunError: it is not there, damaged, or of another version.
    """
    try:
        content = read_checked_json(path)
    except FileNotFoundError:
        raise RunError(f"{path}: not there; the run's memory does not know this task") from None
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise RunError(f"{path}: a memory of format version {version}; this cit-fast reads version {FORMAT_VERSION}")
    try:
        name = content["task"]
        examples: dict[str, Any] = {split: tuple(_example(each, name) for each in content[split]) for split in _SPLITS}
        return RecalledTask(
            name=name,
            **examples,
            metric=content["metric"],
            **Constraints.from_record(content["constraints"]).declared(),
            digest=content["digest"],
            full_size=int(content["size"]),
            instruction_hashes=tuple(content["instruction_hashes"]),
            dropped=bool(content["dropped"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, CitFastError) as error:
        raise RunError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def bytes_of(example: Example) -> int:
    """What an example takes in the file, about."""
    return len(json.dumps(_plain(example), ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _plain(example: Example) -> dict[str, Any]:
    """The fields that say something; the task's name is the file's, and where the example was read is of no use."""
    values = {name: getattr(example, name) for name in _DEFAULTS if name not in ("task", "source")}
    return {name: value for name, value in values.items() if value != _DEFAULTS[name]}


def _example(plain: dict[str, Any], task: str) -> Example:
    return Example(**{name: _tuples(value) for name, value in plain.items()}, task=task)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
