"""What cannot work is one line before a run's folder is made, and a corrected file is accepted at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy_runs

from cit_fast import cli
from cit_fast.data import TaskStream
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.run import stage_training
from cit_fast.run.run_folder import mark_complete


def start(settings, stream, **more):
    merged = {**settings, **{k: {**settings[k], **v} if isinstance(v, dict) else v for k, v in more.items()}}
    return toy_runs.start(merged, stream)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("adapter", "target_modules", "*bad(", "adapter.target_modules: '*bad(' is no regular expression: "),
        ("adapter", "exclude_modules", "(", "adapter.exclude_modules: '(' is no regular expression: "),
        ("adapter", "target_modules", ["nope"], "adapter: Target modules {'nope'} not found in the base model."),
        ("adapter", "init_lora_weights", "pisa", "adapter: Unknown initialization init_lora_weights='pisa'"),
        ("adapter", "lora_dropout", -1.0, "adapter.lora_dropout: -1.0; expected a probability below 1"),
        ("adapter", "r", 0, "adapter: `r` should be a positive integer"),
        ("adapter", "r", 10**9, "GiB, and this machine has"),
        ("training", "optim", "lomo", "training.optim: You need to install `lomo_optim`"),
        ("training", "optim", "nadam", "training: nadam is not a valid OptimizerNames"),
        ("training", "report_to", "nowhere", "training.report_to: nowhere is not supported"),
        ("training", "report_to", "wandb", "training.report_to: WandbCallback requires wandb"),
        ("training", "lr_scheduler_type", "warmup_stable_decay", "training.lr_scheduler_type: "),
        ("training", "lr_scheduler_type", "reduce_lr_on_plateau", "reduce_lr_on_plateau requires an eval strategy"),
        ("training", "lr_scheduler_kwargs", {"spam": 1}, "training.lr_scheduler_type: "),
        ("training", "log_level", "loud", "training.log_level: 'loud'"),
        ("training", "accelerator_config", {"spam": 1}, "training: "),
        ("training", "use_liger_kernel", True, "training.use_liger_kernel: the package liger-kernel is not installed"),
        ("training", "dataloader_drop_last", True, "task 'alpha' has 16 training examples, a batch 17"),
    ],
)
def test_what_cannot_be_set_up(settings, stream, section, key, value, said):
    if key == "dataloader_drop_last":
        settings["training"]["per_device_train_batch_size"] = 17
    with pytest.raises(ConfigError) as caught:
        start(settings, stream, **{section: {key: value}})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(settings["output"]).exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("per_device_train_batch_size", 0, "training.per_device_train_batch_size: 0; expected at least 1"),
        ("per_device_train_batch_size", -3, "-3; expected at least 1"),
        ("gradient_accumulation_steps", 0, "0; expected at least 1"),
        ("num_train_epochs", 0, "0.0; expected more than 0"),
        ("num_train_epochs", float("nan"), "nan is no finite number"),
        ("learning_rate", float("inf"), "inf is no finite number"),
        ("learning_rate", -1, "-1.0; expected at least 0"),
        ("max_steps", 0, "0 trains nothing"),
        ("adam_beta1", 2, "2.0; expected at most 1"),
        ("save_strategy", "best", "best needs evaluations"),
        ("eval_on_start", True, "set by cit-fast; use evaluation instead"),
        ("hub_token", "secret", "hub_token: set by cit-fast"),
        ("use_cache", True, "set by cit-fast"),
    ],
)
def test_training_keys_out_of_range_or_without_an_effect(settings, stream, key, value, said):
    with pytest.raises(ConfigError) as caught:
        start(settings, stream, training={key: value})
    assert said in str(caught.value)


def test_keys_that_reach_the_loss_and_the_batches(settings, stream):
    one, unseen = TaskStream(stream[:1]), {"evaluation": {"untrained": False}}
    plain = read_stages(start(settings, one, methods=["sequential"], **unseen)[0])
    by_length = {"train_sampling_strategy": "group_by_length"}
    for number, training in enumerate(({"label_smoothing_factor": 0.5}, by_length, {"lr_scheduler_type": "linear"})):
        other = start({**settings, "output": settings["output"] + str(number)}, one, training=training, **unseen)[0]
        assert [stage.losses for stage in read_stages(other)] != [stage.losses for stage in plain]
    with pytest.raises(ConfigError, match="method 'kpig' has the objective 'kpig', which does not smooth labels"):
        start(settings, stream, methods=["kpig"], training={"label_smoothing_factor": 0.5})
    pairs = {**settings, "output": settings["output"] + "-pairs", "methods": ["kpig"]}
    assert start(pairs, TaskStream(stream[:2]), training=by_length, **unseen)


# --------------------------------------------------------------------------------------------- a corrected file


def broken_at(monkeypatch, stage):
    """Trainers that cannot be made from a stage on."""
    made = stage_training.StageTrainer

    def make(**kwargs):
        if kwargs["args"].seed >= stage:
            raise KeyError("a package of somebody else")
        return made(**kwargs)

    monkeypatch.setattr(stage_training, "StageTrainer", make)


def test_a_stage_that_cannot_be_set_up_is_one_line_with_its_cause(settings, stream, monkeypatch):
    broken_at(monkeypatch, 1)
    with pytest.raises(ConfigError, match="training: stage 1 cannot be set up: 'a package of somebody else'") as caught:
        start(settings, stream)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_run_that_never_trained_gives_way(settings, stream, monkeypatch):
    with monkeypatch.context() as patch:
        broken_at(patch, 1)
        with pytest.raises(ConfigError):
            start(settings, stream)
    folder = Path(settings["output"]) / "sequential"
    assert len(read_stages(folder)) == 1
    start(settings, stream, training={"learning_rate": 2e-3})
    assert read_run(folder).config["training"]["learning_rate"] == 2e-3
    assert len(read_stages(folder)) == 4


def test_what_was_trained_never_gives_way(settings, stream, monkeypatch):
    with monkeypatch.context() as patch:
        broken_at(patch, 2)
        with pytest.raises(ConfigError, match="stage 2"):
            start(settings, stream)
    with pytest.raises(RunError, match=r"training\.learning_rate was 0\.01, now 0\.002"):
        start(settings, stream, training={"learning_rate": 2e-3})
    assert len(read_stages(Path(settings["output"]) / "sequential")) == 2
    start(settings, stream)


def test_a_checkpoint_that_cannot_be_gone_on_from_is_named(settings, stream, monkeypatch, caplog):
    class Killed(BaseException):
        pass

    class Stopped(stage_training.StageTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise Killed
            return super().compute_loss(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stage_training, "StageTrainer", Stopped)
        with pytest.raises(Killed):
            start(settings, stream)
    (checkpoint,) = (Path(settings["output"]) / "sequential/checkpoints/01").glob("checkpoint-*")
    (checkpoint / "trainer_state.json").write_text("{")
    mark_complete(checkpoint, {"step": 2, "train_seconds": 0.0, "balance_weights": []})  # as if written so
    with pytest.raises(RunError, match=rf"{checkpoint}: cannot be gone on from: .*; without it the stage goes on"):
        start(settings, stream)
    (checkpoint / "trainer_state.json").write_text("[")  # changed since: not taken for a checkpoint
    folder = start(settings, stream)[0]
    assert "trainer_state.json: damaged (its content has changed); the stage goes on from before it" in caplog.text
    assert len(read_stages(folder)) == 4


# -------------------------------------------------------------------------------------------------------- --debug


def test_debug_shows_the_cause(settings, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        json.dumps({**settings, "adapter": {"r": 4, "target_modules": ["nope"]}, "data": {"tasks": ["units"]}})
    )
    for flags in ([], ["--debug"]):
        monkeypatch.setattr("sys.argv", ["cit-fast", *flags, "run", str(path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "error: adapter: Target modules {'nope'} not found" in said
        assert ("Traceback" in said) == bool(flags)
        assert ("--debug shows where it comes from" in said) != bool(flags)
