from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from cit_fast.data import Example, ReadOptions, read_records
from cit_fast.errors import ConfigError, DataError
from cit_fast.key_parts.clauses import clauses
from cit_fast.key_parts.gain import information_gain
from cit_fast.key_parts.sources import check_source, choose_clauses, clause_gains, find_key_parts

TEXT = "Write the date of the day, then the number of it. Answer in words only, without a dot."


@pytest.fixture
def unmarked(examples):
    some = [Example(TEXT, f"9 May 199{k}", (f"May nine 199{k}",), task="dates") for k in range(6)]
    return [*some, *(dataclasses.replace(example, key_parts=()) for example in examples[:2])]


def test_gains_of_clauses_are_those_of_masking_each_alone(make_model, encoder, unmarked):
    model = make_model("Llama", torch.float64)
    some = unmarked[:2]
    (found,) = clause_gains(model, encoder, {TEXT: some}, batch_size=3).values()
    assert [span for span, _ in found] == clauses(TEXT)
    for span, gain in found:
        masked = [dataclasses.replace(example, key_parts=(span,)) for example in some]
        each = information_gain(model, encoder, masked, share_prefix=False)
        assert gain == pytest.approx(sum(one.gain for one in each) / 2, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    ("gains", "share", "expected"),
    [
        ([0.1, 0.3, 0.2], 0.5, ((2, 3),)),
        ([0.1, 0.3, 0.2], 0.6, ((2, 5),)),
        ([0.3, 0.1, 0.2], 0.6, ((0, 1), (4, 5))),
        ([0.3, 0.1, 0.2], 1.0, ((0, 1), (4, 5))),  # never all
        ([-0.3, -0.1, -0.2], 0.5, ((2, 3),)),  # none carries any: the one that takes away least
        ([0.0, 0.0], 0.5, ((0, 1),)),
        ([0.2, -0.1, 0.0], 1.0, ((0, 1),)),  # what carries nothing is not needed
        ([0.2], 0.5, ()),
        ([], 0.5, ()),
    ],
)
def test_the_fewest_clauses_with_the_share_asked_for(gains, share, expected):
    assert choose_clauses([((2 * k, 2 * k + 1), gain) for k, gain in enumerate(gains)], share) == expected


def test_discovery_finds_the_words_that_a_model_listens_to(make_model, encoder, tiny_tokenizer):
    """A model that answers the token that stands most often in its context: only that clause carries gain."""
    model = make_model("Llama", num_hidden_layers=1, num_key_value_heads=4, tie_word_embeddings=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()  # attends evenly, and adds what it saw
            layer.self_attn.v_proj.weight.copy_(torch.eye(32))
            layer.self_attn.o_proj.weight.copy_(torch.eye(32) * 30)
            layer.mlp.down_proj.weight.zero_()
    word = tiny_tokenizer("Z", add_special_tokens=False)["input_ids"]
    text = "Think about it well. Say ZZZZZZZZ ZZZZZZZZ ZZZZ now. Do not be slow."
    found = find_key_parts([Example(text, references=("Z",))], "discover", model=model, encoder=encoder)
    assert len(word) == 1
    assert found.examples[0].key_part_texts == ("Say ZZZZZZZZ ZZZZZZZZ ZZZZ now",)


def test_every_example_of_an_instruction_gets_the_same_and_the_summary_counts(make_model, encoder, unmarked):
    model = make_model("Llama")
    one_word = Example("Go", references=("x",))
    steps = []
    found = find_key_parts(
        [*unmarked, one_word], "discover", model=model, encoder=encoder, progress=lambda *step: steps.append(step)
    )
    by_text = {}
    for before, after in zip([*unmarked, one_word], found.examples, strict=True):
        assert dataclasses.replace(after, key_parts=()) == before
        by_text.setdefault(after.instruction, set()).add(after.key_parts)
    assert all(len(parts) == 1 for parts in by_text.values())
    assert found.examples[-1].key_parts == ()
    spans = sum(len(parts) for (parts,) in by_text.values())
    assert found.summary == {
        "source": "discover", "instructions": 4, "with_key_parts": 3, "without": 1, "spans": spans, "dropped": 0,
    }  # fmt: skip
    assert steps[-1] == (4, 4)


def test_what_was_discovered_is_kept_by_model_instruction_and_options(make_model, encoder, unmarked, tmp_path):
    model = make_model("Llama")
    options = {"encoder": encoder, "cache": tmp_path}
    first = find_key_parts(unmarked, "discover", model=model, identity="one", **options)
    files = sorted((tmp_path / "key-parts").rglob("*.json"))
    assert len(files) == 3
    assert json.loads(files[0].read_text())["clauses"][0]["gain"] is not None

    class Unused(torch.nn.Module):
        pass

    again = find_key_parts(unmarked, "discover", model=Unused(), identity="one", **options)
    assert again == first
    with pytest.raises(ConfigError, match="Unused"):
        find_key_parts(unmarked, "discover", model=Unused(), identity="two", **options)
    with pytest.raises(ConfigError, match="Unused"):
        find_key_parts(unmarked, {"discover": {"share": 0.9}}, model=Unused(), identity="one", **options)
    files[0].write_text('{"instruction": "damaged')
    assert find_key_parts(unmarked, "discover", model=model, identity="one", **options) == first
    assert json.loads(files[0].read_text())["key_parts"]


def test_examples_that_do_not_fit_are_left_out_of_discovery(make_model, tiny_tokenizer, unmarked):
    from cit_fast.models.prompts import PromptEncoder

    short = PromptEncoder(tiny_tokenizer, max_length=90, on_overflow="skip")
    long = dataclasses.replace(unmarked[-1], references=("word " * 100,))
    found = find_key_parts([long], "discover", model=make_model("Llama"), encoder=short)
    assert found.summary["without"] == 1


# --------------------------------------------------------------------------------------------------- from the data


def test_spans_and_marks_in_the_data_reach_the_gain(make_model, encoder):
    records = [
        {"instruction": "Answer in [[one word]].", "output": "yes"},
        {"instruction": "Answer in one word.", "output": "yes", "key_parts": ["one word"]},
        {"instruction": "Answer in one word.", "output": "yes", "key_parts": [[10, 18]]},
    ]
    options = ReadOptions(key_part_markers=("[[", "]]"))
    examples = read_records(((f"data.jsonl:{k}", record) for k, record in enumerate(records, 1)), options)
    found = find_key_parts(examples)
    assert found.summary["spans"] == 1
    assert found.summary["instructions"] == 1
    gains = information_gain(make_model("Llama", torch.float64), encoder, found.examples)
    assert gains[0].gain != 0
    assert [each.gain for each in gains] == pytest.approx([gains[0].gain] * 3, rel=1e-5)  # laid out differently


def test_a_key_part_that_is_not_in_the_instruction_names_the_line():
    record = {"instruction": "Answer.", "output": "yes", "key_parts": ["in one word"]}
    with pytest.raises(DataError, match=r"^data.jsonl:4: key part 'in one word' is not in the instruction"):
        read_records([("data.jsonl:4", record)], ReadOptions())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("guess", "none of data, discover, llm"),
        ({"data": {}, "discover": {}}, "none of data, discover, llm"),
        ({"data": {"share": 1}}, "'share' is unknown; it takes no options"),
        ({"discover": {"shares": 1}}, "'shares' is unknown; it takes share and examples"),
        ({"discover": {"share": 0}}, "expected 0 < share <= 1"),
        ({"discover": {"examples": 0}}, "examples >= 1"),
        ("llm", "llm needs a chat model"),
        ({"llm": {"model": "m", "unusable": "?"}}, "neither 'error' nor 'none'"),
    ],
)
def test_sources_that_do_not_exist(source, words):
    with pytest.raises(ConfigError, match=words):
        check_source(source)
    with pytest.raises(ConfigError, match=words):
        find_key_parts([], source)


def test_discovery_needs_a_model(unmarked):
    with pytest.raises(ConfigError, match="needs a model"):
        find_key_parts(unmarked, "discover")
