from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.data import Example, Task
from cit_fast.errors import ConfigError
from cit_fast.methods.replay import NoReplay, RandomReplay
from cit_fast.methods.stage import Stage


def task(name: str, size: int) -> Task:
    return Task(name, tuple(Example(f"do {name}", str(k), (str(k),), task=name) for k in range(size)))


def stage(seen, seed=0) -> Stage:
    return Stage(None, None, tasks=(task("new", 1),), seen=tuple(seen), seed=str(seed))


@given(st.lists(st.integers(1, 40), max_size=5), st.floats(0.01, 1), st.one_of(st.none(), st.integers(1, 50)))
def test_random_replay_keeps_its_budget(sizes, fraction, per_task):
    seen = [task(f"t{k}", size) for k, size in enumerate(sizes)]
    chosen = RandomReplay(fraction, per_task).select(stage(seen)).examples
    assert len(set(chosen)) == len(chosen)  # without replacement
    for one in seen:
        own = [example for example in chosen if example.task == one.name]
        budget = per_task if per_task is not None else max(1, round(fraction * len(one.train)))
        assert len(own) == min(budget, len(one.train))
        assert set(own) <= set(one.train)


def test_the_draw_follows_the_generator_alone():
    seen = [task("a", 50), task("b", 50)]
    policy = RandomReplay(0.2)
    assert policy.select(stage(seen, 1)) == policy.select(stage(seen, 1))
    assert policy.select(stage(seen, 1)) != policy.select(stage(seen, 2))


def test_no_replay():
    assert NoReplay().select(stage([task("a", 5)])).examples == []


@pytest.mark.parametrize("options", [{"fraction": 0}, {"fraction": 1.01}, {"per_task": 0}])
def test_budgets_out_of_range(options):
    with pytest.raises(ConfigError):
        RandomReplay(**options)
