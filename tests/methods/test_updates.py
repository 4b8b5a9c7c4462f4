"""The update of a method in runs: which stages are averaged, and an average that lives across them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from killed import at_call, killed
from rich.console import Console
from safetensors.torch import load_file
from toy_runs import adapter

from cit_fast import ContinualTrainer
from cit_fast.data import TaskStream
from cit_fast.errors import CitFastError, RunError
from cit_fast.evaluation import read_stages
from cit_fast.methods.stage import Stage
from cit_fast.methods.updates import BalanceEMAUpdate
from cit_fast.optim import AdamWBalanceEMA
from cit_fast.run import run_folder, stage_evaluation, stage_trainer

STREAM_WIDE = {"name": "balance-ema", "rule": "fixed", "decay": 0.5, "scope": "stream"}


def run(settings, stream, update, name="averaged", **more) -> Path:
    method = {"preset": "sequential", "name": name, "update": update}
    settings = {**settings, "methods": [{**method, **more.pop("method", {})}], **more}
    return ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()[0]


def live(folder: Path, stage: int, name: str = "shared") -> dict[str, torch.Tensor]:
    return load_file(folder / f"stages/{stage:02d}/live/{name}.safetensors")


@pytest.mark.parametrize(
    ("when", "averaged"),
    [("always", [True] * 3), ("retrained", [False, True, True]), ("from-second", [False, True, True])],
)
def test_which_stages_are_averaged(settings, stream, when, averaged):
    folder = run(settings, stream, {"name": "balance-ema", "when": when})
    assert [bool(stage.balance_weights) for stage in read_stages(folder)[1:]] == averaged


def test_a_new_set_is_trained_plainly(settings, stream):
    """With a set for each task, ``retrained`` is no average at all, and ``from-second`` one of each but the first."""
    per_task = {"router": "oracle"}
    settings["methods"] = []
    folders = {
        when: run(settings, stream, {"name": "balance-ema", "when": when}, name=when, method=per_task)
        for when in ("retrained", "from-second", "always")
    }
    plain = run(settings, stream, "plain", name="plain", method=per_task)
    for index, stage in enumerate(read_stages(plain)[1:], start=1):
        weights = {name: adapter(folder, index, stage.adapter) for name, folder in folders.items()}
        expected = adapter(plain, index, stage.adapter)

        def same(name, weights=weights, expected=expected):
            return all(torch.equal(weights[name][key], expected[key]) for key in expected)

        assert (same("retrained"), same("from-second"), same("always")) == (True, index == 1, False)


def test_told_by_the_run_whether_the_set_is_new(settings, stream, monkeypatch):
    seen = []
    original = BalanceEMAUpdate.wrap
    monkeypatch.setattr(
        BalanceEMAUpdate,
        "wrap",
        lambda self, optimizer, stage: seen.append((stage.index, stage.new_set)) or original(self, optimizer, stage),
    )
    run(settings, stream, {"name": "balance-ema"})
    assert seen == [(1, True), (2, False), (3, False)]


# One average for the whole stream


def test_an_average_of_the_whole_stream(settings, stream, monkeypatch):
    """Live weights go on where they were, the average as well; both by hand, step by step."""
    steps = []
    original = AdamWBalanceEMA.step

    def step(self, closure=None):
        started = [param.detach().clone() for param in self._parameters()]
        original(self, closure)
        self.flush()
        now = [param.detach().clone() for param in self._parameters()]
        steps.append((started, now, [average.clone() for _, average in self._averages()]))

    monkeypatch.setattr(AdamWBalanceEMA, "step", step)
    folder = run(settings, stream, STREAM_WIDE)
    per_stage = len(steps) // 3
    for index, (started, after, averages) in enumerate(steps):
        if index:
            _, before, averages_before = steps[index - 1]
            assert all(torch.equal(x, y) for x, y in zip(started, before, strict=True)), index  # live weights go on
            for average, old, new in zip(averages, averages_before, after, strict=True):
                torch.testing.assert_close(average, (old + new) / 2)
    for stage in (1, 2, 3):
        _, after, averages = steps[stage * per_stage - 1]
        kept, answering = live(folder, stage), adapter(folder, stage)
        assert sorted(float(x.sum()) for x in kept.values()) == sorted(float(x.sum()) for x in after)
        assert sorted(float(x.sum()) for x in answering.values()) == sorted(float(x.sum()) for x in averages)


MOMENTS = {
    "inside the second stage": at_call(7, stage_trainer.StageTrainer, "training_step"),
    "between its last checkpoint and its evaluation": at_call(1, stage_evaluation, "evaluate"),
    "before that stage is renamed into place": at_call(1, run_folder, "commit_folder"),
    "inside the third": at_call(2, stage_trainer.StageTrainer, "training_step"),
}


@pytest.mark.parametrize("rule", ["released", "paper"])
def test_an_average_of_the_stream_killed_and_resumed(settings, stream, rule):
    update = {"name": "balance-ema", "rule": rule, "scope": "stream", "when": "from-second"}
    whole = run({**settings, "output": settings["output"] + "-whole"}, stream, update)
    for moment, arm in MOMENTS.items():
        assert killed(lambda: run(settings, stream, update), arm), moment
    folder = run(settings, stream, update)
    resumed, expected = read_stages(folder), read_stages(whole)
    assert [stage.balance_weights for stage in resumed] == [stage.balance_weights for stage in expected]
    assert not (folder / "stages/01/live").exists()
    for stage in (1, 2, 3):
        pairs = [(adapter(folder, stage), adapter(whole, stage))]
        pairs += [(live(folder, stage), live(whole, stage))] if stage > 1 else []
        for ours, theirs in pairs:
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), stage


def test_every_set_has_live_weights_of_its_own(settings, stream):
    tasks = (stream[0], stream[1], dataclasses.replace(stream[0], name="again"))
    update = {**STREAM_WIDE, "when": "always"}
    folder = run(settings, TaskStream(tasks), update, method={"router": {"name": "lcia", "start": "random"}})
    names = [stage.adapter for stage in read_stages(folder)[1:]]
    assert names == ["set-01", "set-02", "set-01"]
    kept = {stage: sorted(path.stem for path in (folder / f"stages/0{stage}/live").iterdir()) for stage in (1, 2, 3)}
    assert kept == {1: ["set-01"], 2: ["set-02"], 3: ["set-01"]}
    assert any(not torch.equal(live(folder, 1, "set-01")[k], v) for k, v in live(folder, 3, "set-01").items())


def test_damaged_live_weights_are_named(settings, stream):
    two = TaskStream(stream[:2])
    folder = run(settings, two, STREAM_WIDE)
    path = folder / "stages/01/live/shared.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    stage = folder / "stages/02"
    (stage / "stage.json").unlink()
    for file in sorted(stage.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    stage.rmdir()
    with pytest.raises(RunError, match=r"live/shared\.safetensors"):
        run(settings, two, STREAM_WIDE)


def test_a_new_set_can_start_from_the_one_before(settings, stream):
    """The first step of a set that starts at ``previous`` is taken from the weights of the set before."""
    two = TaskStream(stream[:2])
    settings["training"] = {**settings["training"], "learning_rate": 0.0}
    router = {"name": "lcia", "threshold": 2.0, "start": "previous"}
    folder = run(settings, two, "plain", method={"router": router})
    first, second = adapter(folder, 1, "set-01"), adapter(folder, 2, "set-02")
    assert all(torch.equal(first[name], second[name]) for name in first)


# BEMA's correction


def test_the_correction_by_definition():
    """The average plus (10 + T)^-eta times the way from the first weights to the last."""
    layer = torch.nn.Linear(3, 2)
    stage = Stage(layer, None, index=2)
    plain, corrected = BalanceEMAUpdate(rule="fixed", decay=0.9), BalanceEMAUpdate("fixed", 0.9, bias_power=0.4)
    found = {}
    first = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for update in (plain, corrected):
        layer.load_state_dict(first)
        update.begin(stage)
        optimizer = update.wrap(torch.optim.AdamW(layer.parameters(), lr=0.1), stage)
        for _ in range(5):
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        last = {name: p.detach().clone() for name, p in layer.named_parameters()}
        update.finish(optimizer, dataclasses.replace(stage, steps=5))
        found[update] = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for name, average in found[plain].items():
        expected = average + (10 + 5) ** -0.4 * (last[name] - first[name])
        torch.testing.assert_close(found[corrected][name], expected, rtol=1e-6, atol=1e-7)


def test_a_corrected_average_killed_and_resumed(settings, stream):
    settings["training"] |= {"learning_rate": 1e-2}
    update = {"name": "balance-ema", "bias_power": 0.2}
    whole = run(settings, stream, update, name="whole")
    for arm in (at_call(2, stage_trainer, "mark_complete"), at_call(1, stage_evaluation, "evaluate")):
        assert killed(lambda: run(settings, stream, update, name="killed"), arm)
    folder = run(settings, stream, update, name="killed")
    without = run(settings, stream, {"name": "balance-ema"}, name="without")
    ours, theirs, plain = (adapter(each, 3) for each in (folder, whole, without))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias_power": -0.1}, "bias_power: -0.1 is negative"),
        ({"bias_power": 0.2, "scope": "stream"}, "use scope: task"),
        ({"when": "never"}, "when: 'never' is unknown; expected always, retrained or from-second"),
        ({"average_dtype": "float8"}, "average_dtype: 'float8' is unknown"),
        ({"rule": "paper", "scale": 0.0}, "scale=0.0 must be above 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(CitFastError, match=message):
        BalanceEMAUpdate(**options)


def test_every_option_reaches_a_yaml(settings, stream):
    update = {
        "name": "balance-ema",
        "rule": "paper",
        "fallback": 0.001,
        "scale": 0.01,
        "start": "after",
        "rounding": "nearest",
        "average_dtype": "bfloat16",
    }
    folder = run(settings, TaskStream(stream[:1]), update)
    assert all(weights[1] > 0 for weights in read_stages(folder)[1].balance_weights)
    made = BalanceEMAUpdate(**{key: value for key, value in update.items() if key != "name"})
    layer = torch.nn.Linear(2, 2)
    optimizer = made.wrap(torch.optim.AdamW(layer.parameters()), Stage(layer, None))
    found = {key: getattr(optimizer, key) for key in ("rule", "fallback", "scale", "start", "rounding")}
    assert found == {key: update[key] for key in found}
    assert optimizer.average_dtype == torch.bfloat16
