"""KPIGReplay: which tasks come back, how much of each, and that it hangs on the model's gains."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from cit_fast.data import Example, Task
from cit_fast.errors import ConfigError, DataError
from cit_fast.key_parts.gain import information_gain
from cit_fast.methods.replay import KPIGReplay, RandomReplay
from cit_fast.methods.replay import kpig as module
from cit_fast.methods.stage import Selection, Stage
from cit_fast.models.prompts import PromptEncoder

SIZES = {"alpha": 40, "beta": 20, "gamma": 12, "delta": 8}


def make_task(name: str, key_parts=((4, 9),)) -> Task:
    return Task(
        name,
        tuple(
            Example(f"Say {name} and the number.", str(k), (f"{name} {k}",), name, key_parts, source=f"{name}:{k}")
            for k in range(SIZES[name])
        ),
    )


@pytest.fixture(scope="module")
def seen():
    return [make_task(name) for name in SIZES]


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, attn_implementation="sdpa").eval()


@pytest.fixture
def encoder(tiny_tokenizer):
    return PromptEncoder(tiny_tokenizer, max_length=96)


def stage(seen, model, encoder, seed=0, **more) -> Stage:
    new = Task("new", (Example("New.", "x", ("y",), "new"),))
    return Stage(model, encoder, tasks=(new,), seen=tuple(seen), seed=str(seed), **more)


@pytest.fixture
def gains(monkeypatch):
    """The gains that tasks are to have, instead of those of a random model."""
    wanted = {"alpha": 0.3, "beta": 0.1, "gamma": 0.2, "delta": -0.1}
    scored: list[str] = []

    def stub(model, encoder, examples, **_):
        scored.extend(example.source for example in examples)
        result = information_gain(model, encoder, examples[:1])[0]
        return [replace(result, index=k, gain=wanted[e.task]) for k, e in enumerate(examples)]

    monkeypatch.setattr(module, "information_gain", stub)
    return wanted, scored


def count(chosen) -> dict[str, int]:
    return {name: sum(example.task == name for example in chosen) for name in SIZES}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # A tenth of every task is 8 in all; half of the tasks, those with the lowest gain, share it.
        ({}, {"alpha": 0, "beta": 4, "gamma": 0, "delta": 4}),
        ({"fraction": 0.25}, {"alpha": 0, "beta": 12, "gamma": 0, "delta": 8}),  # delta has no more
        ({"fraction": 0.5}, {"alpha": 0, "beta": 20, "gamma": 12, "delta": 8}),  # the next one helps out
        ({"fraction": 1.0}, SIZES),
        ({"per_task": 3}, {"alpha": 0, "beta": 6, "gamma": 0, "delta": 6}),
        ({"tasks": 1}, {"alpha": 0, "beta": 0, "gamma": 0, "delta": 8}),
        ({"tasks": 9}, {"alpha": 2, "beta": 2, "gamma": 2, "delta": 2}),
        ({"tasks": 3, "instances": 10}, {"alpha": 0, "beta": 10, "gamma": 10, "delta": 8}),  # the paper's M and N
    ],
)
def test_the_tasks_with_the_lowest_gain_share_the_budget(seen, model, encoder, gains, options, expected):
    selection = KPIGReplay(**options).select(stage(seen, model, encoder))
    chosen, record = selection.examples, selection.record
    assert count(chosen) == expected
    assert len({example.source for example in chosen}) == len(chosen)
    assert record.gains == pytest.approx(gains[0])
    assert record.budgets == expected
    assert record.scored == {"alpha": 10, "beta": 10, "gamma": 10, "delta": 8}
    if "tasks" not in options and "instances" not in options:
        assert len(chosen) == len(RandomReplay(**options).select(stage(seen, model, encoder)).examples)


def test_what_is_scored_is_replayed_first(seen, model, encoder, gains):
    chosen = KPIGReplay(tasks=10, instances=10).select(stage(seen, model, encoder)).examples
    assert {example.source for example in chosen} == set(gains[1])  # N drawn, scored, replayed
    gains[1].clear()
    two = KPIGReplay(tasks=2, instances=2, scored=5).select(stage(seen, model, encoder))
    few = {example.source for example in two.examples}
    assert few < set(gains[1])
    assert len(gains[1]) == 20


def test_chance_is_the_stages_alone(seen, model, encoder, gains):
    first, again, other = (
        [e.source for e in KPIGReplay().select(stage(seen, model, encoder, seed)).examples] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_gains_are_the_means_under_the_model(seen, model, encoder):
    record = KPIGReplay(scored=100).select(stage(seen, model, encoder)).record
    for task in seen:
        all_of_it = [each.gain for each in information_gain(model, encoder, task.train)]
        assert record.gains[task.name] == pytest.approx(sum(all_of_it) / len(all_of_it), abs=1e-6)
    chosen = {name for name, share in record.budgets.items() if share}
    assert chosen == set(sorted(SIZES, key=record.gains.__getitem__)[:2])


def test_key_parts_that_are_not_given_are_discovered_once_a_run(model, encoder, tmp_path, monkeypatch):
    bare = [make_task("alpha", ()), make_task("gamma")]
    examples = [
        Example("Read the number, then write it in words, please.", str(k), (f"words {k}",), "alpha") for k in range(6)
    ]
    bare[0] = Task("alpha", tuple(examples))
    first = KPIGReplay().select(stage(bare, model, encoder, kept=tmp_path)).record
    assert set(first.gains) == {"alpha", "gamma"}
    assert len(list(tmp_path.rglob("*.json"))) == 1  # one instruction, kept with the run
    from cit_fast.key_parts import sources as key_parts

    monkeypatch.setattr(key_parts, "clause_gains", lambda *_, **__: pytest.fail("searched again"))
    again = KPIGReplay().select(stage(bare, model, encoder, kept=tmp_path)).record
    assert again == first


def test_a_task_that_cannot_be_scored_is_named(model, encoder):
    with pytest.raises(DataError, match=r"none of the 8 instances drawn from task 'delta' can be scored"):
        KPIGReplay(key_parts="data").select(stage([make_task("delta", ())], model, encoder))


def test_a_task_whose_instruction_is_one_clause_counts_as_unheeded(model, encoder, tmp_path):
    """Nothing of it can be masked, and the run goes on."""
    bare = Task("short", tuple(Example("Summarize", f"text {k}", (f"words {k}",), "short") for k in range(6)))
    found = KPIGReplay().select(stage([make_task("alpha"), bare], model, encoder, kept=tmp_path)).record
    assert found.gains["short"] == 0
    assert any("'short' have no part that could be masked" in note for note in found.notes)


def test_nothing_seen_nothing_replayed(model, encoder):
    assert KPIGReplay().select(stage([], model, encoder)) == Selection([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction: 0.0"),
        ({"tasks": 0}, "tasks: 0 is below 1"),
        ({"instances": 0}, "instances: 0 is below 1"),
        ({"scored": 0}, "scored: 0 is below 1"),
        ({"alpha": 1.5}, r"alpha: 1.5 is outside \(0, 1\]"),
        ({"key_parts": "guess"}, "key_parts: 'guess'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        KPIGReplay(**options)
