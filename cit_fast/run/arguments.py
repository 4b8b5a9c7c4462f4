"""What a run gives to transformers and PEFT: their own keys, checked before anything is trained."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt

from cit_fast.errors import ConfigError
from cit_fast.text import first_line
from cit_fast.values import checked_value, choices

# Set by cit-fast itself, from the key given here; a second value would silently disagree with the first.
RESERVED_TRAINING = {
    "output_dir": "output",
    "seed": "seed",
    "data_seed": "seed",
    "remove_unused_columns": "data",
    "label_names": "data",
    "length_column_name": "train_sampling_strategy alone (lengths are counted)",
    "resume_from_checkpoint": "output (a run resumes by itself)",
    "restore_callback_states_from_checkpoint": "output (a run resumes by itself)",
    "save_only_model": "save_strategy (a checkpoint that cannot be resumed from is no checkpoint)",
    "use_cache": "nothing (training never needs a cache, answering always does)",
    "local_rank": "the launcher's environment",
    "do_train": "evaluation",
    **dict.fromkeys(
        (
            "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_do_concat_batches",
            "eval_use_gather_object", "eval_accumulation_steps", "per_device_eval_batch_size", "prediction_loss_only",
            "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "do_eval", "do_predict",
            "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
        ),
        "evaluation",
    ),
    **dict.fromkeys(
        (
            "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
            "hub_revision",
        ),
        "the stages/*/adapters folders, which can be pushed after the run",
    ),
}  # fmt: skip
OWN_TRAINING = {"tokens_per_batch": PositiveInt, "projector_learning_rate": NonNegativeFloat}
"""Keys of the section ``training`` that are not transformers': the tokens that a batch holds at most, and the learning
rate of what brings images into the language model's space."""
# Other ways to say what a batch is.
_BATCHES = ("per_device_train_batch_size", "train_sampling_strategy", "dataloader_drop_last", "auto_find_batch_size")
# (smallest, whether that itself is allowed, largest) of numbers that transformers takes as they come.
_RANGES: dict[str, tuple[float, bool, float]] = {
    "per_device_train_batch_size": (1, True, 2**20),
    "gradient_accumulation_steps": (1, True, 2**20),
    "num_train_epochs": (0, False, 1e6),
    "max_steps": (-1, True, 2**40),
    "learning_rate": (0, True, 1e38),
    "projector_learning_rate": (0, True, 1e38),
    "weight_decay": (0, True, 1e6),
    "adam_beta1": (0, True, 1),
    "adam_beta2": (0, True, 1),
    "adam_epsilon": (0, True, 1),
    "max_grad_norm": (0, True, 1e12),
    "warmup_steps": (0, True, 2**40),
    "label_smoothing_factor": (0, True, 1),
    "logging_steps": (0, False, 2**40),
    "save_steps": (0, False, 2**40),
    "save_total_limit": (2, True, 2**40),
    "dataloader_num_workers": (0, True, 1024),
    "dataloader_prefetch_factor": (1, True, 2**20),
    "neftune_noise_alpha": (0, True, 1e6),
    "torch_empty_cache_steps": (1, True, 2**40),
    "ddp_timeout": (1, True, 2**31),
}
# What TrainingArguments hold unless the configuration says otherwise.
TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "logging_steps": 5,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
}
RESERVED_ADAPTER = {
    "inference_mode": "cit-fast (an adapter is trained)",
    "base_model_name_or_path": "cit-fast, from model.name",
    "revision": "cit-fast, from model.revision",
    "peft_version": "PEFT",
    "auto_mapping": "PEFT",
    "layer_replication": "nobody: it makes another base model, which no other adapter set fits",
}
# Kinds and initialisations that need calls of their own before or between the steps, and are something else without.
_LEFT_OUT_KINDS = {
    "ADALORA": "moves its ranks between the steps, which no Trainer does by itself; it would train something else",
    "POLY": "wants a task's number with every batch, which a prompt does not have",
    "SHADOW": "hands something else than hidden states to the output projection, which our loss reads",
    "XLORA": "mixes adapters that are there already; it does not learn a task",
}
_LEFT_OUT_INITS = ("eva", "corda", "loftq", "lora_ga")


def over(training: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with later ones over them; of two that say what a batch is, the later one holds."""
    gone: tuple[str, ...] = ()
    if changes.get("tokens_per_batch") is not None:
        gone = _BATCHES
    elif any(key in changes for key in _BATCHES):
        gone = ("tokens_per_batch",)
    return {**{key: value for key, value in training.items() if key not in gone}, **changes}


def learning_rate_of(training: Mapping[str, Any]) -> float:
    """The configured learning rate, or that of a run that configures none."""
    return float(training.get("learning_rate", TRAINING_DEFAULTS["learning_rate"]))


def checked_training(value: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of transformers.TrainingArguments with values of the right types, in range, and not set elsewhere.

    Raises:
        ValueError: one line that starts with the key.
    """
    from transformers import TrainingArguments

    for key in value:
        if key in RESERVED_TRAINING:
            raise ValueError(f"{key}: set by cit-fast; use {RESERVED_TRAINING[key]} instead")
    # fsdp is declared as text and meant to be true or false.
    switches = {key: given for key, given in value.items() if key == "fsdp" and isinstance(given, bool)}
    others = {key: given for key, given in value.items() if key not in switches and key not in OWN_TRAINING}
    checked = {**_checked_fields(TrainingArguments, others), **switches}
    for key in OWN_TRAINING:
        if key in value:
            checked[key] = None if value[key] is None else checked_value(key, value[key], OWN_TRAINING)
    if checked.get("tokens_per_batch") is not None:
        for key in _BATCHES:
            if value.get(key):
                raise ValueError(f"tokens_per_batch: a batch is what fits into it; leave out {key}")
    for key, (least, itself, most) in _RANGES.items():
        number = checked.get(key)
        if number is None:
            continue
        if key == "save_total_limit" and number == 1:
            raise ValueError(f"{key}: keep 2 or more; with 1 there are moments without a whole checkpoint")
        if not math.isfinite(number) or number > most:
            raise ValueError(f"{key}: {number}; expected at most {most:,.15g}")
        if number < least or (number == least and not itself):
            raise ValueError(f"{key}: {number}; expected {'at least' if itself else 'more than'} {least}")
    if checked.get("max_steps") == 0:
        raise ValueError("max_steps: 0 trains nothing; leave it out, or give 1 or more")
    if checked.get("save_strategy") == "best":
        raise ValueError("save_strategy: best needs evaluations during the training; choose steps, epoch or no")
    return checked


def checked_adapter(value: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a PEFT configuration, its kind in capitals.

    Raises:
        ValueError: one line that starts with the key.
    """
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = str(value.get("peft_type", "LORA")).upper()
    known = {str(getattr(name, "value", name)): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        raise ValueError(f"peft_type: unknown adapter {kind!r}; {choices(kind, known)}")
    if issubclass(known[kind], PromptLearningConfig):
        raise ValueError(f"peft_type: {kind} adds tokens to every prompt, which our loss cannot align")
    if kind in _LEFT_OUT_KINDS:
        raise ValueError(f"peft_type: {kind} {_LEFT_OUT_KINDS[kind]}")
    for key in value:
        if key in RESERVED_ADAPTER:
            raise ValueError(f"{key}: set by {RESERVED_ADAPTER[key]}")
    if value.get("task_type", "CAUSAL_LM") not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ValueError(f"task_type: {value['task_type']!r}; only CAUSAL_LM and SEQ_2_SEQ_LM are trained here")
    if str(value.get("init_lora_weights")).lower() in _LEFT_OUT_INITS:
        raise ValueError(
            f"init_lora_weights: {value['init_lora_weights']!r} needs a pass over data that is not made here"
        )
    return {**_checked_fields(known[kind], value), "peft_type": kind}


def _checked_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` checked against the fields of dataclass ``kind``."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return {key: checked_value(key, value, fields, open_ended=True) for key, value in values.items()}


def training_arguments(training: Mapping[str, Any], seed: int, output: Path) -> Any:
    """transformers' own arguments: the configuration's, over our defaults.

    Args:
        training: checked keys of TrainingArguments, and our own, which are left out.
        seed: of the stage.
        output: where the stage keeps its checkpoints.

    Raises:
        ConfigError: transformers refuses them.
    """
    from transformers import TrainingArguments

    theirs = {key: value for key, value in training.items() if key not in OWN_TRAINING}
    try:
        return TrainingArguments(
            output_dir=str(output),
            seed=seed,
            remove_unused_columns=False,
            **{"use_cpu": not torch.cuda.is_available(), **TRAINING_DEFAULTS, **theirs},
        )
    except Exception as error:  # whatever transformers and accelerate think of the values
        raise ConfigError(f"training: {first_line(error)}") from error
