"""The average in transformers' Trainer: which weights are evaluated, saved, exported, resumed from and left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cit_fast.errors import CitFastError, ConfigError
from cit_fast.optim import AdamWBalanceEMA, BalanceEMA, BalanceEMACallback, find_balance_ema
from cit_fast.optim.callback import EXPORT_FOLDER, load_averaged

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data")

FUSED = (AdamWBalanceEMA, {"lr": 0.01, "fallback": 0.3})
FACTORY = (BalanceEMA.factory(AdamW, fallback=0.3), {"lr": 0.01})


class Rows(torch.utils.data.Dataset):
    def __init__(self, seed: int, rows: int = 16) -> None:
        self.ids = torch.randint(10, 300, (rows, 12), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def make_trainer(
    folder: Path,
    tiny: Path,
    *callbacks: TrainerCallback,
    optimizer: Any = None,
    dtype: Any = torch.float32,
    **args: Any,
) -> Trainer:
    model = args.pop("model", None) or AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype or torch.float32)
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        **args,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Rows(0),
        eval_dataset=Rows(1, 8),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=optimizer,
    )


def saved(folder: Path, step: int, inside: Path | str = ".") -> dict[str, Tensor]:
    return load_file(folder / f"checkpoint-{step}" / inside / "model.safetensors")


def live(trainer: Trainer) -> list[Tensor]:
    return [param.detach().clone() for param in trainer.model.parameters()]


def averages(trainer: Trainer) -> list[Tensor]:
    balance_ema = find_balance_ema(trainer.optimizer)
    balance_ema.flush()
    return [balance_ema.state[param]["average"].clone() for param in trainer.model.parameters()]


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def equal(xs: dict[str, Tensor], ys: dict[str, Tensor]) -> bool:
    return xs.keys() == ys.keys() and all(torch.equal(xs[name], ys[name]) for name in xs)


@pytest.mark.parametrize("optimizer", [None, FUSED, FACTORY], ids=["watched", "fused", "factory"])
def test_checkpoints_hold_live_weights_with_and_without_an_evaluation_before(
    tmp_path: Path, tiny_model_folder: Path, optimizer: Any
) -> None:
    options = {} if optimizer else {"fallback": 0.3}
    evaluating = make_trainer(
        tmp_path / "a",
        tiny_model_folder,
        BalanceEMACallback(final="live", **options),
        optimizer=optimizer,
        eval_strategy="steps",
        eval_steps=2,
    )
    evaluating.train()
    silent = make_trainer(
        tmp_path / "b", tiny_model_folder, BalanceEMACallback(final="live", **options), optimizer=optimizer
    )
    silent.train()
    plain = make_trainer(tmp_path / "c", tiny_model_folder, optimizer=optimizer)
    plain.train()
    for step in range(1, 5):
        raw = saved(tmp_path / "a", step)
        assert equal(raw, saved(tmp_path / "b", step))
        assert equal(raw, saved(tmp_path / "c", step))
        exported = saved(tmp_path / "a", step, EXPORT_FOLDER)
        assert not equal(raw, exported)
        assert equal(exported, saved(tmp_path / "b", step, EXPORT_FOLDER))
    assert same(live(evaluating), live(plain))
    # What was evaluated is what was exported.
    losses = [log["eval_loss"] for log in evaluating.state.log_history if "eval_loss" in log]
    exported_model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4" / EXPORT_FOLDER)
    check = make_trainer(tmp_path / "d", tiny_model_folder, model=exported_model)
    assert losses[-1] == pytest.approx(check.evaluate()["eval_loss"], rel=1e-6)
    assert losses[-1] != pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    assert not list(tmp_path.rglob("*.partial"))


def test_live_evaluation_and_no_export(tmp_path: Path, tiny_model_folder: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2}
    callback = BalanceEMACallback(evaluate="live", export=False, final="live")
    trainer = make_trainer(tmp_path / "a", tiny_model_folder, callback, **settings)
    plain = make_trainer(tmp_path / "b", tiny_model_folder, **settings)
    trainer.train()
    plain.train()
    for logs, other in zip(trainer.state.log_history, plain.state.log_history, strict=True):
        assert logs.get("eval_loss") == other.get("eval_loss")
    assert not (tmp_path / "a" / "checkpoint-4" / "averaged").exists()
    assert same(live(trainer), live(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", [None, FUSED, FACTORY], ids=["watched", "fused", "factory"])
def test_resuming_gives_the_same_bits(
    tmp_path: Path, tiny_model_folder: Path, optimizer: Any, dtype: torch.dtype
) -> None:
    callbacks = lambda: [] if optimizer else [BalanceEMACallback(final="live", fallback=0.3)]  # noqa: E731
    straight = make_trainer(tmp_path, tiny_model_folder, *callbacks(), optimizer=optimizer, dtype=dtype)
    straight.train()
    resumed = make_trainer(tmp_path / "other", tiny_model_folder, *callbacks(), optimizer=optimizer, dtype=dtype)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert averages(resumed)[0].dtype == torch.float32
    assert same(live(resumed), live(straight))
    assert same(averages(resumed), averages(straight))


def test_restored_callbacks_go_on_and_the_users_object_stays(tmp_path: Path, tiny_model_folder: Path) -> None:
    first = make_trainer(tmp_path, tiny_model_folder, BalanceEMACallback(rule="paper"), max_steps=2)
    first.train()
    callback = BalanceEMACallback(rule="paper")
    second = make_trainer(tmp_path, tiny_model_folder, callback, restore_callback_states_from_checkpoint=True)
    second.train(resume_from_checkpoint=True)
    assert callback in second.callback_handler.callbacks
    assert callback.balance_ema is find_balance_ema(second.optimizer)
    assert (tmp_path / "checkpoint-4" / EXPORT_FOLDER).is_dir()


def test_resuming_without_averages_says_so(tmp_path: Path, tiny_model_folder: Path) -> None:
    make_trainer(tmp_path, tiny_model_folder, max_steps=2).train()
    trainer = make_trainer(tmp_path, tiny_model_folder, BalanceEMACallback())
    with pytest.warns(UserWarning, match="has no averages, so new ones start"):
        trainer.train(resume_from_checkpoint=True)


def test_what_training_leaves_in_the_model(tmp_path: Path, tiny_model_folder: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_model_folder, BalanceEMACallback(fallback=0.3))
    trainer.train()
    exported = saved(tmp_path, 4, EXPORT_FOLDER)
    assert same(live(trainer), averages(trainer))
    assert torch.equal(trainer.model.state_dict()["model.norm.weight"], exported["model.norm.weight"])
    before = live(trainer)
    trainer.evaluate()  # of what the model holds, and it still does
    assert same(live(trainer), before)
    trainer.train()  # a new task: the average starts anew from what the model holds
    assert not same(live(trainer), before)


def test_the_best_checkpoint_is_the_averaged_one_that_was_evaluated(tmp_path: Path, tiny_model_folder: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        tiny_model_folder,
        BalanceEMACallback(fallback=0.3),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best is not the last
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    exported = load_file(best / EXPORT_FOLDER / "model.safetensors")
    held = trainer.model.state_dict()
    assert all(torch.equal(held[name], value) for name, value in exported.items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_the_best_mixture_of_experts_is_loaded_whole(tmp_path: Path, tiny_model_folder: Path) -> None:
    """transformers writes each expert by itself but keeps all of them in one parameter."""
    config = MixtralConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path,
        tiny_model_folder,
        BalanceEMACallback(fallback=0.3),
        model=MixtralForCausalLM(config),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,  # so that the best is not the last
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    exported = MixtralForCausalLM.from_pretrained(best / EXPORT_FOLDER)
    assert all(map(torch.equal, live(trainer), exported.parameters()))


def test_an_export_without_a_parameter_is_refused(tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CitFastError, match=r"holds no 1\.weight"):
        load_averaged(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)), tmp_path)


def test_logs_reach_history_and_trackers(tmp_path: Path, tiny_model_folder: Path) -> None:
    class Tracker(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[str, Any]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    tracker = Tracker()  # stands where Trainer puts wandb and the others: before the user's callbacks
    trainer = make_trainer(tmp_path, tiny_model_folder, tracker, eval_strategy="steps", eval_steps=2)
    callback = BalanceEMACallback(trainer=trainer, fallback=0.3)
    trainer.add_callback(callback)
    trainer.train()
    for logs in (tracker.seen, trainer.state.log_history):
        training = [log for log in logs if "loss" in log]
        assert len(training) == 4
        assert training[0]["balance_weight_mean"] == pytest.approx(0.3)
        assert training[0]["balance_fallback_fraction"] == 1.0
        assert training[-1]["balance_skipped_updates"] == 0
        assert training[-1]["balance_weight_min"] <= training[-1]["balance_weight_max"]
        assert not any("balance_weight_mean" in log for log in logs if "loss" not in log)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert "balance_weight_mean" in state["log_history"][0]


def test_an_evaluation_that_fails_does_not_leave_the_average_in_the_model(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    class Failing(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of memory")

    class Evaluating(TrainerCallback):
        trainer: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with pytest.raises(RuntimeError, match="out of memory"):
                self.trainer.evaluate()

    plain = make_trainer(tmp_path / "plain", tiny_model_folder)
    plain.train()
    evaluating = Evaluating()
    trainer = make_trainer(
        tmp_path / "failing", tiny_model_folder, BalanceEMACallback(final="live"), Failing(), evaluating, save_steps=9
    )
    evaluating.trainer = trainer
    trainer.train()
    assert same(live(trainer), live(plain))


def test_bad_options(tmp_path: Path, tiny_model_folder: Path) -> None:
    for options, message in (
        ({"evaluate": "raw"}, "evaluate='raw' is unknown; accepted: averaged, live"),
        ({"final": "raw"}, "final='raw' is unknown"),
        ({"beta": 0.9}, "unknown option 'beta'"),
    ):
        with pytest.raises(ConfigError, match=message):
            BalanceEMACallback(**options)
    with pytest.raises(CitFastError, match="decay=2 must be in"):
        BalanceEMACallback(decay=2)
    trainer = make_trainer(tmp_path, tiny_model_folder, BalanceEMACallback(rule="paper"), optimizer=FUSED)
    with pytest.raises(ConfigError, match="is a AdamWBalanceEMA with options of its own; give rule there"):
        trainer.train()
    trainer = make_trainer(
        tmp_path,
        tiny_model_folder,
        BalanceEMACallback(export=False),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    with pytest.raises(ConfigError, match="needs export=True"):
        trainer.train()


def test_layer_wise_optimizers_are_refused() -> None:
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    dummy = LayerWiseDummyOptimizer(optimizer_dict={})
    for make in (BalanceEMA, BalanceEMA.attach):
        with pytest.raises(ConfigError, match="a layer-wise optimizer steps inside backward"):
            make(dummy)


def test_an_optimizer_that_never_steps_is_told(tmp_path: Path, tiny_model_folder: Path) -> None:
    class Elsewhere(torch.optim.SGD):
        """Takes its steps in a way that no hook sees."""

        def __init__(self, params: Any, lr: float) -> None:
            super().__init__([torch.nn.Parameter(torch.zeros(1))], lr=lr)

    callback = BalanceEMACallback(export=False)
    trainer = make_trainer(tmp_path, tiny_model_folder, callback, optimizer=(Elsewhere, {"lr": 0.1}))
    with pytest.warns(UserWarning, match="nothing has been averaged"):
        trainer.train()
