"""What a run has learned, what is left of it, and what a terminal shows of that."""

from __future__ import annotations

import io
import json
import sys

import pytest
from made_up_runs import JOINT, REPLAY, SEQUENTIAL, write_run
from rich.console import Console

from cit_fast import cli
from cit_fast.errors import RunError
from cit_fast.report.status import status, status_table


def shown(found) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(status_table(found))
    return " ".join(console.export_text().split())


def test_then_and_now(tmp_path):
    found = status(write_run(tmp_path / "run", SEQUENTIAL, replay=7))
    assert (found["method"], found["status"], found["stages"], found["planned"]) == ("sequential", "finished", 3, 3)
    rows = {task.pop("task"): task for task in found["tasks"]}
    assert rows["dates"] == {
        "stage": 1,
        "adapter": "shared",
        "untrained": 4.0,
        "then": 96.0,
        "best": 96.0,
        "now": 20.0,
        "fall": 76.0,
        "settings": [],
        "replayed": 14,
    }
    assert (rows["labels"]["stage"], rows["labels"]["fall"], rows["labels"]["replayed"]) == (3, 0.0, 0)
    assert found["AP"] == pytest.approx((20 + 48 + 94) / 3)
    assert found["forgetting"] == pytest.approx((76 + 40) / 2)
    assert found["bytes"] > 1000
    assert json.loads(json.dumps(found)) == found


def test_the_table_says_what_is_at_risk(tmp_path):
    text = shown(status(write_run(tmp_path / "run", SEQUENTIAL)))
    assert "3 of 3 stages, 1 adapter set(s)" in text
    assert "At risk: dates (-76.0), words (-40.0)" in text
    assert "AP 54.0, forgetting 58.0, New.ACC 92.7" in text
    assert "At risk: dates (-10.0)" in shown(status(write_run(tmp_path / "replay", REPLAY)))


def test_a_run_that_has_begun_a_joint_one_and_a_family_of_links(tmp_path):
    begun = status(write_run(tmp_path / "begun", SEQUENTIAL[:1], status="running"))
    assert [task["stage"] for task in begun["tasks"]] == [1, None, None]
    assert [task["now"] for task in begun["tasks"]] == [96.0, None, None]
    assert "1 of 3 stages" in shown(begun)
    untrained = status(write_run(tmp_path / "untrained", [], status="running"))
    assert untrained["AP"] is None
    assert "0 of 3 stages" in shown(untrained)
    joint = status(write_run(tmp_path / "joint", JOINT, joint=True))
    assert [task["stage"] for task in joint["tasks"]] == [1, 1, 1]
    # A file that two stages share counts once.
    folder = tmp_path / "begun"
    before = status(folder)["bytes"]
    (folder / "stages/01/other.json").hardlink_to(folder / "stages/01/stage.json")
    assert status(folder)["bytes"] == before


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", SEQUENTIAL)

    def call(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["cit-fast", "status", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0

    assert call(folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["stages"] == 3
    assert call(folder) == 0
    assert "At risk" in capsys.readouterr().out
    assert call(tmp_path / "nowhere") == 2
    assert "run.json: not there" in capsys.readouterr().err
    with pytest.raises(RunError):
        status(tmp_path / "nowhere")
