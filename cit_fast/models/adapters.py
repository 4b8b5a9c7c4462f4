"""Create, save and load the adapter sets of a language model."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.integrations import unset_hf_deepspeed_config

from cit_fast.errors import ConfigError, RunError
from cit_fast.files import write_json
from cit_fast.models.adapter_bank import is_plain_lora, read_adapter_config, read_adapter_weights
from cit_fast.models.config import DataConfig, ModelConfig
from cit_fast.models.encoder_decoder import is_encoder_decoder
from cit_fast.models.fused_lora import fuse_lora
from cit_fast.models.fused_norms import FusedNorm, fuse_norms
from cit_fast.models.growing_adapter import GrowingAdapter
from cit_fast.models.image_reader import load_image_reader
from cit_fast.models.loading import known_loading
from cit_fast.models.osf import MergedModel, is_osf
from cit_fast.models.parked_sets import (
    park_others,
    parked,
    read_parked,
    set_names,
    set_parked,
    take_in,
    weights_of,
)
from cit_fast.models.pretrained import load_tokenizer
from cit_fast.models.prompts import PromptEncoder
from cit_fast.models.rewritten_base import RewrittenBase, rewrites_base
from cit_fast.models.seeing_adapters import adapter_fields, freeze_tower
from cit_fast.text import first_line


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Keep transformers from loading shards only, as it does where FSDP or ZeRO-3 is configured."""
    unset_hf_deepspeed_config()  # the next TrainingArguments set it again
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def load_encoder(folder: Path, model: ModelConfig, config: DataConfig) -> PromptEncoder:
    """The encoder of a model folder that a configuration's sections ``model`` and ``data`` describe.

    Raises:
        ConfigError: the folder holds no tokenizer, or no processor for a model that takes images.
    """
    tokenizer = load_tokenizer(folder, model.trust_remote_code)
    _, settings = known_loading(folder, model.kwargs, model.trust_remote_code)
    return PromptEncoder(
        tokenizer,
        max_length=config.max_length,
        system_prompt=config.system_prompt,
        on_overflow=config.on_overflow,
        template_options=config.template_options,
        date=config.date,
        images=load_image_reader(folder, settings, tokenizer),
        closes=is_encoder_decoder(settings),
    )


def train_adapter(
    model: Any,
    adapter: Mapping[str, Any] | None,
    name: str,
    seed: int,
    start_from: str | None = None,
    *,
    fuse: bool = False,
    grow: bool = False,
) -> tuple[Any, RewrittenBase | GrowingAdapter | MergedModel | None]:
    """``model`` ready to train adapter set ``name``: made when new, the only one with gradients, and the only one in
    the model where the others can be parked (:mod:`cit_fast.models.parked_sets`).

    Args:
        adapter: fields of a PEFT configuration; ``None``: the model itself is trained.
        start_from: the set whose weights a new one starts with.
        fuse: LoRA layers run as one op each (:func:`~cit_fast.models.fused_lora.fuse_lora`).
        grow: a set that is there stays what it is, and a part is trained that it grows by.

    Returns:
        The model; and what makes the set a plain one after the stage, where an initialisation has rewritten the base
        model, or the set grows, or puts it into the model's own weights (OSF).
    """
    if adapter is None:
        freeze_tower(model)
        return model, None
    from peft import get_peft_config, get_peft_model, set_peft_model_state_dict
    from transformers import set_seed

    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "default":
        raise ConfigError(
            f"router: {name!r} cannot name an adapter set; use letters, digits, '_' and '-' ('default' is PEFT's own)"
        )
    if grow and isinstance(model, PeftModel) and name in model.peft_config:
        set_seed(seed)
        grown = GrowingAdapter(model, name, get_peft_config(adapter_fields(model, adapter, projector=False)))
        if fuse:
            fuse_lora(model)
        return model, grown
    if isinstance(model, PeftModel) and name in set_names(model):
        if name not in model.peft_config:
            take_in(model, name)
        model.set_adapter(name)
        park_others(model, name)
        if fuse:
            fuse_lora(model)
        return model, None
    rewritten = RewrittenBase(model) if rewrites_base(adapter) else None
    if rewritten is not None and start_from is not None:
        raise ConfigError("router.start: previous cannot go with an adapter whose initialisation rewrites the base")
    set_seed(seed)  # a new set starts from the same numbers in a resumed run
    try:
        config = get_peft_config(adapter_fields(model, adapter, projector=not grow))
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    except Exception as error:  # whatever PEFT thinks of the options, in a dozen kinds
        raise ConfigError(f"adapter: {first_line(error)}") from error
    model.set_adapter(name)
    if is_osf(adapter):
        return model, MergedModel()
    if rewritten is not None:
        rewritten.added(model, name)
    if start_from is not None:
        set_peft_model_state_dict(model, weights_of(model, start_from), adapter_name=name)
    if isinstance(model, PeftModel) and rewritten is None:
        park_others(model, name)
    if fuse:
        fuse_lora(model)
    return model, rewritten


def save_weights(
    model: Any,
    folder: Path,
    base_name: str,
    state_dict: dict[str, Any] | None = None,
    *,
    trained: str | None = None,
) -> None:
    """Write what training changed: ``adapters/<name>`` as plain PEFT folders, or the whole model as ``model``.

    Args:
        state_dict: the model's weights, where the model itself holds only shards of them.
        trained: the one adapter set that has changed; ``None``: all are written.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder / "model", state_dict=state_dict)
        return
    names = list(model.peft_config) if trained is None else [trained]
    model.save_pretrained(folder / "adapters", selected_adapters=names, state_dict=state_dict)
    for name in names:
        path = folder / "adapters" / name / "adapter_config.json"
        # The folder the base was loaded from means nothing on another machine; its name does. Modules are a set.
        config = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": base_name}
        if isinstance(config.get("target_modules"), list):
            config["target_modules"] = sorted(config["target_modules"])
        write_json(path, config)


def load_weights(base: Any, weights: Path | Mapping[str, Path], trainable: bool = False) -> Any:
    """``base`` with weights that :func:`save_weights` left.

    Args:
        weights: the folder of a model that was trained whole, or the folders of adapter sets by name. The last of these
            is in the model, the others are parked where they can be.

    Raises:
        RunError: a missing or damaged file, or an adapter of another base model.
    """
    model: Any = base
    if isinstance(weights, Path):
        try:
            model = type(base).from_pretrained(
                weights,
                dtype=base.dtype,
                attn_implementation=base.config._attn_implementation,
                **getattr(base, "loaded_with", {}),
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(f"{weights}: cannot be loaded: {first_line(error)}") from None
        if any(isinstance(module, FusedNorm) for module in base.modules()):
            fuse_norms(model)  # as the base was, for a resumed run must compute what it would have computed
        return model
    *others, last = weights
    plain = is_plain_lora(read_adapter_config(weights[last]))
    sets = read_parked(base, {name: weights[name] for name in others}) if plain else None
    for name in others if sets is None else ():
        model = load_adapter(model, weights[name], trainable)
    model = load_adapter(model, weights[last], trainable)
    if sets is not None:
        set_parked(model, sets)
    # Saving them again, PEFT looks up the base model's configuration: where it was loaded from, not on a hub.
    for config in (*model.peft_config.values(), *parked(model).configs.values()):
        config.base_model_name_or_path = base.name_or_path
    return model


def load_adapter(model: Any, folder: Path, trainable: bool = False, *, name: str | None = None) -> Any:
    """``model``, bare or with adapters, with the one in a PEFT folder.

    Args:
        name: of the adapter set in the model; ``None``: the folder's name.

    Raises:
        RunError: a missing or damaged file, weights that are not finite, or an adapter of another base model.
    """
    name = name or folder.name
    read_adapter_config(folder)
    read_adapter_weights(folder)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name, is_trainable=trainable)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=trainable)
    except Exception as error:  # PEFT and safetensors raise half a dozen kinds for a damaged or foreign file
        if isinstance(model, PeftModel) and name in model.peft_config:
            model.delete_adapter(name)  # half of it is in the model
        raise RunError(f"{folder}: cannot be loaded: {first_line(error)}") from error
    return model
