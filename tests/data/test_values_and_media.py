"""Values and their absence, media, and which part of a turn is the instruction."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import re

import pytest
from one_record import ROWS, TURNS, failing, one

from cit_fast.data import ReadOptions, read_file, read_records
from cit_fast.data.example import unseen_media
from cit_fast.errors import ConfigError, DataError

# ------------------------------------------------------------------------------------------- values and their absence


@pytest.mark.parametrize("missing", ["null", "NaN", '""', '" "', "[]", "[null]", "[NaN, null]", None])
def test_one_rule_for_no_answer(write, missing, caplog):
    unanswered = '{"instruction": "Say it."' + (f', "output": {missing}' if missing else "") + "}"
    path = write("t.jsonl", f'{unanswered}\n{{"instruction": "Say it.", "output": "x"}}')
    assert [e.references for e in read_file(path, ReadOptions(skip_unanswered=True))] == [("x",)]
    assert "skipped 1 records without an answer" in caplog.text
    with pytest.raises(DataError, match=r"t.jsonl:1: (no reference answer|missing field 'output')"):
        read_file(path)
    alone = write("alone.jsonl", unanswered)
    with pytest.raises(DataError, match=r"alone.jsonl:1: .*; nor has any other of 1 records"):
        read_file(alone, ReadOptions(skip_unanswered=True))


def test_an_empty_last_turn_is_no_answer():
    unanswered = {"messages": [*TURNS[:3], {"role": "assistant", "content": None}]}
    records = [("here:1", unanswered), ("here:2", {"messages": TURNS})]
    (example,) = read_records(records, ReadOptions(skip_unanswered=True))
    assert example.source == "here:2"


def test_numbers_truth_values_and_dates_are_taken_as_they_are_written(write):
    (example,) = read_file(
        write("t.json", '[{"instruction": "Say it.", "input": NaN, "output": [1.50, 1e5, 7, true]}]')
    )
    assert (example.input, example.references) == ("", ("1.50", "1e5", "7", "true"))
    values = [False, decimal.Decimal("2.50"), datetime.date(2026, 11, 28)]
    assert one({"instruction": "i", "output": values}).references == ("false", "2.50", "2026-11-28")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.json", "[" * 100_000, ":1: cannot be read: nested too deep"),
        ("t.jsonl", json.dumps(ROWS[0]) + "\n" + '{"a":' * 100_000, ":2: cannot be read: nested too deep"),
        ("t.json", '[{"instruction": "a", "output": ' + "9" * 5000 + "}]", ":1: cannot be read: Exceeds the limit"),
        ("t.json", '{"instruction": "a", "output": Infinity}', ":1: cannot be read: Infinity is no JSON value"),
        ("t.json.gz", b"no archive", ":1: cannot be read (Not a gzipped file"),
        ("t.json.gz", gzip.compress(b"[]" * 5000, mtime=0)[:20], ":1: cannot be read (Compressed file ended"),
    ],
)
def test_files_that_cannot_be_read(write, name, content, said):
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert str(caught.value).startswith(str(path) + said)


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", "/dev/zero"):
        with pytest.raises(DataError, match=r":1: cannot be read \(no regular file\)"):
            read_file(path)


@pytest.mark.parametrize("shown", [3, "x", [3], [None], [{"input": "a"}], [{"input": "a", "output": []}]])
def test_broken_positive_examples(shown):
    task = {"Definition": "Do.", "Positive Examples": shown, "Instances": [{"input": "a", "output": "b"}]}
    with pytest.raises(DataError, match=r"^here: record 1.*(must be|missing field 'output')"):
        read_records([("here: record 1", task)], ReadOptions(positive_examples=1))
    (example,) = read_records([("here: record 1", task)], ReadOptions())
    assert example.instruction == "Do."


# ------------------------------------------------------------------------------------------------------------ media


def test_videos_and_recordings_are_kept_by_name():
    unnamed = one({"instruction": "i", "output": "x", "videos": [{"bytes": b"x", "path": None}, "b.mp4"]})
    assert unnamed.other_media == ("sha256:2d711642b726b04401627ca9fbac32f5", "b.mp4")
    named = one({"instruction": "i", "output": "x", "video": {"bytes": b"x", "path": "a.mp4"}})
    assert named.other_media == ("a.mp4",)
    moving = one({"instruction": "i", "output": "x", "videos": ["a.mp4"], "audio": "b.wav"})
    assert (moving.images, moving.other_media) == ((), ("a.mp4", "b.wav"))
    part = {"type": "video", "video": "c.mp4"}
    turns = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, TURNS[1]]
    assert one({"messages": turns}).other_media == ("c.mp4",)
    assert "'image' must be a path, or an object" in failing({"instruction": "i", "output": "x", "image": {"a": 1}})


def test_what_a_text_model_does_not_see_is_counted():
    plain, picture = one({"instruction": "i", "output": "x"}), one({"instruction": "i", "output": "x", "image": "a"})
    assert unseen_media([plain, plain]) is None
    said = unseen_media([plain, picture, one({"instruction": "i", "output": "x", "video": "a"})])
    assert said.startswith("Of 3 examples 1 have images and 1 have videos or recordings, which this model does not see")


# Which part of a turn is the instruction


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (None, "<image>\nWhat is this?\nAnswer in a word.\n"),
        ("whole", "<image>\nWhat is this?\nAnswer in a word.\n"),
        ("last-line", "Answer in a word."),
        ("first-line", "<image>"),
        ({"regex": "Answer.*"}, "Answer in a word."),
        ({"regex": r"\n(\w+ \w+) this"}, "What is"),
    ],
)
def test_which_part_of_a_turn_is_the_instruction(tmp_path, part, expected):
    text = "<image>\nWhat is this?\nAnswer in a word.\n"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a dog"}]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps([{"conversations": turns}]))
    (example,) = read_file(path, ReadOptions(instruction_part=part))
    assert (example.task_instruction, example.instruction) == (expected, text)  # what is trained stays whole


def test_a_super_ni_definition_has_parts_too(tmp_path):
    path = tmp_path / "task.json"
    task = {"Definition": ["Given a text.\nName its language."], "Instances": [{"input": "x", "output": ["y"]}]}
    path.write_text(json.dumps(task))
    (example,) = read_file(path, ReadOptions(instruction_part="last-line"))
    assert example.task_instruction == "Name its language."


def test_an_instruction_that_is_not_there(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "Answer: yes", "output": "x"}\n{"instruction": "Sum up", "output": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: instruction_part\.regex '\^Answer' matches nothing in 'Sum up'"):
        read_file(path, ReadOptions(instruction_part={"regex": "^Answer"}))
    for part, message in (
        ("middle", "instruction_part: 'middle' is unknown; expected whole, first-line, last-line or {regex: ...}"),
        ({"regex": "("}, "instruction_part.regex: '(': "),
        ({"pattern": "x"}, "instruction_part: {'pattern': 'x'} is unknown"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            ReadOptions(instruction_part=part)
