"""Where tasks come from: a built-in generator, a file or folder, or a ``datasets`` dataset."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from cit_fast.data.constraints import Constraints
from cit_fast.data.example import Example, Task, TaskStream
from cit_fast.data.folders import (
    is_saved_dataset,
    labels_file,
    load_saved,
    load_tables,
    split_files,
    tasks_below,
    wanted,
)
from cit_fast.data.inferred_labels import inferred_labels
from cit_fast.data.opened import (
    SPLITS,
    Limits,
    Opened,
    among_labels,
    choose_examples,
    in_memory,
    joined,
    not_a_label,
    read_splits,
    say_repeated,
    with_test_set,
)
from cit_fast.data.readers import answer_labels, kind, read_dataset, read_file, stem
from cit_fast.data.record_fields import ReadOptions
from cit_fast.errors import ConfigError, DataError
from cit_fast.text import file_name, normalise_label
from cit_fast.values import choices

DEFAULT_METRIC = "rouge_l"
CLOSED_SET_METRIC = "accuracy"


@dataclass(frozen=True)
class TaskSource(Constraints):
    """Where one task comes from; exactly one of ``builtin``, ``path`` and ``dataset``.

    Args:
        builtin: name of a built-in task.
        path: a file (``.json``, ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet``), a folder of such files, one per split
            (``train``, ``dev``, ``test`` or their usual other names) or in shards as the hub lays them out
            (``data/train-00000-of-00002.parquet``), or a dataset saved by ``save_to_disk``. Several of them, with a
            ``name``, are one task, as the categories of InsCL are.
        dataset: a dataset on the Hugging Face hub, or anything else ``datasets.load_dataset`` takes.
        name: the task's name; otherwise the built-in name or the last part of the path.
        metric: name of the metric; otherwise ``accuracy`` where the answers are a closed set, else
            ``rouge_l``.
        labels, answer_pattern, answer_format, extractive, wordy_above: what a good answer keeps to, for the V-score;
            see :class:`~cit_fast.data.constraints.Constraints`. Labels are otherwise taken from the folder's
            ``labels.json`` or from the answer column of a dataset where that is a class label.
        infer_labels: where none of those says, take the distinct answers of the whole source for the closed set if
            they are few and come again and again (see :func:`cit_fast.data.inferred_labels.inferred_labels`).
        splits: ``train``, ``dev``, ``test`` -> the source's own split name or file stem, e.g.
            ``{"train": "train", "test": "validation"}``; those that are not given are found by their usual names.
        subset: configuration name of the dataset; ``revision``: its branch, tag or commit.
        format, columns, instruction, instruction_part, key_parts, key_part_markers, images, positive_examples: how to
            understand the records; see :class:`~cit_fast.data.ReadOptions`.
        skip_unanswered: the same; it leaves out answers that are not among the labels, too.

    Raises:
        ConfigError: none or several of ``builtin``, ``path`` and ``dataset``, an option that does not apply,
            or one with an unusable value.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    builtin: str | None = None
    path: str | tuple[str, ...] | None = None
    dataset: str | None = None
    name: str | None = None
    metric: str | None = None
    infer_labels: bool = False
    splits: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    revision: str | None = None
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    instruction: str | None = None
    instruction_part: str | dict[str, str] | None = None
    key_parts: tuple[str, ...] = ()
    key_part_markers: tuple[str, str] | None = None
    images: str | None = None
    positive_examples: int = 0
    skip_unanswered: bool = False

    def __post_init__(self) -> None:
        given = [kind for kind in ("builtin", "path", "dataset") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"a task source needs exactly one of builtin, path and dataset, not {' and '.join(given) or 'none'}"
            )
        if isinstance(self.path, (list, tuple)):
            if not self.path or self.name is None:
                raise ConfigError("path: a task of several files or folders needs at least one, and a name")
            object.__setattr__(self, "path", tuple(self.path))
        unknown = sorted(set(self.splits) - set(SPLITS))
        if unknown:
            raise ConfigError(f"splits: {unknown[0]!r} is unknown; the splits are {', '.join(SPLITS)}")
        if self.dataset is None and (self.subset or self.revision):
            raise ConfigError("subset and revision belong to a dataset source")
        if self.builtin is not None:
            for option in (*_READING, "infer_labels"):
                if getattr(self, option):
                    raise ConfigError(f"{option} does not apply to the built-in task {self.builtin!r}")
        self.read_options("")  # the constraints are checked by the task, whose name is known

    def read_options(self, task: str) -> ReadOptions:
        """The options that concern reading, for a task of this name."""
        given = {name: getattr(self, name) for name in _READING if name != "splits"}
        return ReadOptions(task=task, **given)


_READING = ("splits", *(f.name for f in dataclasses.fields(ReadOptions) if f.name != "task"))


def load_task(
    source: TaskSource | str,
    *,
    seed: int = 0,
    train: int | None = None,
    dev: int | None = None,
    test: int | None = None,
) -> Task:
    """Load one task.

    A size is an upper limit, ``None`` for all. A split that is larger is sampled by ``seed`` (a smaller limit
    takes a subset of what a larger one takes; file order is kept). ``dev`` and ``test`` sets that the source
    lacks are held out of its training set by ``seed``: as many examples as asked for (``None``: a tenth), at
    most a quarter of the set each, so that training keeps at least half.

    Args:
        source: a source, the name of a built-in task, or a path.
        seed: chooses what is sampled, held out or generated.
        train, dev, test: sizes, each at least 0. A built-in task gives exactly as many, and its own default
            for ``None``.

    Raises:
        ConfigError: a negative size.
        DataError: an unknown built-in task, a missing or broken file, or a source without examples.
    """
    if isinstance(source, str):
        source = _source_of_text(source)
    limits = {"train": train, "dev": dev, "test": test}
    for split, limit in limits.items():
        if limit is not None and limit < 0:
            raise ConfigError(f"{split}: the number of examples must be 0 or more, not {limit}")
    if source.builtin is not None:
        return _builtin(source.builtin, source, seed, limits)
    return _read(source, seed, limits)


def load_stream(
    sources: Sequence[TaskSource | str],
    *,
    seed: int = 0,
    train: int | None = None,
    dev: int | None = None,
    test: int | None = None,
) -> TaskStream:
    """Load the tasks of a stream in their order of arrival; arguments and errors of :func:`load_task`.

    Raises:
        DataError: no sources, or two tasks of one name.
    """
    return TaskStream(tuple(load_task(source, seed=seed, train=train, dev=dev, test=test) for source in sources))


def origin(source: TaskSource | str) -> tuple[str, ...]:
    """Identify the place that a source reads from, whatever its name and options are, and whether it is there."""
    if isinstance(source, str):
        from cit_fast.data.builtin import is_builtin_task

        source = TaskSource(builtin=source) if is_builtin_task(source) else TaskSource(path=source)
    if source.path is not None:
        return "path", *(str(Path(path).resolve()) for path in _paths(source))
    return ("builtin", source.builtin) if source.builtin else ("dataset", f"{source.dataset}", f"{source.subset}")


def possible_names(source: TaskSource | str) -> tuple[str, ...]:
    """What the task of a source may be called, also where its data is gone and nobody knows whether it was a folder."""
    if isinstance(source, str):
        return file_name(Path(source).name), file_name(stem(Path(source)))
    if source.name or source.builtin:
        return (f"{source.name or source.builtin}",)
    paths = [Path(path) for path in _paths(source)] or [Path(f"{source.dataset}".rstrip("/"))]
    return file_name(paths[0].name), file_name(stem(paths[0]))


def is_gone(source: TaskSource | str) -> bool:
    """Whether the files or folders of a source are no longer there."""
    if isinstance(source, str):
        from cit_fast.data.builtin import is_builtin_task

        return not is_builtin_task(source) and not _exists(source)
    if source.path is not None:
        return not all(_exists(path) for path in _paths(source))
    return False


def find_tasks(places: Sequence[str]) -> list[TaskSource]:
    """The sources of all tasks at these places.

    Args:
        places: each ``"builtin"`` for all built-in tasks, the name of one, a data file, a folder that is one task
            (see :class:`TaskSource`), or a folder whose data files and task folders are a task each, in the order of
            their names.

    Returns:
        Sources with different names: where two files or folders are called alike, their folder's name comes in front.
        Records without an answer will be skipped, with a warning.

    Raises:
        DataError: nothing there, a folder without data, or one file or folder twice.
    """
    sources: list[TaskSource] = []
    for place in places:
        if place == "builtin":
            from cit_fast.data.builtin import builtin_task_names

            sources += [TaskSource(builtin=name, name=name) for name in builtin_task_names()]
            continue
        source = _source_of_text(place)
        if source.path is None:
            sources.append(dataclasses.replace(source, name=source.builtin))
        else:
            below = tasks_below(Path(*_paths(source)))
            sources += [TaskSource(path=str(path), skip_unanswered=True) for path in below]
    named = [source if source.name else dataclasses.replace(source, name=_name_of(source)) for source in sources]
    alike = Counter(source.name for source in named)
    if max(alike.values(), default=0) > 1:
        named = [_under_its_folder(s) if s.path is not None and alike[s.name] > 1 else s for s in named]
    for name, count in Counter(source.name for source in named).items():
        if count > 1:
            twice = [f"{source.path or 'builtin'}" for source in named if source.name == name]
            raise DataError(f"two tasks are called {name!r}: {twice[0]} and {twice[1]}; give each task once")
    return named


def _under_its_folder(source: TaskSource) -> TaskSource:
    parent = file_name(Path(f"{source.path}").resolve().parent.name)
    return dataclasses.replace(source, name=f"{parent}.{source.name}" if parent else source.name)


# --------------------------------------------------------------------------------------------- built-in tasks


def _source_of_text(text: str) -> TaskSource:
    from cit_fast.data.builtin import builtin_task_names, is_builtin_task

    if is_builtin_task(text):
        return TaskSource(builtin=text)
    if _exists(text):
        return TaskSource(path=text)
    if "/" in text or Path(text).suffix:
        raise DataError(f"{text}: no such file or folder")
    raise DataError(f"{text!r} is neither a built-in task nor a file or folder; {choices(text, builtin_task_names())}")


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # longer than a name can be
        return False


def _builtin(name: str, source: TaskSource, seed: int, limits: Limits) -> Task:
    from cit_fast.data.builtin import builtin_task

    sizes = {split: limit for split, limit in limits.items() if limit is not None}
    task = builtin_task(name, seed=seed, **sizes)
    return _described(task, source, task.labels)


def _described(task: Task, source: TaskSource, labels: tuple[str, ...]) -> Task:
    """The task with the name, metric, labels and pattern that the source asks for."""
    name = source.name or task.name
    changes: dict[str, Any] = {"metric": source.metric or task.metric, "labels": labels, **source.declared()}
    if name != task.name:
        changes["name"] = name
        for split in SPLITS:
            changes[split] = tuple(dataclasses.replace(e, task=name) for e in getattr(task, split))
    return dataclasses.replace(task, **changes)


# ----------------------------------------------------------------------------------------- files and datasets


def _read(source: TaskSource, seed: int, limits: Limits) -> Task:
    name = source.name or _name_of(source)
    opened = _open_all(source, source.read_options(name), seed, limits)
    labels = source.labels or opened.labels
    if source.skip_unanswered and labels:
        opened = among_labels(opened, labels, f"{source.path or source.dataset}")
    chosen = choose_examples(opened.counts, limits, f"{seed}/{name}")
    splits = {
        split: tuple(opened.read(origin, positions)) if positions else ()
        for split, (origin, positions) in chosen.items()
    }
    _check_labels(splits, labels)
    say_repeated(splits, [split for split, (origin, _) in chosen.items() if origin != split], name)
    if source.infer_labels and not labels:
        every = (opened.read(split, list(range(count))) for split, count in opened.counts.items())
        labels = inferred_labels([example.references for examples in every for example in examples])
    metric = source.metric or (CLOSED_SET_METRIC if labels else DEFAULT_METRIC)
    fields: dict[str, Any] = {**splits, **source.declared(), "labels": labels}
    return Task(name=name, metric=metric, **fields)


def _name_of(source: TaskSource) -> str:
    if source.path is not None:
        path = Path(*_paths(source)).resolve()
        text = path.name if path.is_dir() else stem(path)
    else:
        text = f"{source.dataset}".rstrip("/").rpartition("/")[2]
    return file_name(text) or "task"


def _check_labels(splits: Mapping[str, tuple[Example, ...]], labels: tuple[str, ...]) -> None:
    known = {normalise_label(label) for label in labels}
    for example in (example for examples in splits.values() for example in examples if known):
        for reference in example.references:
            if normalise_label(reference) not in known:
                raise DataError(not_a_label(example, reference, labels))


def _paths(source: TaskSource) -> tuple[str, ...]:
    return (source.path,) if isinstance(source.path, str) else source.path or ()


def _open_all(source: TaskSource, options: ReadOptions, seed: int, limits: Limits) -> Opened:
    """A source, or its several parts as one: where only some of them have a test set, the others hold out their own."""
    if not isinstance(source.path, tuple):
        return _open(source, options)
    sources = [dataclasses.replace(source, path=path) for path in source.path]
    parts = [_open(part, options) for part in sources]
    if any("test" in part.counts for part in parts):
        named = zip(parts, map(_name_of, sources), strict=True)
        parts = [with_test_set(part, limits, f"{seed}/{name}") for part, name in named]
    return joined(parts)


def _open(source: TaskSource, options: ReadOptions) -> Opened:
    if source.dataset is not None:
        return _open_dataset(_load_dataset(source.dataset, source.subset, source.revision), source, options)
    path = Path(f"{source.path}")
    if not _exists(f"{path}"):
        raise DataError(f"{path}: no such file or folder")
    labels = labels_file(path)
    if path.is_dir() and is_saved_dataset(path):
        return _open_dataset(load_saved(path), source, _beside(path, options), labels)
    files = split_files(path, source.splits) if path.is_dir() else {"train": [path]}
    kinds = {kind(file) for shards in files.values() for file in shards}
    if kinds & {".parquet", ".arrow"}:
        plain = dataclasses.replace(source, splits={})
        folder = next(file.parent for shards in files.values() for file in shards)
        return _open_dataset(load_tables(path, files, kinds), plain, _beside(folder, options), labels)
    reads = {split: [partial(read_file, file, options) for file in shards] for split, shards in files.items()}
    return in_memory(read_splits(reads), labels)


def _beside(folder: Path, options: ReadOptions) -> ReadOptions:
    """The options, with images that lie beside the data where they say nothing else."""
    return dataclasses.replace(options, images=options.images or str(folder))


def _load_dataset(name: str, subset: str | None, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, subset, revision=revision)
    except Exception as error:  # datasets raises many kinds, all of them about what was asked for
        raise DataError(f"dataset {name}: cannot be loaded: {' '.join(str(error).split())}") from error


def _open_dataset(opened: Any, source: TaskSource, options: ReadOptions, labels: tuple[str, ...] = ()) -> Opened:
    """A ``Dataset`` (one split, taken for training) or a ``DatasetDict``."""
    where = source.dataset or source.path
    parts = dict(opened) if isinstance(opened, dict) else {"train": opened}
    splits = {}
    for split, names in wanted(source.splits).items():
        name = next((name for name in names if name in parts), None)
        if name is not None:
            splits[split] = name
        elif split in source.splits:
            raise DataError(f"{where}: no split {names[0]!r}; it has {', '.join(map(repr, parts))}")
    if not splits:
        raise DataError(f"{where}: none of its splits {', '.join(map(repr, parts))} is known; name them with splits")

    def read(split: str, positions: Sequence[int]) -> list[Example]:
        name = splits[split]
        return read_dataset(parts[name], options, where=f"{where} [{name}]", indices=positions)

    first = next(iter(splits.values()))
    counts = {split: len(parts[name]) for split, name in splits.items()}
    labels = labels or answer_labels(parts[first], options, f"{where} [{first}]")
    if not source.skip_unanswered:
        return Opened(counts, read, labels)
    # The examples with an answer are counted by reading them.
    reads = {split: [partial(read, split, range(count))] for split, count in counts.items() if count}
    return in_memory(read_splits(reads), labels)
