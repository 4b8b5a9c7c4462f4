from __future__ import annotations

import dataclasses

import pytest

from cit_fast.data import Example, Task
from cit_fast.errors import DataError, RunError
from cit_fast.methods.routing import OracleRouter, SharedRouter, load_router, routing_record, routing_text
from cit_fast.methods.routing.router import set_name
from cit_fast.methods.stage import Assignment, Learned
from cit_fast.models.adapter_bank import BASE


def test_one_set_for_all(tasks, stage, tmp_path):
    router = SharedRouter()
    assert [router.assign(stage(task=task)).adapter for task in tasks] == ["shared"] * 3
    assert router.answer(tasks[0].test, stage()) == ["shared"] * 4
    router.save(tmp_path)
    assert type(load_router(tmp_path)) is SharedRouter


def test_the_oracle_is_told(tasks, stage, tmp_path):
    router = OracleRouter()
    assert [router.assign(stage(task=task)).adapter for task in tasks[:2]] == ["task-dates", "task-mail"]
    asked = [tasks[1].test[0], tasks[0].test[0], tasks[2].test[0]]
    router.save(tmp_path)
    for each in (router, load_router(tmp_path)):
        assert each.answer(asked, stage()) == ["task-mail", "task-dates", BASE]
    with pytest.raises(DataError, match=r"prompt 1: the oracle router must be told the task.* one of dates, mail"):
        router.answer([asked[0], Example("Do it.", references=("-",))], stage())
    with pytest.raises(RunError, match="holds the router 'oracle', not 'shared'"):
        SharedRouter.load(tmp_path)


def test_names_of_sets_are_folders_unlike_each_other(tasks):
    other = dataclasses.replace(tasks[0], name="a.b+c")
    assert set_name(other, []) == "task-a-b-c"
    assert set_name(other, ["task-A-B-C", "task-a-b-c-2"]) == "task-a-b-c-3"
    odd = Task("ä", tasks[0].train)
    assert set_name(odd, []) == "task--"


def test_what_is_read_of_a_prompt():
    plain = Example("Do it.", "now", ("x",))
    assert routing_text(plain) == "Do it.\n\nnow"
    assert routing_text(plain, "instruction") == "Do it."
    assert routing_text(Example("Do it.", references=("x",))) == "Do it."
    turns = (("system", "Be kind."), ("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", "x"))
    chat = Example("", references=("x",), messages=turns)
    assert routing_text(chat) == routing_text(chat, "instruction") == "One\n\nThree"


CHOSEN = Assignment("s1")


def test_the_record_counts_prompts():
    answers = {"a": {"s1": 3, BASE: 1}, "b": {"s1": 4}, "new": {BASE: 1, "s1": 3}}
    known = routing_record(CHOSEN, Learned(), new=True, trained_by={"a": "s1", "b": "s2"}, answers=answers)
    assert (known.accuracy, known.to_base) == (3 / 8, 1 / 4)
    assert known.answers == answers
    nothing = routing_record(CHOSEN, Learned(), new=True, trained_by={}, answers={"new": {"s1": 1}})
    assert nothing.accuracy is None
    own = routing_record(CHOSEN, Learned(), new=True, trained_by={"a": "s1"}, answers={"a": {"s1": 1}})
    assert own.to_base is None
