"""P- and V-score of seen and held-out tasks as table, page and JSON."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.files import write_json
from cit_fast.report import comparison_table, write_report
from cit_fast.report.collect import collect

SEEN = {"a": {"WFR": 50.0, "WR": 25.0}, "b": {}}
HELD_OUT = {"x": {"OOS": 100.0}, "y": {"OOS": 50.0, "WR": 25.0}}


def write_run(folder, method, share=1.0, *, held_out=("x", "y"), violations=True, experts=True):
    """Two tasks trained in turn; ``share`` scales every rate."""
    judged = SEEN | {task: HELD_OUT[task] for task in held_out}
    judged = {task: {kind: share * rate for kind, rate in rates.items()} for task, rates in judged.items()}
    tasks = [*"ab", *held_out]
    run = RunRecord(
        "demo", {"name": method}, ["a", "b"], dict.fromkeys(tasks, "token_f1"), "tiny", 0, "finished",
        experts={"a": 80.0, "b": 90.0} if experts else {}, held_out_tasks=list(held_out),
    )  # fmt: skip
    write_json(folder / "run.json", dataclasses.asdict(run))
    last = {"a": 60.0 - 20 * share, "b": 90.0, **dict.fromkeys(held_out, 40.0 - 10 * share)}
    for stage in (
        StageRecord(0, [], {"a": 0.0, "b": 0.0}),
        StageRecord(1, ["a"], {"a": 80.0, "b": 10.0}, train_seconds=60.0),
        StageRecord(2, ["b"], last, train_seconds=60.0, violations=judged if violations else {}),
    ):
        write_json(folder / "stages" / f"{stage.index:02d}" / "stage.json", dataclasses.asdict(stage))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "1", "sequential"), write_run(tmp_path / "2", "random-replay", 0.5)]


def printed(runs, width):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(comparison_table(runs))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return [line for line in lines if not line.startswith("─")]


WIDE = """\
Method          AP ↑  New.ACC ↑  Forgetting ↓   BWT ↑  FWT ↑  Rel. gain % ↑    V ↓  Held-out P ↑  Held-out V ↓  Replayed  Minutes
sequential      65.0       85.0          40.0   −40.0  +10.0           50.0   37.5          30.0          68.8         0      2.0
random-replay  70.0*       85.0         30.0*  −30.0*  +10.0          62.5*  18.8*         35.0*         34.4*         0      2.0
V is over 1 of 2 seen tasks; the others declare nothing an answer could break."""  # noqa: E501


def test_one_table_in_a_wide_terminal(runs):
    assert "\n".join(printed(runs, 140)) == WIDE


def test_two_tables_in_a_narrow_one(runs):
    lines = printed(runs, 80)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    second = lines.index("") + 1
    assert lines[second:] == [
        "Method         FWT ↑  Rel. gain % ↑    V ↓  Held-out P ↑  Held-out V ↓",
        "sequential     +10.0           50.0   37.5          30.0          68.8",
        "random-replay  +10.0          62.5*  18.8*         35.0*         34.4*",
        "V is over 1 of 2 seen tasks; the others declare nothing an answer could break.",
    ]
    assert "Minutes" in " ".join(lines[:2])


def test_older_runs_have_no_such_columns(tmp_path):
    old = write_run(tmp_path / "old", "sequential", held_out=(), violations=False)
    record = json.loads((old / "run.json").read_text())
    for key in ("held_out_tasks", "constraints"):
        del record[key]
    (old / "run.json").write_text(json.dumps(record))
    for path in old.glob("stages/*/stage.json"):
        stage = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in stage.items() if k not in {"violations"}}))
    header, row = printed([old], 120)
    assert " ".join(header.split()) == "Method AP ↑ New.ACC ↑ Forgetting ↓ BWT ↑ FWT ↑ Rel. gain % ↑ Replayed Minutes"
    assert row.split() == ["sequential", "65.0", "85.0", "40.0", "−40.0", "+10.0", "50.0", "0", "2.0"]


@pytest.mark.usefixtures("undrawn")
def test_page_and_values(runs, tmp_path):
    page = write_report(runs, tmp_path / "page.html")
    text = " ".join(page.read_text().split())
    assert "<td>sequential</td><td>2 seen</td><td>65.0</td><td>37.5</td><td>50.0</td><td>–</td><td>25.0</td>" in text
    assert (
        '<td>random-replay</td><td>2 held out</td><td class="best">35.0 ★</td><td class="best">34.4 ★</td>'
        "<td>–</td><td>37.5</td><td>12.5</td><td>25.0</td>" in text
    )
    assert "V is over 1 of 2 seen tasks" in text
    assert "<td>x</td><td>held out</td><td>30.0</td><td></td><td>100.0</td><td></td>" in text
    first, second = json.loads((tmp_path / "page-values.json").read_text())["runs"]
    assert (first["label"], first["AP"], first["V"], first["Held-out V"]) == ("sequential", 65.0, 37.5, 68.75)
    assert second["held_out"] == {
        "tasks": 2, "constrained": 2, "p": 35.0, "v": 34.375, "v_by_kind": 25.0, "rates": {"OOS": 37.5, "WR": 12.5},
        "p_by_metric": 35.0,
    }  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_page_without_violations_says_nothing_of_them(tmp_path):
    run = write_run(tmp_path / "run", "sequential", held_out=(), violations=False)
    text = write_report([run]).read_text()
    assert "How well answers keep" not in text
    assert "Scores and violations" not in text


def test_different_held_out_tasks_are_not_compared(runs, tmp_path):
    other = write_run(tmp_path / "3", "lcia", 0.25, held_out=("y",))
    assert collect(runs).same_held_out
    assert collect([*runs, write_run(tmp_path / "4", "ema", held_out=())]).same_held_out
    lines = printed([*runs, other], 140)
    row = next(line for line in lines if line.startswith("lcia")).split()
    assert row[-5:] == ["9.4*", "37.5", "9.4", "0", "2.0"]  # V of the seen tasks competes, what is held out does not
    said = " ".join(lines)
    assert "Held-out values do not compare; the runs hold out different tasks: sequential x, y; random-replay" in said
