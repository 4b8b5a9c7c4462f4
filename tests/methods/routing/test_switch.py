from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save_file

from cit_fast.data import Example, Task
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.methods.routing import SwitchRouter, SwitchTokensRouter, load_router, switch, train_switch
from cit_fast.methods.routing import features as features_of
from cit_fast.methods.routing.familiarity import Familiarity
from cit_fast.models.adapter_bank import BASE


def learn(router, tasks, stage):
    learned = []
    for number, task in enumerate(tasks):
        router.assign(stage(number, task))
        learned.append(router.learn(stage(number, task)))
    return learned


@pytest.fixture
def clouds():
    """Three clouds of points that a line cannot part: two classes, one of them on both sides of the other."""
    chance = torch.Generator().manual_seed(1)
    centres = torch.tensor([[-4.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    points = (centres[:, None] + 0.5 * torch.randn(3, 40, 2, generator=chance)).reshape(-1, 2)
    return points, torch.tensor([0] * 40 + [1] * 40 + [0] * 40)


def test_the_network_learns_what_a_line_cannot(clouds):
    points, labels = clouds
    network = train_switch(points, labels, 2, seed=0, epochs=40)
    assert (network(points).argmax(1) == labels).float().mean() > 0.97
    inside = torch.nn.Sequential(torch.nn.Linear(2, 256), torch.nn.ReLU(), torch.nn.Linear(256, 2))
    weights = (network.hidden_weight, network.hidden_bias, network.weight, network.bias)
    inside.load_state_dict(dict(zip(inside.state_dict(), weights, strict=True)))
    assert torch.allclose(network(points), inside((points - network.mean) / network.scale), atol=1e-5)


def test_the_same_seed_gives_the_same_bits_whatever_else_draws_numbers(clouds):
    points, labels = clouds
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = train_switch(points, labels, 2, seed=3, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    with torch.no_grad():
        same, other = (train_switch(points, labels, 2, seed=seed, epochs=2) for seed in (3, 4))
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert not one.weight.requires_grad


def test_a_class_with_few_examples_is_drawn_as_often():
    points = torch.cat([torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), torch.full((1, 4), 0.5)])
    labels = torch.tensor([0] * 200 + [1])
    found = [train_switch(points, labels, 2, seed=0, epochs=3, balanced=each)(points[-1:]) for each in (True, False)]
    assert [int(scores.argmax()) for scores in found] == [1, 0]


# The states of a model that has learned nothing tell its last token, and no more: there it reads what tells the task.
@pytest.mark.parametrize(("features", "reads"), [("base", "instruction"), ("tokens", "prompt")])
def test_prompts_go_to_their_tasks_set(tasks, stage, features, reads):
    router = SwitchTokensRouter(features, retained=0.25, at_least=1, reads=reads, reject=0)
    decided = learn(router, tasks, stage)
    assert router.sets == ("task-dates", "task-mail", "task-mood")
    assert [each.examples for each in decided] == [16, 4 + 16, 8 + 16]
    assert [each.retained for each in decided] == [4, 8, 12]
    found = router.answer([example for task in tasks for example in task.test], stage())
    right = [name for name in router.sets for _ in range(4)]
    assert sum(map(str.__eq__, found, right)) >= 11
    assert router.answer([], stage()) == []


def test_a_new_set_starts_where_it_is_told_to(tasks, stage):
    dates, mail, mood = tasks
    again = replace(dates, name="again")
    started = {}
    for start in ("random", "previous", "nearest"):
        router = SwitchTokensRouter(start=start, reject=0)
        started[start] = []
        for index, task in enumerate((dates, mail, mood, again), start=1):
            started[start].append(router.assign(stage(index, task)).start_from)
            router.learn(stage(index, task))
    assert started["random"] == [None] * 4
    assert started["previous"] == [None, "task-dates", "task-mail", "task-mood"]
    assert [started["nearest"][n] for n in (0, 1, 3)] == [None, "task-dates", "task-dates"]


def test_what_is_far_from_everything_goes_to_the_base_model(tasks, stage):
    router = SwitchTokensRouter("tokens", retained=0.5, reject=0.15)
    learn(router, tasks, stage)
    strange = Example("%&/ 7777 ~~~ {}[] 31415926 <<>>", references=("-",))
    assert router.answer([strange, tasks[1].test[0]], stage()) == [BASE, "task-mail"]


def worded(name: str, *instructions: str) -> Task:
    def examples(start: int) -> tuple[Example, ...]:
        return tuple(Example(text, f"input {start + k}", ("x",), name) for k, text in enumerate(instructions * 6))

    return Task(name, examples(0), examples(50), examples(80))


def test_another_wording_of_a_known_task_is_no_stranger(stage):
    """The threshold comes from prompts whose own wording is left out of what their task is known by."""
    tasks = [
        worded("dates", "Write the date as day and month.", "Give day and month of the date.", "Which day and month?"),
        worded("mail", "Find the e-mail address.", "Give the address of the e-mail.", "Which e-mail address is it?"),
    ]
    router = SwitchTokensRouter()
    learn(router, tasks, stage)
    apart = []
    familiarity = Familiarity()
    for task in tasks:
        learned, asked = (router._read(examples, stage())[0] for examples in (task.train, task.dev))
        for wording in task.instructions:
            without = copy.deepcopy(familiarity)
            without.learn(learned[[k for k, each in enumerate(task.train) if each.instruction != wording]])
            apart += without(asked[[k for k, each in enumerate(task.dev) if each.instruction == wording]]).tolist()
        familiarity.learn(learned)
    assert sorted(router._reworded) == pytest.approx(sorted(apart))
    assert router._rejection.below == pytest.approx(sorted(apart)[int(0.1 * len(apart))])
    other = [
        Example("Write day and month of the date.", "input 3", ("-",)),
        Example("Which is the address of the e-mail?", "input 7", ("-",)),
    ]
    scores = router._familiarity(router._read(other, stage())[0])
    plain = router._familiarity(torch.cat(router._known)).min()  # what the threshold used to be
    assert router._rejection.below < scores.min() < scores.max() < plain
    strange = Example("%&/ 7777 ~~~ {}[] 31415926 <<>>", references=("-",))
    assert router.answer([*other, strange], stage()) == ["task-dates", "task-mail", BASE]
    alone = SwitchTokensRouter()  # of one wording there is nothing else to know it by
    learn(alone, [worded("dates", "Write the date.")], stage)
    assert alone._reworded == []
    assert alone._rejection.below == pytest.approx(float(alone._familiarity(alone._known[0]).min()))


def test_of_a_small_task_enough_is_kept(tasks, stage):
    assert [each.retained for each in learn(SwitchTokensRouter("tokens", at_least=6), tasks, stage)] == [6, 12, 18]
    assert [each.retained for each in learn(SwitchTokensRouter("tokens"), tasks, stage)] == [16, 32, 48]  # all


def test_unknown_tasks_set_the_threshold(tasks, stage, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": f"%&/ 77{k} ~~~ {{}}[]", "output": "-"}) + "\n" for k in range(8))
    )
    router = SwitchTokensRouter("tokens", reject=0.01, held_out=[str(path)])
    learn(router, tasks, stage)
    strange = [Example(f"%&/ 33{k} ~~~ {{}}[]", references=("-",)) for k in range(5)]
    assert router.answer(strange, stage()) == [BASE] * 5
    known = [example for task in tasks for example in task.dev]
    assert router.answer(known, stage()).count(BASE) == 0


def test_a_long_prompt_is_read_in_part_and_counted(tasks, stage):
    decided = learn(SwitchTokensRouter("base", max_length=8), tasks[:1], stage)[0]
    assert decided.truncated > 0
    assert decided.notes == [f"{len(set(tasks[0].train))} prompts are longer than 8 tokens; their middle was not read."]
    assert learn(SwitchTokensRouter("base", max_length=500), tasks[:1], stage)[0].truncated == 0


def test_save_and_load(tasks, stage, tmp_path):
    router = SwitchTokensRouter(retained=0.25, hidden=8, reject=0.1)
    learn(router, tasks, stage)
    router.save(tmp_path)
    texts = " ".join(path.read_text(errors="replace") for path in tmp_path.iterdir())
    assert tasks[0].train[0].instruction not in texts  # features are kept, never texts
    twin = load_router(tmp_path)
    examples = [example for task in tasks for example in task.test]
    assert twin.answer(examples, stage()) == router.answer(examples, stage())
    assert (twin.sets, twin.hidden, twin.state()) == (router.sets, 8, router.state())
    twin.save(tmp_path / "again")
    for name in ("router.json", "switch.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_learning_goes_on_after_loading_as_if_nothing_had_happened(tasks, stage, tmp_path):
    whole, first = SwitchTokensRouter(retained=0.25), SwitchTokensRouter(retained=0.25)
    learn(whole, tasks, stage)
    learn(first, tasks[:2], stage)
    first.save(tmp_path / "two")
    again = load_router(tmp_path / "two")
    again.assign(stage(2, tasks[2]))
    again.learn(stage(2, tasks[2]))
    for router, name in ((whole, "whole"), (again, "again")):
        router.save(tmp_path / name)
    for name in ("router.json", "switch.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_damage_is_named(tasks, stage, tmp_path):
    router = SwitchTokensRouter("tokens", hidden=4)
    learn(router, tasks, stage)
    router.save(tmp_path)
    path, saved = tmp_path / "switch.safetensors", json.loads((tmp_path / "router.json").read_text())
    del saved["checksum"]
    content = path.read_bytes()
    tensors = load(content)
    for damage, message in (
        (lambda: path.write_bytes(content[:50]), "damaged"),
        (lambda: save_file({k: v for k, v in tensors.items() if k != "network.bias"}, path), r"network\.bias"),
        (lambda: save_file({**tensors, "network.bias": torch.zeros(2)}, path), "tells 2 tasks apart"),
        (path.unlink, "not there; it holds the switch network"),
    ):
        damage()
        with pytest.raises(RunError, match=message) as caught:
            load_router(tmp_path)
        assert str(path) in str(caught.value)
    path.write_bytes(content)
    (tmp_path / "router.json").write_text(json.dumps({**saved, "state": {**saved["state"], "learned": "many"}}))
    with pytest.raises(RunError, match=r"router\.json: damaged"):
        load_router(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retained": 0}, "retained: 0; expected a share"),
        ({"retained": 1.5}, "retained: 1.5"),
        ({"hidden": 0}, "hidden: 0; expected at least 1"),
        ({"max_length": 1}, "max_length: 1; expected at least 2 tokens"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0"),
        ({"reads": "mind"}, "reads: 'mind'"),
        ({"reject": -0.1}, "reject: -0.1"),
        ({"reject_reworded": 1.0}, "reject_reworded: 1.0"),
        ({"start": "zero"}, "start: 'zero' is unknown; expected random, previous or nearest"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        SwitchTokensRouter(**options)


def test_nothing_to_choose_from(tasks, stage):
    with pytest.raises(RunError, match="no task has been learned yet"):
        SwitchTokensRouter().answer(tasks[0].test, stage())
    with pytest.raises(ConfigError, match=r"router\.features .*: no folder 'no such model'"):
        learn(SwitchTokensRouter("no such model"), tasks, stage)
    blank = Example("", references=("x",), messages=(("user", ""), ("assistant", "x")))
    router = SwitchTokensRouter("tokens")
    learn(router, tasks[:1], stage)
    with pytest.raises(DataError, match="an empty prompt cannot be routed"):
        router.answer([blank], stage())


# -- the published switch ------------------------------------------------------------------------------------------


def test_the_published_network_by_hand(tasks, stage, monkeypatch):
    """Raw last-token states of whole prompts, a fraction of every task, AdamW, in plain torch."""
    seen = []
    original = switch.train_switch

    def watched(features, labels, classes, **options):
        seen.append((features, labels, classes, options))
        return original(features, labels, classes, **options)

    monkeypatch.setattr(switch, "train_switch", watched)
    router = SwitchRouter(fraction=0.25)
    decided = learn(router, tasks, stage)
    assert [each.examples for each in decided] == [4, 8, 12]  # of every task a quarter, the new one's too
    assert [each.retained for each in decided] == [4, 8, 12]
    features, labels, classes, options = seen[-1]
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    expected = {"hidden": 200, "learning_rate": 1e-3, "epochs": 20, "batch_size": 32, "balanced": False}
    assert {key: options[key] for key in expected} == expected

    chance = torch.Generator().manual_seed(options["seed"])
    inside = torch.nn.Sequential(
        torch.nn.Linear(features.shape[1], 200), torch.nn.ReLU(), torch.nn.Linear(200, classes)
    )
    for parameter, columns in zip(inside.parameters(), [features.shape[1]] * 2 + [200] * 2, strict=True):
        parameter.data.uniform_(-(columns**-0.5), columns**-0.5, generator=chance)
    optimizer = torch.optim.AdamW(inside.parameters(), lr=1e-3)
    for _ in range(20):
        order = torch.randperm(len(labels), generator=chance)  # one batch: twelve are fewer than 32
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(inside(features[order]), labels[order]).backward()
        optimizer.step()
    torch.testing.assert_close(router._network(features), inside(features), rtol=1e-5, atol=1e-6)


def test_the_published_switch_reads_what_the_model_is_given(tasks, stage):
    router, state = SwitchRouter(), stage()
    (text,) = router._texts([tasks[0].test[0]], state)
    assert text == state.encoder.tokenizer.decode(state.encoder.prompt(tasks[0].test[0]))
    assert tasks[0].test[0].instruction in text
    assert [each.examples for each in learn(router, tasks, stage)] == [1, 2, 3]  # 0.0001 of 16: at least one
    assert BASE not in router.answer([Example("%&/ ~~~", references=("-",))], state)  # no reject class
    with pytest.raises(DataError, match="an empty prompt cannot be routed"):
        router.answer([Example("", references=("x",), messages=(("user", " "), ("assistant", "x")))], state)


def test_the_first_tokens_of_a_long_prompt_are_read(stage):
    features = features_of.build_features("base", stage(), 4, "end")
    texts = ["one two three four five six seven eight nine", "one two three four 5 6 7 8 9"]
    found = features.embed(texts)
    assert features.truncated == 2
    assert torch.equal(found[0], found[1])
    middle = features_of.build_features("base", stage(), 4).embed(texts)
    assert not torch.equal(middle[0], middle[1])


def test_the_published_switch_is_saved_and_loaded(tasks, stage, tmp_path):
    router = SwitchRouter(fraction=0.25, hidden=8)
    learn(router, tasks, stage)
    router.save(tmp_path)
    twin = load_router(tmp_path)
    assert type(twin) is SwitchRouter
    examples = [example for task in tasks for example in task.test]
    assert twin.answer(examples, stage()) == router.answer(examples, stage())
    with pytest.raises(ConfigError, match="retained: 2"):
        SwitchRouter(fraction=2)
