"""Kill -9 at every kind of moment; the same command ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killed import at_call, die, killed
from safetensors.torch import load_file
from toy_runs import adapter, start

from cit_fast.errors import RunError
from cit_fast.evaluation import read_stages
from cit_fast.optim import AdamWBalanceEMA
from cit_fast.run import cached_scores, method_run, run_folder, stage_evaluation, stage_trainer


def half_written_checkpoint():
    """The newest checkpoint is cut in half and gets no marker."""

    def interrupted(checkpoint, progress):
        if progress["step"] == 4 and "02" in str(checkpoint):
            for path in (path for path in checkpoint.rglob("*") if path.is_file()):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            die()
        original(checkpoint, progress)

    original = stage_trainer.mark_complete
    stage_trainer.mark_complete = interrupted


def inside_an_optimizer_step():
    for optimizer in (torch.optim.AdamW, AdamWBalanceEMA):
        at_call(3, optimizer, "step")()


# One run is killed at all of them, one after another: calls are counted from where it went on.
MOMENTS = {
    "before anything": at_call(1, method_run, "load_model"),
    "while the untrained model answers": at_call(1, cached_scores, "evaluate"),
    "inside an optimizer step of stage 1": inside_an_optimizer_step,
    "while a checkpoint of stage 2 is written": half_written_checkpoint,
    "between its last checkpoint and its evaluation": at_call(1, stage_evaluation, "evaluate"),
    "before stage 2 is renamed into place": at_call(1, run_folder, "commit_folder"),
    "after stage 2, before stage 3": at_call(2, method_run, "train_adapter"),
}
COMMITTED = (0, 0, 1, 2, 2, 2, 3)


@pytest.mark.parametrize("method", ["sequential", "lcia-ema"])
def test_kill_at_any_moment_and_go_on(settings, stream, method, tmp_path, monkeypatch):
    settings["methods"] = [method]
    whole = {**settings, "output": settings["output"] + "-whole"}
    start(whole, stream)
    undisturbed, folder = (Path(run["output"]) / method for run in (whole, settings))
    expected = read_stages(undisturbed)
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "other-cache"))  # nothing answered there yet
    for (moment, arm), committed in zip(MOMENTS.items(), COMMITTED, strict=True):
        assert killed(lambda: start(settings, stream), arm), moment
        assert len(list(folder.glob("stages/0*"))) == committed, moment
    start(settings, stream)
    resumed = read_stages(folder)
    assert [stage.scores for stage in resumed] == [stage.scores for stage in expected]
    assert [stage.losses for stage in resumed] == [stage.losses for stage in expected]
    assert [stage.balance_weights for stage in resumed] == [stage.balance_weights for stage in expected]
    for stage in range(1, len(expected)):
        ours, theirs = adapter(folder, stage), adapter(undisturbed, stage)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), stage
    assert not list(folder.glob("stages/.*"))


def test_the_model_itself_goes_on_with_the_same_bits(settings, stream):
    """Without adapters: what is loaded from a stage computes as what was in memory, fused layers and all."""
    settings |= {"methods": ["sequential"], "adapter": None}
    whole = {**settings, "output": settings["output"] + "-whole"}
    start(whole, stream)
    for arm in (at_call(3, stage_trainer, "mark_complete"), at_call(1, stage_evaluation, "evaluate")):
        assert killed(lambda: start(settings, stream), arm)
    start(settings, stream)
    for stage in (1, 2, 3):
        ours, theirs = (
            load_file(Path(each["output"]) / f"sequential/stages/{stage:02d}/model/model.safetensors")
            for each in (settings, whole)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_limit_of_steps_holds_after_the_last_checkpoint(settings, stream, monkeypatch):
    settings = {**settings, "methods": ["sequential"]}
    settings["training"] = {**settings["training"], "max_steps": 2, "save_steps": 1}
    whole = {**settings, "output": settings["output"] + "-whole"}
    start(whole, stream)
    original, calls = stage_evaluation.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # the first stage's, when it is trained
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(stage_evaluation, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(settings, stream)
    start(settings, stream)
    folders = [Path(run["output"]) / "sequential" for run in (settings, whole)]
    for ours, theirs in zip(*(read_stages(folder)[1:] for folder in folders), strict=True):
        assert (ours.steps, ours.losses) == (2, theirs.losses)
        resumed, undisturbed = (adapter(folder, ours.index) for folder in folders)
        assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


@pytest.mark.parametrize("where", ["commit", "checkpoint"])
def test_a_full_disk_loses_nothing(settings, stream, monkeypatch, where):
    settings = {**settings, "methods": ["sequential"]}
    calls = []
    module, name, error = {
        "commit": (method_run, "save_weights", OSError(28, "No space left on device")),
        "checkpoint": (stage_trainer, "mark_complete", RuntimeError("PytorchStreamWriter failed writing file data/1")),
    }[where]
    original = getattr(module, name)

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, full)
    with pytest.raises(RunError, match="the disk is full; everything completed so far is kept"):
        start(settings, stream)
    folder = Path(settings["output"]) / "sequential"
    assert len(read_stages(folder)) >= 2
    monkeypatch.setattr(module, name, original)
    start(settings, stream)
    assert len(read_stages(folder)) == 4


def test_other_errors_keep_their_name(settings, stream, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(method_run, "save_weights", broken)
    with pytest.raises(RuntimeError, match="something else"):
        start({**settings, "methods": ["sequential"]}, stream)


def test_what_a_killed_run_left_is_cleared_up(settings, stream, sequential):
    folder = sequential
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "run.json", "stages"]
    (folder / "checkpoints/02/checkpoint-4").mkdir(parents=True)  # killed between a commit and their removal
    (folder / "checkpoints/02/checkpoint-4/optimizer.pt").write_bytes(b"x")
    (folder / ".run.json.0123abcd.tmp").write_text("{")
    (folder / "stages/.03.tmp").mkdir()
    start({**settings, "methods": ["sequential"]}, stream)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "run.json", "stages"]
    assert sorted(path.name for path in (folder / "stages").iterdir()) == ["00", "01", "02", "03"]
