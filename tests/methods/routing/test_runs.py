"""Routers in continual runs: whole families of adapters, kept, resumed, and answered with."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from ablations import spelled
from growth import predictions
from killed import at_call, killed
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import TaskStream
from cit_fast.data.kept_task import hash_of
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation import predictions_path, read_stages, rescore
from cit_fast.methods.routing import load_router
from cit_fast.models.adapter_bank import BASE
from cit_fast.run import run_folder, stage_evaluation, stage_trainer
from cit_fast.run.forget import _scrubbed

PRESETS = ["lcia", "grouping-ema", "switchcit", "switch-tokens", "oracle", "cit-fast-switch"]


# Room for these tasks, with their long instructions and one-word answers.
ROOM = {"data": {"max_length": 128}, "evaluation": {"max_new_tokens": 4}}


def run(settings, stream, method, **more) -> Path:
    settings = {**settings, **ROOM, "methods": spelled([method]), **more}
    return ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()[0]


def files(folder: Path, stage: int) -> dict[str, bytes]:
    """Adapter and router files of a stage."""
    path = folder / "stages" / f"{stage:02d}"
    return {
        str(file.relative_to(path)): file.read_bytes()
        for kind in ("adapters", "router")
        for file in sorted((path / kind).rglob("*"))
        if file.suffix in {".safetensors", ".json"}
    }


@pytest.fixture(scope="module")
def whole_runs(toy_settings, tasks, tmp_path_factory):
    """``whole_runs(preset)``: the folder of an undisturbed run, made once: copy it before changing anything in it."""

    @functools.cache
    def whole(preset) -> Path:
        made = tmp_path_factory.mktemp(preset)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CIT_FAST_CACHE", str(made / "cache"))
            return run({**toy_settings, "output": str(made)}, tasks, preset)

    return whole


@pytest.mark.parametrize("preset", PRESETS)
def test_each_task_has_its_own_set_and_old_ones_never_change(tasks, preset, whole_runs):
    folder = whole_runs(preset)
    stages = read_stages(folder)
    sets = [stage.adapter for stage in stages[1:]]
    assert len(set(sets)) == 3
    assert [stage.routing.new for stage in stages[1:]] == [True] * 3
    for stage in range(1, 4):
        kept = [path.name for path in (folder / f"stages/{stage:02d}/adapters").iterdir() if path.is_dir()]
        assert kept == [sets[stage - 1]]  # the others are where they were trained
    assert load_router(folder / "stages/03/router").sets == tuple(sets)
    final = stages[3].routing
    assert {task: sum(counts.values()) for task, counts in final.answers.items()} == dict.fromkeys(tasks.names, 4)
    assert final.to_base is None
    if preset == "oracle":
        assert (final.accuracy, stages[1].routing.to_base) == (1.0, 1.0)
        assert stages[1].routing.answers["mood"] == {BASE: 4}
        assert [stage.scores["dates"] for stage in stages[1:]] == [stages[1].scores["dates"]] * 3
        assert stages[1].scores["mood"] == stages[0].scores["mood"]  # the base model, as it was


def test_answers_of_sets_that_have_not_changed_are_taken_over(settings, tasks, whole_runs, monkeypatch, tmp_path):
    folder = whole_runs("oracle")
    # After stage 2: the first task's, and the third's by the base model; after stage 3 the first two tasks'.
    assert [stage.taken_over for stage in read_stages(folder)] == [0, 0, 8, 8]
    monkeypatch.setattr(stage_evaluation.StageEvaluation, "_before", lambda *_: None)
    again = run(settings, tasks, "oracle")
    assert [stage.taken_over for stage in read_stages(again)] == [0, 0, 0, 0]
    for stage in range(1, 4):
        for task in tasks.names:
            ours, right = (predictions(each, stage, task) for each in (folder, again))
            assert ours == right
    assert {one.adapter for one in ours} == {"task-mood"}
    stages = read_stages(folder)
    assert [stage.taken_from for stage in stages] == [{}, {}, {"dates": 1, "mood": 1}, {"dates": 1, "mail": 2}]
    kept = [sorted(path.stem for path in folder.glob(f"stages/0{k}/predictions/*")) for k in (1, 2, 3)]
    assert kept == [["dates", "mail", "mood"], ["mail"], ["mood"]]  # what is the same is not written again
    assert all(entry.agrees for entry in rescore(folder))
    copied = shutil.copytree(folder, tmp_path / "copied")
    path = copied / "stages/01/predictions/dates.jsonl"
    path.write_text(path.read_text().replace('"score": 0.0', '"score": 50.0'))
    changed = {entry.stage for entry in rescore(copied) if not entry.intact}
    assert changed == {1, 2, 3}
    assert {entry.stage for entry in rescore(copied, write=True) if not entry.intact} == {1}
    assert all(entry.agrees for entry in rescore(copied))


def test_answers_that_have_changed_on_disk_are_not_taken_over(settings, tasks):
    assert killed(lambda: run(settings, tasks, "oracle"), MOMENTS["inside the second stage"])
    path = predictions_path(Path(settings["output"]) / "oracle", 1, "dates")
    path.write_text(path.read_text().replace('"prediction": "', '"prediction": "x'))
    with pytest.raises(RunError, match=r"predictions/dates.jsonl: damaged"):
        run(settings, tasks, "oracle")


def test_a_checkpoint_holds_the_set_in_training_alone(settings, tasks, monkeypatch):
    seen = []
    mark = stage_trainer.mark_complete
    monkeypatch.setattr(
        stage_trainer,
        "mark_complete",
        lambda path, progress: (
            seen.append([p.parent.name for p in path.glob("*/adapter_model.safetensors")]) or mark(path, progress)
        ),
    )
    run(settings, tasks, "oracle")
    assert seen == [["task-dates"]] * 2 + [["task-mail"]] * 2 + [["task-mood"]] * 2


# One run is killed at both, one after the other: calls are counted from where it went on.
MOMENTS = {
    "inside the second stage": at_call(7, stage_trainer.StageTrainer, "training_step"),
    "before that stage is renamed into place": at_call(1, run_folder, "commit_folder"),
}


@pytest.mark.parametrize("preset", ["switchcit", "lcia", "lcia-always", "cit-fast-switch"])
def test_kill_and_go_on_with_the_same_family(settings, tasks, preset, whole_runs):
    whole = whole_runs(preset)
    for moment, arm in MOMENTS.items():
        assert killed(lambda: run(settings, tasks, preset), arm), moment
    folder = run(settings, tasks, preset)
    resumed, expected = read_stages(folder), read_stages(whole)
    assert [stage.scores for stage in resumed] == [stage.scores for stage in expected]
    for stage in range(1, 4):
        assert files(folder, stage) == files(whole, stage), stage
        ours, theirs = (replace(each[stage].routing, seconds=0) for each in (resumed, expected))
        assert ours == theirs, stage


def test_a_reused_set_trains_on_and_learns_more_instructions(settings, tasks):
    again = dataclasses.replace(
        tasks[0], name="again", train=tuple(dataclasses.replace(e, task="again") for e in tasks[0].train)
    )
    stream = TaskStream((tasks[0], tasks[1], again))
    folder = run(settings, stream, {"preset": "lcia", "replay": {"name": "random", "fraction": 0.5}})
    stages = read_stages(folder)
    assert [stage.adapter for stage in stages[1:]] == ["set-01", "set-02", "set-01"]
    assert [stage.routing.new for stage in stages[1:]] == [True, True, False]
    assert stages[3].routing.assignment.scores["set-01"] == pytest.approx(1.0)
    assert stages[3].replayed == {"dates": 8, "mail": 8}
    assert [bool(stage.balance_weights) for stage in stages[1:]] == [False, False, True]  # when: retrained
    assert stages[3].taken_over <= 4  # at most the second task's
    before, after = files(folder, 1), files(folder, 3)
    changed = {name for name in before if before[name] != after[name] and name.startswith("adapters")}
    assert changed == {"adapters/set-01/adapter_model.safetensors"}


def test_what_cannot_be_routed(settings, tasks):
    with pytest.raises(ConfigError, match="router: 'switch' grows adapter sets, and adapter: null trains the model"):
        run(settings, tasks, "switchcit", adapter=None)
    with pytest.raises(ConfigError, match="router: a joint run trains all tasks at once"):
        run(settings, tasks, {"preset": "joint", "name": "j", "router": "lcia"})
    with pytest.raises(ConfigError, match=r"router\.held_out: .*nowhere"):
        run(settings, tasks, {"preset": "switch-tokens", "router": {"held_out": ["nowhere"]}})


def test_a_router_without_its_memory_is_refused(settings, tasks, edit_record, tmp_path, whole_runs):
    whole = tmp_path / "whole"
    shutil.copytree(whole_runs("lcia"), whole)
    shutil.rmtree(whole / "stages/03")
    edit_record(whole / "run.json", status="running")

    def resumed(change):
        """A run that was stopped after its second stage goes on."""
        own = {**settings, "output": settings["output"] + change.__name__}
        shutil.copytree(whole, Path(own["output"]) / "lcia")
        change(Path(own["output"]) / "lcia/stages")
        run(own, tasks, "lcia")

    def no_router(stages):
        shutil.rmtree(stages / "02/router")

    def no_adapter(stages):
        shutil.rmtree(stages / "01/adapters/set-01")

    def damaged(stages):
        path = stages / "02/router/router.json"
        path.unlink()
        path.write_text("{")

    for change, message in (
        (no_router, r"02/router/router\.json: damaged \(it is not there\)"),
        (no_adapter, r"01/adapters/set-01/adapter_config\.json: damaged \(it is not there\)"),
        (damaged, r"02/router/router\.json: damaged"),
    ):
        with pytest.raises(RunError, match=message):
            resumed(change)


@pytest.mark.parametrize("method", ["lcia", "switch-tokens"])
def test_a_stage_writes_what_its_router_has_learned_anew(tasks, tmp_path, whole_runs, method):
    """A stage's router is whole, made of what the stages until it have written, none of it twice."""
    whole = whole_runs(method)
    sets = [stage.adapter for stage in read_stages(whole)[1:]]
    for stage in (1, 2, 3):
        router = load_router(whole / f"stages/{stage:02d}/router")
        assert router.sets == tuple(dict.fromkeys(sets[:stage]))
        router.save(tmp_path / f"{stage}")
        written = json.loads((whole / f"stages/{stage:02d}/router/router.json").read_text())
        assert ("state" in written, "changes" in written) == (stage == 1, stage > 1)
        again = load_router(tmp_path / f"{stage}")
        assert again.state() == router.state() == json.loads((tmp_path / f"{stage}/router.json").read_text())["state"]
    texts = [(whole / f"stages/{stage:02d}/router/router.json").read_text() for stage in (1, 2, 3)]
    assert [text.count(f'"{sets[0]}"') for text in texts].count(0) >= 1

    copied = tmp_path / "copied"
    shutil.copytree(whole, copied)
    (copied / "stages/01/router/router.json").write_text("{")
    with pytest.raises(RunError, match=r"stages/01/router/router\.json: damaged"):
        load_router(copied / "stages/03/router")
    path = copied / "stages/01/router/router.json"
    path.write_text((whole / "stages/01/router/router.json").read_text().replace(f'"{sets[0]}"', f'"{sets[1]}"'))
    with pytest.raises(RunError, match=r"stages/01/router/router\.json: damaged \(its checksum is that of another"):
        load_router(copied / "stages/03/router")
    shutil.copytree(whole / "stages/03/router", tmp_path / "apart")
    with pytest.raises(RunError, match="it tells changes, and there is no stage before it"):
        load_router(tmp_path / "apart")


@pytest.mark.parametrize("method", ["lcia", "switch-tokens"])
def test_a_routers_own_words_are_nobodys_texts(tasks, tmp_path, whole_runs, method):
    """A task may answer with words that router.json is made of, and with names of tasks."""
    shutil.copytree(whole_runs(method), tmp_path / "run")
    instruction = tasks.tasks[1].train[0].instruction
    words = "changes at is more state set_of set latest codebook known reworded learned apart reject_below options"
    texts = {hash_of(word) for word in [*words.split(), *tasks.names, instruction]}
    before = {k: load_router(tmp_path / f"run/stages/0{k}/router").state() for k in (1, 2, 3)}
    found = 0
    for path in sorted((tmp_path / "run").glob("stages/*/router/router.json")):
        text = _scrubbed(path, texts)
        if text is not None:
            found += 1
            path.write_text(text)
            assert instruction not in text
    assert found == (method == "lcia")
    for k, state in before.items():
        after = load_router(tmp_path / f"run/stages/0{k}/router").state()
        assert after.keys() == state.keys()
        assert {**after, "codebook": None} == {**state, "codebook": None}


def test_the_file_of_a_router_of_ones_own_is_all_texts(tmp_path):
    path = tmp_path / "router.json"
    for content in ('{"more": ["is"]}', '["more", {"a": "is"}]'):
        path.write_text(content)
        assert '"is"' not in (_scrubbed(path, {hash_of("is")}) or '"is"')
    path.write_text('{"more": "a"}')
    assert _scrubbed(path, {hash_of("is")}) is None
