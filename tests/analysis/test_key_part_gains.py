from __future__ import annotations

import csv
import io
import json
import sys

import pytest
from PIL import Image
from rich.console import Console

from cit_fast import cli
from cit_fast.analysis.key_part_gains import Scores, TaskGains, check_options, counts, how_scored
from cit_fast.data import Example
from cit_fast.errors import ConfigError
from cit_fast.key_parts.gain import ExampleGain
from cit_fast.report.key_part_gains import MOST_SHOWN, score_tables, write_scores

SUMMARY = {"source": "discover", "instructions": 2, "with_key_parts": 2, "without": 0, "spans": 3, "dropped": 0}


def task(name: str, values) -> TaskGains:
    examples = tuple(Example("Say it in [words].", f"{k}", ("x",), name, ((10, 17),)) for k in range(len(values)))
    gains = tuple(ExampleGain(k, value, value + 0.1, 0.1, 3) for k, value in enumerate(values))
    return TaskGains(name, examples, gains, 1, 2)


def scores(*tasks) -> Scores:
    return Scores("a/model", tuple(tasks), 0.3, 0.05, SUMMARY)


@pytest.fixture
def two():
    return scores(task("deaf", [0.0, 0.01, -0.02, 0.07]), task("listens", [0.2, 0.25, 0.3, 0.04]))


def test_numbers_of_a_task(two):
    deaf = two.tasks[0]
    assert deaf.mean == pytest.approx(0.015)
    assert deaf.below(0.05) == 0.75
    assert deaf.spread == pytest.approx(0.03354, abs=1e-5)
    assert deaf.info == pytest.approx(0.115)
    assert two.limit == pytest.approx(3 / 7)


@pytest.mark.parametrize("most", [1, 2, 7, 14, 24])
@pytest.mark.parametrize("values", [[0.0], [-0.3, 0.4], [0.001, 0.0013], [-0.02], [0.42] * 5, [1e-9]])
def test_bins_hold_every_gain_and_have_zero_as_an_edge(values, most):
    if most == 1 and min(values) < 0 < max(values):
        return  # zero could be no edge
    edges = scores(task("t", values)).edges(most)
    assert 2 <= len(edges) <= most + 1
    assert 0.0 in edges
    assert edges[0] <= min(values)
    assert max(values) <= edges[-1]
    assert sum(counts(values, edges)) == len(values)


def test_a_value_on_an_edge_is_in_the_upper_bin():
    assert counts([0.0, 0.1, 0.2, 0.25, 0.3], [0.0, 0.1, 0.2, 0.3]) == [1, 1, 3]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_what_the_terminal_shows(two, width):
    console = Console(width=width, file=io.StringIO(), legacy_windows=False)
    for table in score_tables(two, width):
        console.print(table)
    text = console.file.getvalue()
    lines = text.splitlines()
    assert all(len(line) <= width for line in lines)
    if width >= 80:
        row = next(line for line in lines if line.startswith("deaf"))
        assert row.split()[1:6] == ["4", "0.015", "0.034", "75%", "0.115"]
        assert "…" not in "".join(lines[1:6])
        assert text.index("deaf") < text.index("listens")
        assert "Say it in [[[words]]]." in text
    assert "All 8 examples by gain" in text


def test_many_tasks_show_a_few_instructions_only():
    many = scores(*(task(f"t{k}", [k / 300]) for k in range(100)))
    tables = score_tables(many, 100)
    assert tables[0].row_count == 100
    assert tables[2].row_count == MOST_SHOWN


def test_how_scored_says_what_was_left_out(two):
    words = how_scored(two)
    assert "at most 0.43" in words
    assert "discovered under the model itself: 3 in 2 instructions." in words
    assert "Left out: 2 without key parts and 4 too long." in words


def test_files(two, tmp_path):
    picture = write_scores(two, tmp_path / "out")
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 800
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert lines[0] == {
        "task": "deaf", "source": "", "instruction": "Say it in [words].", "input": "0", "answer": "x",
        "key_parts": ["[words]"], "spans": [[10, 17]], "gain": 0.0, "info_full": 0.1, "info_masked": 0.1, "tokens": 3,
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "tasks.csv").read_text().splitlines()))
    assert [row["task"] for row in rows] == ["deaf", "listens"]
    assert float(rows[0]["share_below"]) == 0.75
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["key_parts"] == SUMMARY
    assert not list((tmp_path / "out").glob(".*"))


def test_a_picture_of_hundreds_of_tasks_stays_readable(tmp_path):
    many = scores(*(task(f"task{k:04}_with_a_long_name_that_goes_on_and_on", [k / 300, 0.1]) for k in range(100)))
    with Image.open(write_scores(many, tmp_path)) as picture:
        assert picture.size[1] < 4000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("data", 0.0, 0.05), "--alpha"),
        (("data", 0.3, 2.0), "--threshold"),
        (("guess", 0.3, 0.05), "key_parts: 'guess'"),
        (("{llm: [", 0.3, 0.05), "--key-parts"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words):
        check_options(*options)


def test_yaml_names_a_source_with_options():
    assert check_options("{discover: {share: 0.8}}", 0.3, 0.05) == {"discover": {"share": 0.8}}


# ----------------------------------------------------------------------------------------------------- end to end


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["cit-fast", "score", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def data(tmp_path):
    records = [
        {"instruction": "Say it in words, then the number.", "input": f"{k}", "output": f"it {k}"} for k in range(5)
    ]
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_score_of_built_in_tasks_by_their_own_key_parts(monkeypatch, capsys, tiny_model_folder, tmp_path):
    out = tmp_path / "out"
    assert call(monkeypatch, tiny_model_folder, "units", "records", "--examples", "4", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "All 8 examples by gain" in printed
    assert "Key parts from the data" in printed
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert {line["task"] for line in lines} == {"units", "records"}
    assert all(abs(line["gain"] - (line["info_full"] - line["info_masked"])) < 1e-6 for line in lines)


def test_marks_in_the_text_are_key_parts(monkeypatch, capsys, tiny_model_folder, tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text(json.dumps({"instruction": "Say it <in words>, please.", "output": "x"}) + "\n")
    out = tmp_path / "out"
    assert call(monkeypatch, tiny_model_folder, path, "--markers", "<", ">", "--out", out) == 0
    line = json.loads((out / "scores.jsonl").read_text())
    assert line["key_parts"] == ["in words"]
    assert line["instruction"] == "Say it in words, please."


def test_score_discovers_key_parts_and_takes_an_adapter(monkeypatch, capsys, tiny_model_folder, tmp_path, data):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    assert call(monkeypatch, tmp_path / "adapter", data, "--key-parts", "discover", "-o", tmp_path / "out") == 0
    assert "discovered under the model itself" in capsys.readouterr().out
    line = json.loads((tmp_path / "out" / "scores.jsonl").read_text().splitlines()[0])
    assert line["key_parts"][0] in line["instruction"]
    assert list((tmp_path / "cache" / "key-parts").rglob("*.json"))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "task 'bad': none of its 1 examples has key parts; name them in the data"),
        ({"key_parts": ["in one word"]}, "bad.jsonl:1: key part 'in one word' is not in the instruction"),
        ({"key_parts": ["Say it."]}, "bad.jsonl:1: the key parts cover the whole instruction"),
        ({"key_parts": ["it"], "output": "  "}, "bad.jsonl"),
    ],
)
def test_bad_data_is_one_line(monkeypatch, capsys, tiny_model_folder, tmp_path, record, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"instruction": "Say it.", "output": "x", **record}) + "\n")
    assert call(monkeypatch, tiny_model_folder, path, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words in error.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_no_such_model(monkeypatch, capsys, data):
    assert call(monkeypatch, "./nowhere", data) == 2
    assert "no folder './nowhere'" in capsys.readouterr().err
