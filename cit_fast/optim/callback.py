"""BalanceEMACallback: the balance-weight average in transformers' Trainer and in TRL's trainers."""

from __future__ import annotations

import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback

from cit_fast.errors import CitFastError, ConfigError
from cit_fast.files import commit_folder
from cit_fast.optim.average_options import AverageOptions
from cit_fast.optim.averaging import AveragingOptimizer
from cit_fast.optim.balance_ema import BalanceEMA, find_balance_ema
from cit_fast.optim.partitions import gather_state
from cit_fast.optim.sharding import is_sharded

EXPORT_FOLDER = Path("averaged", "model")
"""Where in a checkpoint the averaged weights are. One folder deep they would be taken for one more PEFT adapter."""

Weights = Literal["averaged", "live"]


class BalanceEMACallback(TrainerCallback):  # type: ignore[misc]
    """Keeps a balance-weight average beside the weights that a Trainer trains; one line, and no optimizer to choose.

    If the Trainer's optimizer is a :class:`BalanceEMA` or :class:`AdamWBalanceEMA` (by ``optimizer_cls_and_kwargs``,
    as FSDP wants it), that one is used, else the optimizer is watched (:meth:`BalanceEMA.attach`).

    Which weights are where:

    * **Training goes on from the live weights, and checkpoints hold the live weights**, whether an evaluation came
      just before or not. The averages are in the checkpoint's optimizer state: a resumed run has the same numbers as
      one that was never stopped.
    * **Evaluations during training** (and predictions) use ``evaluate``. The average is put into the model when
      ``evaluate()`` begins and taken out before anything is saved.
    * With ``export`` the **averaged weights** are written beside each checkpoint, to ``checkpoint-N/averaged/model``
      by the model's own ``save_pretrained`` (a PEFT model's adapters only), to be loaded with ``from_pretrained``.
    * **After training** the model holds ``final``: what ``trainer.save_model()`` then writes. With
      ``load_best_model_at_end`` the averaged ones are those of the best checkpoint.

    The last step's mean, smallest and largest balance weight, the fraction that fell back and the number of skipped
    updates stand in each training log of the Trainer as ``balance_weight_mean``, ``balance_weight_min``,
    ``balance_weight_max``, ``balance_fallback_fraction`` and ``balance_skipped_updates``.

    Args:
        evaluate: ``"averaged"`` or ``"live"``.
        export: Whether averaged weights are written beside each checkpoint.
        final: ``"averaged"`` or ``"live"``.
        trainer: The Trainer, for ``trainer.add_callback(BalanceEMACallback(trainer=trainer))``. A Trainer calls its
            trackers (wandb, tensorboard, ...) before the callbacks it is given, so without this the numbers reach its
            log history and progress bar, but not the trackers.
        options: Those of :class:`BalanceEMA`, where the optimizer does not average by itself.

    Raises:
        ConfigError: An option has no such value.

    >>> callback = BalanceEMACallback(rule="paper", evaluate="live")  # Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        *,
        evaluate: Weights = "averaged",
        export: bool = True,
        final: Weights = "averaged",
        trainer: Any = None,
        **options: Any,
    ) -> None:
        for name, value in (("evaluate", evaluate), ("final", final)):
            if value not in ("averaged", "live"):
                raise ConfigError(f"BalanceEMACallback: {name}={value!r} is unknown; accepted: averaged, live")
        unknown = sorted(set(options) - set(AverageOptions._fields))
        if unknown:
            raise ConfigError(
                f"BalanceEMACallback: unknown option {unknown[0]!r}; accepted: evaluate, export, final, trainer, "
                + ", ".join(AverageOptions._fields)
            )
        AverageOptions(**options).check("BalanceEMACallback")
        self.evaluate, self.export, self.final = evaluate, export, final
        self.options = options
        self.balance_ema: AveragingOptimizer | None = None
        self._swap = ExitStack()
        self._switch: Any = None  # the optimizer that has our eval() and train()
        self._trainer = trainer
        self._warned = False

    # The Trainer's events, in their order

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find or watch the optimizer; a fresh run starts a new average, a resumed one goes on with its own."""
        optimizer, model = kwargs["optimizer"], kwargs["model"]
        if self.final == "averaged" and args.load_best_model_at_end and not self.export:
            raise ConfigError(
                'BalanceEMACallback: load_best_model_at_end with final="averaged" needs export=True, or final="live"'
            )
        if self._trainer is not None:
            # First in the list: the average must be up to date before any other callback evaluates or saves.
            callbacks = self._trainer.callback_handler.callbacks
            callbacks.remove(self)
            callbacks.insert(0, self)
        found = find_balance_ema(optimizer)
        if found is None:
            found = BalanceEMA.attach(optimizer, **self.options)
        elif self.options and self.balance_ema is not found:
            raise ConfigError(
                f"BalanceEMACallback: the optimizer is a {type(found).__name__} with options of its own; "
                f"give {', '.join(self.options)} there"
            )
        self.balance_ema = found
        if state.global_step == 0:
            found.start_task()
        elif not found.has_averages():
            warnings.warn(
                "BalanceEMACallback: the checkpoint that training resumes from has no averages, so new ones start "
                "(under FSDP they are kept with optimizer_cls_and_kwargs=(AdamWBalanceEMA, ...) only)",
                stacklevel=2,
            )
        if self.evaluate == "averaged":
            self._install_switch(optimizer, found, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the balance weights to a training log."""
        if self.balance_ema is None or logs is None or "loss" not in logs:
            return
        summary = self.balance_ema.balance_summary()
        if summary is None:
            self._warn_without_averages()
            return
        numbers = {
            "balance_weight_mean": summary.mean,
            "balance_weight_min": summary.minimum,
            "balance_weight_max": summary.maximum,
            "balance_fallback_fraction": summary.fallback_fraction,
            "balance_skipped_updates": self.balance_ema.skipped_updates,
        }
        logs.update(numbers)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(numbers)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last step the Trainer may load other weights, which must not enter the averages."""
        if self.balance_ema is not None and (control.should_training_stop or state.global_step >= state.max_steps):
            self.balance_ema.flush()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The live weights are back before anything is saved."""
        self._swap.close()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """As after an evaluation."""
        self._swap.close()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the averaged weights beside the checkpoint that was just written."""
        if self.balance_ema is None or not self.export:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and not checkpoint.is_dir():
            warnings.warn(f"BalanceEMACallback: no checkpoint at {checkpoint}, so no averages beside it", stacklevel=2)
            return
        export_averaged(kwargs["model"], self.balance_ema, checkpoint / EXPORT_FOLDER, write=args.should_save)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave ``final`` in the model; what is evaluated from now on is what it holds."""
        self._swap.close()
        self._remove_switch()
        if self.balance_ema is None or self.final == "live":
            return
        self._warn_without_averages()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_averaged(kwargs["model"], Path(state.best_model_checkpoint) / EXPORT_FOLDER)
        else:
            self.balance_ema.copy_averaged_to_parameters()

    def _warn_without_averages(self) -> None:
        if self.balance_ema is not None and not self.balance_ema.has_averages() and not self._warned:
            self._warned = True
            warnings.warn(
                "BalanceEMACallback: nothing has been averaged: no step of the Trainer's optimizer has reached it",
                stacklevel=3,
            )

    # Trainer calls optimizer.eval() as an evaluation begins and optimizer.train() as a training step does.

    def _install_switch(self, optimizer: Any, balance_ema: AveragingOptimizer, model: nn.Module) -> None:
        self._remove_switch()
        inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper passes both on
        own_eval, own_train = getattr(inner, "eval", None), getattr(inner, "train", None)

        def eval_() -> None:
            if own_eval is not None:
                own_eval()
            self._swap.close()
            self._swap.enter_context(balance_ema.averaged(model))

        def train() -> None:
            self._swap.close()  # also after an evaluation that failed
            if own_train is not None:
                own_train()

        inner.eval, inner.train = eval_, train
        self._switch = inner

    def _remove_switch(self) -> None:
        if self._switch is not None:
            del self._switch.eval, self._switch.train
        self._switch = None


def export_averaged(model: nn.Module, balance_ema: AveragingOptimizer, folder: Path, *, write: bool = True) -> None:
    """Write a model with its averaged weights to a folder, which appears complete or not at all.

    Args:
        model: With ``save_pretrained`` (transformers, PEFT: the adapters only), or any module, whose state dict is
            then written as ``model.safetensors``. Under FSDP2 and DeepSpeed ZeRO all processes must call.
        balance_ema: The optimizer that has the averages.
        folder: Is replaced if it exists.
        write: Whether this process writes.
    """
    zero = balance_ema.in_partitions()
    sharded = zero or any(map(is_sharded, model.parameters()))
    if not (write or sharded):
        return
    partial = folder.with_name(f"{folder.name}.partial")
    with balance_ema.averaged(model):
        weights = gather_state(_unwrapped(model)) if zero else _gathered(model) if sharded else None
        if not write:
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _save(model, partial, weights)
    commit_folder(partial, folder)


def load_averaged(model: nn.Module, folder: Path) -> None:
    """Load what :func:`export_averaged` wrote into the model that it came from.

    Raises:
        CitFastError: Nothing was written there, a parameter is not in it, or the model is sharded.
    """
    from safetensors.torch import load_file

    if not folder.is_dir():
        raise CitFastError(f"{folder}: no averaged weights")
    if any(is_sharded(param) or hasattr(param, "ds_id") for param in model.parameters()):  # FSDP2, ZeRO-3
        raise CitFastError(f"{folder}: cannot be loaded into a sharded model; load it in a process of its own")
    inner = _unwrapped(model)
    if not hasattr(inner, "peft_config"):
        loaded: set[str] = set()
        for file in sorted(folder.glob("*.safetensors")):
            weights = load_file(file)
            inner.load_state_dict(weights, strict=False)
            loaded.update(weights)
        names = dict(inner.named_parameters(remove_duplicate=False))
        found = {id(param) for name, param in names.items() if name in loaded}  # tied weights are written once
        if all(id(param) in found for param in names.values()):
            return
        if not hasattr(inner, "from_pretrained"):
            missing = next(name for name, param in names.items() if id(param) not in found)
            raise CitFastError(f"{folder}: holds no {missing}; load it by the means of the model that wrote it")
        # save_pretrained writes some models (mixtures of experts) under other names than those of their parameters.
        inner.load_state_dict(type(inner).from_pretrained(folder).state_dict())
        return
    from peft import set_peft_model_state_dict

    for name in inner.peft_config:
        own = folder if name == "default" else folder / name
        set_peft_model_state_dict(inner, load_file(own / "adapter_model.safetensors"), adapter_name=name)


def _gathered(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _save(model: nn.Module, folder: Path, weights: dict[str, Any] | None) -> None:
    inner = _unwrapped(model)
    if hasattr(inner, "save_pretrained"):
        inner.save_pretrained(folder, state_dict=weights)
        return
    from safetensors.torch import save_file, save_model

    if weights is None:
        save_model(inner, str(folder / "model.safetensors"))
    else:
        save_file(weights, folder / "model.safetensors")


def _unwrapped(model: nn.Module) -> Any:
    from accelerate.utils import extract_model_from_parallel

    with torch.no_grad():
        return extract_model_from_parallel(model, keep_torch_compile=False)
