"""Options of loading reach transformers, wherever a model is loaded; what it does not know is named."""

from __future__ import annotations

import os
import platform

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.errors import ConfigError
from cit_fast.inference.export import export_adapters, export_merged
from cit_fast.models.config import ModelConfig
from cit_fast.models.loading import RESERVED_LOADING, loading_names, multiplies
from cit_fast.models.pretrained import load_model


def test_the_options_are_those_of_transformers():
    names = loading_names()
    assert {"use_safetensors", "use_kernels", "key_mapping", "variant"} <= names
    assert not names & set(RESERVED_LOADING)


def test_fields_of_the_models_configuration(tiny_model_folder):
    plain = load_model(tiny_model_folder, ModelConfig())
    turned = {"rope_parameters": {"rope_theta": 50.0}}  # what is not said stays
    other = load_model(tiny_model_folder, ModelConfig(kwargs={**turned, "attention_dropout": 0.25}))
    assert other.config.attention_dropout == 0.25
    assert other.config.rope_parameters == {**plain.config.rope_parameters, "rope_theta": 50.0}
    assert turned == {"rope_parameters": {"rope_theta": 50.0}}
    ids = torch.arange(5, 45)[None]
    assert not torch.allclose(plain(input_ids=ids).logits, other(input_ids=ids).logits)


def test_options_of_from_pretrained(tiny_model_folder, tmp_path):
    """``key_mapping``: names in the file -> names in the model."""
    for file in tiny_model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {f"old_{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    found = load_model(tmp_path, ModelConfig(kwargs={"key_mapping": {"^old_": ""}})).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"use_safetensor": True}, "model.kwargs.use_safetensor: unknown key; did you mean 'use_safetensors'"),
        ({"rope_parameter": {}}, "model.kwargs.rope_parameter: unknown key; did you mean 'rope_parameters'"),
        ({"torch_dtype": "float16"}, ".*kwargs.*torch_dtype: set by cit-fast; use model.dtype instead"),
        ({"device_map": "auto"}, ".*kwargs.*device_map: set by cit-fast; use nothing"),
        ({"ignore_mismatched_sizes": True}, ".*ignore_mismatched_sizes: set by cit-fast; use nothing"),
        ({"trust_remote_code": True}, ".*use model.trust_remote_code instead"),
        ({"token": "hf_secret"}, ".*HF_TOKEN"),
        ({"use_kernels": True}, "model.name: .* cannot be loaded: .*kernels"),
        ({"use_cache": "no"}, "model.kwargs: use_cache: "),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "model.kwargs: rope_parameters: "),
        ({"key_mapping": 5}, "model.kwargs: key_mapping: "),
        (
            {"num_hidden_layers": 3},
            r"model.kwargs: with them the model has weights that .* hold \(model.layers.2",
        ),
    ],
)
def test_what_it_does_not_know_is_one_line(settings, stream, kwargs, said, tmp_path):
    settings["model"]["kwargs"] = kwargs
    with pytest.raises(ConfigError, match=f"^{said}") as error:
        ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()
    assert "\n" not in str(error.value)
    assert "hf_secret" not in str(error.value)


def test_a_run_trains_answers_and_exports_with_them(settings, stream, tmp_path):
    """A model without position information is another function, so where they are lost, it shows."""
    still = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 1e6}}
    settings["model"]["kwargs"] = still
    (folder,) = ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()
    model = ContinualModel.from_run(folder)
    assert model.model.config.rope_parameters["factor"] == 1e6
    export_merged(folder, tmp_path / "merged", model.sets[0])
    again = load_model(tmp_path / "merged", ModelConfig())
    assert again.config.rope_parameters["factor"] == 1e6
    export_adapters(folder, tmp_path / "sets")
    card = (tmp_path / "sets" / model.sets[0] / "README.md").read_text()
    assert f"rope_parameters={still['rope_parameters']!r}" in card


def test_a_model_trained_whole_keeps_how_it_computes(settings, stream):
    settings["model"]["kwargs"] = {"experts_implementation": "eager"}
    settings["adapter"] = None
    (folder,) = ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()
    assert ContinualModel.from_run(folder).model.config._experts_implementation == "eager"


@pytest.mark.parametrize(
    ("native", "memory", "stored", "expected"),
    [
        (False, 1 << 40, torch.bfloat16, torch.float32),
        (False, 1 << 40, torch.float16, torch.float32),
        (False, 1 << 10, torch.bfloat16, torch.bfloat16),
        (True, 1 << 40, torch.bfloat16, torch.bfloat16),
        (False, 1 << 40, torch.float32, torch.float32),
    ],
)
def test_auto_is_a_dtype_that_the_processor_multiplies(
    tiny_model_folder, tmp_path, monkeypatch, caplog, native, memory, stored, expected
):
    """float32 is several times faster where there are no instructions for half precision, if there is room for it."""
    AutoModelForCausalLM.from_pretrained(tiny_model_folder).to(stored).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native, raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}.get)
    assert load_model(tmp_path, ModelConfig()).dtype == expected
    assert load_model(tmp_path, ModelConfig(dtype="bfloat16")).dtype == torch.bfloat16
    assert ("model.dtype: float32 would take" in caplog.text) == (memory == 1 << 10)


def test_another_processor_than_x86_is_not_known_to_lack_half_precision(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert multiplies(torch.bfloat16)
