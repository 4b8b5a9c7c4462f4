from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cit_fast.errors import ConfigError, DataError
from cit_fast.methods.routing.features import LastTokenFeatures, build_features
from cit_fast.methods.stage import Stage

TEXTS = ["Write the date in the form year, month, day.", "day", "Extract the e-mail address from the text. " * 3]


def test_the_last_tokens_state_of_the_final_layer(tiny_model, tiny_tokenizer):
    found = LastTokenFeatures(tiny_model, tiny_tokenizer).embed(TEXTS)
    assert found.shape == (3, 32)
    for text, row in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            states = tiny_model(torch.tensor([tiny_tokenizer(text)["input_ids"]]), output_hidden_states=True)
        assert torch.allclose(row, states.hidden_states[-1][0, -1], atol=1e-5)


def test_adapters_are_off_and_everything_is_as_before(tiny_model, tiny_tokenizer):
    plain = LastTokenFeatures(tiny_model, tiny_tokenizer).embed(TEXTS)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    adapted = get_peft_model(copy.deepcopy(tiny_model), config).train()
    assert torch.equal(LastTokenFeatures(adapted, tiny_tokenizer).embed(TEXTS), plain)
    assert all(module.training for module in adapted.modules())
    with torch.inference_mode():
        ids = torch.tensor([[5, 6]])
        assert not torch.allclose(adapted.eval()(ids).logits, tiny_model(ids).logits)  # they do something


def test_a_long_text_loses_its_middle_and_is_counted(tiny_model, tiny_tokenizer):
    features = LastTokenFeatures(tiny_model, tiny_tokenizer, max_length=9)
    ids = tiny_tokenizer(TEXTS[2])["input_ids"]
    found = features.embed([TEXTS[2], "day"])
    assert features.truncated == 1
    with torch.inference_mode():
        cut = torch.tensor([ids[:4] + ids[-5:]])
        assert torch.allclose(found[0], tiny_model.base_model(cut).last_hidden_state[0, -1], atol=1e-5)
    assert LastTokenFeatures(tiny_model, tiny_tokenizer, max_length=len(ids)).embed([TEXTS[2]]).shape == (1, 32)


def test_from_a_folder_and_from_the_cache(tiny_model, tiny_tokenizer, tiny_model_folder, stage, tmp_path):
    plain = LastTokenFeatures(tiny_model, tiny_tokenizer).embed(TEXTS)
    own = stage()
    cached = build_features(str(tiny_model_folder), replace(own, cache=tmp_path), 128)
    assert torch.allclose(cached.embed(TEXTS), plain, atol=1e-5)
    again = build_features(str(tiny_model_folder), replace(own, cache=tmp_path), 128)
    assert torch.equal(again.embed(TEXTS), cached.embed(TEXTS))
    other = build_features(str(tiny_model_folder), replace(own, cache=tmp_path), 5)
    assert other.name != again.name
    assert torch.equal(build_features("base", own, 128).embed(TEXTS), plain)


def test_what_has_no_features(tiny_model, tiny_tokenizer, stage, tmp_path):
    with pytest.raises(DataError, match="text 1: it is empty"):
        LastTokenFeatures(tiny_model, tiny_tokenizer).embed(["day", " "])
    with pytest.raises(ConfigError, match="max_length: 1"):
        LastTokenFeatures(tiny_model, tiny_tokenizer, max_length=1)
    for spec in ("base", "tokens"):
        with pytest.raises(ConfigError, match="there is no model"):
            build_features(spec, Stage(None, None), 128)
    with pytest.raises(ConfigError, match=r"features: .* cannot be loaded"):
        build_features(str(tmp_path), stage(), 128)
    assert LastTokenFeatures(tiny_model, tiny_tokenizer).embed([]).numel() == 0
