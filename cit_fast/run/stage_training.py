"""One stage's training: what the objective prepares, through the Trainer, to the weights that the update leaves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from rich.markup import escape

from cit_fast.errors import CitFastError, ConfigError, DataError, RunError
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.evaluation.run_files import adapter_sets, set_folder, stage_folder
from cit_fast.methods.stage import Finished, Stage, StageInputs
from cit_fast.methods.updates import stream_wide
from cit_fast.models.adapters import save_weights, train_adapter
from cit_fast.models.growing_adapter import GrowingAdapter
from cit_fast.models.osf import MergedModel, is_osf, refuse_sharded_osf
from cit_fast.models.parked_sets import park_others, parked, set_parked
from cit_fast.models.rewritten_base import RewrittenBase, refuse_sharded, rewrites_base
from cit_fast.run.arguments import training_arguments
from cit_fast.run.config import RunConfig
from cit_fast.run.guards import FrozenWeights, TrainedWeights
from cit_fast.run.live_weights import take_up_live_weights
from cit_fast.run.pace import TimeLeft
from cit_fast.run.parts import Parts
from cit_fast.run.run_folder import RunFolder
from cit_fast.run.stage_settings import training_at
from cit_fast.run.stage_trainer import StageTrainer
from cit_fast.run.trackers import OURS, RunTrackers
from cit_fast.text import first_line


@dataclass(frozen=True)
class Trained:
    """A trained stage: the model, what its update made of it, what it was trained on, what was logged."""

    model: Any
    finished: Finished
    inputs: StageInputs
    steps: int
    seconds: float
    losses: list[tuple[int, float]]
    balance_weights: list[tuple[int, float, float, float, float]]
    notes: list[str]


class StageTraining:
    """Trains the stages of one method's run.

    Args:
        config: of the run; ``method``: the method's name; ``parts``: its parts.
        folder: of the run, whose checkpoints an interrupted stage goes on from.
        load: the model with the weights in a folder.
        say: prints a line; ``clock``: knows how long the whole run still takes.
    """

    def __init__(
        self,
        config: RunConfig,
        method: str,
        parts: Parts,
        folder: RunFolder,
        load: Callable[[Path | Mapping[str, Path]], Any],
        say: Callable[[str], None],
        clock: TimeLeft | None,
    ) -> None:
        self.config, self.method, self.parts, self.folder = config, method, parts, folder
        self.clock, self.state, self.trackers = clock, PartialState(), RunTrackers((), folder.path)
        self._load, self._say = load, say

    def arguments(self, index: int) -> Any:
        """transformers' arguments of a stage, without the trackers that have one run over all stages."""
        training = training_at(self.config.training, self.config.stages, index)
        arguments = training_arguments(training, self.config.seed + index, self.folder.checkpoints(index))
        arguments.report_to = [name for name in arguments.report_to if name not in OURS]
        return arguments

    def track(self, record: RunRecord, stages: Sequence[StageRecord]) -> None:
        """Start the trackers that ``training.report_to`` names, on the first process alone.

        Raises:
            ConfigError: one cannot be started.
        """
        training = training_at(self.config.training, self.config.stages, max(1, len(stages)))
        asked = training_arguments(training, self.config.seed, self.folder.path).report_to
        if self.state.is_main_process:
            self.trackers = RunTrackers([name for name in OURS if name in asked], self.folder.path)
            self.trackers.begin(record, stages)

    def train(
        self,
        stage: Stage,
        adapter: str,
        title: str,
        frozen: FrozenWeights,
        rewritten: RewrittenBase | GrowingAdapter | MergedModel | None,
    ) -> Trained:
        """The model with the set ``adapter`` trained on the stage's examples, and nothing else of it changed."""
        model = stage.model
        where = f"stage {stage.index} ({stage.task.name})"
        inputs = self.parts.prepare(stage)
        if not inputs.features:
            raise DataError(
                f"task {stage.task.name!r}: no training example fits data.max_length; every one was skipped"
            )
        before = adapter_sets(self.folder.stages()[: stage.index]).get(adapter)
        if before is not None:
            averages = take_up_live_weights(model, stage_folder(self.folder.path, before), adapter)
            stage = dataclasses.replace(stage, averages=averages)
        # What must not move is held against its copy afterwards, and what should have moved as well.
        weights = TrainedWeights(model)
        self.parts.update.begin(stage)
        trainer = self._trained(stage, title, inputs)
        seconds = trainer.record.seconds + inputs.seconds
        finished = self.parts.finish(trainer.optimizer, dataclasses.replace(stage, steps=trainer.state.global_step))
        model = self._unwrapped(trainer, stage.index, adapter)
        notes = weights.notes(model)
        if rewritten is not None:
            model = rewritten.undo(model, adapter)
            if isinstance(model, PeftModel):
                park_others(model, adapter)
        frozen.check(model, f"{self.folder.path}: {where}")
        for note in notes:
            self._say(f"  {escape(note)}")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise RunError(
                    f"{self.folder.path}: {where}: {name} is not finite after training; "
                    "start again in another output with a smaller training.learning_rate"
                )
        return Trained(
            model,
            finished,
            inputs,
            steps=trainer.state.global_step,
            seconds=seconds,
            losses=[(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
            balance_weights=trainer.record.balance_weights,
            notes=notes,
        )

    def _trained(self, stage: Stage, title: str, inputs: StageInputs) -> StageTrainer:
        """The trainer, when the stage is trained; what it refuses before the first batch is an error of the set-up."""
        trainer: StageTrainer | None = None
        checkpoint: str | None = None
        try:
            trainer, checkpoint = self._trainer(stage, title, inputs)
            trainer.train(resume_from_checkpoint=checkpoint)
        except CitFastError:
            raise
        except Exception as error:
            if trainer is not None and trainer.record.begun:
                raise
            if checkpoint is not None:
                raise RunError(
                    f"{checkpoint}: cannot be gone on from: {first_line(error)}; without it the stage goes on from an "
                    "earlier checkpoint, or from its beginning"
                ) from error
            raise ConfigError(f"training: stage {stage.index} cannot be set up: {first_line(error)}") from error
        return trainer

    def _trainer(self, stage: Stage, title: str, inputs: StageInputs) -> tuple[StageTrainer, str | None]:
        index = stage.index
        checkpoint = self.folder.last_checkpoint(index)
        training = training_at(self.config.training, self.config.stages, index)
        trainer = StageTrainer(
            objective=self.parts.objective,
            update=self.parts.update,
            stage=stage,
            title=title,
            left=None if self.clock is None else functools.partial(self.clock.left, index),
            progress={} if checkpoint is None else checkpoint[1],
            model=stage.model,
            args=self.arguments(index),
            train_dataset=inputs.features,
            data_collator=inputs.collator,
            trackers=self.trackers,
            tokens_per_batch=training.get("tokens_per_batch"),
            projector_learning_rate=training.get("projector_learning_rate"),
        )
        if (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled) and rewrites_base(self.config.adapter):
            raise refuse_sharded()
        if (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled) and is_osf(self.config.adapter):
            raise refuse_sharded_osf()
        if stream_wide(self.parts.update) and (rewrites_base(self.config.adapter) or is_osf(self.config.adapter)):
            raise ConfigError("update.scope: stream cannot go on with adapters that rewrite the base model")
        trainer.check_engine(self.method)
        return trainer, None if checkpoint is None else str(checkpoint[0])

    def _unwrapped(self, trainer: StageTrainer, index: int, adapter: str) -> Any:
        """The trained model, whole on every process, without what Accelerate put around it."""
        accelerator = trainer.accelerator
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            return accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        # FSDP and ZeRO leave shards, hooks and another dtype in the model: it is gathered, written, and loaded anew.
        gathered = self.folder.checkpoints(index) / "gathered"
        weights = accelerator.get_state_dict(trainer.model_wrapped)  # every process takes part
        unwrapped = accelerator.unwrap_model(trainer.model)
        beside, inside = parked(unwrapped), set(getattr(unwrapped, "peft_config", ()))
        if self.state.is_main_process:
            save_weights(unwrapped, gathered, self.config.model.name, weights, trained=adapter)
        self.state.wait_for_everyone()
        del unwrapped
        trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
        accelerator.free_memory()
        if not inside:
            return self._load(gathered / "model")
        sets = adapter_sets(self.folder.stages()[:index])
        others = {name: set_folder(self.folder.path, stage) for name, stage in sets.items() if name in inside}
        others.pop(adapter, None)
        model = self._load({**others, adapter: gathered / "adapters" / adapter})
        if not others:
            set_parked(model, beside)
        return train_adapter(model, self.config.adapter, adapter, self.config.seed, fuse=self.config.model.fuse_lora)[0]
