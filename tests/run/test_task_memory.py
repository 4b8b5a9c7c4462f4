"""A run remembers its tasks: their data may go, and so may the texts of one of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from growth import same, weights
from hypothesis import given
from hypothesis import strategies as st
from killed import at_call, killed
from pydantic import ValidationError
from rich.console import Console

from cit_fast import ContinualModel, ContinualTrainer, learn
from cit_fast.data import Example, Task, TaskStream
from cit_fast.data.kept_task import RecalledTask, bytes_of, kept, read_kept, write_kept
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation import continual_metrics, read_run, read_stages, rescore
from cit_fast.files import write_file
from cit_fast.methods.config import MethodConfig
from cit_fast.methods.memory_order import memory_order
from cit_fast.methods.stage import Stage
from cit_fast.report.status import status
from cit_fast.run import method_run, stage_evaluation, task_memory
from cit_fast.run.config import RunConfig
from cit_fast.run.forget import _without_instruction, drop, remembered
from cit_fast.run.identity import task_digest
from cit_fast.run.rollback import rollback, undo_rollback
from cit_fast.run.task_memory import MemoryConfig

METHODS = [
    {"preset": "random-replay", "replay": {"fraction": 0.2}},
    {"preset": "inscl", "replay": {"per_task": 3}},
    {"preset": "kpig", "replay": {"tasks": 1, "instances": 2}},
    {"preset": "on-policy", "replay": {"fraction": 0.2, "max_new_tokens": 4}},
    {"preset": "surprise", "replay": {"fraction": 0.2}},
    {"preset": "cit-fast", "replay": {"fraction": 0.2}},
    {"preset": "lcia", "router": {"threshold": 0.1}},
    "switch-tokens",
    "ewc",
]
NAMES = ("alpha", "beta", "gamma")


def named(method) -> str:
    return method if isinstance(method, str) else method["preset"]


@pytest.fixture
def folders(tmp_path, stream) -> dict[str, Path]:
    """The tasks of the stream as folders of data."""
    made = {}
    for task in stream:
        made[task.name] = tmp_path / "data" / task.name
        made[task.name].mkdir(parents=True)
        for split in ("train", "test"):
            records = [
                {"instruction": each.instruction, "input": each.input, "output": each.references[0]}
                for each in getattr(task, split)
            ]
            (made[task.name] / f"{split}.json").write_text(json.dumps(records))
    return made


def run(settings, tasks, output: Path, method, memory, **more) -> Path:
    config = {
        **settings,
        "methods": [method],
        "output": str(output),
        "memory": memory,
        "data": {**settings["data"], "dev": 0, "tasks": [str(task) for task in tasks]},
        "evaluation": {**settings["evaluation"], "tasks": "seen"},
        **more,
    }
    (folder,) = ContinualTrainer(config, console=Console(quiet=True)).run()
    return folder


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_the_data_may_go_and_the_bits_are_the_same(settings, folders, tmp_path, method):
    """Three tasks from the start; and one after another, on another machine, each one's data gone before the next."""
    settings["training"] |= {"learning_rate": 1e-2, "max_steps": 2}
    memory = {"per_task": 6}
    whole = run(settings, folders.values(), tmp_path / "whole", method, memory)
    grown = run(settings, [folders["alpha"]], tmp_path / "grown", method, memory)
    for name, gone in (("beta", "alpha"), ("gamma", "beta")):
        shutil.rmtree(folders[gone])
        elsewhere = tmp_path / f"before-{name}" / grown.name
        elsewhere.parent.mkdir()
        grown = grown.rename(elsewhere)
        learn(grown, [str(folders[name])], Console(quiet=True))
    same(grown, whole)
    assert [(task["kept"], task["size"]) for task in remembered(grown)] == [(6, 16)] * 3
    assert ContinualModel.from_run(grown, device="cpu").generate(["Say alpha, then the number.\n\n100"])


@pytest.mark.parametrize("method", METHODS[:3], ids=named)
def test_a_memory_of_all_changes_nothing(settings, folders, tmp_path, method):
    settings["training"] |= {"learning_rate": 1e-2, "max_steps": 2}
    with_memory = run(settings, folders.values(), tmp_path / "with", method, "all")
    without = run(settings, folders.values(), tmp_path / "without", method, None)
    same(with_memory, without)
    assert not (without / "memory").exists()


def test_killed_at_any_write_of_the_memory_the_bits_are_the_same(settings, folders, tmp_path):
    settings["training"] |= {"learning_rate": 1e-2, "max_steps": 2}
    method, memory = METHODS[0], {"total": 9}
    whole = run(settings, folders.values(), tmp_path / "whole", method, memory)
    files = {path.name: path.read_bytes() for path in (whole / "memory").iterdir()}
    writes = 0
    while True:
        output = tmp_path / f"killed-{writes}"
        died = killed(
            lambda output=output: run(settings, folders.values(), output, method, memory),
            at_call(writes + 1, task_memory, "write_kept"),
        )
        again = run(settings, folders.values(), output, method, memory)
        same(again, whole)
        assert {path.name: path.read_bytes() for path in (again / "memory").iterdir()} == files
        if not died:
            break
        writes += 1
    assert writes == 6  # three tasks are written, then one shrinks, then two
    assert killed(
        lambda: run(settings, folders.values(), tmp_path / "commit", method, memory),
        at_call(3, method_run.MethodRun, "_commit"),
    )
    same(run(settings, folders.values(), tmp_path / "commit", method, memory), whole)


def test_a_total_budget_shrinks_and_is_never_exceeded(settings, folders, tmp_path):
    settings["training"] |= {"max_steps": 1}
    tasks = list(folders.values())
    for memory, most in (({"total": 10}, [[10], [5, 5], [4, 3, 3]]), ({"bytes": 400}, None)):
        output = tmp_path / f"{next(iter(memory))}"
        for count in (1, 2, 3):
            folder = run(settings, tasks[:count], output, "sequential", memory)
            held = remembered(folder)
            if most is not None:
                assert [task["kept"] for task in held] == most[count - 1]
            else:
                assert 0 < sum(task["bytes"] for task in held) <= 400
                assert all(task["kept"] >= 1 for task in held)
            assert all(task["evaluation"] == 4 for task in held)


@pytest.mark.parametrize("method", METHODS[1:3], ids=named)
def test_tasks_that_the_budget_has_nothing_left_for(settings, folders, tmp_path, method):
    settings["training"] |= {"max_steps": 1}
    folder = run(settings, folders.values(), tmp_path, method, {"total": 1})
    assert [task["kept"] for task in remembered(folder)] == [1, 0, 0]
    with pytest.raises(ConfigError, match="memory: nothing is kept of 'beta', and objective ewc needs some of it"):
        run(settings, folders.values(), tmp_path / "ewc", "ewc", {"total": 1})


def test_no_examples_are_kept_where_none_are_wanted(settings, folders, tmp_path):
    settings["training"] |= {"max_steps": 1}
    folder = run(settings, list(folders.values())[:2], tmp_path, "switch-tokens", "none")
    shutil.rmtree(folders["alpha"])
    learn(folder, [str(folders["gamma"])], Console(quiet=True))
    assert [task["kept"] for task in remembered(folder)] == [0, 0, 0]
    assert set(read_stages(folder)[-1].scores) == set(NAMES)
    later = [{"from": 2, "replay": "random"}]
    with pytest.raises(ConfigError, match="memory: none keeps no examples, and random of method 'switch-tokens' needs"):
        run(settings, folders.values(), tmp_path, "switch-tokens", "none", stages=later)
    with pytest.raises(ConfigError, match="memory: none keeps no examples, and random of method 'random-replay' needs"):
        run(settings, folders.values(), tmp_path, "random-replay", "none")
    # Answers of the base model to prompts of no task are kept with the run, and need no memory.
    anchored = {"preset": "on-policy", "replay": {"anchor": "prompts.txt"}}
    assert RunConfig(methods=(MethodConfig.model_validate(anchored),), memory="none").memory.keep == "none"


def test_tasks_given_from_python_are_remembered(settings, stream, folders, tmp_path):
    settings["training"] |= {"max_steps": 1}
    config = {**settings, "methods": [METHODS[0]], "output": str(tmp_path / "runs"), "memory": {"per_task": 2}}
    first = TaskStream(stream[:2])
    (folder,) = ContinualTrainer(config, stream=first, console=Console(quiet=True)).run()
    learn(folder, [str(folders["gamma"])], Console(quiet=True))
    assert read_run(folder).tasks == list(NAMES)
    assert read_stages(folder)[3].replayed == {"alpha": 2, "beta": 2}


def test_held_out_tasks_are_remembered(settings, folders, tmp_path):
    settings["training"] |= {"max_steps": 1}
    evaluation = {**settings["evaluation"], "held_out": [str(folders["gamma"])], "held_out_after": "all"}
    folder = run(settings, [folders["alpha"]], tmp_path, "sequential", {"per_task": 4}, evaluation=evaluation)
    shutil.rmtree(folders["gamma"])
    learn(folder, [str(folders["beta"])], Console(quiet=True))
    assert "gamma" in read_stages(folder)[-1].scores


def test_a_rollback_takes_the_memory_along(settings, folders, tmp_path):
    settings["training"] |= {"max_steps": 1}
    folder = run(settings, folders.values(), tmp_path, METHODS[0], {"per_task": 4})
    rollback(folder, 1)
    assert [task["task"] for task in remembered(folder)] == ["alpha"]
    undo_rollback(folder)
    assert [task["task"] for task in remembered(folder)] == list(NAMES)


# -- a task's texts are removed ------------------------------------------------------------------------------------


def texts_below(folder: Path) -> str:
    kinds = {".json", ".jsonl", ".md", ".txt"}
    return "\n".join(path.read_text() for path in folder.rglob("*") if path.is_file() and path.suffix in kinds)


def test_an_instruction_of_the_configuration_goes_with_its_task_alone(settings, folders, tmp_path):
    source = {"path": "tasks/alpha", "instruction": "Do it.", "labels": ["a", "b"]}
    other = {**source, "path": "tasks/beta"}
    first, second = _without_instruction([source, other], "alpha")
    assert (second, {**first, "instruction": "Do it."}) == (other, source)
    assert first["instruction"].startswith("[dropped ")
    assert _without_instruction(None, "alpha") is None
    # The same configuration goes on with the run, wherever its data lies.
    settings["training"] |= {"max_steps": 1}
    tasks = list(folders.values())
    folder = run(settings, tasks[:2], tmp_path, METHODS[0], {"per_task": 6})
    drop(folder, "alpha")
    moved = [shutil.copytree(each, tmp_path / "elsewhere" / each.name) for each in tasks]
    run(settings, moved, tmp_path, METHODS[0], {"per_task": 6})
    assert len(read_stages(folder)) == 4


@pytest.mark.parametrize("method", METHODS[::2], ids=named)
def test_a_dropped_tasks_texts_are_nowhere_and_the_run_goes_on(settings, folders, tmp_path, method):
    settings["training"] |= {"max_steps": 1}
    tasks = list(folders.values())
    folder = run(settings, tasks[:2], tmp_path, method, {"per_task": 6})
    assert "Say alpha, then the number." in texts_below(folder)
    assert drop(folder, "alpha") > 2
    found = texts_below(folder)
    for text in ("Say alpha", "alpha 1", "then the number.\\n\\n10"):
        where = [line[:200] for line in found.splitlines() if text in line and "beta" not in line]
        assert not where
    assert "Say beta, then the number." in found
    learn(folder, [str(folders["gamma"])], Console(quiet=True))
    last = read_stages(folder)[-1]
    assert set(last.scores) == {"beta", "gamma"}
    assert set(last.replayed) <= {"beta"}
    assert continual_metrics(read_run(folder), read_stages(folder)).average_performance is not None
    assert [task["dropped"] for task in remembered(folder)] == [True, False, False]
    assert status(folder)["AP"] is not None
    assert all(entry.agrees for entry in rescore(folder))
    assert ContinualModel.from_run(folder, device="cpu").generate(["Say beta, then the number.\n\n100"])


def test_what_cannot_be_dropped_is_named(settings, folders, tmp_path):
    settings["training"] |= {"max_steps": 1}
    tasks = list(folders.values())
    folder = run(settings, tasks[:2], tmp_path, "ewc", {"per_task": 6})
    with pytest.raises(RunError, match=r"the next stage needs 'beta' \(objective ewc\)"):
        drop(folder, "beta")
    with pytest.raises(ConfigError, match="has no task 'gamma' in its memory; there are alpha, beta"):
        drop(folder, "gamma")
    drop(folder, "alpha")
    with pytest.raises(ConfigError, match="has no task 'alpha' in its memory; there are beta"):
        drop(folder, "alpha")
    plain = run(settings, tasks[:1], tmp_path / "plain", "sequential", None)
    with pytest.raises(RunError, match="keeps no memory of its tasks"):
        drop(plain, "alpha")
    assert killed(
        lambda: run(settings, tasks, tmp_path, "ewc", {"per_task": 6}),
        at_call(1, stage_evaluation, "evaluate"),
    )
    with pytest.raises(RunError, match="stage 3 is under way and may replay 'beta'"):
        drop(folder, "beta")


def test_a_dropped_task_and_a_rollback(settings, folders, tmp_path):
    """What is dropped is dropped in what was taken back, too; and a task may come again with other data."""
    settings["training"] |= {"max_steps": 1}
    tasks = list(folders.values())
    folder = run(settings, tasks, tmp_path, "lcia", {"per_task": 6})
    drop(folder, "beta")
    rollback(folder, 2)
    drop(folder, "alpha")
    assert "Say alpha" not in texts_below(folder)
    with pytest.raises(RunError, match=r"'gamma' was taken back by a rollback; cit-fast prune .* deletes it"):
        drop(folder, "gamma")
    undo_rollback(folder)
    assert read_run(folder).dropped_tasks == ["alpha", "beta"]
    assert continual_metrics(read_run(folder), read_stages(folder)).average_performance is not None
    rollback(folder, 1)
    assert read_run(folder).dropped_tasks == ["alpha"]
    learn(folder, [str(folders["beta"])], Console(quiet=True))
    assert "beta" in read_stages(folder)[-1].scores
    assert [(task["task"], task["dropped"]) for task in remembered(folder)] == [("alpha", True), ("beta", False)]
    drop(folder, "beta")  # also the one that the rollback has kept aside
    assert "Say beta" not in texts_below(folder)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_named_and_loses_nothing(settings, folders, tmp_path):
    settings["training"] |= {"max_steps": 1}
    tasks = list(folders.values())
    folder = run(settings, tasks[:2], tmp_path, METHODS[0], {"per_task": 6})
    data = json.loads((folders["alpha"] / "train.json").read_text())
    (folders["alpha"] / "train.json").write_text(json.dumps(data[:-1]))
    with pytest.raises(RunError, match=r"'alpha' \(number 1\) is no longer .*: its training examples have changed"):
        learn(folder, [str(folders["gamma"])], Console(quiet=True))
    shutil.rmtree(folders["alpha"])
    path = folder / "memory" / "alpha.json"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-20], "alpha.json: damaged"),
        (whole.replace(b'"size": 16', b'"size": 17'), "alpha.json: damaged"),
        (b'{"format_version": 7}', "a memory of format version 7; this cit-fast reads version 1"),
        (b'{"format_version": 1}', "alpha.json: damaged"),
    ):
        write_file(path, content)
        with pytest.raises(RunError, match=message):
            learn(folder, [str(folders["gamma"])], Console(quiet=True))
    write_file(path, whole)
    # A second method has not learned it, and its data is gone.
    other = {**settings, "methods": [METHODS[0], "sequential"], "output": str(tmp_path), "memory": {"per_task": 6}}
    other["data"] = {**settings["data"], "dev": 0, "tasks": [str(task) for task in tasks[:2]]}
    other["evaluation"] = {**settings["evaluation"], "tasks": "seen"}
    with pytest.raises(RunError, match="sequential: task 'alpha' is still to be trained, and its data is gone"):
        ContinualTrainer(other, console=Console(quiet=True)).run()
    learn(folder, [str(folders["gamma"])], Console(quiet=True))
    assert len(read_stages(folder)) == 4
    for wrong in ({}, {"per_task": 3, "total": 4}, {"per_task": 0}, "some", {"per_task": 3, "choose": "best"}):
        with pytest.raises(ValidationError):
            MemoryConfig.model_validate(wrong)


# -- the parts ---------------------------------------------------------------------------------------------------------

words = st.text(min_size=1, max_size=12).filter(lambda text: text.strip() and text.isprintable())


@st.composite
def examples(draw):
    instruction = draw(words)
    messages = draw(st.one_of(st.just(()), st.just((("user", instruction), ("assistant", "yes")))))
    end = draw(st.integers(1, len(instruction)))
    return Example(
        instruction,
        draw(st.text(max_size=8).filter(str.isprintable)),
        tuple(draw(st.lists(words, min_size=1, max_size=3))),
        key_parts=draw(st.sampled_from([(), ((0, end),)])),
        messages=messages,
        images=tuple(draw(st.lists(words, max_size=2))),
        instruction_span=draw(st.sampled_from([None, (0, end)])),
    )


@given(
    train=st.lists(examples(), min_size=1, max_size=4),
    test=st.lists(examples(), max_size=3),
    labels=st.sampled_from([(), ("yes", "no")]),
    wordy=st.sampled_from([None, 2.5]),
)
def test_a_kept_task_reads_as_it_was_written(tmp_path_factory, train, test, labels, wordy):
    task = Task("some-task", tuple(train), (), tuple(test), "accuracy", labels=labels, wordy_above=wordy)
    path = tmp_path_factory.mktemp("kept") / "some-task.json"
    one = kept(task, task_digest(task), range(len(train)), {each.instruction for each in train})
    write_kept(path, one)
    again = read_kept(path)
    assert again == one
    assert (again.size, task_digest(again)) == (len(train), task_digest(task))
    plain = Task(again.name, again.train, again.dev, again.test, again.metric, labels=labels, wordy_above=wordy)
    assert task_digest(plain) == task_digest(task)
    nothing = replace(again, train=(), dev=(), test=(), dropped=True)
    write_kept(path, nothing)
    assert read_kept(path) == nothing
    assert isinstance(nothing, RecalledTask)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    budget=st.sampled_from([{"per_task": 5}, {"total": 17}, {"bytes": 900}, {"keep": "all"}, {"keep": "none"}]),
)
def test_shares_are_within_the_budget_and_do_not_depend_on_how_often_a_memory_shrank(sizes, budget):
    config = MemoryConfig(**budget)
    tasks = [[Example("Say it.", "x" * (7 * k % 23), ("yes",)) for k in range(size)] for size in sizes]
    step: list[list[Example]] = []
    for own in tasks:  # as a run does: what is there, and the new task
        step = [each[:share] for each, share in zip([*step, own], config.shares([*step, own]), strict=True)]
        assert [len(each) for each in step] == config.shares(step)
        if config.total:
            assert sum(map(len, step)) <= config.total
        if config.bytes:
            assert sum(bytes_of(example) for each in step for example in each) <= config.bytes
    if "total" in budget:
        assert sum(map(len, step)) == min(17, sum(map(len, step)) if sum(sizes) < 17 else 17)
    else:
        assert [len(each) for each in step] == config.shares(tasks)


@pytest.mark.parametrize("choose", ["random", "insinfo", "gain", "diverse"])
def test_orders_are_permutations_and_repeat(choose, make_model, encoder):
    own = [
        Example(f"Say {'the long word of it' if k % 3 else 'no'}, then {k % 2}.", f"{k}", ("yes",)) for k in range(9)
    ]
    task = Task("mine", tuple(own))
    stage = Stage(make_model("Llama"), encoder, 1, tasks=(task,), seed="0/1")
    order = memory_order(stage, choose)
    assert sorted(order) == list(range(9))
    assert order == memory_order(stage, choose)
    if choose == "diverse":  # of two alike, one comes late
        twins = Task("mine", (own[0], own[0], own[1], own[2]))
        late = memory_order(replace(stage, tasks=(twins,)), choose)[-1]
        assert late in (0, 1)


def test_insinfo_keeps_more_of_what_says_more(make_model, encoder):
    plain = [Example("Say it.", f"{k}", ("yes",)) for k in range(8)]
    rare = [Example("Translate the legal contract into formal Latin verse.", f"{k}", ("yes",)) for k in range(8)]
    stage = Stage(make_model("Llama"), encoder, 1, tasks=(Task("mine", (*plain, *rare)),), seed="0/1")
    first = memory_order(stage, "insinfo")[:6]
    assert sum(place >= 8 for place in first) > 3


def test_weights_of_a_run_with_a_memory_are_saved(settings, folders, tmp_path):
    settings["training"] |= {"max_steps": 1}
    assert weights(run(settings, [folders["alpha"]], tmp_path, "sequential", {"per_task": 2}))
