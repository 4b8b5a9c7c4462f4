from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cit_fast.errors import DataError, RunError
from cit_fast.models.adapter_bank import BASE, AdapterBank, NotPlainLoraError, RowsLostError, is_plain_lora
from cit_fast.models.generation import generate

PLAIN = {
    "small": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "large": {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear", "lora_dropout": 0.5},
    "pattern": {
        "r": 4,
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"v_proj": 11},
        "target_modules": ["v_proj", "up_proj"],
    },
}


class NumberTokenizer:
    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


def base_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def with_sets(base, sets):
    torch.manual_seed(1)
    for name, options in sets.items():
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "init_lora_weights": False, **options})
        if isinstance(base, PeftModel):
            base.add_adapter(name, config)
        else:
            base = get_peft_model(base, config, adapter_name=name)
    return base.eval()


@pytest.fixture(scope="module")
def model():
    return with_sets(base_model(), PLAIN)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(path)
    return path


PROMPTS = [
    torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 17, 2, 8, 8, 5, 11, 6)
]
SETS = ["small", "large", BASE, "pattern", "small", "large", "pattern", BASE]


def answers(model, sets, batch_size=8, **options):
    tokens = {"pad_token_id": 0, "eos_token_ids": 1, "tokenizer": NumberTokenizer()}
    return generate(model, PROMPTS, **tokens, max_new_tokens=8, batch_size=batch_size, adapters=sets, **options)


def alone(model, sets):
    """One prompt at a time through PEFT."""
    found = []
    for prompt, name in zip(PROMPTS, sets, strict=True):
        tokens = {"pad_token_id": 0, "eos_token_ids": 1, "tokenizer": NumberTokenizer(), "max_new_tokens": 8}
        if name == BASE:
            with model.disable_adapter():
                found += generate(model, [prompt], **tokens)
        else:
            model.set_adapter(name)
            found += generate(model, [prompt], **tokens)
    return found


def read_all(base, folder):
    bank = AdapterBank()
    for name in PLAIN:
        bank.read(base, name, folder / name)
    return bank


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_prompt_is_answered_as_by_its_set_alone(model, folder, batch_size):
    expected = alone(model, SETS)
    assert len(set(expected)) == len(expected)
    assert answers(model, SETS, batch_size) == expected
    base = base_model()
    assert answers(base, SETS, batch_size, bank=read_all(base, folder)) == expected


def test_logits_are_those_of_each_set_alone(model, folder):
    ids = torch.randint(3, 64, (8, 7))
    base = base_model()
    for each, bank in ((model, AdapterBank.of_model(model)), (base, read_all(base, folder))):
        with torch.no_grad(), bank.answering(SETS):
            mixed = each(ids).logits
            plain = base_model()(ids).logits
        moved = (mixed - plain).abs().flatten(1).amax(1)
        assert [bool(by > 1e-2) for by in moved] == [name != BASE for name in SETS]  # far more than tolerated
        for row, name in enumerate(SETS):
            with torch.no_grad():
                if name == BASE:
                    with model.disable_adapter():
                        one = model(ids[row : row + 1]).logits
                else:
                    model.set_adapter(name)
                    one = model(ids[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], one, atol=2e-5, rtol=2e-5)


def test_a_row_sees_nothing_of_the_other_rows_sets():
    model = with_sets(base_model(), {"good": {"target_modules": ["up_proj"]}, "bad": {"target_modules": ["up_proj"]}})
    for name, parameter in model.named_parameters():
        if ".bad." in name:
            parameter.data.fill_(float("nan"))
    ids = torch.randint(3, 64, (3, 5))
    with torch.no_grad(), AdapterBank.of_model(model).answering(["good", "bad", BASE]):
        finite = model(ids).logits.isfinite().flatten(1).all(1)
    assert finite.tolist() == [True, False, True]


def test_memory_that_runs_out_leaves_no_half_of_a_batch(model, monkeypatch):
    """What is tried again afterwards is answered as if nothing had been."""
    ids, bank = torch.randint(3, 64, (1, 7)), AdapterBank.of_model(model)
    with torch.no_grad():
        with bank.answering(["large"]):
            right = model(ids).logits
        with bank.answering(["small"]):
            model(ids)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cat", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no room")))
            with pytest.raises(MemoryError):
                bank.answering(["large"]).__enter__()
        with bank.answering(["large"]):
            torch.testing.assert_close(model(ids).logits, right)


def test_another_sets_overflow_is_not_a_rows():
    """In half precision a product with a foreign set's matrix may be infinite; it is nobody else's."""
    model = with_sets(
        base_model().half(), {"good": {"target_modules": ["up_proj"]}, "big": {"target_modules": ["up_proj"]}}
    )
    for name, parameter in model.named_parameters():
        if "lora_A.big" in name:
            parameter.data.fill_(6e4)
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.up_proj"))
    x = torch.full((3, 1, 32), 100.0).half()
    with torch.no_grad(), AdapterBank.of_model(model).answering(["good", "big", BASE]):
        found = layer(x)
        plain = layer.base_layer(x)
    assert found.isfinite().flatten(1).all(1).tolist() == [True, False, True]
    assert torch.equal(found[2], plain[2])


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")  # PEFT 0.21 takes a bias for a shard
def test_bias_and_conv1d(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    model = with_sets(base, {"biased": {**targets, "lora_bias": True}, "plain": targets})
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.biased.bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    ids, expected = torch.randint(3, 64, (2, 5)), []
    for row, name in enumerate(("biased", "plain")):
        model.set_adapter(name)
        expected.append(model(ids[row : row + 1]).logits)
    bare, bank = model.unload(), AdapterBank()
    for name in ("biased", "plain"):
        bank.read(bare, name, tmp_path / name)
    with bank.answering(["biased", "plain"]):
        torch.testing.assert_close(bare(ids).logits, torch.cat(expected), atol=1e-5, rtol=1e-5)
    with bank.answering(["biased"]):
        torch.testing.assert_close(bare(ids[:1]).logits, expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "other",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:.*modules_to_save")
def test_other_kinds_answer_one_set_after_another(other):
    model = with_sets(base_model(), {"plain": {"r": 2}, "other": {"r": 2, **other}})
    for name, parameter in model.named_parameters():
        if "other" in name:
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    assert not is_plain_lora(model.peft_config["other"])
    assert AdapterBank.of_model(model) is None
    sets = ["plain", "other", BASE, "other", "plain", BASE, "other", "plain"]
    expected = alone(model, sets)
    model.set_adapter("plain")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert answers(model, sets) == expected
    assert model.active_adapter == "plain"
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_a_model_is_as_it_was_afterwards(model):
    answers(model, SETS)  # PEFT's first generation leaves a method of the base model as an attribute
    model.set_adapter("large")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    answers(model, SETS)
    with pytest.raises(ZeroDivisionError), AdapterBank.of_model(model).answering(["small", BASE]):
        raise ZeroDivisionError
    assert all("forward" not in vars(module) for module in model.modules())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {k: set(v) for k, v in before.items()}
    assert model.active_adapter == "large"


def test_rows_that_a_layer_does_not_see_are_answered_by_sets(model, monkeypatch):
    expected = alone(model, SETS)

    def flat(self, x):  # as a mixture of experts does
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden.flatten(0, 1)).view(x.shape)

    monkeypatch.setattr(type(model.base_model.model.model.layers[1].mlp), "forward", flat)
    with pytest.raises(RowsLostError), torch.no_grad(), AdapterBank.of_model(model).answering(["small", "large"]):
        model(torch.ones(2, 3, dtype=torch.long))
    assert answers(model, SETS) == expected


@pytest.mark.parametrize("sets", [["large"] * 2, ["large", "small"], ["large", *"abcde"]])
def test_half_precision_is_rounded_as_in_training(model, folder, sets):
    """y = W x + c B A x: W x, the sum, A and c B are rounded, and A x on the way (products are summed in fp32)."""
    reference = PeftModel.from_pretrained(base_model().bfloat16(), folder / "large", adapter_name="large").eval()
    base, unit = base_model().bfloat16(), 2.0**-8
    layers = {name: layer for name, layer in reference.named_modules() if hasattr(layer, "lora_A")}
    assert len(layers) == 14
    bank = read_all(base, folder)
    for name in sets:  # more sets than stand side by side
        if name not in bank.names:
            bank.read(base, name, folder / "small")
    with torch.no_grad(), bank.answering(sets):
        for name, layer in layers.items():
            x = torch.randn(len(sets), 6, layer.in_features).bfloat16()
            weights = layer.base_layer.weight, layer.lora_A["large"].weight, layer.lora_B["large"].weight
            W, A, B = (weight.double() for weight in weights)
            plain, low, scaling = x[:1].double() @ W.T, x[:1].double() @ A.T, layer.scaling["large"]
            exact = plain + scaling * low @ B.T
            of_a = x[:1].double().abs() @ A.abs().T  # what rounding A can do to A x
            bound = unit / 2 * (plain.abs() + exact.abs() + scaling * (2 * low.abs() + of_a) @ B.abs().T)
            bound *= 1 + 4 * unit  # roundings of what is rounded already
            ours = base.get_submodule(name.removeprefix("base_model.model."))(x)[:1]
            assert ours.dtype == torch.bfloat16
            assert ((ours - exact).abs() <= bound).all(), name
            assert (scaling * low @ B.T).abs().max() > 8 * bound.max()  # what the set adds is no rounding


@pytest.mark.parametrize(
    ("sets", "message"),
    [(["small"], "1 adapter sets for 8 prompts"), (["large"] * 7 + ["lost"], "no adapter set 'lost'; there are large")],
)
def test_bad_sets(model, sets, message):
    with pytest.raises(DataError, match=message):
        answers(model, sets)
    with pytest.raises(DataError, match="no adapter set 'small'; there are none"):
        answers(base_model(), ["small"] * 8)


def test_no_sets_at_all():
    base = base_model()
    assert answers(base, [BASE] * 8) == answers(base, None)


def damage(folder, kind):
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = min(tensors)
    if kind == "weights":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "empty":
        save_file({}, weights)
    elif kind == "config":
        config.write_text("{")
    elif kind == "kind":
        config.write_text(json.dumps({"peft_type": "NEWEST"}))
    elif kind == "no config":
        config.unlink()
    elif kind == "infinite":
        save_file({**tensors, first: torch.full_like(tensors[first], torch.inf)}, weights)
    elif kind == "half":
        save_file({key: value for key, value in tensors.items() if key != first}, weights)
    elif kind == "shape":
        wider = {key: torch.cat([value, value], 1) for key, value in tensors.items() if "lora_A" in key}
        save_file({**tensors, **wider}, weights)
    elif kind == "layer":
        save_file({key.replace("layers.1", "layers.7"): value for key, value in tensors.items()}, weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weights", "adapter_model.safetensors: damaged"),
        ("no weights", "adapter_model.safetensors: not there"),
        ("empty", "it holds no weights"),
        ("config", "adapter_config.json: damaged"),
        ("kind", "adapter_config.json: damaged"),
        ("no config", "adapter_config.json: not there"),
        ("infinite", "is not finite"),
        ("half", "lacks lora_A"),
        ("shape", "made for another base model: .* inputs and 32 outputs, the adapter's"),
        ("layer", "made for another base model: this one has no layer model.layers.7"),
    ],
)
def test_a_folder_that_cannot_be_used(folder, tmp_path, kind, message):
    (tmp_path / "small").mkdir()
    for file in (folder / "small").iterdir():
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    damage(tmp_path / "small", kind)
    bank = AdapterBank()
    with pytest.raises(RunError, match=message) as caught:
        bank.read(base_model(), "small", tmp_path / "small")
    assert "\n" not in str(caught.value)
    assert not bank.names
    with pytest.raises(RunError, match="the adapter set is gone"):
        bank.read(base_model(), "other", tmp_path / "other")


def test_what_only_peft_can_apply(tmp_path):
    get_peft_model(base_model(), IA3Config(task_type="CAUSAL_LM"), adapter_name="scaled").save_pretrained(tmp_path)
    with pytest.raises(NotPlainLoraError):
        AdapterBank().read(base_model(), "scaled", tmp_path / "scaled")
