"""Adapters over a base in 4 or 8 bits: trained, resumed, routed, served, exported, merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from growth import predictions, same
from killed import at_call, killed
from rich.console import Console
from safetensors.torch import load_file
from toy_folders import llama_folder

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.data import TaskStream
from cit_fast.errors import ConfigError
from cit_fast.evaluation import read_stages
from cit_fast.inference.export import export_adapters, export_merged
from cit_fast.models.config import ModelConfig
from cit_fast.models.pretrained import load_model
from cit_fast.run import method_run

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


@pytest.fixture(scope="module")
def base(tiny_tokenizer, tmp_path_factory):
    """A model whose rows hold a block of 64 values, which is what is quantised together."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "initializer_range": 0.1}
    return llama_folder(tmp_path_factory.mktemp("base"), tiny_tokenizer, **sizes)


@pytest.fixture
def quantized(settings, base):
    settings["model"] = {"name": str(base), "quantization": dict(FOUR_BITS)}
    settings["evaluation"] |= {"tasks": "seen", "untrained": False}
    return settings


def run(settings, stream):
    return ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()


def few_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 45)[None]).logits[0].float()


# One of each objective, update and router; `osft` trains the base itself.
METHODS = ["kpig", "eaft", "ewc", "o-lora", "mask-the-target", "merge", "switch-tokens"]


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method_learns_over_four_bits(quantized, stream, method):
    (folder,) = run(quantized | {"methods": [method]}, TaskStream(stream.tasks[:2]))
    first, second = read_stages(folder)[-2:]
    for stage in (first, second):
        assert stage.losses[-1][1] < stage.losses[0][1], stage.index
    prompts = [f"Say beta, then the number.\n\n{k}" for k in range(100, 104)]
    answers = ContinualModel.from_run(folder).generate(prompts, max_new_tokens=6)
    assert answers == [each.prediction for each in predictions(folder, second.index, "beta")]


@pytest.mark.parametrize("bits", [FOUR_BITS, {"load_in_8bit": True}], ids=["4 bits", "8 bits"])
def test_killed_and_resumed_with_the_same_bits(quantized, stream, tmp_path, bits):
    quantized |= {"methods": ["random-replay"]}
    quantized["model"]["quantization"] = bits
    (whole,) = run(quantized | {"output": str(tmp_path / "whole")}, stream)
    assert killed(lambda: run(quantized, stream), at_call(2, method_run, "train_adapter"))
    (resumed,) = run(quantized, stream)
    same(resumed, whole)


@pytest.fixture
def routed(quantized, stream):
    return run(quantized | {"methods": ["switch-tokens"]}, stream)[0]


def test_answers_do_not_take_the_gradients(quantized):
    model = load_model(Path(quantized["model"]["name"]), ModelConfig(**quantized["model"]))
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert layers
    model.eval()
    with torch.no_grad():
        few_logits(model)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)  # whatever this processor can do


def test_what_is_exported_answers_as_here_over_the_same_bits(routed, quantized, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Where a processor multiplies bfloat16, bitsandbytes rounds to it in evaluation.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    names = export_adapters(routed, tmp_path / "out")
    own = BitsAndBytesConfig(**FOUR_BITS)
    own_model = ContinualModel.from_run(routed)
    for name in names:
        bare = AutoModelForCausalLM.from_pretrained(quantized["model"]["name"], quantization_config=own)
        plain = few_logits(bare)
        found = few_logits(PeftModel.from_pretrained(bare, str(tmp_path / "out" / name)))
        with own_model.bank.answering([name]):
            torch.testing.assert_close(few_logits(own_model.model), found, rtol=0, atol=5e-6)
        assert (found - plain).abs().max() > 0.1
    # The card's own lines, with the exported folder in the place of "this folder".
    card = (tmp_path / "out" / names[0] / "README.md").read_text()
    lines = card[card.index("```python\n") + len("```python\n") :].split("```")[0]
    scope: dict[str, object] = {}
    exec(lines.replace(f'(base, "{names[0]}")', f'(base, "{tmp_path / "out" / names[0]}")'), scope)  # noqa: S102
    with own_model.bank.answering([names[0]]):
        torch.testing.assert_close(few_logits(scope["model"]), few_logits(own_model.model), rtol=0, atol=5e-6)


def test_mixed_batches_answer_as_each_set_alone(routed):
    model = ContinualModel.from_run(routed)
    prompts = [f"Say {task}, then the number.\n\n{k}" for task in ("alpha", "beta", "gamma") for k in (3, 7)]
    together = model.generate(prompts, max_new_tokens=6)
    assert together == [model.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert len(set(model.route(prompts))) == 3


def test_a_merge_takes_the_bits_for_what_they_stand_for(routed, quantized, tmp_path):
    from transformers import AutoModelForCausalLM

    model = ContinualModel.from_run(routed)
    export_merged(routed, tmp_path / "merged", model.sets[0])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not getattr(merged, "is_quantized", False)
    with model.bank.answering([model.sets[0]]):
        expected = few_logits(model.model)
    torch.testing.assert_close(few_logits(merged), expected, rtol=0, atol=5e-6)
    unquantized = few_logits(AutoModelForCausalLM.from_pretrained(quantized["model"]["name"]))
    assert (unquantized - few_logits(merged)).abs().max() > 0.1


def test_a_base_that_is_stored_in_four_bits(quantized, stream, base, tmp_path):
    """Its folder says so itself, and no other quantisation goes over it."""
    stored = tmp_path / "stored"
    model = load_model(base, ModelConfig(**quantized["model"]))
    model.save_pretrained(stored)
    for file in base.glob("token*"):
        shutil.copy(file, stored)
    quantized |= {"methods": ["random-replay"], "model": {"name": str(stored)}}
    (folder,) = run(quantized, stream)
    assert read_stages(folder)[1].losses[-1][1] < read_stages(folder)[1].losses[0][1]
    quantized["model"]["quantization"] = FOUR_BITS
    with pytest.raises(ConfigError, match="quantised already"):
        run(quantized | {"output": str(tmp_path / "again")}, stream)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapter": None}, "a model without an adapter trains the base's own weights"),
        ({"methods": ["osft"]}, "this adapter trains the base's own weights"),
        ({"adapter": {"target_modules": "all-linear", "init_lora_weights": "pissa"}}, "quantised ones cannot"),
    ],
    ids=["whole", "osft", "pissa"],
)
def test_what_would_train_the_bits_themselves_is_refused(quantized, stream, change, said):
    with pytest.raises(ConfigError, match=said):
        run(quantized | change, stream)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"load_in_4bits": True}, "load_in_4bit"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "cannot be 4 and 8 bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant": "nf4"}, "bnb_4bit_quant: unknown key; did you mean"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float31"}, "model.quantization.load_in_4bit"),
        ({"quant_method": "bitsandbites"}, "did you mean 'bitsandbytes'"),
        ({"quant_method": "bitsandbytes"}, "wants load_in_4bit or load_in_8bit"),
        ({}, "say how"),
    ],
)
def test_what_no_quantisation_knows_is_one_line(quantized, stream, given, said):
    quantized["model"]["quantization"] = given
    with pytest.raises(ConfigError, match=said) as error:
        run(quantized, stream)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_before_a_folder_is_made(quantized, stream, monkeypatch, tmp_path):
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'cit-fast\[quantization\]'"):
        run(quantized, stream)
    assert not (tmp_path / "runs").exists()


def test_layers_that_keep_pefts_path_are_said_once(quantized, stream, caplog):
    with caplog.at_level("INFO", logger="cit_fast.models.fused_lora"):
        run(quantized | {"methods": ["sequential"]}, stream)
    said = [record.message for record in caplog.records if "keep PEFT's path" in record.message]
    assert len(said) == 1
    assert "14 LoRA layers keep PEFT's path: they are peft.tuners.lora.bnb.Linear4bit" in said[0]


def test_the_adapter_is_that_of_the_run(quantized, stream):
    """Files hold the adapter alone, in full precision."""
    (folder,) = run(quantized | {"methods": ["sequential"]}, stream)
    (file,) = folder.glob("stages/02/adapters/*/adapter_model.safetensors")
    tensors = load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(".lora_" in name for name in tensors)
