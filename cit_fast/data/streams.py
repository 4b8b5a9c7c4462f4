"""Streams as files: which tasks a paper trains in which order, how they are read and scored, where each part is.

A file below ``cit_fast/data/streams`` names tasks, orders, reader options, metric and form of the prompt, and the
digests of parts that are known. The data itself is not shipped: the user names the folder that holds it, and nothing is
downloaded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cit_fast.data.sources import TaskSource
from cit_fast.errors import ConfigError, DataError
from cit_fast.files import file_checksum
from cit_fast.values import choices

_FOLDER = Path(__file__).with_name("streams")


@dataclass(frozen=True)
class StreamFile:
    """What a stream file says.

    Args:
        name: of the stream; ``says``: what it is; ``source``: who made it; ``where``: where its data is to be had.
        orders: name of an order -> the tasks in it.
        tasks: task -> options of its :class:`~cit_fast.data.sources.TaskSource`, with ``path``, and the folder of
            ``images``, below the user's folder; ``digests``: task -> file below that path -> SHA-256, for the parts
            that are known.
        data: what the section ``data`` of a configuration takes from the stream where it does not say otherwise.
    """

    name: str
    says: str
    source: str
    where: str
    orders: dict[str, list[str]]
    tasks: dict[str, dict[str, Any]]
    digests: dict[str, dict[str, str]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def sources(self, order: str, root: str | Path) -> tuple[TaskSource, ...]:
        """The tasks of an order, read from below ``root``."""

        def source(task: str) -> TaskSource:
            options = dict(self.tasks[task])
            for key in {"path", "images"} & options.keys():
                options[key] = str(Path(root) / options[key])
            return TaskSource(**{**options, "name": task})

        return tuple(map(source, self.orders[order]))


@functools.cache
def stream_files() -> dict[str, StreamFile]:
    """The streams that are shipped, by name."""
    return {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.yaml"))}


def _read(path: Path) -> StreamFile:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    reads, tasks, digests = content.pop("reads", {}), {}, {}
    for name, own in content.pop("tasks").items():
        known = own.pop("sha256", None)
        if known:
            digests[name] = known
        tasks[name] = {"path": name, **reads, **own}
    return StreamFile(name=path.stem, tasks=tasks, digests=digests, **content)


def find_stream(text: str) -> tuple[StreamFile, str]:
    """The stream and the order that ``"name/order"`` means; the first order where none is named.

    Raises:
        ConfigError: no such stream or order.
    """
    name, _, order = text.partition("/")
    known = stream_files()
    if name not in known:
        raise ConfigError(f"stream: {text!r} is unknown; {choices(name, known)}")
    stream = known[name]
    order = order or next(iter(stream.orders))
    if order not in stream.orders:
        raise ConfigError(f"stream: {name} has no order {order!r}; {choices(order, stream.orders)}")
    return stream, order


def missing_parts(stream: StreamFile, order: str, root: str | Path) -> dict[str, str]:
    """Task -> what is wrong with its part below ``root``: it is not there, or its digest differs."""
    found = {}
    for task in stream.orders[order]:
        path = Path(root) / stream.tasks[task]["path"]
        if not path.exists():
            found[task] = f"{path} is not there"
            continue
        for name, digest in stream.digests.get(task, {}).items():
            if not (path / name).is_file():
                found[task] = f"{path / name} is not there"
            elif file_checksum(path / name) != digest:
                found[task] = f"{path / name} is another file than the stream's (its SHA-256 differs)"
    return found


def check_stream(text: str, root: str | Path) -> None:
    """See that every part of a stream is there, and is what it should be.

    Raises:
        DataError: the first part that is missing, or whose digest differs.
    """
    stream, order = find_stream(text)
    missing = missing_parts(stream, order, root)
    if missing:
        task, problem = next(iter(missing.items()))
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"data.stream: {text}: task {task}: {problem}{more}; to be had from {stream.where}")
