from __future__ import annotations

import dataclasses

import pytest
import torch

from cit_fast.data import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.key_parts.hidden import honours_4d_mask, pair_collator, pair_hidden, shortest_window
from cit_fast.key_parts.pairs import EncodedPair, PairCollator, encode_pair, encode_pairs
from cit_fast.models.prompts import Encoded, PromptEncoder

TRIMS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + (m['content'] | trim | replace('\n', '  ')) "
    "+ ' <|im_end|>\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)
COUNTS = (  # what stands after the instruction depends on its length
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] + '(' ~ (m['content'] | length) ~ ')' "
    "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)
MARKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] | trim + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(tokenizer, template):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return PromptEncoder(other)


def conversation(marked) -> Example:
    turns = (("system", "Be brief."), ("user", "Hello 1"), ("assistant", "Hi 2"), ("user", " Count to ten, slowly. "))
    example = marked(turns[-1][1], "to ten", answer="1 2 3")
    return dataclasses.replace(example, messages=(*turns, ("assistant", "1 2 3")))


def separate(model, pairs):
    """The definition: one pass per sequence, the hidden states before each labelled token."""
    found = []
    for pair in pairs:
        for one in (pair.full, pair.masked or pair.full):
            at = [k - 1 for k, label in enumerate(one.labels) if label != -100]
            hidden = model.model(input_ids=torch.tensor([one.input_ids])).last_hidden_state
            found.append(hidden[0, at])
    return torch.cat(found[::2]), torch.cat(found[1::2])


# ------------------------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize("template", [None, TRIMS, COUNTS, MARKS], ids=["chatml", "trims", "counts", "marks"])
def test_both_contexts_answer_with_the_same_tokens(tiny_tokenizer, examples, marked, template):
    encoder = PromptEncoder(tiny_tokenizer) if template is None else with_template(tiny_tokenizer, template)
    everything = [*examples, conversation(marked), marked("Say [x]  \n", "[x]", input="\n\n 5 \n", answer=" a\n\nb ")]
    pairs = encode_pairs(encoder, everything).pairs
    for pair, example in zip(pairs, everything, strict=True):
        assert pair.masked.input_ids != pair.full.input_ids
        full, masked = ([t for t in one.labels if t != -100] for one in (pair.full, pair.masked))
        assert full == masked
        start, end = pair.scored
        own = pair.full.input_ids[start:end]
        assert tiny_tokenizer.decode(own).strip() == example.references[0].strip()
        assert pair.full.input_ids[end] == encoder.end_of_turn_id
        assert masked[len(masked) - len(pair.full.labels) + start :][: end - start] == own


def test_without_a_chat_template(tiny_tokenizer, examples):
    encoder = with_template(tiny_tokenizer, None)
    pair = encode_pair(encoder, examples[0])
    assert tiny_tokenizer.decode(pair.full.input_ids[slice(*pair.scored)]) == "seven"
    assert "[MASK]" in tiny_tokenizer.decode(pair.masked.input_ids)


def test_what_cannot_be_compared_is_refused_by_name(encoder):
    whole = Example("All of it.", references=("x",), key_parts=((0, 9),), source="data.jsonl:7")
    with pytest.raises(DataError, match=r"^data.jsonl:7: the key parts cover the whole instruction \('All of it.'\)"):
        encode_pair(encoder, whole)
    none = Example("All of it.", references=("x",), source="data.jsonl:8")
    with pytest.raises(DataError, match=r"^data.jsonl:8: no key parts"):
        encode_pairs(encoder, [none], missing="error")
    assert encode_pair(encoder, none).masked is None
    named_so = Example("Fill in [MASK] here.", references=("x",), key_parts=((8, 14),))
    assert encode_pair(encoder, named_so).masked is None


def test_too_long_examples_are_skipped_and_counted(tiny_tokenizer, examples):
    encoder = PromptEncoder(tiny_tokenizer, max_length=60, on_overflow="skip")
    long = dataclasses.replace(examples[0], references=("word " * 90,), source="here")
    found = encode_pairs(encoder, [long, examples[2]])
    assert found.skipped == ("here",)
    assert [pair.index for pair in found.pairs] == [1]


# ------------------------------------------------------------------------------------- the hidden states are right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma2", "Gemma3"])
def test_every_layout_gives_the_states_of_separate_passes(make_model, encoder, examples, marked, name, dtype):
    model = make_model(name, dtype)
    plain = Example("Count to ten.", references=("1 2 3",))
    pairs = encode_pairs(encoder, [*examples, plain, conversation(marked)]).pairs
    # All turns of the assistant are learned, those before the key parts too.
    several = encode_pair(with_template(encoder.tokenizer, MARKS), conversation(marked))
    assert sum(label != -100 for label in several.full.labels) > several.scored[1] - several.scored[0] + 1
    pairs.append(several)
    expected = separate(model, pairs)
    tolerance = 1e-5 if dtype == torch.float64 else 1e-4
    for collator in (PairCollator(0), PairCollator(0, share_prefix=True)):
        hidden = pair_hidden(model, collator(pairs))
        torch.testing.assert_close(hidden.full, expected[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(hidden.masked, expected[1], atol=tolerance, rtol=tolerance)
        targets = [t for pair in pairs for t in pair.full.labels if t != -100]
        assert hidden.targets.tolist() == targets
        assert hidden.offsets.tolist()[-1] == len(targets)


def test_sdpa_takes_the_mask_as_well(make_model, encoder, examples):
    model = make_model("Llama", torch.float64, "sdpa")
    pairs = encode_pairs(encoder, examples).pairs
    hidden = pair_hidden(model, PairCollator(0, share_prefix=True)(pairs))
    for ours, expected in zip((hidden.full, hidden.masked), separate(model, pairs), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row", [1024, 120, 1])
def test_several_maskings_of_one_example_share_its_full_context(make_model, encoder, marked, row):
    model = make_model("Llama", torch.float64)
    text = "Write the date, then the number of the day, then the month, in words."
    maskings = [encode_pair(encoder, marked(text, part, input="9 May"), k) for k, part in enumerate(text.split(", "))]
    pairs = [dataclasses.replace(pair, full=maskings[0].full) for pair in maskings]
    collator = PairCollator(0, share_prefix=True, row=row)
    batch = collator(pairs)
    assert len(batch["input_ids"]) == {1024: 1, 120: 3, 1: 4}[row]
    assert len(PairCollator(0)(pairs)["input_ids"]) == 5  # one full row and four masked ones
    expected = separate(model, pairs)
    for ours in (pair_hidden(model, batch), pair_hidden(model, PairCollator(0)(pairs))):
        torch.testing.assert_close(ours.full, expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.masked, expected[1], atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_separate_passes(make_model, encoder, examples):
    model = make_model("Llama", torch.float64)
    pairs = encode_pairs(encoder, examples).pairs

    def gradients(full, masked):
        model.zero_grad()
        (full.sin().sum() + masked.cos().sum()).backward()
        return {name: p.grad.clone() for name, p in model.model.named_parameters()}

    expected = gradients(*separate(model, pairs))
    for collator in (PairCollator(0), PairCollator(0, share_prefix=True)):
        hidden = pair_hidden(model, collator(pairs))
        for name, gradient in gradients(hidden.full, hidden.masked).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4, msg=name)


def test_only_scored_tokens(make_model, encoder, examples):
    pairs = encode_pairs(encoder, examples).pairs
    hidden = pair_hidden(make_model("Llama"), PairCollator(0, share_prefix=True)(pairs))
    own = hidden.only_scored()
    assert own.targets.tolist() == [t for pair in pairs for t in pair.full.input_ids[slice(*pair.scored)]]
    assert own.offsets.diff().tolist() == [pair.scored[1] - pair.scored[0] for pair in pairs]
    assert own.offsets.tolist()[-1] == len(own.full) == len(own.masked)
    torch.testing.assert_close(own.masked, hidden.masked[hidden.scored])


# ------------------------------------------------------------------------------------------------------- batches


def test_what_a_shared_row_looks_like():
    full = Encoded([1, 2, 3, 4, 5, 6], [-100, -100, -100, -100, 5, 6], 4)
    masked = Encoded([1, 2, 9, 5, 6], [-100, -100, -100, 5, 6], 3)
    batch = PairCollator(0, share_prefix=True, lengths=(10,))([EncodedPair(full, masked, 3, (4, 5))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 9, 5, 6, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 0]]
    assert batch["branch"].tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1, -1]]
    assert batch["visible"].tolist() == [[0, 0, 0, 0, 0, 0, 2, 2, 2, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 5, 6, -100, -100, -100, -100]]
    assert batch["full_at"].tolist() == [3, 4]
    assert batch["masked_at"].tolist() == [6, 7]
    assert batch["scored"].tolist() == [True, False]
    assert batch["index"].tolist() == [3]


def test_a_packed_row_holds_every_sequence(encoder, examples):
    pairs = encode_pairs(encoder, examples).pairs
    packed, padded = PairCollator(0, packed=True)(pairs), PairCollator(0)(pairs)
    sizes = [len(one.input_ids) for one in (*(p.full for p in pairs), *(p.masked for p in pairs))]
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["cu_seq_lens_k"].diff().tolist() == sizes
    assert packed["max_length_q"] == max(sizes)
    assert packed["input_ids"].shape == (1, sum(sizes))
    assert "attention_mask" not in packed
    for name in ("full_at", "masked_at"):
        tokens = packed["input_ids"].flatten()[packed[name] + 1]
        assert tokens.tolist() == padded["input_ids"].flatten()[padded[name] + 1].tolist()
    starts = packed["position_ids"][0, packed["cu_seq_lens_q"][:-1].long()]
    assert starts.tolist() == [0] * 6
    assert (packed["labels"] != -100).sum() == (padded["labels"] != -100).sum() == len(packed["full_at"])
    with pytest.raises(ConfigError, match="exclude each other"):
        PairCollator(0, share_prefix=True, packed=True)


# ---------------------------------------------------------------------------------------------- which models share


@pytest.mark.parametrize(
    ("name", "takes"),
    [("Llama", True), ("Qwen2", True), ("Gemma2", True), ("Gemma3", True), ("Mamba", False), ("Bloom", False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_tried_before_it_shares(make_model, name, takes, dtype):
    more = {"n_layer": 2, "n_head": 4} if name == "Bloom" else {}
    model = make_model(name, dtype, **more).train()
    assert honours_4d_mask(model) is takes
    assert model.training
    assert pair_collator(model, 0).share_prefix is takes
    if not takes:
        with pytest.raises(ConfigError, match="does not honour an attention mask"):
            pair_collator(model, 0, share_prefix=True)
    assert pair_collator(model, 0, share_prefix=False).share_prefix is False


def test_rows_longer_than_a_sliding_window_are_not_shared(make_model, encoder, examples):
    model = make_model("Gemma3", sliding_window=24)  # eager attention in float64 cannot pad beyond the window
    pairs = encode_pairs(encoder, examples).pairs
    assert max(len(pair.full.input_ids) for pair in pairs) > 24 == shortest_window(model)
    collator = pair_collator(model, 0)
    assert collator.share_prefix
    batch = collator(pairs)
    assert "branch" not in batch
    hidden = pair_hidden(model, batch)
    for ours, expected in zip((hidden.full, hidden.masked), separate(model, pairs), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_model_is_refused(make_model, encoder, examples, monkeypatch):
    model = make_model("Llama")
    monkeypatch.setattr(model, "_orig_mod", model, raising=False)
    with pytest.raises(ConfigError, match="torch_compile"):
        pair_hidden(model, PairCollator(0)(encode_pairs(encoder, examples).pairs))


def test_padding_stays_within_learned_positions(make_model, encoder, examples):
    pairs = encode_pairs(encoder, examples).pairs
    longest = max(len(one.input_ids) for pair in pairs for one in (pair.full, pair.masked))
    model = make_model("OPT", max_position_embeddings=longest, word_embed_proj_dim=32, ffn_dim=64)
    for share_prefix in (False, "auto"):
        hidden = pair_hidden(model, pair_collator(model, 0, share_prefix)(pairs))
        assert hidden.full.isfinite().all()
