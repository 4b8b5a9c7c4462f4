"""Settings that change from a stage on."""

from __future__ import annotations

from pathlib import Path

import pytest
from growth import same, weights
from killed import at_call, killed
from rich.console import Console

from cit_fast import ContinualModel, ContinualTrainer, learn
from cit_fast.data import TaskStream
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.methods.config import MethodConfig
from cit_fast.run import stage_trainer
from cit_fast.run.config import validated
from cit_fast.run.rollback import rollback
from cit_fast.run.stage_settings import StageSettings, method_at, training_at

METHOD = {"preset": "random-replay", "replay": {"fraction": 0.2}}
LATER = [
    {"from": 2, "training": {"learning_rate": 5e-3}, "objective": "kpig", "update": {"name": "balance-ema"}},
    {"from": 3, "replay": {"name": "inscl", "per_task": 3}},
]


def run(settings, stream, output: Path, **more) -> Path:
    evaluation = {**settings["evaluation"], "tasks": "seen"}
    config = {**settings, "methods": [METHOD], "output": str(output), "evaluation": evaluation, **more}
    (folder,) = ContinualTrainer(config, stream=stream, console=Console(quiet=True)).run()
    return folder


def test_settings_change_and_the_run_goes_on_with_the_same_bits(settings, stream, tmp_path):
    settings["training"] |= {"max_steps": 4}
    whole = run(settings, stream, tmp_path / "whole", stages=LATER)
    stages = read_stages(whole)
    assert [stage.settings for stage in stages] == [[], [], LATER[:1], LATER]
    assert stages[1].objective.compared == 0
    assert stages[2].objective.gains
    assert stages[3].replayed == {"alpha": 3, "beta": 3}
    assert stages[3].replay.distances
    assert not stages[1].balance_weights
    assert stages[2].balance_weights
    for number in (2, 3, 4):  # within the second stage, at its end, within the third
        output = tmp_path / f"killed-{number}"
        assert killed(
            lambda output=output: run(settings, stream, output, stages=LATER),
            at_call(number, stage_trainer, "mark_complete"),
        )
        same(run(settings, stream, output, stages=LATER), whole)
    # Learned one after another, with the settings given as they change.
    grown = run(settings, TaskStream(stream[:1]), tmp_path / "grown")
    run(settings, TaskStream(stream[:2]), tmp_path / "grown", stages=LATER[:1])
    same(run(settings, stream, tmp_path / "grown", stages=LATER), whole)
    assert read_run(grown).config["stages"] == LATER
    # And without them the trained stages stay what they are.
    run(settings, stream, tmp_path / "grown")
    assert weights(grown).keys() == weights(whole).keys()


ROUTERS = {
    "lcia, then cit-fast": ("lcia", {"preset": "cit-fast", "replay": {"fraction": 0.2}}),
    "shared, then switch-tokens": ("sequential", {"router": {"name": "switch-tokens", "at_least": 4, "retained": 0.2}}),
    "switch-tokens, then the published": ("switch-tokens", {"router": {"name": "switch", "fraction": 0.5}}),
    "oracle, then shared, then oracle": ("oracle", {"router": "shared"}, {"router": "oracle"}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_begins_in_a_later_stage(settings, stream, tmp_path, name):
    """It knows the earlier tasks with the sets that they have trained; killed and grown, the bits are the same."""
    method, *changes = ROUTERS[name]
    later = [{"from": 2 + k, **change} for k, change in enumerate(changes, start=len(changes) == 1)]
    settings["training"] |= {"max_steps": 2}
    settings["data"] |= {"max_length": 160}
    more = {"methods": [method], "memory": {"per_task": 12}}
    whole = run(settings, stream, tmp_path / "whole", stages=later, **more)
    stages = read_stages(whole)
    sets = [stage.adapter for stage in stages[1:]]
    model = ContinualModel.from_run(whole, device="cpu")
    assert set(model.router.sets) <= set(sets)
    prompts = [task.test[0] for task in stream]
    assert len(model.generate(prompts, max_new_tokens=2)) == 3
    if name == "lcia, then cit-fast":
        assert sets == ["set-01", "set-02", "set-02"]  # goes on with the one that was trained last
        assert model.route(prompts) == ["set-02"] * 3
        assert stages[3].replayed
        assert stages[3].objective.gains
    elif name.endswith("then oracle"):
        assert sets == ["task-alpha", "task-alpha", "task-gamma"]
        assert model.route(prompts) == ["task-alpha", "task-alpha", "task-gamma"]
    else:
        assert len(set(sets)) == (2 if method == "sequential" else 3)
        assert stages[3].routing.learned is not None
    for number in (2, 3):
        output = tmp_path / f"killed-{number}"
        assert killed(
            lambda output=output: run(settings, stream, output, stages=later, **more),
            at_call(number, stage_trainer, "mark_complete"),
        )
        same(run(settings, stream, output, stages=later, **more), whole)
    run(settings, TaskStream(stream[:2]), tmp_path / "grown", stages=[e for e in later if e["from"] == 2], **more)
    same(run(settings, stream, tmp_path / "grown", stages=later, **more), whole)


def test_routers_that_cannot_begin_later(settings, stream, tmp_path):
    settings["training"] |= {"max_steps": 1}
    with pytest.raises(ConfigError, match="router stacked cannot begin in a later stage"):
        run(settings, stream, tmp_path / "a", stages=[{"from": 2, "router": "stacked"}])
    assert not (tmp_path / "a").exists()  # before anything is trained
    with pytest.raises(ConfigError, match="unknown preset 'cit-fats'; did you mean 'cit-fast'"):
        run(settings, stream, tmp_path / "b", stages=[{"from": 2, "preset": "cit-fats"}])
    with pytest.raises(ConfigError, match="preset 'joint' cannot begin in the middle of a run"):
        run(settings, stream, tmp_path / "b", stages=[{"from": 2, "preset": "joint"}])
    with pytest.raises(ConfigError, match="router: 'oracle' grows adapter sets, and adapter: null"):
        run(settings, stream, tmp_path / "b", stages=[{"from": 2, "router": "oracle"}], adapter=None)
    more = {"methods": ["sequential"], "memory": "none"}
    folder = run(settings, stream, tmp_path / "d", stages=[{"from": 2, "router": "oracle"}], **more)
    sets = [stage.adapter for stage in read_stages(folder)[1:]]
    assert sets == ["shared", "task-beta", "task-gamma"]  # names are enough for some
    with pytest.raises(RunError, match="router lcia needs examples of 'alpha', and none are left of it"):
        run(settings, stream, tmp_path / "c", stages=[{"from": 2, "router": "lcia"}], **more)


def test_learn_changes_settings(settings, tmp_path):
    settings["training"] |= {"max_steps": 1}
    settings["data"] |= {"tasks": ["units"], "train": 8, "test": 2, "max_length": 256}
    config = {**settings, "methods": [METHOD]}
    (folder,) = ContinualTrainer(config, console=Console(quiet=True)).run()
    quiet = Console(quiet=True)
    learn(folder, ["records"], quiet, settings=["training.learning_rate=1e-4", "replay.fraction=0.5"])
    changed = {"from": 2, "training": {"learning_rate": 1e-4}, "replay": {"fraction": 0.5}}
    assert [stage.settings for stage in read_stages(folder)] == [[], [], [changed]]
    assert read_stages(folder)[2].replayed == {"units": 4}
    learn(folder, ["dates"], quiet)  # they hold on
    assert read_stages(folder)[3].settings == [changed]


def test_a_call_that_was_killed_goes_on_with_its_settings(settings, tmp_path):
    settings["training"] |= {"max_steps": 4}
    settings["data"] |= {"tasks": ["units"], "train": 8, "test": 2, "max_length": 256}
    (folder,) = ContinualTrainer({**settings, "methods": [METHOD]}, console=Console(quiet=True)).run()

    def more() -> None:
        learn(folder, ["records"], Console(quiet=True), settings=["training.learning_rate=1e-4"])

    assert killed(more, at_call(1, stage_trainer, "mark_complete"))
    assert killed(more, at_call(2, stage_trainer, "mark_complete"))
    more()
    changed = {"from": 2, "training": {"learning_rate": 1e-4}}
    assert read_run(folder).config["stages"] == [changed]
    rollback(folder, 1)  # and they go with the stages that they were for
    assert "stages" not in read_run(folder).config


def test_what_cannot_change_is_named(settings, stream, tmp_path):
    settings["training"] |= {"max_steps": 4}
    folder = run(settings, TaskStream(stream[:2]), tmp_path, stages=LATER[:1])
    with pytest.raises(RunError, match="other settings than those that stages 1 to 2 were trained with"):
        run(settings, stream, tmp_path, stages=[{"from": 2, "training": {"learning_rate": 1.0}}])
    assert killed(lambda: run(settings, stream, tmp_path, stages=LATER[:1]), at_call(1, stage_trainer, "mark_complete"))
    for stages, message in (
        ([{"from": 2, "adapter": {"r": 4}}], "unknown key"),
        ([{"from": 0}], "greater than or equal to 1|greater than 0"),
        ([{"from": 3}, {"from": 2}], "order of their stages"),
        ([{"from": 2, "training": {"seed": 3}}], "set by cit-fast"),
        ([{"from": 2, "replay": {"fraction": 7}}], "outside"),
        ([{"from": 2, "objective": "kpi"}], "unknown name 'kpi'"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(settings, stream, tmp_path, stages=stages)
    assert len(read_stages(folder)) == 3


def test_a_rule_for_the_learning_rate():
    stages = [StageSettings.model_validate({"from": 2, "learning_rate_by_stage": "1/sqrt(k)"})]
    rates = [training_at({"learning_rate": 1e-3}, stages, k).get("learning_rate") for k in (1, 2, 4, 9)]
    assert rates == pytest.approx([1e-3, 1e-3 / 2**0.5, 5e-4, 1e-3 / 3])
    off = [*stages, StageSettings.model_validate({"from": 4, "learning_rate_by_stage": "1"})]
    assert training_at({"learning_rate": 1e-3}, off, 5) == {"learning_rate": 1e-3}
    assert training_at({}, stages, 4)["learning_rate"] == pytest.approx(1e-4)  # of the default, 2e-4
    with pytest.raises(ConfigError, match="learning_rate_by_stage"):
        validated({"stages": [{"from": 2, "learning_rate_by_stage": "2/k"}]}, "here")


def test_parts_over_parts():
    method = MethodConfig.model_validate(METHOD)
    stages = [StageSettings.model_validate(each) for each in ({"from": 2, "replay": {"per_task": 2}}, *LATER)]
    assert method_at(method, stages, 1) == method
    assert method_at(method, stages, 2).replay.options == {"fraction": 0.2, "per_task": 2}
    assert method_at(method, stages, 3).replay.name == "inscl"
    assert method_at(method, stages, 3).router == method.router
