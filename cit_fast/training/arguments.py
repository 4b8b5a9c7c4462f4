"""What transformers' TrainingArguments are for a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cit_fast.errors import ConfigError
from cit_fast.text import first_line
from cit_fast.training.config import RunConfig

# What TrainingArguments hold unless the configuration says otherwise.
_TRAINING_DEFAULTS: dict[str, Any] = {
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


def training_arguments(config: RunConfig, output: Path, index: int) -> Any:
    """Those of stage ``index``, which keeps its checkpoints in ``output``: the configuration's, over our defaults.

    Raises:
        ConfigError: transformers refuses them.
    """
    from transformers import TrainingArguments

    try:
        return TrainingArguments(
            output_dir=str(output),
            seed=config.seed + index,
            remove_unused_columns=False,
            **{"use_cpu": not torch.cuda.is_available(), **_TRAINING_DEFAULTS, **config.training},
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {first_line(error)}") from None
