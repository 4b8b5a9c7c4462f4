"""Information gain of key parts as tables for a terminal, and as files: JSONL, CSV and a picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cit_fast.analysis.key_part_gains import Scores, TaskGains, counts
from cit_fast.data.example import Example
from cit_fast.files import write_file, write_json
from cit_fast.report.key_part_gains_picture import BINS, score_picture
from cit_fast.report.table import plain_table
from cit_fast.text import short_name

LINES = 14
"""Bins of the histogram in the terminal, at most."""

MOST_SHOWN = 5
"""Tasks whose instruction is shown with its key parts."""

_BLOCKS = " ▁▂▃▄▅▆▇█"

# ------------------------------------------------------------------------------------------------------- terminal


def score_tables(scores: Scores, width: int = 80) -> list[Any]:
    """What a terminal shows: the tasks with the lowest gain first, all gains as a histogram, and what was masked."""
    return [_tasks(scores, width), _histogram(scores, width), _masked(scores)]


def _tasks(scores: Scores, width: int) -> Table:
    edges = scores.edges(BINS)
    drawn = len(edges) - 1 if width >= 90 else 0  # a narrow terminal has the histogram of all below
    room = max(12, min(44, width - 46 - (drawn + 3 if drawn else 0)))
    table = plain_table("Information gain of the key parts, lowest first")
    table.add_column("Task", no_wrap=True)
    for column in ("Examples", "Gain", "Spread", f"Below {scores.threshold:g}", "Info"):
        table.add_column(column, justify="right", no_wrap=True)
    if drawn:
        table.add_column(_scale(edges[0], edges[-1], drawn), no_wrap=True)
    for task in scores.tasks:
        share = task.below(scores.threshold)
        table.add_row(
            Text(short_name(task.task, room)),
            f"{len(task.gains):,}",
            f"{task.mean:.3f}",
            f"{task.spread:.3f}",
            Text(f"{share:.0%}", style="bold red" if share > 0.5 else ""),
            f"{task.info:.3f}",
            *([Text(_spark(counts(task.values, edges)), style="cyan")] if drawn else []),
        )
    return table


def _scale(low: float, high: float, width: int) -> str:
    left, right = f"{low:.2f}", f"{high:.2f}"
    return left + " " * max(1, width - len(left) - len(right)) + right


def _spark(bins: Sequence[int]) -> str:
    """A bar of eighths per bin; one that is not empty shows."""
    most = max(bins)
    return "".join(_BLOCKS[0 if not n else max(1, round(n / most * 8))] for n in bins)


def _histogram(scores: Scores, width: int) -> Table:
    edges = scores.edges(LINES)
    bins = counts(scores.values, edges)
    room = max(10, min(60, width - 28))
    table = plain_table(f"All {len(scores.values):,} examples by gain")
    table.add_column("Gain", no_wrap=True)
    table.add_column("Examples", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    digits = max(2, -math.floor(math.log10(edges[1] - edges[0])))
    for count, lower, upper in zip(bins, edges[:-1], edges[1:], strict=True):
        eighths = round(count / max(bins) * room * 8)
        bar = "█" * (eighths // 8) + ("" if eighths % 8 == 0 else "▏▎▍▌▋▊▉"[eighths % 8 - 1])
        low = upper <= scores.threshold + 1e-9
        table.add_row(
            f"{lower:.{digits}f} to {upper:.{digits}f}",
            f"{count:,}",
            Text(bar or ("▏" if count else ""), "red" if low else "cyan"),
        )
    return table


def _masked(scores: Scores) -> Table:
    table = plain_table("What was masked")
    table.add_column("Task", overflow="fold", max_width=34)
    table.add_column("Its commonest instruction, the key parts in [[ ]]")
    for task in scores.tasks[:MOST_SHOWN]:
        table.add_row(Text(task.task), Padding(_marked(_commonest(task)), (0, 0, 1, 0)))
    return table


def _commonest(task: TaskGains) -> Example:
    (instruction, _), *_rest = Counter(example.instruction for example in task.examples).most_common(1)
    return next(example for example in task.examples if example.instruction == instruction)


def _marked(example: Example, most: int = 400) -> Text:
    text, position = Text(), 0
    for start, end in example.key_parts:
        text.append(example.instruction[position:start])
        text.append(f"[[{example.instruction[start:end]}]]", "bold cyan")
        position = end
    text.append(example.instruction[position:])
    return text[:most].append("…") if len(text) > most else text


# ---------------------------------------------------------------------------------------------------------- files


def write_scores(scores: Scores, folder: Path) -> Path:
    """Write ``scores.jsonl`` (a line per example), ``tasks.csv``, ``scores.json`` (settings) and ``histogram.png``.

    Returns the path of the picture.

    Raises:
        RunError: the folder cannot be written.
    """
    write_file(folder / "scores.jsonl", "".join(_lines(scores)))
    write_file(folder / "tasks.csv", _csv(scores))
    settings = {name: getattr(scores, name) for name in ("model", "alpha", "threshold", "key_parts")}
    write_json(folder / "scores.json", settings)
    picture = folder / "histogram.png"
    write_file(picture, score_picture(scores))
    return picture


def _lines(scores: Scores) -> list[str]:
    records = (
        {
            "task": task.task,
            "source": example.source,
            "instruction": example.instruction,
            "input": example.input,
            "answer": example.references[0],
            "key_parts": list(example.key_part_texts),
            "spans": [list(span) for span in example.key_parts],
            **{key: value for key, value in asdict(gain).items() if key != "index"},
        }
        for task in scores.tasks
        for example, gain in zip(task.examples, task.gains, strict=True)
    )
    return [json.dumps(record, ensure_ascii=False) + "\n" for record in records]


def _csv(scores: Scores) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["task", "examples", "mean_gain", "spread", "share_below", "mean_info", "without_key_parts", "too_long"]
    )
    for task in scores.tasks:
        numbers = (task.mean, task.spread, task.below(scores.threshold), task.info)
        writer.writerow([task.task, len(task.gains), *map(repr, numbers), task.without, task.too_long])
    return text.getvalue()
