from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from cit_fast.data import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.key_parts.gain import information_gain
from cit_fast.key_parts.head import head_of
from cit_fast.key_parts.pairs import encode_pairs

ALPHA = 0.3


@torch.no_grad()
def by_hand(model, pair, alpha):
    """Info(y|x) and Info(y|mask(x)) from the model's own logits, a token at a time."""
    found = []
    own = pair.full.input_ids[slice(*pair.scored)]
    for one in (pair.full, pair.masked):
        probabilities = model(input_ids=torch.tensor([one.input_ids])).logits.double().softmax(-1)[0]
        start = one.prompt_length
        found.append(sum(alpha ** (k + 1) * float(probabilities[start + k - 1, t]) for k, t in enumerate(own)))
    return found


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "Granite"])
@pytest.mark.parametrize("share", [True, False])
def test_gain_is_the_papers_sum_over_the_models_own_probabilities(make_model, encoder, examples, name, share):
    model = make_model(name, torch.float64)
    found = information_gain(model, encoder, examples, alpha=ALPHA, batch_size=2, share_prefix=share)
    pairs = encode_pairs(encoder, examples).pairs
    for gain, pair in zip(found, pairs, strict=True):
        full, masked = by_hand(model, pair, ALPHA)
        assert gain.info_full == pytest.approx(full, rel=1e-4)
        assert gain.info_masked == pytest.approx(masked, rel=1e-4)
        assert gain.gain == pytest.approx(full - masked, abs=1e-4 * max(full, masked))
        assert gain.tokens == pair.scored[1] - pair.scored[0]
        assert abs(gain.gain) > 1e-3 * min(gain.info_full, gain.info_masked)
    assert [gain.index for gain in found] == [0, 1, 2]


def test_batches_and_order_change_nothing(make_model, encoder, examples):
    model = make_model("Llama", torch.float64).train()
    one_by_one = [information_gain(model, encoder, [example], batch_size=1)[0].gain for example in examples]
    steps = []
    together = information_gain(model, encoder, examples, batch_size=2, progress=lambda *step: steps.append(step))
    assert [gain.gain for gain in together] == pytest.approx(one_by_one, rel=1e-3)
    assert steps == [(1, 3), (3, 3)]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_examples_without_key_parts(make_model, encoder, examples):
    model = make_model("Llama")
    plain = Example("Count.", references=("1 2",), source="data.jsonl:3")
    with pytest.raises(DataError, match=r"^data.jsonl:3: no key parts"):
        information_gain(model, encoder, [examples[0], plain])
    found = information_gain(model, encoder, [plain, examples[0]], missing="none")
    assert found[0].gain is None
    assert found[0].tokens > 0
    assert found[1].gain is not None
    assert information_gain(model, encoder, []) == []


def test_a_tokenizer_of_another_model_is_named(make_model, encoder, examples):
    model = make_model("Llama", vocab_size=300)
    example = dataclasses.replace(examples[0], source="data.jsonl:5")
    with pytest.raises(DataError, match=r"^data.jsonl:5: token \d+ is outside the model's vocabulary of 300"):
        information_gain(model, encoder, [example])


def test_a_padded_vocabulary_counts_whole(make_model, encoder, examples):
    model = make_model("Llama", torch.float64, vocab_size=448)
    full, _ = by_hand(model, encode_pairs(encoder, examples[:1]).pairs[0], ALPHA)
    assert information_gain(model, encoder, examples[:1])[0].info_full == pytest.approx(full, rel=1e-4)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 1.5}, {"batch_size": 0}, {"missing": "?"}])
def test_options_out_of_range(make_model, encoder, examples, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        information_gain(make_model("Llama"), encoder, examples, **options)


# ----------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize(
    ("name", "softcap", "scale"),
    [("Llama", None, 1.0), ("Gemma2", 2.0, 1.0), ("Cohere", None, 3.0), ("Granite", None, 4.0)],
)
def test_head_of_the_usual_models(make_model, name, softcap, scale):
    model = make_model(name)
    head = head_of(model)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.softcap, head.scale, head.vocabulary) == (softcap, scale, 400)
    assert head.options == {"softcap": softcap, "scale": scale}


def test_head_with_a_bias_in_a_wrapper(make_model):
    model = make_model("Phi", num_key_value_heads=4)
    model.lm_head.bias.data.normal_()
    wrapped = nn.Module()
    wrapped.module = model
    head = head_of(wrapped)
    assert head.bias is model.lm_head.bias


def test_a_head_that_is_not_understood(make_model):
    model = make_model("Llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output**3)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM: its logits are not cap\(scale"):
        head_of(model)
    with pytest.raises(ConfigError, match="no output projection"):
        head_of(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("adapter", "bias"),
    [({}, False), ({"use_rslora": True, "lora_alpha": 7}, True), ({"use_dora": True}, False)],
    ids=["lora", "rslora with a bias", "dora"],
)
def test_the_head_is_what_its_adapter_makes_of_it(make_model, adapter, bias):
    """Whatever the adapter: the model's logits, and the same gradients."""
    from peft import LoraConfig, get_peft_model

    model = make_model("Phi", num_key_value_heads=4) if bias else make_model("Llama")
    settings = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5, **adapter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(model, settings).train()
    head = head_of(adapted)
    assert adapted.get_base_model().lm_head.lora_dropout["default"].training
    adapted.eval()
    ids = torch.tensor([[5, 17, 300]])
    logits = adapted(ids).logits
    hidden = adapted.get_base_model().model(ids).last_hidden_state
    ours = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)
    factors = [p for name, p in adapted.named_parameters() if p.requires_grad]
    for one, other in zip(*(torch.autograd.grad(z.square().sum(), factors) for z in (ours, logits)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(head_of(adapted).weight, model.lm_head.base_layer.weight)
