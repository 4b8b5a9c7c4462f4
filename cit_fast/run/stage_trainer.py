"""One stage on transformers.Trainer: our objective as its loss, our update around its optimizer."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from cit_fast.errors import ConfigError, RunError
from cit_fast.methods.objectives import Objective
from cit_fast.methods.stage import Stage
from cit_fast.methods.updates import PlainUpdate, Update, stream_wide
from cit_fast.models.collation import is_packed, padded_length, row_sizes
from cit_fast.models.growing_adapter import keeping_active, trained_sets
from cit_fast.models.seeing_adapters import is_of_projector
from cit_fast.run.pace import duration
from cit_fast.run.run_folder import mark_complete
from cit_fast.run.token_batches import TokenBatches
from cit_fast.run.trackers import RunTrackers, training_values


class StageTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is an :class:`Objective` and whose optimizer goes through an :class:`Update`.

    Args:
        objective: computes the loss.
        update: wraps the optimizer.
        stage: that is trained.
        title: what the progress bar says.
        left: of the stage's steps to come and the seconds that one takes, those until the end of the whole run.
        progress: what an earlier part of this stage left in its checkpoint's marker (see ``record``).
        tokens_per_batch: see :class:`~cit_fast.run.token_batches.TokenBatches`; ``None``: batches are of
            ``per_device_train_batch_size`` examples.
        projector_learning_rate: of a vision-language model's projector; ``None``: as of everything else.
        trackers: told of losses, learning rate and balance weights.
        **kwargs: of transformers.Trainer.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        update: Update,
        stage: Stage,
        title: str,
        left: Callable[[int, float], float | None] | None,
        progress: dict[str, Any],
        trackers: RunTrackers,
        tokens_per_batch: int | None = None,
        projector_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.objective, self.update, self.stage = objective, update, stage
        self.tokens_per_batch, self.projector_learning_rate = tokens_per_batch, projector_learning_rate
        self.optimizer: torch.optim.Optimizer | None
        # Our loss divides by the response tokens of the whole accumulated batch, so the Trainer has to count them.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.record = _StageRecorder(update, stage, title, left, progress, trackers)
        self.add_callback(self.record)

    def check_engine(self, method: str) -> None:
        """Refuse what DeepSpeed is told to do and a method cannot live with.

        Raises:
            ConfigError: an optimizer of DeepSpeed's own beside an update's, or weights that stay in shards.
        """
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded and stream_wide(self.update):
            raise ConfigError(
                f"method {method!r}: update.scope stream keeps the live weights of each stage, which DeepSpeed and "
                "FSDP hold in shards; use scope task, or DDP"
            )
        grows = isinstance(self.model, PeftModel) and len(self.model.active_adapters) > 1
        if grows and sharded:
            raise ConfigError(
                f"method {method!r}: router stacked joins two adapter sets after every stage, which DeepSpeed and FSDP "
                "hold in shards; use DDP"
            )
        for part in (self.objective, self.update):
            if sharded and getattr(part, "needs_whole_weights", False):
                raise ConfigError(
                    f"method {method!r}: {type(part).__name__} needs all weights on every process, and DeepSpeed and "
                    "FSDP hold them in shards; use DDP"
                )
        if not self.is_deepspeed_enabled:
            return
        gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        # Of training.deepspeed, or of the launcher.
        engine = self.accelerator.state.deepspeed_plugin.hf_ds_config
        if "optimizer" in engine.config and not isinstance(self.update, PlainUpdate):
            raise ConfigError(
                f"training.deepspeed: optimizer must not be set for method {method!r}: its update steps with an "
                "optimizer of its own, which DeepSpeed's would replace; use training.optim"
            )
        if engine.is_zero3() and not engine.is_true(gather):
            raise ConfigError(f"training.deepspeed: {gather} must be true, or a stage's weights cannot be kept")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of TrainingArguments inside the update's."""
        if self.optimizer is None:
            made: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
            if self.projector_learning_rate is not None:
                self._slow_projector(made, self.projector_learning_rate)
            self.optimizer = self.update.wrap(made, self.stage)
        return self.optimizer

    def _slow_projector(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Give the projector's parameters groups of their own, with their learning rate."""
        own = {id(each) for name, each in self.model.named_parameters() if is_of_projector(name)}
        for group in list(optimizer.param_groups):
            apart = [each for each in group["params"] if id(each) in own]
            if apart:
                group["params"] = [each for each in group["params"] if id(each) not in own]
                optimizer.add_param_group({**group, "params": apart, "lr": rate})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's own, or batches of so many tokens."""
        if self.tokens_per_batch is None:
            loader: DataLoader[Any] = super().get_train_dataloader()
            return loader
        args, features, collator = self.args, self.train_dataset, self.data_collator
        packed = is_packed(collator)
        sizes = [row_sizes(feature) for feature in features]
        batches = TokenBatches(
            [sum(size) if packed else max(size) for size in sizes],
            self.tokens_per_batch,
            rows=[len(size) for size in sizes],
            padded=None if packed else padded_length,
            seed=args.seed,
            processes=args.world_size,
            process=args.process_index,
        )
        loader = DataLoader(
            features,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # Each process has its own batches already.
        mine: DataLoader[Any] = prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True
        )
        return mine

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's own; for one that goes by length, in the form in which it looks for lengths."""
        features = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy not in ("group_by_length", "batch_rebalance"):
            return super()._get_train_sampler(features)
        return super()._get_train_sampler([{"input_ids": range(len(feature))} for feature in features])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Of a family of adapters only the one in training goes into a checkpoint; the others are in the last stage."""
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            return
        whole = self.model.save_pretrained
        self.model.save_pretrained = functools.partial(whole, selected_adapters=trained_sets(self.model))
        try:
            super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own, which makes the set in training the only active one."""
        with keeping_active(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _run_epoch(self, **kwargs: Any) -> None:
        """No step after the last one of a checkpoint: the Trainer looks at ``max_steps`` after a step only."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss; scaled as the Trainer scales token-normalised losses across processes."""
        loss = self.objective(model, inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss


class _StageRecorder(TrainerCallback):  # type: ignore[misc]
    """Progress bar, balance weights per step, wall time, and the marker that makes a checkpoint count."""

    def __init__(
        self,
        update: Update,
        stage: Stage,
        title: str,
        left: Callable[[int, float], float | None] | None,
        progress: dict[str, Any],
        trackers: RunTrackers,
    ) -> None:
        self.update, self.stage, self.title, self.left = update, stage, title, left
        self.trackers = trackers
        self._loss: dict[str, str] = {}
        self.balance_weights: list[tuple[int, float, float, float, float]] = [
            tuple(entry) for entry in progress.get("balance_weights", [])
        ]
        self._seconds_before = float(progress.get("train_seconds", 0.0))
        self._started = time.perf_counter()
        self._bar: tqdm[Any] | None = None
        self._resumed_at = 0
        self.begun = False  # whether a batch has reached the model

    @property
    def seconds(self) -> float:
        """Training time of this stage so far, earlier parts included."""
        return self._seconds_before + time.perf_counter() - self._started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar, already moved to where a resumed stage stands."""
        self._started = time.perf_counter()
        if state.is_world_process_zero:
            self._resumed_at = state.global_step
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", leave=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The set-up is over."""
        self.begun = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the step's balance weights; gradients are still there, the step count is not yet raised.

        Reading them waits for a GPU, so there it happens as often as the loss is logged.
        """
        if args.device.type != "cpu" and (state.global_step + 1) % max(state.logging_steps, 1):
            return
        summary = self.update.summary(kwargs["optimizer"], self.stage)
        if summary is not None:
            self.balance_weights.append((state.global_step + 1, *summary))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar, and say when the whole run will be over."""
        if self._bar is None:
            return
        rate = self._bar.format_dict["rate"]
        taken = state.global_step - self._resumed_at
        step = 1 / rate if rate else (time.perf_counter() - self._started) / taken
        left = None if self.left is None else self.left(state.max_steps - state.global_step, step)
        if left is not None:
            self._bar.set_postfix({**self._loss, "whole run": f"{duration(left)} left"}, refresh=False)
        self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the running loss, and tell the trackers; a run that has diverged ends here, not after hours."""
        if logs and not math.isfinite(float(logs.get("loss", 0.0))):
            raise RunError(
                f"{self.title}: the training loss is {logs['loss']} at step {state.global_step}; "
                "start again in another output with a smaller training.learning_rate"
            )
        if logs and "loss" in logs:
            balance = self.balance_weights[-1] if self.balance_weights else None
            self.trackers.training(self.stage.index, state.global_step, training_values(logs, balance))
        if self._bar is not None and logs and "loss" in logs:
            self._loss = {"loss": f"{float(logs['loss']):.3f}"}
            self._bar.set_postfix(self._loss, refresh=False)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every process has written its part: mark the checkpoint."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark_complete(
                Path(args.output_dir) / f"checkpoint-{state.global_step}",
                {
                    "step": state.global_step,
                    "train_seconds": self.seconds,
                    "balance_weights": self.balance_weights,
                },
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
