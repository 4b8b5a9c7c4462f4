"""One self-contained HTML page about one or several runs, with its pictures as PNG files beside it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from cit_fast.data.constraints import KINDS
from cit_fast.data.images import thumbnail
from cit_fast.errors import DataError, RunError
from cit_fast.evaluation.predictions import Prediction, predictions_after, read_predictions
from cit_fast.evaluation.records import StageRecord
from cit_fast.evaluation.run_files import check_files
from cit_fast.evaluation.violations import TaskSetScores
from cit_fast.files import write_file, write_json
from cit_fast.methods.config import descriptions
from cit_fast.report import figures
from cit_fast.report.collect import COLUMNS, Runs, RunView, collect, coverage
from cit_fast.report.headline import headline
from cit_fast.report.html import data_address, template
from cit_fast.report.routing import decisions, has_routing
from cit_fast.report.table import comparison_rows
from cit_fast.report.values import report_values

_RIGHT = 99.95
_SHOWN_OF_EACH = 2
_SHOWN_IMAGES = 4
_LONGEST_TEXT = 700
_SHOWN_RANKED = 20


@dataclass(frozen=True)
class Picture:
    """A picture on the page: its data address, its size in pixels, its text alternative and its caption."""

    address: str
    width: int
    height: int
    alt: str
    caption: str


def write_report(runs: Runs | Sequence[Path], output: Path | None = None, *, title: str | None = None) -> Path:
    """Write the report of these runs.

    The page needs no network and no other file; the same pictures lie beside it in ``<name>-figures/``, and its values
    in ``<name>-values.json``. Runs under way are shown as far as they are.

    Args:
        runs: what :func:`cit_fast.report.collect` read, or folders of one run or more; those on the same tasks are
            compared.
        output: the HTML file, or a folder for ``report.html``. Default: ``report.html`` in the run's folder,
            or for several runs in the folder that holds them all.
        title: heading of the page.

    Returns:
        The path of the page.

    Raises:
        RunError: no run there, damaged records, or the page cannot be written.
    """
    runs = runs if isinstance(runs, Runs) else collect(runs)
    output = _output(runs, output)
    folder = output.with_name(f"{output.stem}-figures")
    try:
        html = _render(runs, title or _title(runs), _Album(folder))
        write_file(output, html.encode("utf-8", "xmlcharrefreplace"))
        write_json(output.with_name(f"{output.stem}-values.json"), report_values(runs))
    except OSError as error:
        raise RunError(f"{error.filename or output}: cannot be written ({error.strerror or error})") from None
    return output


def _output(runs: Runs, output: Path | None) -> Path:
    if output is None:
        folders = [view.folder.resolve() for view in runs.views]
        output = folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders))
    output = Path(output)
    return output / "report.html" if output.is_dir() else output


def _title(runs: Runs) -> str:
    names = list(dict.fromkeys(view.record.name for view in runs.views))
    return f"Continual run: {', '.join(names)}" if len(names) <= 3 else f"{len(runs.views)} continual runs"


class _Album:
    """Files pictures and hands them to the page."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: set[str] = set()

    def picture(self, name: str, figure: Figure, alt: str, caption: str) -> Picture:
        self._folder.mkdir(parents=True, exist_ok=True)
        data = figures.png(figure)
        (self._folder / f"{self._unique(name)}.png").write_bytes(data)
        width, height = (round(inches * 96) for inches in figure.get_size_inches())
        return Picture(data_address(data), width, height, alt, caption)

    def _unique(self, name: str) -> str:
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", name)[-80:].strip("-.") or "picture"
        candidate, count = slug, 1
        while candidate.lower() in self._names:
            count += 1
            candidate = f"{slug}-{count}"
        self._names.add(candidate.lower())
        return candidate


def _render(runs: Runs, title: str, album: _Album) -> str:
    # What says how answers keep to their instructions stands in a table of its own, below.
    shown = [not column.answers and any(column.value(view) is not None for view in runs.compared) for column in COLUMNS]
    return template("page.html.j2").render(
        title=title,
        headline=headline(runs),
        notes=runs.notes,
        methods=[(view.label, says) for view in runs.compared if (says := descriptions().get(view.record.method_name))],
        columns=list(itertools.compress(COLUMNS, shown)),
        rows=[(view, list(itertools.compress(cells, shown))) for view, cells in comparison_rows(runs)],
        violations=_violations(runs),
        coverage=coverage(runs),
        kinds=KINDS,
        comparison=_comparison(runs, album),
        sections=[_section(view, runs, album) for view in runs.views],
    )


def _violations(runs: Runs) -> list[tuple[str, str, TaskSetScores, list[tuple[str, bool]]]]:
    """A row per compared run and set of tasks: label, which set, its scores, P and V as text, each with whether it is
    the best. Left out are seen tasks without a V-score: the comparison has their P-score, AP.
    """
    rows = []
    for view, cells in comparison_rows(runs):
        cell = dict(zip([column.title for column in COLUMNS], cells, strict=True))
        seen, held_out = [cell["AP"], cell["V"]], [cell["Held-out P"], cell["Held-out V"]]
        rows += [(view.label, "seen", view.seen, seen), (view.label, "held out", view.held_out, held_out)]
    return [row for row in rows if row[2].v is not None or (row[1] == "held out" and row[2].p is not None)]


def _answers_by_task(view: RunView) -> list[tuple[str, str, float, dict[str, float]]]:
    """For every task judged after the last stage: its name, ``seen`` or ``held out``, its score, its rates."""
    last = view.stages[-1] if view.trained else None
    if last is None or not any(last.violations.values()):
        return []
    return [
        (task, "held out" if task in view.record.held_out_tasks else "seen", points, last.violations[task])
        for task, points in last.scores.items()
        if task in last.violations
    ]


def _comparison(runs: Runs, album: _Album) -> list[Picture]:
    views = runs.compared
    pictures = []
    if len(views) > 1:
        pictures.append(
            album.picture(
                "comparison",
                figures.comparison_figure(views),
                "Bars: every measure of the table above, run by run",
                "The table as bars. ↑ more is better, ↓ less is better."
                + ("" if all(view.is_complete for view in views) else " A faded bar is a run that is not complete."),
            )
        )
    if any(view.trained for view in views):
        pictures.append(_curves(views, "tasks", album))
    return pictures


def _curves(views: list[RunView], name: str, album: _Album) -> Picture:
    joint = " A dashed horizontal line is a joint run." if any(view.is_joint for view in views) else ""
    return album.picture(
        name,
        figures.task_curves_figure(views),
        "Lines: score of each task after each stage",
        f"Score of each task over the stages. The large filled mark is the stage that trained the task.{joint}",
    )


def _section(view: RunView, runs: Runs, album: _Album) -> dict[str, Any]:
    """What the page shows of one run."""
    pictures = [
        album.picture(
            f"{view.label}-scores",
            figures.score_matrix_figure(view),
            f"Heat map: score matrix of {view.label}",
            "Score of every task (columns) after every stage (rows). A frame marks what the stage has just trained.",
        )
    ]
    # A picture is drawn only where the run has something to show in it; runs on other tasks get curves of their own.
    if view not in runs.compared and view.trained:
        pictures.append(_curves([view], f"{view.label}-tasks", album))
    if view.replayed:
        pictures.append(
            album.picture(
                f"{view.label}-replay",
                figures.replay_figure(view),
                f"Heat map: examples that {view.label} replayed",
                "Examples of each earlier task (columns) replayed during each stage (rows).",
            )
        )
    if any(stage.replay and stage.replay.distances for stage in view.trained):
        pictures.append(
            album.picture(
                f"{view.label}-distances",
                figures.distance_figure(view),
                f"Heat map: distances between tasks that {view.label} measured",
                "Distance of each earlier task (columns) to the task that arrived (rows). "
                "The farther a task, the more of it was replayed.",
            )
        )
    if any(stage.replay and stage.replay.gains for stage in view.trained):
        pictures.append(
            album.picture(
                f"{view.label}-gains",
                figures.gain_figure(view),
                f"Heat map: information gain of the key parts of each task, as {view.label} measured it",
                "Mean information gain of the key parts of each earlier task (columns) when a new task arrived (rows): "
                "near 0 the model answers as if the words that define the task were not there. A frame marks the tasks "
                "that were replayed.",
            )
        )
    if has_routing(view):
        pictures.append(
            album.picture(
                f"{view.label}-routing",
                figures.routing_figure(view),
                f"Heat map: which adapter set of {view.label} answered which task",
                "Share of each task's prompts (rows) that each adapter set (columns) answered after the last stage. "
                "A frame marks the set that the task trained; prompts of a task that trained none belong to the base "
                "model.",
            )
        )
    if len(view.general) > 1:
        pictures.append(
            album.picture(
                f"{view.label}-general",
                figures.general_figure(view),
                f"Lines: general abilities of {view.label} beside its tasks, over the stages",
                "General abilities, which no task asks for, beside the mean score of the tasks seen so far; below, how "
                "far the predictions have moved from the base model's.",
            )
        )
    if any(stage.balance_weights for stage in view.trained):
        pictures.append(
            album.picture(
                f"{view.label}-balance-weights",
                figures.balance_weight_figure(view),
                f"Lines: balance weights of {view.label} over steps",
                "Balance weight (share of the new weights in the average) over parameter tensors; below, the share of "
                "tensors whose weight fell back to its constant.",
            )
        )
    if any(stage.losses for stage in view.trained):
        pictures.append(
            album.picture(
                f"{view.label}-loss",
                figures.loss_figure(view),
                f"Line: training loss of {view.label}",
                "Training loss over optimizer steps.",
            )
        )
    examples, problem = _examples(view)
    rows = [("untrained", view.untrained.tolist())]
    rows += [(f"after {name}", row.tolist()) for name, row in zip(view.stage_names, view.matrix, strict=True)]
    return {
        "view": view,
        "pictures": pictures,
        "rows": rows,
        "stage_notes": _stage_notes(view, lambda stage: stage.notes),
        "replay_notes": _stage_notes(view, lambda stage: stage.replay.notes if stage.replay else []),
        "objective_notes": _stage_notes(view, lambda stage: stage.objective.notes if stage.objective else []),
        "update_notes": _stage_notes(view, lambda stage: stage.update.notes if stage.update else []),
        "routing_notes": _stage_notes(view, lambda stage: stage.routing.notes if stage.routing else []),
        "ranking": _ranking(view),
        "answers_by_task": _answers_by_task(view),
        "routing": decisions(view) if has_routing(view) else [],
        "examples": examples,
        "problem": problem,
        "truncated": sum(stage.truncated for stage in view.trained),
        "skipped": sum(stage.skipped for stage in view.trained),
        "config": _yaml({"method": view.record.method, **view.record.config}),
        "environment": _yaml(view.record.environment),
    }


def _stage_notes(view: RunView, notes: Callable[[StageRecord], list[str]]) -> list[tuple[str, str]]:
    """The name of each stage with each of its notes."""
    named = zip(view.stage_names, view.trained, strict=True)
    return [(name, note) for name, stage in named for note in notes(stage)]


def _ranking(view: RunView) -> dict[str, Any] | None:
    """The instructions of the last stage that ranked them, those with most InsInfo first."""
    for name, stage in reversed(list(zip(view.stage_names, view.trained, strict=True))):
        if stage.replay and stage.replay.instructions:
            shown = stage.replay.instructions[:_SHOWN_RANKED]
            return {
                "stage": name,
                "count": stage.replay.instruction_count,
                "entries": [dataclasses.replace(each, instruction=_cut(each.instruction)) for each in shown],
            }
    return None


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _examples(view: RunView) -> tuple[list[tuple[str, list[dict[str, Any]]]], str]:
    """A few answers per task of the last stage, right and wrong ones, and what kept us from reading
    others.
    """
    found, problem = [], ""
    for task in view.record.every_task if view.stages else []:
        stage = view.stages[-1]
        path = predictions_after(view.folder, stage, task)
        name = f"predictions/{path.name}"
        holder = next((each for each in view.stages if each.index == stage.taken_from.get(task)), stage)
        if not path.exists() and name not in holder.files:
            continue
        try:
            check_files(path.parents[1], holder, name)
            predictions = read_predictions(path)
        except RunError as error:
            problem = str(error)
            continue
        if predictions:
            found.append((task, [_example(each) for each in _selection(predictions)]))
    return found, problem


def _selection(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The first right answers, else the best; then the worst of the others."""
    right = [each for each in predictions if each.score >= _RIGHT]
    by_score = sorted(predictions, key=lambda each: each.score)
    wrong = [each for each in by_score if each.score < _RIGHT]
    best = right[:_SHOWN_OF_EACH] or by_score[-1:]
    return best + [each for each in wrong[:_SHOWN_OF_EACH] if each not in best]


def _example(prediction: Prediction) -> dict[str, Any]:
    return {
        "images": _thumbnails(prediction.images or ()),
        "prompt": _cut(prediction.prompt),
        "prediction": _cut(prediction.prediction) or "(empty)",
        "references": [_cut(each) for each in prediction.references[:3]],
        "score": prediction.score,
        "right": prediction.score >= _RIGHT,
    }


def _thumbnails(images: Sequence[str]) -> list[tuple[str, str]]:
    """Address and description of each image; no address, and why, of one that cannot be read any more."""
    found = []
    for number, name in enumerate(images[:_SHOWN_IMAGES], start=1):
        try:
            found.append((thumbnail(name), f"image {number} of the prompt"))
        except DataError as error:
            found.append(("", _cut(str(error))))
    if len(images) > _SHOWN_IMAGES:
        found.append(("", f"and {len(images) - _SHOWN_IMAGES} more"))
    return found


def _cut(text: str) -> str:
    """The text, or beginning and end of a long one: instructions stand at either."""
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[: _LONGEST_TEXT // 2]} […] {text[-_LONGEST_TEXT // 2 :]}"
