"""The transformers model in what others put around it, and its parts."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, DeepSpeed and PEFT wrappers."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model


def sees_images(config: Any) -> bool:
    """Whether a model of this transformers configuration takes images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")


def text_part(model: nn.Module) -> nn.Module:
    """The language model of a model that takes images; of any other the model itself."""
    whole: Any = unwrap(model)
    return whole.get_decoder() if sees_images(getattr(whole, "config", None)) else model


def learned_positions(model: nn.Module) -> int | None:
    """How many positions the model has learned embeddings of; ``None``: it computes them, for any number."""
    for name, module in text_part(model).named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            # OPT and BART keep two rows, RoBERTa one more than its padding token's, that stand for no position.
            unused = getattr(module, "offset", None)
            if unused is None:
                unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings - unused)
    return None
