"""Run folders with made-up scores, and what a reader finds on a page and in a terminal."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from html.parser import HTMLParser

from PIL import Image
from rich.console import Console

from cit_fast.evaluation.predictions import Prediction, predictions_path, write_predictions
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.files import write_json

TASKS = ("dates", "words", "labels")
UNTRAINED = (4.0, 0.0, 20.0)
SEQUENTIAL = [(96.0, 2.0, 20.0), (40.0, 88.0, 10.0), (20.0, 48.0, 94.0)]
REPLAY = [(95.0, 2.0, 20.0), (90.0, 86.0, 10.0), (85.0, 80.0, 93.0)]
JOINT = [(94.0, 90.0, 95.0)]


def write_run(folder, rows, *, tasks=TASKS, replay=0, weights=False, joint=False, answers=True, **record):
    """A run folder as the training loop leaves it; ``rows``: the score matrix, NaN where nothing was evaluated."""
    values = {"name": "demo", "method": "sequential", "model": "tiny", "seed": 0, "status": "finished", **record}
    values["method"] = {"name": values["method"], "replay": "random"}
    metrics = values.pop("metrics", dict.fromkeys(tasks, "exact_match"))
    run = RunRecord(tasks=list(tasks), metrics=metrics, **values)
    write_json(folder / "run.json", dataclasses.asdict(run))
    stages = [StageRecord(0, [], dict(zip(tasks, UNTRAINED, strict=False)), evaluate_seconds=6.0)]
    for i, row in enumerate(rows):
        trained = list(tasks) if joint else [tasks[i]]
        stages.append(
            StageRecord(
                index=i + 1,
                trained=trained,
                scores={t: v for t, v in zip(tasks, row, strict=True) if not math.isnan(v)},
                train_examples=100 * len(trained),
                replayed=dict.fromkeys(tasks[:i], replay),
                steps=10,
                train_seconds=30.0,
                losses=[(5, 2.0), (10, 1.0)],
                balance_weights=[(s, 0.1, 0.001, 0.9, 0.5) for s in range(1, 11)] if weights else [],
            )
        )
    for stage in stages:
        write_json(folder / "stages" / f"{stage.index:02d}" / "stage.json", dataclasses.asdict(stage))
        for task in stage.scores if answers else ():
            rows_of = [Prediction(f"prompt {k}", f"answer {k}", ("ref",), 100.0 * (k % 2)) for k in range(6)]
            write_predictions(predictions_path(folder, stage.index, task), rows_of)
    return folder


class Page(HTMLParser):
    """What a browser would find: references, text, tags that are open too long."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, path):
        super().__init__()
        self.references, self.tags, self.open, self.text = [], [], [], ""
        self.html = path.read_text("utf-8")
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{tag} has a handler"
            if name in {"src", "srcset", "href", "data", "action"}:
                self.references.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def images(self):
        for reference in self.references:
            kind, _, data = reference.partition(",")
            assert kind == "data:image/png;base64"
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            image.load()
            yield image


def printed(table, width=80):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table)
    return console.file.getvalue()
