"""Images, videos and recordings of a run's examples, looked at before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cit_fast.data import Task
from cit_fast.data.example import Example, unseen_media
from cit_fast.data.images import checked_images
from cit_fast.errors import ConfigError, DataError
from cit_fast.run.config import RunConfig

_SPLITS = ("train", "dev", "test")


def looked_at(tasks: Sequence[Task], seen: bool, config: RunConfig) -> tuple[tuple[Task, ...], list[str]]:
    """The tasks as a model can be trained on them, and what there is to say of it.

    Args:
        seen: whether the model takes images; nothing that is trained here takes videos or recordings.

    Raises:
        ConfigError: a server is to answer prompts with images.
        DataError: the first example with something that the model does not take, unless ``data.ignore_media``; or the
            first image that cannot be read, unless ``data.on_bad_image`` is skip.
    """
    examples = [example for task in tasks for split in _SPLITS for example in getattr(task, split)]
    unseen = [example for example in examples if example.other_media or (example.images and not seen)]
    if unseen and not config.data.ignore_media:
        raise DataError(
            f"{_where(unseen[0])}: {_what(unseen[0], seen)}, which {config.model.name} does not take; choose a model "
            "that does, or data.ignore_media: true, which trains on the texts alone"
        )
    if not seen:
        note = unseen_media(examples)
        return tuple(tasks), [] if note is None else [note]
    if not any(example.images for example in examples):
        return tuple(tasks), ["No example has an image: the model's vision tower is frozen and not used."]
    if config.evaluation.engine != "transformers":
        raise ConfigError("evaluation.engine: a server is asked with tokens, which hold no image; leave it out")
    notes: list[str] = []

    def readable(task: Task, split: str) -> tuple[Example, ...]:
        given: tuple[Example, ...] = getattr(task, split)
        kept, said = checked_images(given, config.data.on_bad_image)
        if given and not kept:
            raise DataError(f"task {task.name!r}: no image of its {split} examples can be read; {said[0]}")
        notes.extend(said)
        return kept

    found = [replace(t, train=readable(t, "train"), dev=readable(t, "dev"), test=readable(t, "test")) for t in tasks]
    return tuple(found), notes


def _what(example: Example, seen: bool) -> str:
    return "an image" if example.images and not seen else "a video or a recording"


def _where(example: Example) -> str:
    return example.source or f"task {example.task!r}"
