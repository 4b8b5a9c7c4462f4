"""Which tasks a stage answers."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cit_fast.run.config import EvaluationConfig
from cit_fast.run.tasks import answered_tasks


def test_which_tasks_are_answered():
    tasks = [*"abcdefgh"]
    some = EvaluationConfig(tasks={"sample": 2})
    found = [answered_tasks(tasks, index, 8, some, seed=3) for index in range(1, 9)]
    assert [len(each) for each in found] == [1, 2, 3, 3, 3, 3, 3, 8]
    assert all(each[-1] == tasks[index] for index, each in enumerate(found))
    assert all(each == sorted(each) and set(each) <= set(tasks[: index + 1]) for index, each in enumerate(found))
    assert found == [answered_tasks(tasks, index, 8, some, seed=3) for index in range(1, 9)]
    assert len({tuple(each) for each in found[2:7]}) > 1
    assert answered_tasks(tasks, 1, 1, some, seed=3, joint=True) == tasks
    with pytest.raises(ValidationError, match="sample"):
        EvaluationConfig(tasks={"sample": -1})
