"""Files of every format, with values that nobody expects or bytes that are damaged: read, and turned into tokens."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from cit_fast.data import TaskSource, find_tasks, load_task
from cit_fast.data.record_fields import FORMATS
from cit_fast.models.prompts import PromptEncoder
from tests.fuzz.values import value
from tests.support.toy_folders import bpe_tokenizer

TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yo"}]
RECORDS: dict[str, Any] = {
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3", "key_parts": ["Add"]},
    "prompt_completion": {"prompt": "Add 1 2.", "completion": "3"},
    "trace": {"prompt": "Add 1 2.", "answer": "3"},
    "messages": {"messages": [*TURNS, *TURNS], "images": ["a.png"]},
    "conversations": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
        "system": "s",
    },
}
SUPER_NI = {
    "Definition": ["Add."],
    "Positive Examples": [{"input": "1", "output": "1", "explanation": "x"}],
    "Instances": [{"id": str(n), "input": f"{n}", "output": [f"{n}"]} for n in range(6)],
}


def _change(content: Any, rng: random.Random) -> Any:
    """The content with one value replaced, removed or repeated somewhere."""
    if isinstance(content, dict) and content and rng.random() < 0.8:
        key = rng.choice(list(content))
        what = rng.random()
        if what < 0.15:
            return {k: v for k, v in content.items() if k != key}
        if what < 0.25:
            return {**content, str(value(rng, 3)): value(rng)}
        return {**content, key: _change(content[key], rng)}
    if isinstance(content, list) and content and rng.random() < 0.8:
        at = rng.randrange(len(content))
        if rng.random() < 0.1:
            return [*content[:at], *content[at + 1 :]]
        return [*content[:at], _change(content[at], rng), *content[at + 1 :]]
    return value(rng)


def _plain(content: Any, depth: int = 0) -> Any:
    """What JSON can hold of it."""
    if depth > 600:
        return "deep"
    if isinstance(content, dict):
        return {str(k): _plain(v, depth + 1) for k, v in content.items()}
    if isinstance(content, list):
        return [] if content and content[0] is content else [_plain(v, depth + 1) for v in content]
    return content if isinstance(content, (str, int, float, bool, type(None))) else str(content)


def _dumps(content: Any) -> str:
    with contextlib.suppress(RecursionError):
        return json.dumps(_plain(content))
    return "[" * 5000


def _write(folder: Path, rng: random.Random) -> Path:
    """A data file or folder, and its place."""
    kind = rng.choice(["json", "jsonl", "super_ni", "csv", "tsv", "parquet", "saved", "folder"])
    record = rng.choice(list(RECORDS.values()))
    rows = [_change(record, rng) if rng.random() < 0.12 else record for _ in range(6)]
    path = folder / f"set.{kind}"
    if kind == "super_ni":
        path = folder / "task.json"
        path.write_text(_dumps(_change(SUPER_NI, rng)), encoding="utf-8")
    elif kind == "json":
        path.write_text(_dumps(rows if rng.random() < 0.8 else _change(rows, rng)), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(map(_dumps, rows)), encoding="utf-8")
    elif kind in ("csv", "tsv"):
        file = io.StringIO(newline="")
        names = ["instruction", "input", "output", rng.choice(["images", "key_parts", "output", ""])]
        writer = csv.writer(file, delimiter="\t" if kind == "tsv" else rng.choice(",;\t"))
        writer.writerow(names)
        for _ in range(5):
            cells = [str(value(rng)) if rng.random() < 0.3 else "x" for _ in range(rng.choice([4, 4, 4, 3, 5]))]
            with contextlib.suppress(csv.Error):
                writer.writerow([cell.encode("utf-8", "replace").decode() for cell in cells])
        path.write_bytes(file.getvalue().encode("utf-8"))
    else:
        path = folder / "set"
        path.mkdir()
        columns = {"instruction": ["Add."] * 6, "output": ["3"] * 6}
        column = rng.choice(
            [
                pa.array([1.5, None, float("nan"), 2, 3, 4]),
                pa.array([True, False, None, True, True, False]),
                pa.array([b"x"] * 6),
            ]
        )
        table = pa.table({**columns, rng.choice(["output", "input", "images", "key_parts", "messages"]): column})
        if kind == "parquet":
            pq.write_table(table, path / rng.choice(["train.parquet", "train-00000-of-00001.parquet", "odd.parquet"]))
        elif kind == "saved":
            datasets.Dataset(table).save_to_disk(str(path))
        else:
            for split in ("train", "dev", "test"):
                (path / f"{split}.json").write_text(_dumps(rows), encoding="utf-8")
            (path / "labels.json").write_text(_dumps(_change(["3", "Yo"], rng)), encoding="utf-8")
    return path


def _damage(path: Path, rng: random.Random) -> Path:
    """Truncate, flip, empty, remove or pack one of the files there, or put a folder or a pipe in its place."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    file = rng.choice(files)
    content = file.read_bytes()
    how = rng.randrange(8)
    if how == 0:
        file.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif how == 1 and content:
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
    elif how == 2:
        at = rng.randrange(len(content) + 1)
        file.write_bytes(
            content[:at] + rng.choice([b"\0", b"\xff", b"NaN", b"[" * 3000, b'"', b"9" * 5000, b"\n"]) + content[at:]
        )
    elif how == 3:
        file.unlink()
        rng.choice(
            [
                lambda: file.mkdir(),
                lambda: __import__("os").mkfifo(file),
                lambda: file.symlink_to("/dev/zero"),
                lambda: None,
            ]
        )()
    elif how == 4:
        packed = file.with_name(file.name + ".gz")
        packed.write_bytes(gzip.compress(content)[: rng.choice([10, 10**9])])
        return packed if file == path else path
    return path


def maker() -> Callable[[random.Random], tuple[str, Callable[[], str | None]]]:
    words = bpe_tokenizer(["user system assistant"], 300)

    def make(rng: random.Random) -> tuple[str, Callable[[], str | None]]:
        state = rng.getstate()
        options: dict[str, Any] = {
            "format": rng.choice([None] * 20 + list(FORMATS)),
            "skip_unanswered": rng.random() < 0.5,
            "positive_examples": rng.choice([0, 0, 2]),
            "infer_labels": rng.random() < 0.3,
            "instruction": rng.choice([None, None, "Say it."]),
            "columns": rng.choice([{}, {}, {}, {}, {"output": "answer"}, {"input": "a.b"}]),
            "key_part_markers": rng.choice([None, None, ("A", "d")]),
        }

        def attempt() -> None:
            own = random.Random()
            own.setstate(state)
            path = _write(Path.cwd(), own)
            if own.random() < 0.4:
                path = _damage(path, own)
            encoder = PromptEncoder(words, max_length=128, on_overflow="skip")
            if own.random() < 0.2:
                tasks = [load_task(source, train=4) for source in find_tasks([str(path)])]
            else:
                tasks = [load_task(TaskSource(path=str(path), **options))]
            for task in tasks:
                encoder.encode_all([*task.train, *task.dev, *task.test])
                encoder.encode_pairs(task.train)

        return f"options {options}", attempt

    return make
