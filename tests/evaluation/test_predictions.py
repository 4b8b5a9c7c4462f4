from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.predictions import (
    Prediction,
    predictions_path,
    read_predictions,
    rescore,
    write_predictions,
)
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.evaluation.run_files import read_stages
from cit_fast.files import write_json


@pytest.fixture
def run_folder(tmp_path):
    """Two tasks, two stages; one recorded score is wrong, one is missing, as are some predictions."""
    run = RunRecord("r", {"name": "m"}, ["a", "b"], {"a": "exact_match", "b": "accuracy"}, "model", 0)
    write_json(tmp_path / "run.json", dataclasses.asdict(run))
    stages = [
        StageRecord(0, [], {"a": 0.0, "b": 50.0}),
        StageRecord(1, ["a"], {"a": 90.0}, losses=[(1, 2.5)]),
    ]
    for stage in stages:
        path = tmp_path / "stages" / f"{stage.index:02d}" / "stage.json"
        write_json(path, dataclasses.asdict(stage))
    right, wrong = Prediction("p", "x", ("x",), 100.0), Prediction("p", "x", ("y", "z"), 0.0)
    write_predictions(predictions_path(tmp_path, 0, "a"), [wrong])
    write_predictions(predictions_path(tmp_path, 1, "a"), [right, dataclasses.replace(right, score=0.0), wrong, right])
    write_predictions(predictions_path(tmp_path, 1, "b"), [right])
    return tmp_path


def test_what_is_written_is_read(tmp_path):
    predictions = [
        Prediction("a\nb", "line\u2028separator", ("r1", "ü字"), 12.5),
        Prediction("", "\ud800 lone surrogate", ("x",), 0.0),
        Prediction("p", "a", ("a",), 100.0, None, "set-01"),
        Prediction("<image>p", "a", ("a",), 100.0, images=("/pictures/1.png",)),
    ]
    write_predictions(tmp_path / "deep" / "task.jsonl", predictions)
    assert read_predictions(tmp_path / "deep" / "task.jsonl") == predictions
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["task.jsonl"]
    assert "ü字" in (tmp_path / "deep" / "task.jsonl").read_text("utf-8")


@given(st.lists(st.tuples(st.text(), st.text(), st.lists(st.text()), st.floats(0, 100)), max_size=4))
def test_any_text_survives(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("predictions") / "task.jsonl"
    predictions = [Prediction(p, a, tuple(r), s) for p, a, r, s in rows]
    write_predictions(path, predictions)
    assert read_predictions(path) == predictions


def full_disk(descriptor):
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_earlier_file(run_folder, monkeypatch):
    path = predictions_path(run_folder, 0, "a")
    earlier = read_predictions(path)
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(RunError, match=r"a\.jsonl: cannot be written \(No space left on device\)"):
        write_predictions(path, [])
    assert read_predictions(path) == earlier
    assert list(path.parent.iterdir()) == [path]


def test_a_stage_file_that_cannot_be_written_is_named(run_folder, monkeypatch):
    (run_folder / "stages" / "00" / "predictions" / "a.jsonl").unlink()
    monkeypatch.setattr("cit_fast.evaluation.predictions.write_predictions", lambda path, predictions: None)
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(RunError, match=r"01/stage\.json: cannot be written"):
        rescore(run_folder, write=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "task.jsonl:2: broken JSON"),
        ("[]", "task.jsonl:2: an object with the keys prompt, prediction, references, score"),
        ('{"prompt": "p"}', "task.jsonl:2: an object with the keys"),
        ('{"prompt": "p", "prediction": 3, "references": [], "score": 1}', "prediction has the wrong type"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "p", "prediction": "a", "references": ["a"], "score": 1}\n' + line + "\n")
    with pytest.raises(RunError, match=message):
        read_predictions(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RunError, match=r"none.jsonl: cannot be read \(No such file"):
        read_predictions(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match=r"bytes\.jsonl: cannot be read"):
        read_predictions(tmp_path / "bytes.jsonl")


def test_rescore_compares_and_changes_nothing(run_folder):
    before = {path: path.read_bytes() for path in run_folder.rglob("*.json*")}
    results = rescore(run_folder)
    assert [(r.stage, r.task, r.recorded, r.recomputed, r.examples, r.agrees) for r in results] == [
        (0, "a", 0.0, 0.0, 1, True),
        (0, "b", 50.0, None, 0, False),  # recorded, but no predictions stored
        (1, "a", 90.0, 75.0, 4, False),
        (1, "b", None, 100.0, 1, False),  # stored, but never recorded
    ]
    assert results[0].metric == "exact_match"
    assert before == {path: path.read_bytes() for path in run_folder.rglob("*.json*")}


def test_rescore_writes_when_asked(run_folder):
    rescore(run_folder, write=True)
    stages = read_stages(run_folder)
    assert stages[0].scores == {"a": 0.0, "b": 50.0}
    assert stages[1].scores == {"a": 75.0, "b": 100.0}
    assert stages[1].losses == [(1, 2.5)]
    scores = [each.score for each in read_predictions(predictions_path(run_folder, 1, "a"))]
    assert scores == [100.0, 100.0, 0.0, 100.0]
    assert [r.agrees for r in rescore(run_folder)] == [True, False, True, True]


def test_rescore_of_a_run_with_other_metrics(run_folder):
    path = run_folder / "run.json"
    text = path.read_text()
    path.write_text(text.replace('"accuracy"', '"acuracy"'))
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        rescore(run_folder, write=True)
    path.write_text(text.replace('"b": "accuracy"', '"c": "accuracy"'))
    with pytest.raises(RunError, match=r"run.json: metrics names none for task 'b'"):
        rescore(run_folder)
    path.write_text(text.replace('"accuracy"', '"os.getcwd"'))  # a run may come from anywhere
    with pytest.raises(RunError, match=r"is scored by 'os\.getcwd', which is not one of ours"):
        rescore(run_folder)


def with_violations(folder, rates, held_out_score):
    """The run as if task b were held out, task a asked for a format and b for spans of its input."""
    run = json.loads((folder / "run.json").read_text())
    run |= {"tasks": ["a"], "held_out_tasks": ["b"]}
    run["constraints"] = {"a": {"answer_pattern": "x|w"}, "b": {"extractive": True, "wordy_above": 2.0}}
    (folder / "run.json").write_text(json.dumps(run))
    for index in (0, 1):
        path = folder / "stages" / f"{index:02d}" / "stage.json"
        stage = json.loads(path.read_text())
        stage["scores"].pop("b", None)
        path.write_text(
            json.dumps(
                stage | ({"scores": {**stage["scores"], "b": held_out_score}, "violations": rates} if index else {})
            )
        )
    spans = [Prediction("p", a, ("y",), 0.0, "y or z") for a in ("y", "or z", "no", "y or z")]
    write_predictions(predictions_path(folder, 1, "b"), spans)
    answers = [Prediction("p", a, ("x",), 0.0) for a in ("x", "w", "no", "x")]
    write_predictions(predictions_path(folder, 1, "a"), answers)
    return folder


def test_rescore_judges_violations_and_held_out_tasks(run_folder):
    with_violations(run_folder, {"a": {"WFR": 25.0}, "b": {"OOS": 25.0, "WR": 0.0}}, 25.0)
    a, b = [entry for entry in rescore(run_folder) if entry.stage == 1]
    assert (a.violations_again, a.violations_agree) == ({"WFR": 25.0}, True)
    assert (b.recorded, b.recomputed, b.agrees) == (25.0, 25.0, False)  # "y or z" has three words, the reference one
    assert (b.violations, b.violations_again) == ({"OOS": 25.0, "WR": 0.0}, {"OOS": 25.0, "WR": 25.0})
    rescore(run_folder, write=True)
    stage = read_stages(run_folder)[1]
    assert stage.scores == {"a": 50.0, "b": 25.0}
    assert stage.violations == {"a": {"WFR": 25.0}, "b": {"OOS": 25.0, "WR": 25.0}}
    assert all(entry.agrees for entry in rescore(run_folder) if entry.stage == 1)


def test_damaged_constraints_are_named(run_folder):
    with_violations(run_folder, {}, 25.0)
    path = run_folder / "run.json"
    path.write_text(path.read_text().replace('"x|w"', '"("'))
    with pytest.raises(RunError, match=r"run\.json: constraints of task 'a': answer_pattern is no regular expression"):
        rescore(run_folder)


def test_an_input_is_kept_only_where_it_is_needed(tmp_path):
    predictions = [Prediction("p", "a", ("a",), 1.0), Prediction("p", "a", ("a",), 1.0, "an input")]
    write_predictions(tmp_path / "t.jsonl", predictions)
    assert [set(json.loads(line)) for line in (tmp_path / "t.jsonl").read_text().splitlines()] == [
        {"prompt", "prediction", "references", "score"},
        {"prompt", "prediction", "references", "score", "input"},
    ]
    assert read_predictions(tmp_path / "t.jsonl") == predictions
