"""What router, replay policy and objective decided, on the page and as pictures."""

from __future__ import annotations

import json

import pytest
from made_up_runs import REPLAY, Page, write_run

from cit_fast.files import write_json
from cit_fast.report import figures as pictures
from cit_fast.report import write_report
from cit_fast.report.collect import collect
from cit_fast.report.routing import confusion


def with_replay(folder, *replays):
    """The run's stages with what a replay policy said of each."""
    for index, replay in enumerate(replays, start=1):
        path = folder / "stages" / f"{index:02d}" / "stage.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "replay": replay}))
    return folder


@pytest.mark.usefixtures("undrawn")
def test_what_a_replay_policy_decided_is_shown(tmp_path):
    entry = {"task": "dates", "insinfo": 4.256, "tags": ["write date", "year"], "drawn": 3, "available": 9}
    run = with_replay(
        write_run(tmp_path / "a", REPLAY, method="inscl", replay=10),
        {},
        {"distances": {"dates": 0.5}, "budgets": {"dates": 10}, "notes": ["All distances are <zero>."]},
        {
            "distances": {"dates": 0.04, "words": 0.02},
            "budgets": {"dates": 13, "words": 7},
            "notes": [],
            "instructions": [{**entry, "instruction": f"Instruction {k}"} for k in range(25)],
            "instruction_count": 40,
        },
    )
    page = Page(write_report([run]))
    assert "Replay during words: All distances are <zero>." in page.text
    assert "Instructions by InsInfo, during labels" in page.text
    assert "The 20 highest of 40." in page.text
    assert "Instruction 19" in page.text
    assert "Instruction 20" not in page.text
    assert "4.26" in page.text
    assert "write date, year" in page.text
    view = collect([run]).views[0]
    ax = pictures.distance_figure(view).axes[0]
    assert [text.get_text() for text in ax.texts] == ["0.500", "", "", "0.040", "0.020", ""]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["to words", "to labels"]
    assert (tmp_path / "a" / "report-figures" / "inscl-distances.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_what_a_policy_of_ones_own_says_does_no_harm(tmp_path):
    own = {"details": {"instructions": ["mine", {"task": "x"}], "scores": {"dates": [1, 2]}}}
    page = Page(write_report([with_replay(write_run(tmp_path / "a", REPLAY, replay=1), {}, own, {"distances": {}})]))
    assert "InsInfo" not in page.text
    zero = with_replay(write_run(tmp_path / "b", REPLAY, replay=1), {}, {"distances": {"dates": 0.0}})
    ax = pictures.distance_figure(collect([zero]).views[0]).axes[0]
    assert ax.texts[0].get_text() == "0.00"


@pytest.mark.usefixtures("undrawn")
def test_information_gains_are_shown_with_the_replayed_tasks_framed(tmp_path):
    run = with_replay(
        write_run(tmp_path / "a", REPLAY, method="kpig", replay=10),
        {},
        {"gains": {"dates": 0.021}},
        {"gains": {"dates": -0.001, "words": 0.2}},
    )
    path = run / "stages" / "01" / "stage.json"
    notes = {"objective": {"notes": ["3 of 9 examples have no <key> parts."]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **notes}))
    page = Page(write_report([run]))
    assert "Loss during dates: 3 of 9 examples have no <key> parts." in page.text
    view = collect([run]).views[0]
    view.trained[2].replayed = {"dates": 4, "words": 0}
    ax = pictures.gain_figure(view).axes[0]
    assert [text.get_text() for text in ax.texts] == ["0.021", "", "", "-0.001", "0.200", ""]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["before words", "before labels"]
    framed = {tuple(round(float(at), 2) for at in patch.get_xy()) for patch in ax.patches}
    assert framed == {(-0.46, -0.43), (-0.46, 0.57)}  # dates, both times
    assert (tmp_path / "a" / "report-figures" / "kpig-gains.png").exists()


def routed(folder, *stages):
    """The run with these ``routing`` entries, one per trained stage."""
    for index, routing in enumerate(stages, 1):
        path = folder / "stages" / f"{index:02d}" / "stage.json"
        adapter = routing["assignment"]["adapter"]
        stage = {**json.loads(path.read_text()), "adapter": adapter, "routing": {"learned": {}, **routing}}
        write_json(path, stage)
    return folder


def test_routing_is_a_table_and_a_confusion_matrix(tmp_path):
    first = {"new": True, "assignment": {"adapter": "set-01"}, "trained_by": {"dates": "set-01"}, "accuracy": 1.0}
    second = {"new": True, "assignment": {"adapter": "set-02", "scores": {"set-01": 0.125}}, "accuracy": 0.75}
    second["to_base"] = 0.5
    third = {
        "new": False,
        "assignment": {"adapter": "set-01", "scores": {"set-01": 0.9375, "set-02": 0.25}},
        "trained_by": {"dates": "set-01", "words": "set-02", "labels": "set-01"},
        "answers": {
            "dates": {"set-01": 3, "__base__": 1},
            "words": {"set-01": 2, "set-02": 2},
            "labels": {"set-01": 4},
            "strange": {"set-02": 1, "__base__": 3},
        },
        "accuracy": 0.75,
        "to_base": 0.75,
        "learned": {"notes": ["7 prompts are long."]},
    }
    folder = routed(write_run(tmp_path / "a", REPLAY, method="lcia"), first, second, third)
    page = Page(write_report([folder]))
    for text in (
        "Which adapter set each task trained",
        "set-01 0.94, set-02 0.25",
        "reused",
        "75.0",
        "labels: 7 prompts are long.",
    ):
        assert text in page.text, text
    assert (tmp_path / "a" / "report-figures" / "lcia-routing.png").exists()
    shares, texts, tasks, sets, framed = confusion(collect([folder]).views[0])
    assert (tasks, sets) == (["dates", "words", "labels", "strange"], ["set-01", "set-02", "base model"])
    assert texts == [["75", "", "25"], ["50", "50", ""], ["100", "", ""], ["", "25", "75"]]
    assert framed == [(0, 0), (1, 1), (2, 0), (3, 2)]
    assert shares[0, 0] == 75.0


def test_one_set_for_all_is_no_routing(folders, undrawn):
    assert "Which adapter set" not in Page(write_report(folders)).text
