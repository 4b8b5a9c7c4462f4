"""What tells runs, tasks and cached scores apart: plain values and their digests."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cit_fast.data.example import Task
from cit_fast.data.images import image_digest
from cit_fast.data.kept_task import RecalledTask
from cit_fast.errors import ConfigError, DataError


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that JSON can hold, others by their type."""
    kinds = (str, int, float, bool, type(None))
    return {k: v if isinstance(v, kinds) else type(v).__name__ for k, v in options.items() if not k.startswith("_")}


def check_plain_values(record: Any, where: str) -> None:
    """See that a record can be written; better refused now than when the stage is trained.

    Raises:
        ConfigError: a value that JSON does not have.
    """
    try:
        json.dumps(dataclasses.asdict(record), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: its record must hold plain JSON values: {error}") from None


def digest(value: Any) -> str:
    """32 hexadecimal digits that tell plain values apart."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def task_digest(task: Task) -> str:
    """Digest of everything a task is, but not of where its examples were read from; of a recalled one as it was."""
    if isinstance(task, RecalledTask):
        return task.digest
    plain = _plain(task)
    for name in ("answer_format", "extractive", "wordy_above"):
        if not plain[name]:  # experts that were cached before there were such fields stay what they are
            del plain[name]
    return digest(plain)


def _plain(task: Task) -> dict[str, Any]:
    """Everything a task is. Where an example was read from does not change it, nor where its images lie."""
    plain = dataclasses.asdict(task)
    for split in ("train", "dev", "test"):
        for example in plain[split]:
            example.pop("source")
            example["images"] = list(map(_image, example["images"]))
    return plain


def _image(name: str) -> str:
    try:
        return image_digest(name)
    except DataError:  # of a model that is not shown it
        return name.rpartition("/")[2]


_SPLITS = {"train": "training", "dev": "development", "test": "test"}


def task_parts(task: Task) -> dict[str, str]:
    """Sizes and digests of a task's splits, and a digest of what it declares, to say later what has changed; nothing of
    a recalled one, whose examples are not all there.
    """
    if isinstance(task, RecalledTask):
        return {}
    plain = _plain(task)
    found = {}
    for split in _SPLITS:
        examples = plain.pop(split)
        found[split] = f"{len(examples)} {digest(examples)[:16]}"
    return {**found, "declared": digest(plain)[:16]}


def what_changed(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which parts of a task are others, in words; nothing where that is not known."""
    words = []
    for part, name in _SPLITS.items():
        before, after = was.get(part), now.get(part)
        if before and after and before != after:
            counts = before.split()[0], after.split()[0]
            how = f"{counts[0]} then, {counts[1]} now" if counts[0] != counts[1] else f"{counts[0]}, as before"
            words.append(f"its {name} examples have changed ({how})")
    if was.get("declared", "") != now.get("declared", "") and was and now:
        words.append("its metric, its labels or its other constraints have changed")
    return " and ".join(words)
