"""The loss of KPIG against its equations, written out with explicit logits; layouts change nothing beyond rounding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from cit_fast.data import Example, Task
from cit_fast.errors import ConfigError, DataError
from cit_fast.key_parts import teacher as frozen_module
from cit_fast.methods.objectives import KPIG, CrossEntropy
from cit_fast.methods.stage import Stage
from cit_fast.models.digests import fingerprint

ALPHA, LAMBDA = 0.3, 0.02
# Of a model in float64 whose normalisation computes in float32.
ROUNDING = {"rtol": 1e-4, "atol": 1e-7}


def examples() -> list[Example]:
    """Key parts at both ends, several, one, none; answers of different lengths."""
    one = "Convert the number to words and answer with the words only."
    two = "Write the date in the form year, month, day."
    return [
        Example(one, "42", ("forty two",), "alpha", ((8, 18), (48, 58)), source="a:1"),
        Example(two, "4 May", ("05 04",), "beta", ((19, 43),), source="b:1"),
        Example("Extract the e-mail address from the text.", "jo", ("jo",), "gamma", source="c:1"),
        Example(two, "the quick brown fox", ("over the lazy dog 0 1 2 3",), "beta", ((0, 5),), source="b:2"),
    ]


def stage(model, encoder, chosen=None, folder=None, tasks=()) -> Stage:
    return Stage(model, encoder, tasks=tuple(tasks), examples=tuple(chosen or examples()), scratch=folder)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# ------------------------------------------------------------------------------------------ the equations, by hand


def logits_of(model, encoded):
    return model(input_ids=torch.tensor([encoded.input_ids])).logits[0, encoded.prompt_length - 1 : -1]


def gain_by_hand(model, encoder, example) -> float:
    """sum_k alpha^k (p(t_k) - p_masked(t_k)) over the answer's tokens, the end of the turn left out."""
    both = []
    for encoded in encoder.pair(example):
        answer = encoded.input_ids[encoded.prompt_length : -1]
        probabilities = logits_of(model, encoded).softmax(-1)
        both.append([probabilities[k, token].item() for k, token in enumerate(answer)])
    return sum(ALPHA ** (k + 1) * (p - q) for k, (p, q) in enumerate(zip(*both, strict=True)))


def loss_by_hand(model, previous, encoder, chosen, *, masked=True, temperature=None, lambda_=LAMBDA):
    """CE of the full instances plus lambda JSD of the compared ones, both over all response tokens."""
    total, tokens = 0.0, 0
    for example in chosen:
        full, with_mask = encoder.pair(example)
        targets = torch.tensor(full.input_ids[full.prompt_length :])
        total = total + F.cross_entropy(logits_of(model, full), targets, reduction="sum")
        tokens += len(targets)
        if not example.key_parts:
            continue
        with torch.no_grad():
            beta = 2 - min(gain_by_hand(previous, encoder, example), 1) if temperature is None else temperature
            q = (logits_of(previous, with_mask if masked else full) / beta).softmax(-1)
        p = (logits_of(model, with_mask if masked else full) / beta).softmax(-1)
        m = (p + q) / 2
        divergence = ((p * (p / m).log2()).sum(-1) + (q * (q / m).log2()).sum(-1)) / 2
        total = total + lambda_ * divergence.sum()
    return total / tokens


VARIANTS = {
    "kpig": ({}, {}),
    "no mask": ({"masked": False}, {"masked": False}),
    "fixed temperature": ({"temperature": 1.5}, {"temperature": 1.5}),
    "heavier": ({"lambda_": 3.0}, {"lambda_": 3.0}),
}


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_the_equations(previous, live, encoder, variant, share_prefix):
    options, by_hand = VARIANTS[variant]
    objective = KPIG(key_parts="data", share_prefix=share_prefix, **options)
    inputs = objective.prepare(stage(previous, encoder))
    loss = objective(live, inputs.collator(inputs.features), None)
    loss.backward()
    ours = gradients(live)
    expected = loss_by_hand(live, previous, encoder, examples(), **by_hand)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # temperatures travel in float32
    for name, gradient in gradients(live).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-8)


def test_the_divergence_is_part_of_the_loss_and_starts_at_zero(previous, live, encoder):
    plain, heavy = KPIG(key_parts="data"), KPIG(key_parts="data", lambda_=50.0)
    inputs = heavy.prepare(stage(previous, encoder))
    batch = inputs.collator(inputs.features)
    assert heavy(live, batch, None) - plain(live, batch, None) > 0.05
    torch.testing.assert_close(heavy(previous, batch, None), plain(previous, batch, None))  # p_t is p_{t-1}


def test_gains_are_those_of_the_previous_model(previous, encoder):
    chosen = examples()
    inputs = KPIG(key_parts="data").prepare(stage(previous, encoder))
    expected = {k: gain_by_hand(previous, encoder, one) for k, one in enumerate(chosen) if one.key_parts}
    assert inputs.collator.frozen.gains == pytest.approx(expected, abs=1e-9)
    assert any(abs(gain) > 1e-6 for gain in expected.values())
    batch = inputs.collator(inputs.features[:1])
    assert batch["temperature"].tolist() == pytest.approx([2 - min(expected[0], 1)] * len(batch["compared"]))
    assert inputs.record.gains["beta"] == pytest.approx((expected[1] + expected[3]) / 2)
    assert (inputs.record.compared, inputs.record.without_key_parts) == (3, 1)
    assert inputs.record.notes == ["1 of 4 examples have no key parts: cross-entropy alone trains them."]


# ------------------------------------------------------------------------------------------- what changes nothing


def test_micro_batches_and_order_change_nothing(previous, live, encoder):
    objective = KPIG(key_parts="data", lambda_=2.0)
    inputs = objective.prepare(stage(previous, encoder))
    together = inputs.collator(inputs.features)
    count = int((together["labels"] != -100).sum())
    objective(live, together, None).backward()
    expected = gradients(live)
    for parts in ([[3], [2], [0, 1]], [[2], [1, 3, 0]]):
        losses = [objective(live, inputs.collator([inputs.features[k] for k in part]), count) for part in parts]
        sum(losses).backward()
        torch.testing.assert_close(sum(losses), objective(live, together, torch.tensor(count)))
        for name, gradient in gradients(live).items():
            torch.testing.assert_close(gradient, expected[name], **ROUNDING)


def test_padding_and_packing_change_nothing(previous, live, encoder):
    """Wider rows, one packed row (which the CPU's attention does not tell apart, so one pair), the frozen batches."""
    objective = KPIG(key_parts="data", lambda_=2.0, share_prefix=False)
    inputs = objective.prepare(stage(previous, encoder))
    expected = objective(live, inputs.collator(inputs.features), None)
    pairs = inputs.collator.pairs.pairs
    for other in (
        type(pairs)(pairs.pad_token_id, False, lengths=(256,)),
        type(pairs)(pairs.pad_token_id, True, lengths=(200,)),
    ):
        wider = type(inputs.collator)(other, inputs.collator.frozen, None, inputs.collator.width)
        torch.testing.assert_close(objective(live, wider(inputs.features), None), expected)
    one_by_one = KPIG(key_parts="data", lambda_=2.0, batch_size=1)
    again = one_by_one.prepare(stage(previous, encoder))
    torch.testing.assert_close(one_by_one(live, again.collator(again.features), None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near(previous, live, encoder, dtype):
    expected = loss_by_hand(live, previous, encoder, examples(), lambda_=2.0)
    objective = KPIG(key_parts="data", lambda_=2.0)
    inputs = objective.prepare(stage(previous.to(dtype), encoder))
    assert inputs.collator.frozen.states[0].dtype == dtype
    loss = objective(live.to(dtype), inputs.collator(inputs.features), None)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in live.parameters() if p.grad is not None)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)


def test_a_head_of_its_own_that_is_trained_is_kept_for_the_previous_model(encoder, tiny_tokenizer):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=False, eos_token_id=2, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    previous = copy.deepcopy(model)
    objective = KPIG(key_parts="data", lambda_=5.0)
    inputs = objective.prepare(stage(model, encoder))
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.05)
    loss = objective(model, inputs.collator(inputs.features), None)
    loss.backward()
    ours = gradients(model)
    expected = loss_by_hand(model, previous, encoder, examples(), lambda_=5.0)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert "lm_head.weight" in ours
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-8)


def test_nothing_to_compare_is_cross_entropy(previous, live, encoder):
    chosen = [examples()[2]]
    objective = KPIG(key_parts="data")
    inputs = objective.prepare(stage(previous, encoder, chosen))
    ours = objective(live, inputs.collator(inputs.features), None)
    plain = KPIG(key_parts="data", jsd=False)
    assert inputs.record.notes == ["1 of 1 examples have no key parts: cross-entropy alone trains them."]
    inputs = plain.prepare(stage(previous, encoder, chosen))
    theirs = CrossEntropy()(live, inputs.collator(inputs.features), None)
    torch.testing.assert_close(ours.float(), theirs)
    torch.testing.assert_close(plain(live, inputs.collator(inputs.features), None), theirs)


# ------------------------------------------------------------------------------------------------ the frozen states


def test_states_are_kept_and_taken_up_by_content(previous, encoder, tmp_path, monkeypatch):
    calls = []
    original = frozen_module.hidden_of
    monkeypatch.setattr(frozen_module, "hidden_of", lambda *args: calls.append(1) or original(*args))

    def rows(model, **options):
        inputs = KPIG(key_parts="data", **options).prepare(stage(model, encoder, folder=tmp_path))
        return inputs.collator(inputs.features)["frozen"]

    first = rows(previous)
    assert torch.equal(rows(previous), first)
    assert len(calls) == 1
    (path,) = tmp_path.iterdir()  # whole files only
    assert path.name == "frozen-00000-of-00001.safetensors"

    rows(previous, alpha=0.5)
    rows(previous, masked=False)
    assert len(calls) == 3
    with torch.no_grad():
        previous.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    changed = rows(previous)
    assert len(calls) == 4
    assert not torch.equal(changed, first)

    path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(rows(previous), changed)
    assert len(calls) == 5


def test_the_fingerprint_knows_trained_weights(previous):
    before = fingerprint(previous)
    assert fingerprint(copy.deepcopy(previous)) == before
    with torch.no_grad():
        previous.model.norm.weight[3] += 1e-6
    assert fingerprint(previous) != before


def test_the_model_keeps_training_mode_and_random_state(previous, encoder):
    previous.train()
    before = torch.get_rng_state()
    KPIG(key_parts="data").prepare(stage(previous, encoder))
    assert previous.training
    assert previous.model.layers[0].training
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_": -1.0}, "lambda_: -1.0 is negative"),
        ({"lambda_": math.inf}, "lambda_: inf"),
        ({"alpha": 0.0}, r"alpha: 0.0 is outside \(0, 1\]"),
        ({"temperature": 0.0}, "temperature: 0.0 is neither 'gain' nor a positive number"),
        ({"temperature": "loss"}, "temperature: 'loss'"),
        ({"batch_size": 0}, "batch_size: 0 is below 1"),
        ({"key_parts": "guess"}, "key_parts: 'guess' is none of data, discover, llm; or auto"),
        ({"instructions": "all"}, "instructions: 'all' is unknown; expected 'own', 'data'"),
        ({"instructions": {"base_url": "nowhere", "model": "m"}}, "base_url"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        KPIG(**options)


def test_key_parts_that_cover_everything_name_the_example(previous, encoder):
    chosen = [Example("Add.", "1 2", ("3",), "sum", ((0, 3),), source="sums.json:7")]
    with pytest.raises(DataError, match=r"sums.json:7: the key parts cover the whole instruction \('Add.'\)"):
        KPIG(key_parts="data").prepare(stage(previous, encoder, chosen))


# ----------------------------------------------------------------------------------------------------- other wordings


def test_instructions_are_drawn_from_those_of_the_task(previous, encoder):
    chosen = [examples()[1], examples()[3]]
    other = Example("Answer with the date as year, month, day.", "1 May", ("05 01",), "beta", ((16, 24),))
    objective = KPIG(key_parts="data", instructions="data")
    inputs = objective.prepare(stage(previous, encoder, chosen * 20, tasks=[Task("beta", (*chosen, other))]))
    texts = [encoder.tokenizer.decode(pair.full.input_ids) for pair in inputs.features]
    assert 5 < sum("Answer with the date" in text for text in texts) < 35
    assert all("[MASK]" in encoder.tokenizer.decode(pair.masked.input_ids) for pair in inputs.features)
    assert inputs.record.wordings == {"beta": 2}
    whole = [Example("Say it.", "", ("it",), "said", ((4, 6),))]
    with pytest.raises(DataError, match="no task has wordings that can stand for one another"):
        KPIG(instructions="data").prepare(stage(previous, encoder, whole, tasks=[Task("said", tuple(whole))]))
