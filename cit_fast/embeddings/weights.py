"""The input embeddings of a model folder, read without the rest of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cit_fast.errors import ConfigError
from cit_fast.models.pretrained import TOKENIZER_FILES, base_of_adapter, load_tokenizer, model_folder
from cit_fast.text import first_line

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_ADAPTER = "adapter_model.safetensors"


def read_input_embeddings(folder: Path) -> Tensor:
    """The input embeddings [V, d] of a transformers model folder, in the file's dtype; only they are read.

    Args:
        folder: holds ``config.json`` and safetensors, sharded or not; or a PEFT adapter of such a model.

    Raises:
        ConfigError: a file is missing or damaged, or none of its tensors is the embeddings.
    """
    base = _base_of_adapter(folder)
    name, shape = _name_and_shape(base)
    _refuse_own_embeddings(folder, name.rpartition(".")[0].rpartition(".")[2])
    files = _tensor_files(base)
    # A file may know the tensor under a longer name than the bare model ("model." in front) or, in files written by
    # older releases, under another path to the same last module.
    parts = name.split(".")
    for skipped in range(len(parts) - 1):
        suffix = ".".join(parts[skipped:])
        found = [key for key in files if key == suffix or key.endswith(f".{suffix}")]
        fitting = [weight for key in sorted(found) if list((weight := _rows(files[key], key)).shape) == shape]
        if fitting and all(torch.equal(fitting[0], other) for other in fitting[1:]):
            return fitting[0]
        if fitting:
            raise ConfigError(f"embedder: {base} has several tensors that may be its input embeddings: {sorted(found)}")
    raise ConfigError(f"embedder: {base} has no tensor {name} of shape {shape}, which its config.json asks for")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, or of the base model of an adapter that brings none.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    has_own = any((folder / name).exists() for name in TOKENIZER_FILES)
    return load_tokenizer(folder if has_own else _base_of_adapter(folder), where="embedder")


def _base_of_adapter(folder: Path) -> Path:
    base = base_of_adapter(folder, where="embedder")
    return folder if base is None else model_folder(base, where="embedder")


def _refuse_own_embeddings(folder: Path, module: str) -> None:
    """An adapter that changes the embeddings is only put together with them by PEFT."""
    path = folder / _ADAPTER
    if not path.exists() or (folder / "config.json").exists():
        return
    changed = [key for key in _keys(path) if f".{module}." in f".{key}"]
    if changed:
        raise ConfigError(
            f"embedder: the adapter {folder} changes the input embeddings ({changed[0]}); merge it into its model "
            "first, or pass the live model"
        )


def _name_and_shape(folder: Path) -> tuple[str, list[int]]:
    """The parameter that is the input embeddings, as the model's own code says, without any weights."""
    from transformers import AutoConfig, AutoModel

    if not (folder / "config.json").exists():
        raise ConfigError(f"embedder: {folder} holds no config.json, so it is no transformers model")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
        weight = model.get_input_embeddings().weight
        name = next(name for name, each in model.named_parameters() if each is weight)
    except Exception as error:  # a model's own code may raise anything for a configuration it does not like
        raise ConfigError(f"embedder: {folder} is no model with input embeddings: {first_line(error)}") from error
    return name, list(weight.shape)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it."""
    if (folder / _INDEX).exists():
        placed = _json(folder / _INDEX).get("weight_map", {})
        return {key: folder / file for key, file in placed.items()}
    if not (folder / _SINGLE).exists():
        raise ConfigError(f"embedder: {folder} holds no {_SINGLE} (weights in other formats are not read)")
    return dict.fromkeys(_keys(folder / _SINGLE), folder / _SINGLE)


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"embedder: {path} cannot be read: {first_line(error)}") from None


def _rows(path: Path, key: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"embedder: {path} cannot be read: {first_line(error)}") from None
    return tensor


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"embedder: {path} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"embedder: {path} must hold a JSON object")
    return content
