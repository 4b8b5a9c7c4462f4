"""Load a model for evaluation from a run folder, an adapter folder, a model folder or a hub name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.records import read_stages
from cit_fast.inference.continual_model import ContinualModel
from cit_fast.models.config import ModelConfig
from cit_fast.models.pretrained import load_model, load_tokenizer, model_identity, resolve_model
from cit_fast.models.prompts import PromptEncoder
from cit_fast.text import first_line


class LoadedModel(NamedTuple):
    """A model with its prompt encoder, as :func:`load_any_model` returns it."""

    model: Any
    """In evaluation mode, on the GPU where there is one."""
    encoder: PromptEncoder
    """Of its tokenizer; examples that do not fit are skipped and counted."""
    identity: str
    """Tells the model from any other, by its files."""


def load_any_model(place: str, max_length: int | None = None) -> LoadedModel:
    """Load a model with its tokenizer.

    Args:
        place: a run folder (its last stage), a folder with a PEFT adapter, a model folder, or a hub name.
        max_length: limit of the encoder in tokens; ``None``: the run's own, else 1024.

    Raises:
        ConfigError: no such model, or an adapter that does not fit its base.
        RunError: a run without a trained stage.
    """
    folder = Path(place)
    if (folder / "run.json").is_file():
        continual = ContinualModel.from_run(folder)
        own = continual.encoder
        encoder = own.with_limit(max_length or own.max_length, on_overflow="skip")
        model, identity = continual.model, _files_identity(folder / "stages" / f"{read_stages(folder)[-1].index:02d}")
    else:
        adapter = folder / "adapter_config.json"
        base = _base_of(adapter) if adapter.is_file() else place
        config = ModelConfig(name=base)
        resolved = resolve_model(config)
        has_own = (folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(folder if has_own else resolved)
        model = load_model(resolved, config)
        identity = model_identity(resolved, base)
        if adapter.is_file():
            model = _with_adapter(model, folder)
            identity = model_identity(folder, identity)
        encoder = PromptEncoder(tokenizer, max_length=max_length or 1024, on_overflow="skip")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    encoder.fit_to(model)
    return LoadedModel(model, encoder, identity)


def _files_identity(stage: Path) -> str:
    """Digest of a stage's weights, wherever they lie in it."""
    identity = ""
    for folder in sorted({path.parent for path in stage.rglob("*.safetensors")}):
        identity = model_identity(folder, identity)
    return identity


def _base_of(adapter: Path) -> str:
    try:
        name = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{adapter}: cannot be read ({error})") from None
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{adapter}: names no base model (base_model_name_or_path)")
    return name


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # PEFT and safetensors raise half a dozen kinds for a damaged or foreign file
        raise ConfigError(f"{folder}: cannot be loaded: {first_line(error)}") from error
