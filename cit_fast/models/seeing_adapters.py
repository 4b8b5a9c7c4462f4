"""What trains in a model that takes images: the language model's layers and the projector, never the vision tower.

LCIA's setting (the paper's section on implementation; LLaVA's second stage): LoRA on the language model, and the
projector, which brings the tower's features into its space, in full.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cit_fast.models.encoder_decoder import is_encoder_decoder
from cit_fast.models.osf import is_osf
from cit_fast.models.wrappers import sees_images, text_part, unwrap

_PROJECTORS = ("multi_modal_projector", "connector", "merger", "deepstack_merger_list", "aligner", "mm_projector")
"""What transformers' models call them."""


def adapter_fields(model: nn.Module, adapter: Mapping[str, Any], *, projector: bool = True) -> dict[str, Any]:
    """The fields of a PEFT configuration for a model.

    In one that takes images, ``target_modules: all-linear`` are the language model's, and the projector is trained
    beside them unless ``modules_to_save`` says otherwise.

    Args:
        projector: whether it can be trained beside them; sets that grow have no room for it.
    """
    base: Any = unwrap(model)
    fields = {**adapter, "task_type": "SEQ_2_SEQ_LM" if is_encoder_decoder(base.config) else "CAUSAL_LM"}
    if not sees_images(base.config):
        return fields
    if fields.get("target_modules") == "all-linear":
        fields["target_modules"] = _linear_layers(base)
    if projector and "modules_to_save" not in fields and not is_osf(adapter):
        fields["modules_to_save"] = projectors(base)
    return fields


def freeze_tower(model: nn.Module) -> None:
    """Where a model is trained whole: everything but what is neither language model, output projection nor projector.

    No effect on a model that takes no images.
    """
    base: Any = unwrap(model)
    if not sees_images(base.config):
        return
    trained = {id(each) for each in text_part(base).parameters()} | {
        id(each) for each in base.get_output_embeddings().parameters()
    }
    names = projectors(base)
    for name, parameter in base.named_parameters():
        if id(parameter) not in trained and not any(name.startswith(f"{each}.") for each in names):
            parameter.requires_grad_(False)


def projectors(base: nn.Module) -> list[str]:
    """Names of the modules that bring an image's features into the language model's space."""
    found: list[str] = []
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in _PROJECTORS and not any(name.startswith(f"{each}.") for each in found):
            # PEFT copies modules, but not lists of them.
            found += [f"{name}.{k}" for k in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
    return found


def is_of_projector(name: str) -> bool:
    """Whether a parameter of this name, in a model and its wrappers, is a projector's."""
    return any(part in _PROJECTORS for part in name.split("."))


def _linear_layers(base: Any) -> str:
    """A pattern of the names of all linear layers in the language model."""
    decoder = text_part(base)
    place = next(name for name, module in base.named_modules() if module is decoder)
    kinds: set[str] = set()
    inside = "\0"  # of a layer that has an adapter already
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear | BaseTunerLayer) and not name.startswith(inside):
            kinds.add(name.rpartition(".")[2])
            inside = f"{name}." if isinstance(module, BaseTunerLayer) else inside
    return rf"(.*\.)?{re.escape(place)}\..*\.({'|'.join(map(re.escape, sorted(kinds)))})"
