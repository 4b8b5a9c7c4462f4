from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from cit_fast.data import Example
from cit_fast.errors import ConfigError
from cit_fast.key_parts import hidden
from cit_fast.key_parts.layout import PrefixCollator
from cit_fast.methods.objectives import CrossEntropy, cross_entropy
from cit_fast.methods.stage import Stage
from cit_fast.models.collation import PaddingCollator
from cit_fast.models.forward import response_logits
from cit_fast.models.prompts import Encoded, PromptEncoder
from cit_fast.models.wrappers import unwrap
from cit_fast.ops import linear_cross_entropy


@pytest.fixture
def model(tiny_model_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder).train()


@pytest.fixture
def batch():
    rows = [([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9]), ([10, 11, 12], [-100, 11, 12])]
    return PaddingCollator(0)([{"input_ids": ids, "labels": labels} for ids, labels in rows])


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_equals_the_models_own_loss_and_gradients(model, batch):
    model(**batch).loss.backward()
    expected_loss, expected = model(**batch).loss, gradients(model)
    loss = CrossEntropy()(model, batch, None)
    loss.backward()
    ours = gradients(model)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient)


def test_two_micro_batches_normalised_together_equal_one(model, batch):
    together = CrossEntropy()(model, batch, None)
    halves = [{key: value[row : row + 1] for key, value in batch.items()} for row in (0, 1)]
    apart = sum(CrossEntropy()(model, half, 5) for half in halves)
    torch.testing.assert_close(apart, together)


def test_only_response_rows_reach_the_output_projection(model, batch):
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    logits, targets, _ = response_logits(model, batch)
    handle.remove()
    assert logits.shape == (5, model.config.vocab_size)
    assert targets.tolist() == [7, 8, 9, 11, 12]
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits[0], full[0, 1])
    torch.testing.assert_close(logits[4], full[1, 1])
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 0  # nothing is left behind


def test_a_batch_without_a_response_gives_a_zero_loss(model, batch):
    batch["labels"].fill_(-100)
    loss = CrossEntropy()(model, batch, None)
    assert loss.item() == 0
    loss.backward()


def test_a_head_whose_inputs_are_already_rows_is_left_alone(model, batch, monkeypatch):
    """A compiled model keeps its full logits; the rows are taken afterwards."""
    expected = response_logits(model, batch).logits
    monkeypatch.setattr(model, "_orig_mod", model, raising=False)
    with torch.no_grad():
        logits = response_logits(model, batch).logits
    torch.testing.assert_close(logits, expected)


def test_unwrap_goes_through_parallel_and_peft_wrappers(model):
    from peft import LoraConfig, get_peft_model

    wrapped = nn.Module()
    wrapped.module = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert unwrap(wrapped) is model


def test_label_smoothing_is_that_of_the_trainer(model, batch):
    from transformers.trainer_pt_utils import LabelSmoother

    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = LabelSmoother(epsilon=0.3)(output, batch["labels"], shift_labels=True)
    torch.testing.assert_close(CrossEntropy(label_smoothing=0.3)(model, batch, None), expected)
    with pytest.raises(ConfigError, match=r"label_smoothing: 1 is outside \[0, 1\)"):
        CrossEntropy(label_smoothing=1)


LONG = "Read the text with care, then convert the number to words and answer with the words only, in lower case please."


def stage_of(model, tokenizer, **options):
    examples = [Example(LONG if k % 4 else "In words.", f"{k} of {k * 7}", (f"{k} {k * 7}",), "t") for k in range(8)]
    return Stage(model, PromptEncoder(tokenizer, max_length=None), examples=tuple(examples), **options)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_common_beginning_is_computed_once_with_the_same_loss_and_gradients(
    make_model, tiny_tokenizer, implementation
):
    model = make_model("Llama", torch.float64, implementation).train()
    stage = stage_of(model, tiny_tokenizer)
    found = []
    for share in (False, "auto"):
        objective = CrossEntropy(share_prefix=share)
        inputs = objective.prepare(stage)
        batch = inputs.collator(inputs.features)
        loss = objective(model, batch, None)
        loss.backward()
        found.append((batch, loss.detach(), gradients(model)))
    (plain, expected, right), (shared, loss, ours) = found
    assert shared["input_ids"].numel() <= 0.5 * plain["input_ids"].numel()
    assert (shared["labels"] != -100).sum() == (plain["labels"] != -100).sum()  # what the Trainer counts
    # transformers' RMSNorm and our softmax are in float32 here too.
    torch.testing.assert_close(loss, expected, rtol=3e-7, atol=0)
    for name, gradient in right.items():
        assert (ours[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_examples_that_have_little_in_common_are_padded(make_model, tiny_tokenizer):
    model = make_model("Llama", torch.float32, "sdpa")
    stage = stage_of(model, tiny_tokenizer)
    inputs = CrossEntropy().prepare(stage)
    apart = CrossEntropy(share_prefix=False).prepare(stage)
    one = inputs.features[:1]
    assert inputs.collator(one).keys() == apart.collator(one).keys()
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 60, (30,), generator=random).tolist() for _ in range(4)]
    features = [Encoded(ids, [-100] * 6 + ids[6:], 6) for ids in rows]
    assert "attention_mask" in inputs.collator(features)
    labelled = [Encoded(ids, ids, 0) for ids in [rows[0]] * 3]  # nothing may stand before such a token
    assert "attention_mask" in inputs.collator(labelled)


@given(data=st.data())
def test_rows_hold_every_example_once(data):
    beginnings = data.draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=12), min_size=1, max_size=3))
    features = []
    for number in range(data.draw(st.integers(1, 7))):
        prompt = [*data.draw(st.sampled_from(beginnings)), *data.draw(st.lists(st.integers(1, 5), max_size=4))]
        answer = [100 + number] * data.draw(st.integers(1, 3))
        features.append(Encoded([*prompt, *answer], [-100] * len(prompt) + answer, len(prompt)))
    window = data.draw(st.sampled_from([None, 8, 64]))
    batch = PrefixCollator(PaddingCollator(0), window)(features)
    if "branch" not in batch:
        return
    assert window is None or max(map(len, features)) <= window
    seen = []
    for ids, labels, positions, branch, visible in zip(
        *(batch[name].tolist() for name in ("input_ids", "labels", "position_ids", "branch", "visible")), strict=True
    ):
        for number in sorted(set(branch) - {-1, 0}):
            own = [k for k in range(len(ids)) if branch[k] == number]
            common = visible[own[0]]
            assert positions[:common] == list(range(common))
            assert [positions[k] for k in own] == list(range(common, common + len(own)))
            assert labels[own[0]] == -100  # predicted by nobody of its own
            seen.append(([*ids[:common], *(ids[k] for k in own)], [-100] * common + [labels[k] for k in own]))
    assert sorted(seen) == sorted((one.input_ids, one.labels) for one in features)


@pytest.mark.parametrize("change", ["dropout", "router", "compiled", "mask"])
def test_nothing_is_shared_where_it_would_make_a_difference(make_model, tiny_tokenizer, change, monkeypatch):
    model = make_model("Llama", torch.float32, "sdpa")
    if change == "dropout":
        model.model.layers[0].mlp.dropout = nn.Dropout(0.1)
    if change == "router":
        model.config.output_router_logits = True
    if change == "mask":
        monkeypatch.setattr(hidden, "honours_4d_mask", lambda _: False)
    stage = stage_of(model, tiny_tokenizer, compiled=change == "compiled")
    assert isinstance(CrossEntropy().prepare(stage).collator, PaddingCollator)
    if change == "mask":
        with pytest.raises(ConfigError, match="share_prefix: LlamaForCausalLM does not honour"):
            CrossEntropy(share_prefix=True).prepare(stage)
    else:
        assert isinstance(CrossEntropy(share_prefix=True).prepare(stage).collator, PrefixCollator)


def test_share_prefix_is_true_false_or_auto():
    with pytest.raises(ConfigError, match="share_prefix: 'sometimes'; expected true, false or auto"):
        CrossEntropy(share_prefix="sometimes")


@pytest.fixture
def never_any_logits(monkeypatch):
    """Every batch is too large for logits; how often the op ran."""
    calls = []

    def counted(*args, **options):
        calls.append(args[0].shape)
        return linear_cross_entropy(*args, **options)

    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", 0)
    monkeypatch.setattr(cross_entropy, "linear_cross_entropy", counted)
    return calls


def prepared(model, tokenizer, **options):
    example = Example("Name the animal.", "It barks.", ("dog",), "animals")
    objective = CrossEntropy(**options)
    objective.prepare(Stage(model, PromptEncoder(tokenizer), examples=(example,)))
    return objective


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Cohere", "Granite", "Phi"])
def test_without_logits_the_loss_and_the_gradients_are_the_same(
    make_model, tiny_tokenizer, batch, architecture, never_any_logits
):
    """Soft-cap, scales, biases and tied embeddings included; the head is trained as well."""
    options = {"num_key_value_heads": 4} if architecture == "Phi" else {}
    model = make_model(architecture, **options).train()
    expected_loss = CrossEntropy()(model, batch, None)
    expected_loss.backward()
    expected = gradients(model)
    assert not never_any_logits
    loss = prepared(model, tiny_tokenizer)(model, batch, None)
    loss.backward()
    assert len(never_any_logits) == 1
    torch.testing.assert_close(loss, expected_loss)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert "lm_head.weight" in found or model.config.tie_word_embeddings
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("architecture", ["Llama", "Granite"])
def test_the_entropy_gate_with_logits_and_without(make_model, tiny_tokenizer, batch, architecture, never_any_logits):
    """Each token's loss times min(1, H / ln 20)^gate, which has no gradient; the same from the op."""
    model = make_model(architecture).train()
    model.get_output_embeddings().weight.data *= 4  # surer than a random model
    found = response_logits(model, batch)
    log_p = found.logits.double().log_softmax(1)
    gate = (-(log_p.exp() * log_p).sum(1) / math.log(20)).clamp(max=1).pow(2.5).detach()
    assert gate.min() < 0.9 * gate.max()
    expected_loss = (gate * -log_p.gather(1, found.targets[:, None])[:, 0]).sum() / len(gate)
    expected_loss.backward()
    expected = gradients(model)
    for objective in (CrossEntropy(entropy_gate=2.5), prepared(model, tiny_tokenizer, entropy_gate=2.5)):
        loss = objective(model, batch, None)
        loss.backward()
        torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-5, atol=1e-6 * float(expected[name].abs().max())
            )
    assert len(never_any_logits) == 1


@pytest.mark.parametrize("options", [{"entropy_gate": -1}, {"entropy_gate": math.nan}])
def test_a_gate_out_of_range(options):
    with pytest.raises(ConfigError, match="entropy_gate"):
        CrossEntropy(**options)


def test_no_gate_for_smoothed_labels():
    with pytest.raises(ConfigError, match="leave label_smoothing out"):
        CrossEntropy(label_smoothing=0.1, entropy_gate=1.0)


def test_no_logits_reach_memory(model, tiny_tokenizer, batch, never_any_logits):
    sizes = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, output: sizes.append(output.shape[0]))
    objective = prepared(model, tiny_tokenizer)
    sizes.clear()  # the trial of the head
    objective(model, batch, None).backward()
    assert sizes == [0]
    assert never_any_logits == [(5, model.config.hidden_size)]


def test_small_batches_make_their_logits_which_is_faster(model, tiny_tokenizer, batch, monkeypatch):
    monkeypatch.setattr(cross_entropy, "linear_cross_entropy", None)
    prepared(model, tiny_tokenizer)(model, batch, None).backward()


@pytest.mark.parametrize("change", ["smoothing", "compiled", "adapter", "unknown head"])
def test_logits_are_made_where_the_op_cannot_stand_for_them(
    model, tiny_tokenizer, batch, change, never_any_logits, monkeypatch
):
    smoothing = 0.1 if change == "smoothing" else 0.0
    if change == "adapter":
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], ensure_weight_tying=True)
        model = get_peft_model(model, config)
    if change == "unknown head":
        projection = model.get_output_embeddings()
        projection.register_forward_hook(lambda _, args, output: output.sin())
    objective = CrossEntropy(label_smoothing=smoothing)
    example = Example("Name the animal.", "It barks.", ("dog",), "animals")
    compiled = change == "compiled"
    objective.prepare(Stage(model, PromptEncoder(tiny_tokenizer), examples=(example,), compiled=compiled))
    torch.testing.assert_close(
        objective(model, batch, None), CrossEntropy(label_smoothing=smoothing)(model, batch, None)
    )
    assert not never_any_logits


class Autocast(nn.Module):
    """As accelerate wraps a model: autocast around the forward pass alone, what it returns in float32."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, **inputs):
        with torch.autocast("cpu", torch.bfloat16):
            output = self.module(**inputs)
        output.logits = output.logits.float()
        return output


def test_under_autocast_float32_weights_are_multiplied_as_the_model_does(
    model, tiny_tokenizer, batch, never_any_logits, monkeypatch
):
    wrapped = Autocast(model)
    expected_loss = CrossEntropy()(wrapped, batch, None)
    expected_loss.backward()
    expected = gradients(model)
    objective = prepared(model, tiny_tokenizer)
    dtypes = []
    counted = cross_entropy.linear_cross_entropy

    def looked_at(hidden, weight, *args, **options):
        dtypes.extend([hidden.dtype, weight.dtype])
        return counted(hidden, weight, *args, **options)

    monkeypatch.setattr(cross_entropy, "linear_cross_entropy", looked_at)
    loss = objective(wrapped, batch, None)
    loss.backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    # The model rounds its logits to bfloat16, 8 bits, before the softmax; the op does not.
    torch.testing.assert_close(loss, expected_loss, rtol=2**-9, atol=0)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 2**-6, name
