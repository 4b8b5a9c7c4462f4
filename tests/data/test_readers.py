from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_record import ROWS, TURNS, failing, one

from cit_fast.data import ReadOptions, read_dataset, read_file, read_records
from cit_fast.errors import ConfigError, DataError

# ---------------------------------------------------------------------------------------------------------- formats


def test_super_ni_task_file(write):
    path = write(
        "task.json",
        {
            "Definition": ["Say whether it is good."],
            "Positive Examples": [{"input": "nice", "output": "good"}, {"input": "awful", "output": ["bad", "poor"]}],
            "Instances": [
                {"id": "a", "input": "great", "output": ["good", "fine"]},
                {"id": "b", "input": "bad", "output": "bad"},
            ],
        },
    )
    first, second = read_file(path)
    assert (first.instruction, first.input, first.references) == ("Say whether it is good.", "great", ("good", "fine"))
    assert second.references == ("bad",)
    assert (first.task, first.source, second.source) == ("task", f"{path}: record 1", f"{path}: record 2")
    shown, _ = read_file(path, ReadOptions(positive_examples=2))
    assert shown.task == "task"
    assert shown.instruction == (
        "Say whether it is good.\n\nExample 1\nInput: nice\nOutput: good\n\nExample 2\nInput: awful\nOutput: bad"
    )


def test_super_ni_key_parts_of_the_task_and_of_an_instance():
    task = {
        "Definition": "Answer in one word.",
        "key_parts": ["one word"],
        "Instances": [{"input": "x", "output": "y"}, {"input": "x", "output": "y", "key_parts": [[0, 6]]}],
    }
    first, second = read_records([("here: record 1", task)], ReadOptions())
    assert first.key_part_texts == ("one word",)
    assert second.key_part_texts == ("Answer",)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"Definition": "Do.", "Instances": {"a": 1}}, "'Instances' must be a list, not an object"),
        ({"Definition": "Do.", "Instances": ["text"]}, "an instance must be an object, not a text"),
        ({"Definition": "Do.", "Instances": [{"input": "a"}]}, "missing field 'output'"),
        ({"Instances": [{"input": "a", "output": "b"}]}, "missing field 'Definition'"),
        ({"Definition": "Do."}, "missing field 'Instances'"),
        ({"Definition": "Do.", "Instances": []}, "no records"),
    ],
)
def test_broken_super_ni(write, task, said):
    path = write("task.json", task)
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert str(caught.value).startswith((f"{path}: record 1: ", f"{path}:1: "))
    assert said in str(caught.value)


def test_alpaca():
    example = one({"instruction": "Add.", "input": "1 2", "output": "3", "image": "a.png"})
    assert (example.instruction, example.input, example.references) == ("Add.", "1 2", ("3",))
    assert example.images == (str(Path("a.png").absolute()),)
    bare = one({"instruction": " Say hi.\n", "input": None, "output": [7, "hi"]})
    assert (bare.instruction, bare.input, bare.references) == (" Say hi.\n", "", ("7", "hi"))


def test_prompt_completion_and_trace():
    assert one({"prompt": "p", "completion": "c"}).references == ("c",)
    trace = one({"prompt": "p", "answer": "a"})
    assert (trace.instruction, trace.references, trace.messages) == ("p", ("a",), ())
    turns = one(
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "completion": [{"role": "assistant", "content": "a"}],
        }
    )
    assert turns.messages == (("system", "s"), ("user", "u"), ("assistant", "a"))
    half = one({"prompt": [{"role": "user", "content": "u"}], "completion": "c"})
    assert (half.instruction, half.references, half.messages) == ("u", ("c",), ())


def test_messages():
    plain = one({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]})
    assert (plain.instruction, plain.references, plain.messages) == ("u", ("a",), ())
    several = one(
        {
            "messages": [
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "v"}, {"type": "image", "url": "/b.png"}, {"type": "image"}],
                },
                {"role": "assistant", "content": "b"},
            ],
            "images": ["/a.png"],
        }
    )
    question = "v<image><image>"
    assert several.messages == (("user", "u"), ("assistant", "a"), ("user", question), ("assistant", "b"))
    assert (several.instruction, several.references, several.images) == (question, ("b",), ("/b.png", "/a.png"))


def test_conversations():
    example = one(
        {
            "image": "/coco/1.jpg",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
        }
    )
    assert (example.instruction, example.references) == ("What?", ("A cat.",))
    assert (example.images, example.messages) == (("/coco/1.jpg",), ())
    system = one({"system": "s", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]})
    assert system.messages == (("system", "s"), ("user", "u"), ("assistant", "a"))


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ("hi", "must be a non-empty list of turns, not a text"),
        ([], "must be a non-empty list of turns"),
        ([{"role": "user"}], "turn 1 must be an object with 'role' and 'content'"),
        ([{"role": "tool", "content": "x"}], "turn 1: role 'tool' cannot be used; roles are assistant,"),
        ([{"role": 3, "content": "x"}], "role 3"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "turn 1: tool calls cannot be used"),
        ([{"role": "user", "content": "u"}], "the last turn is the user's"),
        ([{"role": "assistant", "content": "u"}], "has no user turn"),
        ([{"role": "user", "content": None}], "'content of turn 1' must be a text, not null"),
        ([{"role": "user", "content": [{"type": "tool"}]}], "must be of type 'text', 'image', 'image_url', 'video' or"),
        ([{"role": "user", "content": "u"}, {"role": "assistant", "content": " "}], "no reference answer"),
    ],
)
def test_broken_conversations(turns, said):
    assert said in failing({"messages": turns})


def test_columns_and_fixed_instruction():
    record = {"q": {"text": "1 2"}, "a.b": "3", "a": {"b": "wrong"}}
    example = one(record, columns={"input": "q.text", "output": "a.b"}, instruction="Add.", key_parts=("Add",))
    assert (example.instruction, example.input, example.references) == ("Add.", "1 2", ("3",))
    assert example.key_part_texts == ("Add",)
    own = one({"instruction": "Own.", "output": "x"}, instruction="Add.")
    assert own.instruction == "Own."
    assert "missing field 'question'; the record has 'output'" in failing(
        {"output": "x"}, columns={"instruction": "question"}, format="alpaca"
    )


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "Add."}, "missing field 'output'; the record has 'instruction'"),
        ({"instruction": "Add.", "output": float("inf")}, "'output' is inf, which is no text"),
        ({"instruction": "Add.", "output": None}, "no reference answer; every record needs at least one"),
        ({"instruction": "Add.", "output": {"a": 1}}, "'output' must be a text, not an object"),
        ({"instruction": "Add.", "output": []}, "no reference answer"),
        ({"instruction": " ", "output": "x"}, "the instruction is empty"),
        ({"text": "Add."}, "cannot tell the format from the fields 'text'"),
        ({}, "cannot tell the format from the fields none"),
        ({"prompt": "x"}, "cannot tell the format"),
        ("text", "a record must be an object, not a text"),
        (3, "a record must be an object, not a number"),
    ],
)
def test_broken_records(record, said):
    assert said in failing(record)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "csv"}, "format 'csv' is unknown; choose one of super_ni, alpaca"),
        ({"format": "alpaca", "columns": {"prompt": "x"}}, "'prompt' is no field of alpaca"),
        ({"columns": {"question": "x"}}, "'question' is no field of any format"),
        ({"key_part_markers": ("[[", "")}, "both marks must be non-empty"),
        ({"positive_examples": -1}, "must be 0 or more, not -1"),
    ],
)
def test_unusable_options(options, said):
    with pytest.raises(ConfigError) as caught:
        ReadOptions(**options)
    assert said in str(caught.value)


def test_records_without_an_answer(caplog):
    records = [
        (f"here:{n}", {"prompt": "p", "answer": answer}) for n, answer in enumerate(["", "a", [" ", "b"], []], 1)
    ]
    with pytest.raises(DataError, match=r"^here:1: no reference answer.*skip_unanswered"):
        read_records(records, ReadOptions())
    examples = read_records(records, ReadOptions(skip_unanswered=True), where="here")
    assert [example.references for example in examples] == [("a",), ("b",)]
    assert caplog.messages == ["here: skipped 2 records without an answer, the first here:1"]


# -------------------------------------------------------------------------------------------------------- key parts


def test_key_parts_as_texts_and_spans():
    example = one({"instruction": "a b a b", "output": "x", "key_parts": ["b", [0, 1], "a", "b"]})
    assert example.key_parts == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert example.masked_instruction == "[MASK] [MASK] [MASK] [MASK]"


@pytest.mark.parametrize(
    ("key_parts", "said"),
    [
        (["Divide"], "key part 'Divide' is not in the instruction: 'Add two.'"),
        (["Add", "Add"], "key part 'Add' is not in the instruction once more"),
        ([""], "must be a non-empty text or [start, end]"),
        ([[0]], "must be a non-empty text or [start, end]"),
        ([[0, True]], "must be a non-empty text or [start, end]"),
        ([[0, 99]], "is not a span of the instruction"),
        ([[0, 3], [1, 4]], "spans ascend, do not overlap"),
        ("Add", "'key_parts' must be a list of texts or [start, end] spans, not a text"),
    ],
)
def test_broken_key_parts(key_parts, said):
    assert said in failing({"instruction": "Add two.", "output": "x", "key_parts": key_parts})


def test_long_instruction_is_shortened_in_errors():
    assert len(failing({"instruction": "x" * 500, "output": "x", "key_parts": ["y"]})) < 200


def test_key_part_markers():
    record = {"instruction": "Give the [[date]] in [[ISO]] form.", "output": "x"}
    example = one(record, key_part_markers=("[[", "]]"))
    assert (example.instruction, example.key_part_texts) == ("Give the date in ISO form.", ("date", "ISO"))
    assert one(record).instruction == record["instruction"]
    assert one({**record, "key_parts": ["Give"]}, key_part_markers=("[[", "]]")).key_parts[0] == (0, 4)
    for broken in ("Give [[date", "Give [[]]", "Give [[a [[b]]"):
        assert "is not closed by ']]'" in failing({**record, "instruction": broken}, key_part_markers=("[[", "]]"))
    turns = [("system", "s"), ("user", "the [[x]]"), ("assistant", "a")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert "not in conversations" in failing({"messages": messages}, key_part_markers=("[[", "]]"))


@given(parts=st.lists(st.tuples(st.text("ab .", max_size=5), st.text("ab", min_size=1, max_size=5)), min_size=1))
def test_markers_round_trip(parts):
    marked = "!" + "".join(f"{before}<{part}>" for before, part in parts)
    example = one({"instruction": marked, "output": "x"}, key_part_markers=("<", ">"))
    assert example.instruction == "!" + "".join(before + part for before, part in parts)
    assert example.key_part_texts == tuple(part for _, part in parts)
    assert example.masked_instruction == "!" + "".join(before + "[MASK]" for before, _ in parts)


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_json_and_jsonl(write, name):
    path = write(name, ROWS)
    examples = read_file(path)
    assert [example.instruction for example in examples] == [row["instruction"] for row in ROWS]
    where = f"{path}: record 3" if name == "t.json" else f"{path}:3"
    assert examples[2].source == where


def test_lines_under_the_name_json_and_a_single_object(write):
    lines = "\n".join(json.dumps(row) for row in ROWS)
    assert read_file(write("t.json", lines))[1].source.endswith("t.json:2")
    assert len(read_file(write("u.json", ROWS[0]))) == 1


def test_byte_order_mark_crlf_and_blank_lines(write):
    text = "\ufeff" + "\r\n".join(json.dumps(row) for row in ROWS[:2]) + "\r\n\r\n" + json.dumps(ROWS[2]) + "\r\n"
    examples = read_file(write("t.jsonl", text))
    assert [example.source.rpartition(":")[2] for example in examples] == ["1", "2", "4"]
    assert examples[0].instruction == ROWS[0]["instruction"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.jsonl", json.dumps(ROWS[0]) + '\n{"instruction": "Say', ":2: broken JSON at column 17: "),
        ("t.json", '[\n{"instruction": "Say"},\n{"a" 1}]', ":3: broken JSON at column 6: "),
        ("t.json", "[1] [2]", ":1: broken JSON at column 5: Extra data"),
        ("t.json", '{"a": 1\n}\n{"b": 2}', ":3: broken JSON at column 1: Extra data"),
        ("t.json", "", ":1: the file is empty"),
        ("t.jsonl", " \n\n", ":1: the file is empty"),
        ("t.json", "[]", ":1: no records"),
        ("t.json", '{"instruction": "a", "output": "b"}\n{"instruction": "a"}', ":2: missing field 'output'"),
        ("t.jsonl", b'{"a": "b"}\n{"a": "\xff"}', ":2: not UTF-8"),
        ("t.json", "3", ": record 1: a record must be an object, not a number"),
    ],
)
def test_broken_files(write, name, content, said):
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert str(caught.value).startswith(str(path) + said)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_instead_of_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_file(tmp_path / "t.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_file(tmp_path)


# --------------------------------------------------------------------------------------------------------- datasets


def test_dataset_rows_and_class_labels():
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = [{"sentence": "nice", "label": 1}, {"sentence": "awful", "label": 0}, {"sentence": "?", "label": -1}]
    dataset = Dataset.from_list(rows, features=features)
    options = ReadOptions(columns={"input": "sentence", "output": "label"}, instruction="Judge.")
    first, second = read_dataset(dataset, options, where="toy [train]", indices=[1, 0])
    assert (first.input, first.references, first.source) == ("awful", ("bad",), "toy [train]: record 2")
    assert second.references == ("good",)
    with pytest.raises(DataError, match=r"^toy \[train\]: record 3: no reference answer"):
        read_dataset(dataset, options, where="toy [train]")
    answered = read_dataset(dataset, replace(options, skip_unanswered=True), where="toy [train]")
    assert [example.references for example in answered] == [("good",), ("bad",)]
    other = read_dataset(
        dataset, ReadOptions(columns={"input": "sentence", "output": "sentence"}, instruction="?"), where=""
    )
    assert other[2].references == ("?",)
    unknown = Dataset.from_list([{"sentence": "nice", "label": None}], features=features)
    with pytest.raises(DataError, match="no reference answer"):
        read_dataset(unknown, options, where="toy")


def test_half_a_character_names_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a \\ud83d", "output": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: invalid Unicode: a lone surrogate"):
        read_file(path)
    turns = [{"role": "user", "content": "\ud83d"}, *TURNS[1:]]
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(DataError, match=r"a\.jsonl:1: invalid Unicode: a lone surrogate"):
        read_file(path)
