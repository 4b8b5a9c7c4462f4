"""What tells the format of records, context beside the turns, and options that a format cannot honour."""

from __future__ import annotations

import pytest
from one_record import TURNS, failing, one

from cit_fast.data import Example, ReadOptions, Task, read_file, read_records
from cit_fast.errors import DataError

# --------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize("unanswered", [{"prompt": "a", "completion": None}, {"prompt": "a"}])
def test_the_order_of_records_does_not_decide_whether_they_are_read(unanswered):
    answered = {"prompt": "b", "completion": "x"}
    for records in ([unanswered, answered], [answered, unanswered], [unanswered, unanswered, answered]):
        pairs = [(f"here:{number}", record) for number, record in enumerate(records, 1)]
        (example,) = read_records(iter(pairs), ReadOptions(skip_unanswered=True))
        assert (example.instruction, example.references) == ("b", ("x",))
        assert example.source == f"here:{records.index(answered) + 1}"


def test_a_first_record_without_an_answer_is_told_as_that():
    assert "no reference answer" in failing({"prompt": "a", "completion": None})
    with pytest.raises(DataError, match=r"^here:1: no reference answer.*; nor has any other of 1 records"):
        one({"prompt": "a", "answer": None}, skip_unanswered=True)
    with pytest.raises(DataError, match=r"^here:1: cannot tell the format from the fields 'text'"):
        one({"text": "a"}, skip_unanswered=True)


def test_lines_under_the_name_json_may_begin_with_a_blank_one(write):
    lines = '\n{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "c"}\n'
    assert [example.source.rpartition(":")[2] for example in read_file(write("t.json", lines))] == ["2", "3"]


def test_the_name_tsv_means_tabs(write):
    path = write("t.tsv", "instruction\toutput (a, b)\nDo, it.\ty, z\n")
    (example,) = read_file(path, ReadOptions(columns={"output": "output (a, b)"}))
    assert (example.instruction, example.references) == ("Do, it.", ("y, z",))
    assert [each.references for each in read_file(write("u.tsv", "instruction,output\nDo.,y\n"))] == [("y",)]


# -------------------------------------------------------------------------------------------- beside the question


def test_a_system_text_beside_messages_is_their_first_turn():
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b")]
    example = one({"messages": TURNS[:2], "system": "Be brief."})
    assert (example.messages, example.instruction) == (tuple(turns), "a")
    whole = [{"role": role, "content": content} for role, content in turns]
    assert one({"messages": whole, "system": "Be brief."}).messages == tuple(turns)
    assert one({"messages": TURNS[:2], "system": ""}).messages == ()
    assert one({"messages": TURNS[:2], "s": "Be brief."}, columns={"system": "s"}).messages == tuple(turns)
    said = failing({"messages": whole, "system": "Be long."})
    assert "'system' says something else than the system turn of 'messages'; keep one of them" in said


def test_a_system_text_of_alpaca_makes_a_conversation():
    record = {"instruction": "Add.", "input": "1 2", "output": ["3", "three"], "system": "Be brief."}
    example = one(record)
    assert example.messages == (("system", "Be brief."), ("user", "Add.\n\n1 2"), ("assistant", "3"))
    assert (example.instruction, example.input, example.references) == ("Add.", "1 2", ("3", "three"))
    assert one({**record, "input": ""}).messages[1] == ("user", "Add.")
    for nothing in (None, "", " "):
        assert one({**record, "system": nothing}).messages == ()


def test_a_history_that_is_not_read_is_counted(caplog):
    record = {"instruction": "And now?", "output": "x"}
    histories = [[], [["q", "a"]], None, [["q", "a"]]]
    records = [(f"here:{number}", {**record, "history": one}) for number, one in enumerate(histories, 1)]
    assert len(read_records(records, ReadOptions(), where="here")) == 4
    assert caplog.messages == [
        "here: 2 records have a 'history', which is not read, the first here:2; write conversations as 'messages'"
    ]


def test_an_instruction_for_a_super_ni_task_is_refused():
    task = {"Definition": "Do.", "Instances": [{"input": "a", "output": "b"}]}
    said = failing(task, instruction="Mine.")
    assert said == "here:1: a Super-NI task has its instruction in 'Definition'; leave out the option instruction"


# ----------------------------------------------------------------------------------------------------------- tasks


def test_the_examples_of_a_task_carry_its_name():
    examples = tuple(Example("Do it.", f"{k}", ("x",), name) for k, name in enumerate(["a", "", "b"]))
    task = Task("b", examples, examples[:1], examples[:2])
    assert {example.task for split in (task.train, task.dev, task.test) for example in split} == {"b"}
    assert task.train[2] is examples[2]
