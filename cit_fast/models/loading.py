"""How a model is loaded: transformers' own options, and its quantisations."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from cit_fast.errors import ConfigError
from cit_fast.models.encoder_decoder import is_encoder_decoder
from cit_fast.models.wrappers import sees_images
from cit_fast.text import first_line
from cit_fast.values import choices

logger = logging.getLogger(__name__)
_PLACED = "nothing: the trainer and the launcher place the model"
_FETCHED = "model.name and model.revision (a model is fetched before it is loaded)"
# Set by cit-fast itself, or by another key.
RESERVED_LOADING = {
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "quantization_config": "model.quantization",
    "token": "the environment variable HF_TOKEN",
    "weights_only": "nothing: a file that could hold code is never loaded",
    "output_loading_info": "nothing: a model alone is loaded",
    "ignore_mismatched_sizes": "nothing: weights that are drawn would be others at every load",
    **dict.fromkeys(("config", "state_dict"), "model.name: the folder of another model"),
    **dict.fromkeys(("adapter_kwargs", "adapter_name"), "adapter: adapter sets are trained here"),
    **dict.fromkeys(
        ("revision", "cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "gguf_file"), _FETCHED
    ),
    **dict.fromkeys(
        (
            "device_map", "max_memory", "offload_folder", "offload_buffers", "tp_plan", "tp_size", "device_mesh",
            "distributed_config",
        ),
        _PLACED,
    ),
}  # fmt: skip


COMPUTING = frozenset({"use_kernels", "allow_all_kernels", "kernel_config", "experts_implementation", "fusion_config"})
"""Options that decide how a model computes, not from which files it is read."""


@cache
def loading_names() -> frozenset[str]:
    """The options of ``PreTrainedModel.from_pretrained`` that a configuration may set.

    Those of its signature, and those that it takes out of its ``**kwargs``.
    """
    from transformers import PreTrainedModel

    function = PreTrainedModel.from_pretrained
    named = {
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY or parameter.default is not inspect.Parameter.empty
    }
    taken = set(re.findall(r"= kwargs\.pop\(\"(\w+)\"", inspect.getsource(function)))
    return frozenset(name for name in named | taken if not name.startswith("_") and name not in RESERVED_LOADING)


def checked_loading(value: Mapping[str, Any]) -> dict[str, Any]:
    """Options of loading that are not set elsewhere. Whether one is known is seen when the model is there.

    Raises:
        ValueError: one line that starts with the key.
    """
    for key in value:
        if key in RESERVED_LOADING:
            raise ValueError(f"{key}: set by cit-fast; use {RESERVED_LOADING[key]} instead")
        if not key.isidentifier() or key.startswith("_"):
            raise ValueError(f"{key}: no name of an option")
    return dict(value)


def known_loading(folder: Path, kwargs: Mapping[str, Any], trust_remote_code: bool) -> tuple[dict[str, Any], Any]:
    """The options as transformers takes them, and the model's configuration with those that belong to it.

    Args:
        folder: of the model.
        kwargs: options of ``from_pretrained``, and fields of the model's configuration.

    Raises:
        ConfigError: an option that neither has, or a configuration that cannot be read.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise ConfigError(f"model.name: {folder} holds no config.json, so it is no transformers model")
    own = {key: copy.deepcopy(value) for key, value in kwargs.items() if key in loading_names()}
    fields = {key: copy.deepcopy(value) for key, value in kwargs.items() if key not in own}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ConfigError(f"model.name: {folder} cannot be loaded: {first_line(error)}") from None
    plain = config.to_dict()
    known = {*(key for key in plain if not key.startswith("_")), *getattr(config, "attribute_map", {})}
    for key, value in fields.items():
        if key not in known:
            raise ConfigError(f"model.kwargs.{key}: unknown key; {choices(key, {*known, *loading_names()})}")
        if isinstance(value, dict) and isinstance(plain.get(key), dict):  # what is not said stays
            fields[key] = {**plain[key], **value}
    if fields:
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **fields)
        except Exception as error:  # whatever a configuration's own checks think of the values
            raise ConfigError(f"model.kwargs: {', '.join(fields)}: {first_line(error)}") from error
    return own, config


def auto_class(config: Any) -> Any:
    """transformers' class that loads a model of this configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if is_encoder_decoder(config):
        return AutoModelForSeq2SeqLM
    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def checked_quantization(value: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of one of transformers' quantisation configurations.

    ``load_in_4bit: true`` and ``load_in_8bit: true`` are bitsandbytes'; another one is named by ``quant_method``.

    Raises:
        ValueError: one line that starts with the key.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

    given = dict(value)
    if not isinstance(given.get("quant_method", ""), str):
        raise ValueError("quant_method: expected a name, such as bitsandbytes")
    bits = [key for key in ("load_in_4bit", "load_in_8bit") if given.get(key)]
    if len(bits) > 1:
        raise ValueError("load_in_8bit: it cannot be 4 and 8 bits; leave one out")
    method = given.get("quant_method", "bitsandbytes" if bits else None)
    if method is None:
        raise ValueError("load_in_4bit: say how, by load_in_4bit or load_in_8bit: true (bitsandbytes), or quant_method")
    kinds = {
        name.removesuffix("_4bit").removesuffix("_8bit"): kind
        for name, kind in AUTO_QUANTIZATION_CONFIG_MAPPING.items()
    }
    if method not in kinds:
        raise ValueError(f"quant_method: {method!r} is unknown; {choices(str(method), kinds)}")
    if method == "bitsandbytes" and not bits:
        raise ValueError("quant_method: bitsandbytes wants load_in_4bit or load_in_8bit: true")
    fields = {name for name in inspect.signature(kinds[method].__init__).parameters if name not in ("self", "kwargs")}
    for key in given:
        if key not in fields | {"quant_method"}:
            raise ValueError(f"{key}: unknown key; {choices(key, fields)}")
    try:
        AutoQuantizationConfig.from_dict({**given, "quant_method": method})
    except ImportError:  # said where it is needed: a run can be looked at without it
        pass
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{next(iter(given))}: {first_line(error)}") from None
    return given


def quantization_config(given: Mapping[str, Any]) -> Any:
    """transformers' object for checked fields."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict({"quant_method": "bitsandbytes", **given})


def try_quantization(given: Mapping[str, Any] | None, config: Any) -> bool:
    """See that this machine has what a quantised base needs, before it is loaded.

    Args:
        given: checked fields of a quantisation; ``None``: that of the model's own configuration, if it has one.
        config: of the model.

    Returns:
        Whether its base is quantised.

    Raises:
        ConfigError: a package is missing, or this machine cannot do it.
    """
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    stored = getattr(config, "quantization_config", None)
    if given is None and stored is None:
        return False
    if given is not None and stored is not None:
        if given.get("dequantize"):  # of formats that transformers can load as what they stand for
            return False
        raise ConfigError("model.quantization: the weights of this model are quantised already; leave it out")
    try:
        if given is not None and stored is None:
            wanted = quantization_config(given)
        else:
            wanted = AutoQuantizationConfig.from_dict(stored) if isinstance(stored, dict) else stored
        quantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=stored is not None)
        quantizer.validate_environment(dtype=torch.bfloat16, device_map=None, weights_only=True)
    except Exception as error:  # a package that is missing or too old, a device that is not there, in many kinds
        hint = "; pip install 'cit-fast[quantization]'" if "bitsandbytes" in str(error) else ""
        raise ConfigError(f"model.quantization: {first_line(error)}{hint}") from error
    if not quantizer.is_trainable:
        raise ConfigError(
            f"model.quantization: adapters on {wanted.quant_method} weights cannot be trained, says transformers"
        )
    return True


def is_quantized(model: Any) -> bool:
    """Whether a model's base weights are quantised."""
    return bool(getattr(model, "is_quantized", False))


def keep_gradients(model: Any) -> None:
    """Keep weights of 4 bits in the layout whose products have gradients.

    On a CPU that multiplies bfloat16 bitsandbytes packs them at the first answer for a product that has none and rounds
    to bfloat16; what is trained after an evaluation would then miss the gradients that go through these layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def full_precision(model: Any) -> Any:
    """The model in float32, quantised weights as what they stand for.

    Raises:
        ConfigError: a quantisation that transformers cannot take back.
    """
    if not is_quantized(model):
        return model.float()
    try:
        model = model.dequantize(torch.float32)
    except (NotImplementedError, ValueError, AttributeError, ImportError) as error:
        raise ConfigError(f"its quantised weights cannot be taken back: {first_line(error)}") from None
    return model.float()


def computing_dtype(folder: Path, settings: Any) -> torch.dtype | Literal["auto"]:
    """What ``model.dtype: auto`` means for a model on this machine.

    Args:
        folder: of the model.
        settings: its configuration.
    """
    stored = getattr(settings, "dtype", None)
    quantized = getattr(settings, "quantization_config", None) is not None
    if torch.cuda.is_available() or stored is None or quantized or multiplies(stored):
        return "auto"
    weights = sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    if 4 * 2 * weights > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        logger.warning(
            "this processor does not multiply %s, in which the model computes slowly here; model.dtype: float32 would "
            "take %.0f GB for the weights",
            *(str(stored).removeprefix("torch."), 2 * weights / 1e9),
        )
        return "auto"
    return torch.float32


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products in this dtype; of others than x86 it is not known to lack
    them.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    needed = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    return dtype not in needed or any(getattr(torch.cpu, name, bool)() for name in needed[dtype])
