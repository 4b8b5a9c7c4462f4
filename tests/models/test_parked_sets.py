"""Sets beside a PEFT model answer, train and start others as those in it do."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel

from cit_fast.errors import RunError
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.adapters import load_weights, save_weights, train_adapter
from cit_fast.models.generation import generate, one_set
from cit_fast.models.parked_sets import bank_of, parked, set_names, weights_of

PLAIN = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
DORA = {**PLAIN, "use_dora": True}
IDS = torch.tensor([[3, 5, 7, 11, 13]])


def trained(model, adapter, name, **options):
    """As if the set had been trained: its B is no longer zero."""
    model, _ = train_adapter(model, {"peft_type": "LORA", **adapter}, name, 0, **options)
    chance = torch.Generator().manual_seed(sum(name.encode()))
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}" in key:
            parameter.data.normal_(generator=chance)
    return model


def logits(model, name):
    with one_set(model, name), torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("fuse", [False, True])
def test_parked_sets_answer_as_they_did(make_model, fuse):
    model = trained(make_model("Llama"), PLAIN, "one", fuse=fuse)
    before = logits(model.eval(), "one")
    assert (before - logits(model, BASE)).abs().max() > 0.1
    for name in ("bb", "ccc"):
        model = trained(model, PLAIN, name, fuse=fuse)
    model.eval()
    assert list(model.peft_config) == ["ccc"]
    assert set(parked(model).configs) == {"one", "bb"}
    assert set_names(model) == bank_of(model).names == {"one", "bb", "ccc"}
    torch.testing.assert_close(logits(model, "one"), before, atol=2e-6, rtol=2e-6)
    assert (logits(model, "bb") - before).abs().max() > 0.1
    assert model.active_adapters == ["ccc"]
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


def test_parked_matrices_follow_the_model(make_model):
    model = trained(trained(make_model("Llama"), PLAIN, "one"), PLAIN, "bb")
    parked(model).to(torch.device("meta"))
    assert {value.device.type for value in weights_of(model, "one").values()} == {"meta"}


def test_mixed_rows_are_those_of_each_set_alone(make_model, encoder):
    model = make_model("Llama")
    for name in ("one", "bb", "ccc"):
        model = trained(model, PLAIN, name)
    options = {"tokenizer": encoder.tokenizer, "pad_token_id": 0, "eos_token_ids": 1, "max_new_tokens": 6}
    prompts = [[3, 5, 7], [3, 5, 7], [3, 5, 7], [3, 5, 7]]
    mixed = generate(model, prompts, adapters=["one", "bb", "ccc", BASE], **options)
    alone = []
    for name in ("one", "bb", "ccc", BASE):
        with one_set(model, name):
            alone += generate(model, prompts[:1], **options)
    assert mixed == alone
    assert len(set(mixed)) > 1


def test_a_parked_set_is_trained_again_where_it_was(make_model):
    model = trained(make_model("Llama"), PLAIN, "one")
    before, state = logits(model.eval(), "one"), torch.random.get_rng_state()
    weights = {name: value.clone() for name, value in weights_of(model, "one").items()}
    model = trained(model, PLAIN, "bb")
    assert all(torch.equal(weights_of(model, "one")[name], value) for name, value in weights.items())
    torch.random.set_rng_state(state)
    model, _ = train_adapter(model, {"peft_type": "LORA", **PLAIN}, "one", 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (list(model.peft_config), set(parked(model).configs)) == (["one"], {"bb"})
    assert torch.equal(logits(model.eval(), "one"), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


def test_a_new_set_starts_from_a_parked_one(make_model):
    model = trained(make_model("Llama"), PLAIN, "one")
    before = logits(model.eval(), "one")
    model = trained(model, PLAIN, "bb")
    model, _ = train_adapter(model, {"peft_type": "LORA", **PLAIN}, "ccc", 0, "one")
    assert torch.equal(logits(model.eval(), "ccc"), before)


def test_sets_of_other_kinds_stay_in_the_model(make_model):
    model = trained(trained(make_model("Llama"), DORA, "one"), DORA, "bb")
    assert (set(model.peft_config), parked(model).configs) == ({"one", "bb"}, {})
    assert bank_of(model) is None
    model = trained(model, PLAIN, "ccc")
    assert set(model.peft_config) == {"one", "bb", "ccc"}  # the bank could not answer for all


@pytest.mark.parametrize("adapter", [PLAIN, DORA], ids=["plain", "dora"])
def test_read_from_their_folders(make_model, tmp_path, adapter):
    model, expected, folders = make_model("Llama"), {}, {}
    for name in ("one", "bb", "ccc"):
        model = trained(model, adapter, name)
        expected[name] = logits(model.eval(), name)
        save_weights(model, tmp_path / name, "base", trained=name)
        assert [path.name for path in (tmp_path / name / "adapters").iterdir() if path.is_dir()] == [name]
        folders[name] = tmp_path / name / "adapters" / name
    again = load_weights(make_model("Llama"), folders, trainable=True)
    assert isinstance(again, PeftModel)
    assert set_names(again) == {"one", "bb", "ccc"}
    configs = [*again.peft_config.values(), *parked(again).configs.values()]
    assert {config.base_model_name_or_path for config in configs} == {again.get_base_model().name_or_path}
    assert all((expected["one"] - expected[name]).abs().max() > 0.1 for name in ("bb", "ccc"))
    for name, value in expected.items():
        torch.testing.assert_close(logits(again.eval(), name), value, atol=2e-6, rtol=2e-6)


def test_a_parked_set_cannot_answer_beside_one_of_another_kind(make_model):
    model = trained(trained(make_model("Llama"), PLAIN, "one"), PLAIN, "bb")
    model.add_adapter("other", LoraConfig(**DORA, task_type="CAUSAL_LM"))
    with pytest.raises(RunError, match="adapter set 'one' cannot answer while the set in the model is no plain LoRA"):
        logits(model, "one")
