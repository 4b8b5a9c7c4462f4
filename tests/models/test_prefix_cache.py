"""A batch whose beginning is read once answers what its prompts would alone."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from cit_fast.models import generation, prefix_cache
from cit_fast.models.generation import generate
from cit_fast.models.prefix_cache import (
    BatchLimit,
    CacheLostError,
    Piece,
    PromptReader,
    batches_of_pieces,
    can_continue,
    common_beginning,
    turns_by_length,
)
from cit_fast.models.running_batch import Row, RunningBatch

VOCABULARY = 32
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}


class NumberTokenizer:
    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, **options)).eval()


def random_tokens(count, seed):
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompts_of(*beginnings, rests=(1, 7, 3, 12, 5)):
    return [
        [*random_tokens(length, 100 + number), *random_tokens(rest, 10 * number + rest)]
        for number, length in enumerate(beginnings)
        for rest in rests
    ]


def answers(model, prompts, **options):
    options = {"pad_token_id": 0, "eos_token_ids": [2], "tokenizer": NumberTokenizer(), "max_new_tokens": 8, **options}
    return generate(model, prompts, **options)


@pytest.fixture
def groups_read(monkeypatch):
    """(prompts, tokens) of every piece whose beginning was read once, batch by batch."""
    read = []

    def watched(self, prompts, pieces, room, sets=None):
        own = [(len(piece.indices), piece.beginning) for piece in pieces if piece.beginning]
        if own and len(prompts) > 3:  # else it is the trial of the model
            read.append(own)
        return original(self, prompts, pieces, room, sets)

    original = PromptReader.read
    monkeypatch.setattr(PromptReader, "read", watched)
    return read


@pytest.fixture(autouse=True)
def passes_that_cost_little(monkeypatch):
    """Prompts as short as these tests have would otherwise not be worth it."""
    monkeypatch.setattr(prefix_cache, "PASS", 2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_answers_are_those_of_each_prompt_alone(attention, groups_read):
    model = llama(attn_implementation=attention)
    prompts = prompts_of(40, 25, rests=(6, 7, 7, 5, 7))
    alone = [answers(model, [prompt])[0] for prompt in prompts]
    assert len(set(alone)) > 5
    assert not groups_read
    assert answers(model, prompts, batch_size=10) == alone
    assert [sorted(batch) for batch in groups_read] == [[(5, 25), (5, 40)]]  # both tasks in one batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_beginnings_of_every_length_beside_prompts_without(attention, groups_read):
    model = llama(attn_implementation=attention)
    prompts = [*prompts_of(60, 33, 90), *(random_tokens(length, 500 + length) for length in (4, 9, 1, 12))]
    alone = [answers(model, [prompt])[0] for prompt in prompts]
    assert answers(model, prompts, batch_size=32) == alone
    assert len({read for batch in groups_read for _, read in batch}) >= 3


def test_prompts_that_are_alike_or_of_one_token_more(groups_read):
    model = llama()
    start = random_tokens(30, 1)
    prompts = [start, start, [*start, 5], start[:29]]
    assert answers(model, prompts) == [answers(model, [prompt])[0] for prompt in prompts]
    assert groups_read == [[(4, 28)]]  # the last token of each is read with its answer


def test_little_in_common_is_padded_as_before(groups_read):
    model = llama()
    prompts = [random_tokens(20, seed) for seed in range(6)]
    assert answers(model, prompts) == [answers(model, [prompt])[0] for prompt in prompts]
    assert not groups_read


def test_a_beginning_is_of_one_set(groups_read):
    torch.manual_seed(1)
    model = llama()
    for name in ("first", "second"):
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
        if name == "first":
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.eval()
    prompts = prompts_of(60, rests=(4, 4, 4, 4, 4, 4, 4, 4))
    prompts = [[*prompt[:-1], 3 + number] for number, prompt in enumerate(prompts)]
    sets = ["first", "second", "first", "second", "second", "first", "first", "second"]
    alone = [answers(model, [prompt], adapters=[name])[0] for prompt, name in zip(prompts, sets, strict=True)]
    assert len(set(alone)) == 8
    groups_read.clear()
    assert answers(model, prompts, adapters=sets) == alone
    assert [sorted(rows for rows, _ in batch) for batch in groups_read] == [[4, 4]]  # all answered together


@pytest.mark.parametrize(
    "make",
    [
        lambda: MistralForCausalLM(MistralConfig(**SMALL, **HEADS, sliding_window=8)),
        lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)),
    ],
    ids=["sliding window", "state space"],
)
def test_what_keeps_something_else_reads_every_prompt_whole(make):
    torch.manual_seed(0)
    model = make().eval()
    prompts = prompts_of(40, rests=(4, 4, 4))
    assert not can_continue(model, prompts[0], 0)
    assert answers(model, prompts) == [answers(model, [prompt])[0] for prompt in prompts]


_TURNS = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 6.0, 8.0], "partial_rotary_factor": 1.0},
    "dynamic": {"factor": 4.0},
}


def turning(make_model, name, kind):
    """A model whose keys turn otherwise from the 25th token on."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 24, **_TURNS[kind]}
    positions = {} if kind == "dynamic" else {"original_max_position_embeddings": 24}
    most = 24 if kind == "dynamic" else 128
    return make_model(name, rope_parameters=rope, max_position_embeddings=most, **positions)


@pytest.mark.parametrize(("name", "kind"), [("Phi3", "longrope"), ("Llama", "longrope"), ("Llama", "dynamic")])
def test_positions_that_depend_on_the_length_of_a_text(make_model, name, kind):
    """Neither a cache nor a longer neighbour changes what a prompt is answered."""
    model = turning(make_model, name, kind)
    prompts = sorted(prompts_of(10, 20, rests=(1, 2, 3, 3, 12)), key=len)
    alone = [answers(model, [prompt])[0] for prompt in prompts]
    assert answers(model, prompts, batch_size=10) == alone
    assert not can_continue(model, prompts[0], 0)


@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, False),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}, "sliding_attention": None}}, True),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, False),
        ({"rope_scaling": {"type": "su"}}, True),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, True),
        ({"rope_scaling": None}, False),
        ({}, False),
    ],
)
def test_which_positions_depend_on_the_length(settings, turns):
    model = torch.nn.Module()
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**settings))
    assert turns_by_length(model) == turns


def test_a_cache_that_a_model_leaves_is_none(make_model, monkeypatch):
    """From then on it reads every prompt whole; what was begun is answered anew."""
    for module in (generation, prefix_cache):
        monkeypatch.setattr(module, "turns_by_length", lambda _: False)
    model = turning(make_model, "Phi3", "longrope")
    prompts = [random_tokens(20, seed) for seed in range(4)]
    alone = [answers(model, [prompt])[0] for prompt in prompts]
    assert can_continue(model, prompts[0], 0)
    with pytest.raises(CacheLostError, match="Phi3ForCausalLM: 28 tokens were read, the cache holds 0"):
        RunningBatch(PromptReader(model), 0, [2]).join([Row(random_tokens(28, 0), 8)])
    assert not can_continue(model, prompts[0], 0)
    prefix_cache._can[model] = True
    assert answers(model, prompts) == alone
    assert not can_continue(model, prompts[0], 0)


def test_learned_positions_do_not_count_the_padding(groups_read):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4)
    model = GPT2LMHeadModel(config).eval()
    prompts = prompts_of(30, 20)
    assert answers(model, prompts) == [answers(model, [prompt])[0] for prompt in prompts]
    assert groups_read


@torch.inference_mode()
def test_a_beginning_goes_on_from_the_one_before():
    model = llama()
    read = []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    start = random_tokens(40, 7)
    kept, prompts = PromptReader(model), [[*start, 5], [*start, 6], [*start[:10], 4, *start[11:15], 3]]
    for length in (30, 40, 20, 36):
        for reader in (kept, PromptReader(model)):
            cache = reader.read(prompts, [Piece((0, 1), length)], 0)
            assert {tuple(layer.keys.shape) for layer in cache.layers} == {(2, 2, 40, 8)}
            if reader is kept:
                before = cache
        for layer, right in zip(before.layers, cache.layers, strict=True):
            torch.testing.assert_close(layer.keys, right.keys)
            torch.testing.assert_close(layer.values, right.values)
    kept.read(prompts, [Piece((2,), 15)], 0)
    # Ours and the fresh one in turns: ten more tokens after the thirty, none for twenty or thirty-six of the forty;
    # and the rest of the forty where there is one.
    assert read == [30, 10, 30, 10, 10, 40, 20, 20, 20, 4, 36, 4, 5]


@torch.inference_mode()
def test_prompts_stand_on_the_right_of_the_cache():
    model = llama()
    prompts = [*prompts_of(12, rests=(3, 1, 9)), [5], [7, 8]]
    pieces = [Piece((1, 0, 2), 12), Piece((4,), 0), Piece((3,), 0)]
    cache = PromptReader(model).read(prompts, pieces, 4)
    for row, index in enumerate((1, 0, 2, 4, 3)):
        tokens = prompts[index][:-1]
        expected = model(torch.tensor([tokens]), use_cache=True).past_key_values.layers if tokens else []
        for number, layer in enumerate(cache.layers):
            padding, own = layer.keys[row, :, : 20 - len(tokens)], layer.keys[row, :, 20 - len(tokens) :]
            assert not padding.any()
            if tokens:
                torch.testing.assert_close(own, expected[number].keys[0])
                torch.testing.assert_close(layer.values[row, :, 20 - len(tokens) :], expected[number].values[0])


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(one=tokens, other=tokens)
def test_common_beginning_is_the_longest(one, other):
    found = common_beginning(one, other)
    assert found == max(n for n in range(min(len(one), len(other)) + 1) if one[:n] == other[:n])


@given(
    prompts=st.lists(tokens, min_size=1, max_size=12),
    size=st.integers(1, 5),
    a_pass=st.integers(0, 3),
    sets=st.none() | st.just("ab"),
)
def test_every_prompt_is_in_one_piece_with_what_it_begins_with(prompts, size, a_pass, sets):
    sets = sets and [sets[sum(prompt) % 2] for prompt in prompts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "PASS", a_pass)
        batches = batches_of_pieces(prompts, range(len(prompts)), BatchLimit(size), sets)
    assert sorted(i for batch in batches for piece in batch for i in piece.indices) == list(range(len(prompts)))
    for batch in batches:
        assert sum(len(piece.indices) for piece in batch) <= size
        for piece in batch:
            own = [prompts[index] for index in piece.indices]
            assert all(prompt[: piece.beginning] == own[0][: piece.beginning] for prompt in own)
            assert all(len(prompt) > piece.beginning for prompt in own)
            assert not (piece.beginning and sets) or len({sets[index] for index in piece.indices}) == 1
    # All but the last are full, and prompts get shorter.
    assert len(batches) == -(-len(prompts) // size)


@given(prompts=st.lists(tokens, min_size=1, max_size=12), budget=st.integers(1, 60), new=st.integers(0, 5))
def test_a_batch_has_no_more_tokens_than_it_may(prompts, budget, new):
    limit = BatchLimit(5, budget, new)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    pieces = batches_of_pieces(prompts, range(len(prompts)), limit)
    batches = [[index for piece in batch for index in piece.indices] for batch in pieces]
    for found in (batches, *(generation._batches(prompts, order, limit, how) for how in ("any", "equal", "none"))):
        assert sorted(index for batch in found for index in batch) == list(range(len(prompts)))
        for batch in found:
            longest = max(len(prompts[index]) for index in batch)
            assert len(batch) == 1 or (len(batch) <= 5 and len(batch) * (longest + new) <= budget)


@given(prompts=st.lists(tokens, min_size=1, max_size=6), a_pass=st.integers(0, 6))
def test_pieces_are_of_least_work(prompts, a_pass):
    """Of all ways to cut the prompts in their order, each with the better of two beginnings."""
    order = sorted(prompts)

    def work(group):
        longest, shortest = max(map(len, group)) - 1, min(map(len, group)) - 1
        common = min([shortest, *(common_beginning(group[0], other) for other in group)])
        ways = [a_pass + len(group) * longest if longest else 0]
        rest = a_pass + len(group) * (longest - common) if longest > common else 0
        return min(*ways, common + a_pass + rest)

    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(order)), k) for k in range(len(order)))
    least = min(sum(work(order[a:b]) for a, b in itertools.pairwise([0, *cut, len(order)])) for cut in cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "PASS", a_pass)
        (batch,) = batches_of_pieces(prompts, range(len(prompts)), BatchLimit(6))
        found = 0
        for piece in batch:
            longest = max(len(prompts[index]) for index in piece.indices) - 1
            found += prefix_cache._work(len(piece.indices), longest, piece.beginning)
            found += piece.beginning + a_pass if piece.beginning else 0
    assert found == least


def test_long_prompts_do_not_pad_many_short_ones(monkeypatch):
    monkeypatch.setattr(prefix_cache, "PASS", 50)
    prompts = [random_tokens(length, length) for length in (500, 490, *range(20, 50))]
    (batch,) = batches_of_pieces(prompts, range(len(prompts)), BatchLimit(32))
    assert sum(len(piece.indices) for piece in batch if 0 in piece.indices or 1 in piece.indices) == 2
    assert [sorted(map(len, generation._batches(prompts, range(32), BatchLimit(32), "any")))] == [[2, 30]]


def test_many_sets_of_one_prompt_each_are_read_together(monkeypatch):
    monkeypatch.setattr(prefix_cache, "PASS", 200)
    prompts = [random_tokens(20, 1) for _ in range(64)]
    batches = batches_of_pieces(prompts, range(64), BatchLimit(64), [str(n) for n in range(64)])
    assert [[(len(piece.indices), piece.beginning) for piece in batch] for batch in batches] == [[(64, 0)]]


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Granite", "Cohere", "Gemma", "OPT", "GPTNeoX", "Mixtral"])
def test_these_families_are_read_apart(make_model, kind, groups_read):
    """So that an error of ours does not pass for a cache of another kind."""
    model = make_model(kind)
    prompts = prompts_of(40, 25, rests=(6, 7, 7, 5, 7))
    assert can_continue(model, prompts[0], 0)
    assert answers(model, prompts, batch_size=10) == [answers(model, [prompt])[0] for prompt in prompts]
    assert groups_read


def test_why_prompts_are_read_whole_is_logged(make_model, caplog):
    caplog.set_level("INFO")
    assert not can_continue(make_model("Mamba"), random_tokens(16, 0), 0)
    assert "MambaForCausalLM: prompts are read whole (ValueError: MambaForCausalLM: does not keep all" in caplog.text


def test_memory_that_runs_out_is_no_cache_of_another_kind(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PromptReader, "read", full)
    with pytest.raises(torch.OutOfMemoryError):
        can_continue(llama(), random_tokens(16, 0), 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_continues_too(attention):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).to(torch.bfloat16).eval()
    assert can_continue(model, random_tokens(16, 0), 0)
    assert generation._batched_together(model, random_tokens(16, 0), 0) == "any"


def test_rows_leave_when_they_have_ended(monkeypatch):
    monkeypatch.setattr(prefix_cache, "PASS", 200)  # one batch, nothing shared
    model = llama()
    prompts = prompts_of(0, rests=(9, 7, 3, 12, 5, 8))
    whole = [text.split() for text in answers(model, prompts, eos_token_ids=[VOCABULARY], max_new_tokens=30)]
    ends = [int(tokens[k]) for tokens, k in zip(whole, (2, 28, 11, 5), strict=False)]
    shortest = [min((tokens.index(str(end)) for end in ends if str(end) in tokens), default=30) for tokens in whole]
    assert len(set(shortest)) > 2
    rows = []
    original = model.forward

    @functools.wraps(original)  # generation reads what the model takes from its signature
    def forward(*args, **inputs):
        rows.append(len(inputs["input_ids"]))
        return original(*args, **inputs)

    monkeypatch.setattr(model, "forward", forward)
    found = answers(model, prompts, eos_token_ids=ends, max_new_tokens=30)
    assert [text.split() for text in found] == [t[:n] for t, n in zip(whole, shortest, strict=True)]
    # Every eighth token those that have ended leave.
    passes = [sum(n >= 8 * (step // 8) for n in shortest) for step in range(min(30, max(shortest) + 1))]
    assert rows == [6, *passes]  # the prompts, then the answers
    assert rows[-1] < rows[0]


def test_the_room_is_used_in_place():
    layer = prefix_cache.RoomyLayer(3)
    new = torch.arange(8.0).view(1, 2, 2, 2)
    keys, _ = layer.update(new, -new)
    again, values = layer.update(new[:, :, :1], -new[:, :, :1])
    assert again.data_ptr() == keys.data_ptr()
    torch.testing.assert_close(again, torch.cat([new, new[:, :, :1]], 2))
    torch.testing.assert_close(values, -again)
    assert layer.get_seq_length() == 3
    with pytest.raises(ValueError, match="4 tokens, but there is room for 3"):
        layer.update(new[:, :, :1], new[:, :, :1])
