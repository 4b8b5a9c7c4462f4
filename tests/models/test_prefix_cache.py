"""A batch whose beginning is read once answers what its prompts would alone."""

from __future__ import annotations

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
from cit_fast.models.prefix_cache import SHORTEST, alike_together, can_continue, common_beginning, work

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
def tokens_read(monkeypatch):
    """(rows, tokens) of every beginning that was read."""
    read = []

    def counting(model, tokens, rows):
        read.append((rows, len(tokens)))
        return original(model, tokens, rows)

    original = prefix_cache.read_beginning
    monkeypatch.setattr(generation, "read_beginning", counting)
    return read


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_answers_are_those_of_each_prompt_alone(attention, tokens_read):
    model = llama(attn_implementation=attention)
    prompts = prompts_of(40, 25)
    alone = [answers(model, [prompt])[0] for prompt in prompts]
    assert len(set(alone)) > 5
    assert not tokens_read
    assert answers(model, prompts, batch_size=5) == alone
    assert sorted(tokens_read) == [(5, 25), (5, 40)]


def test_prompts_that_are_alike_or_of_one_token_more(tokens_read):
    model = llama()
    start = random_tokens(30, 1)
    prompts = [start, start, [*start, 5], start[:29]]
    assert answers(model, prompts) == [answers(model, [prompt])[0] for prompt in prompts]
    assert tokens_read == [(4, 28)]


def test_little_in_common_is_padded_as_before(tokens_read):
    model = llama()
    prompts = [random_tokens(20, seed) for seed in range(6)]
    assert answers(model, prompts) == [answers(model, [prompt])[0] for prompt in prompts]
    assert not tokens_read


def test_sets_of_their_own_are_never_in_one_batch(tokens_read):
    torch.manual_seed(1)
    model = llama()
    for name in ("first", "second"):
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
        if name == "first":
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.eval()
    prompts = prompts_of(60, rests=(4, 9, 2, 6, 3, 8))
    sets = ["first", "second", "first", "second", "second", "first"]
    alone = [answers(model, [prompt], adapters=[name])[0] for prompt, name in zip(prompts, sets, strict=True)]
    assert len(set(alone)) == 6
    tokens_read.clear()
    assert answers(model, prompts, adapters=sets, batch_size=3) == alone
    assert tokens_read == [(3, 60), (3, 60)]


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


def test_learned_positions_do_not_count_the_padding(tokens_read):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4)
    model = GPT2LMHeadModel(config).eval()
    prompts = prompts_of(30)
    assert answers(model, prompts) == [answers(model, [prompt])[0] for prompt in prompts]
    assert tokens_read == [(5, 30)]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5))
def test_common_beginning_is_the_longest_that_leaves_each_a_token(prompts):
    found = common_beginning(prompts)
    alike = [n for n in range(min(map(len, prompts))) if all(p[:n] == prompts[0][:n] for p in prompts)]
    assert found == max(alike)


@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12),
    size=st.integers(1, 5),
    kinds=st.none() | st.just("ab"),
)
def test_every_prompt_is_in_one_batch_of_its_kind(prompts, size, kinds):
    kinds = kinds and [kinds[len(prompt) % 2] for prompt in prompts]
    batches = alike_together(prompts, range(len(prompts)), size, kinds)
    assert sorted(index for batch in batches for index in batch) == list(range(len(prompts)))
    assert all(len(batch) <= size for batch in batches)
    assert kinds is None or all(len({kinds[index] for index in batch}) == 1 for batch in batches)


def test_many_sets_of_one_prompt_each_stay_in_full_batches():
    prompts = [random_tokens(20, 1) for _ in range(64)]
    one_by_one = sum(work([prompt], True) for prompt in prompts)
    assert work(prompts, False) < one_by_one
    assert work(prompts, True) < work(prompts, False)
    assert len(prompts[0]) > SHORTEST
