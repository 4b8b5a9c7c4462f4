"""Load a model for evaluation from a run folder, an adapter folder, a model folder or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from cit_fast.errors import ConfigError
from cit_fast.evaluation.run_files import read_stages
from cit_fast.inference.continual_model import ContinualModel
from cit_fast.models.adapters import load_adapter
from cit_fast.models.config import ModelConfig
from cit_fast.models.digests import model_identity
from cit_fast.models.pretrained import base_of_adapter, load_model, load_tokenizer, resolve_model
from cit_fast.models.prompts import PromptEncoder


class LoadedModel(NamedTuple):
    """A model with its prompt encoder, as :func:`load_any_model` returns it."""

    model: Any
    """In evaluation mode, on the GPU where there is one."""
    encoder: PromptEncoder
    """Of its tokenizer; examples that do not fit are skipped and counted."""
    identity: str
    """Tells the model from any other, by its files."""


def load_any_model(place: str, max_length: int | None = None, stage: int | None = None) -> LoadedModel:
    """Load a model with its tokenizer.

    Args:
        place: a run folder, a folder with a PEFT adapter, a model folder, or a hub name.
        max_length: limit of the encoder in tokens; ``None``: the run's own, else 1024.
        stage: of a run, from 1; ``None``: its last.

    Raises:
        ConfigError: no such model, an adapter that names no base model, or a stage of something else than a run.
        RunError: a run without a trained stage, or an adapter that is damaged or does not fit its base.
    """
    folder = Path(place)
    if (folder / "run.json").is_file():
        continual = ContinualModel.from_run(folder, stage=stage)
        own = continual.encoder
        encoder = own.with_limit(max_length or own.max_length, on_overflow="skip")
        index = stage or read_stages(folder)[-1].index
        model, identity = continual.model, _stage_identity(folder / "stages" / f"{index:02d}")
    elif stage is not None:
        raise ConfigError(f"stage: {place} is no run, which alone has stages")
    else:
        base_name = base_of_adapter(folder)
        base = base_name or place
        config = ModelConfig(name=base)
        resolved = resolve_model(config)
        has_own = (folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(folder if has_own else resolved)
        model = load_model(resolved, config)
        identity = model_identity(resolved, base)
        if base_name is not None:
            model = load_adapter(model, folder, name="default")
            identity = model_identity(folder, identity)
        encoder = PromptEncoder(tokenizer, max_length=max_length or 1024, on_overflow="skip")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    encoder.fit_to(model)
    return LoadedModel(model, encoder, identity)


def _stage_identity(stage: Path) -> str:
    """:func:`model_identity` of every folder of a stage that holds weights, chained."""
    identity = ""
    for folder in sorted({path.parent for path in stage.rglob("*.safetensors")}):
        identity = model_identity(folder, identity)
    return identity
