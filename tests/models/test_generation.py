from __future__ import annotations

import math
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toy_models import decided_llama
from transformers import GenerationConfig, LlamaForCausalLM

from cit_fast.errors import DataError
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.generation import (
    Sampling,
    _batched_together,
    generate,
    generate_answers,
    generating,
    one_set,
)
from cit_fast.models.running_batch import Chance, Drawing

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 32


class NumberTokenizer:
    """Token k is the word "k"; tokens below 3 are special."""

    def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return " " + " ".join(str(t) for t in tokens if not (skip_special_tokens and t < 3))


@pytest.fixture(scope="module")
def model():
    return decided_llama()


def prompts_of(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def answer(model, prompts, **options):
    options = {"pad_token_id": PAD, "eos_token_ids": [EOS], "tokenizer": NumberTokenizer(), **options}
    return generate(model, prompts, **options)


def greedy(model, prompt, steps, end_tokens):
    """The definition: the whole sequence through the model at every step."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if token in end_tokens:
                break
            tokens.append(token)
    return " ".join(str(t) for t in tokens[len(prompt) :] if t >= 3)


PROMPTS = prompts_of([3, 17, 1, 8, 8, 2, 11])


def test_answers_are_greedy_and_in_the_given_order(model):
    expected = [greedy(model, prompt, 12, [EOS]) for prompt in PROMPTS]
    assert len(set(expected)) == len(expected)
    assert answer(model, PROMPTS, max_new_tokens=12, batch_size=3) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_an_answer_does_not_depend_on_its_batch(model, batch_size):
    alone = [answer(model, [prompt], max_new_tokens=10)[0] for prompt in PROMPTS]
    assert answer(model, PROMPTS, max_new_tokens=10, batch_size=batch_size) == alone


def test_an_answer_does_not_depend_on_how_many_tokens_a_batch_may_have(model):
    alone = [answer(model, [prompt], max_new_tokens=10)[0] for prompt in PROMPTS]
    sizes = []
    assert answer(model, PROMPTS, max_new_tokens=10, batch_size=7, batch_tokens=40, progress=sizes.append) == alone
    assert sum(sizes) == len(PROMPTS)
    assert 1 < max(sizes) <= 40 // (1 + 10)
    assert min(sizes) == 1  # 17 and 10: two would be 54


def test_stops_at_any_end_token_in_some_rows_only(model):
    free = [[int(t) for t in text.split()] for text in answer(model, PROMPTS, max_new_tokens=10, eos_token_ids=[])]
    ends = [free[0][4], free[3][6]]
    expected = []
    for tokens in free:
        cut = next((k for k, token in enumerate(tokens) if token in ends), len(tokens))
        expected.append(" ".join(map(str, tokens[:cut])))
    assert len({len(text.split()) for text in expected}) > 1
    assert answer(model, PROMPTS, max_new_tokens=10, eos_token_ids=ends) == expected
    assert answer(model, PROMPTS[:1], max_new_tokens=10, eos_token_ids=ends[0]) == [" ".join(map(str, free[0][:4]))]


def test_a_models_own_defaults_play_no_part_and_stay(model):
    expected = answer(model, PROMPTS, max_new_tokens=10)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, no_repeat_ngram_size=1, max_length=4
    )
    previous, model.generation_config = model.generation_config, own
    try:
        assert answer(model, PROMPTS, max_new_tokens=10) == expected
        assert model.generation_config is own
    finally:
        model.generation_config = previous


def test_modes_and_gradients_stay_as_they_were(model):
    model.train()
    model.lm_head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append((module.training, torch.is_grad_enabled())))
    try:
        answer(model, PROMPTS[:2], max_new_tokens=2)
        assert set(seen) == {(False, False)}
        assert {name: module.training for name, module in model.named_modules()} == before
        with pytest.raises(RuntimeError, match="broken tokenizer"):
            answer(model, PROMPTS[:1], max_new_tokens=1, tokenizer=BrokenTokenizer())
        assert {name: module.training for name, module in model.named_modules()} == before
    finally:
        hook.remove()
        model.eval()


class BrokenTokenizer:
    def decode(self, *args, **kwargs):
        raise RuntimeError("broken tokenizer")


def test_through_an_adapter(model):
    torch.manual_seed(0)
    adapted = get_peft_model(
        LlamaForCausalLM(model.config),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.base_model.model.generation_config.repetition_penalty = 9.0
    adapted.eval()
    expected = [greedy(adapted, prompt, 6, [EOS]) for prompt in PROMPTS[:3]]
    assert answer(adapted, PROMPTS[:3], max_new_tokens=6) == expected
    assert adapted.generation_config.repetition_penalty == 9.0


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_drawn_tokens_have_the_models_distribution(model, temperature):
    """Total variation between 4,000 draws and the distribution stays below what chance makes of it."""
    draws, prompt = 4000, PROMPTS[1]
    sampling = Sampling(temperature, range(draws))
    found = answer(model, [prompt] * draws, max_new_tokens=1, eos_token_ids=[], batch_size=500, sampling=sampling)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(0)
    counts = torch.zeros(VOCABULARY, dtype=torch.float64)
    for text in found:  # special tokens have no text
        counts[int(text) if text else 0] += 1
    expected[0], expected[1:3] = expected[:3].sum(), 0.0
    distance = 0.5 * (counts / draws - expected).abs().sum()
    assert distance < 4 * 0.5 * (expected * (1 - expected) / draws).sqrt().sum()
    assert not counts[expected == 0].any()


def test_a_draw_depends_on_its_seed_and_not_on_its_batch(model):
    seeds = list(range(len(PROMPTS)))

    def drawn(order, size):
        texts = answer(
            model,
            [PROMPTS[k] for k in order],
            max_new_tokens=20,
            batch_size=size,
            sampling=Sampling(1.0, [seeds[k] for k in order]),
        )
        return dict(zip(order, texts, strict=True))

    alone = {k: drawn([k], 1)[k] for k in seeds}
    assert len({len(text.split()) for text in alone.values()}) > 2  # rows leave at different times
    assert drawn(seeds, 3) == drawn(seeds[::-1], 7) == alone
    other = answer(model, PROMPTS, max_new_tokens=20, sampling=Sampling(1.0, [s + 100 for s in seeds]))
    assert other != list(alone.values())
    cold = answer(model, PROMPTS, max_new_tokens=20, sampling=Sampling(1e-4, seeds))
    assert cold == answer(model, PROMPTS, max_new_tokens=20)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.7, 0.999])
def test_only_the_likeliest_tokens_are_drawn(model, top_p):
    """As few as have the share of the probability, with their own distribution."""
    draws, prompt = 2000, PROMPTS[1]
    options = {"max_new_tokens": 1, "eos_token_ids": [], "batch_size": 500, "pad_token_id": PAD}
    sampling = Sampling(2.0, range(draws), top_p)
    found = generate_answers(model, [prompt] * draws, tokenizer=NumberTokenizer(), sampling=sampling, **options)
    with torch.no_grad():
        right = (model(torch.tensor([prompt])).logits[0, -1].double() / 2.0).softmax(0)
    order = right.argsort(descending=True).tolist()
    count = next(k for k in range(1, VOCABULARY + 1) if k == VOCABULARY or right[order[:k]].sum() >= top_p)
    drawn = torch.bincount(torch.tensor([answer.ids[0] for answer in found]), minlength=VOCABULARY) / draws
    assert not drawn[order[count:]].any()
    expected = right[order[:count]] / right[order[:count]].sum()
    distance = 0.5 * (drawn[order[:count]] - expected).abs().sum()
    assert distance <= 4 * 0.5 * (expected * (1 - expected) / draws).sqrt().sum()


def test_each_row_is_drawn_from_its_own_share():
    scores = torch.tensor([[3.0, 2.9, 2.8, -math.inf]] * 3)
    drawn = [
        Drawing([Chance(1.0, seed, 0.0), None, Chance(1.0, seed, 1.0)])(torch.empty(3, 0), scores).argmax(1).tolist()
        for seed in range(60)
    ]
    assert [{row[k] for row in drawn} for k in range(3)] == [{0}, {0}, {0, 1, 2}]


@pytest.mark.parametrize("temperature", [1e-320, 1e-300, 1e-4])
def test_the_smallest_temperatures_draw_the_most_likely(temperature):
    scores = torch.tensor([[1.0, 5.0, 4.9], [-700.0, -900.0, -math.inf]])
    for seed in range(20):
        drawn = Drawing([Chance(temperature, seed), Chance(temperature, seed)])(torch.empty(2, 0), scores)
        assert drawn.argmax(1).tolist() == [1, 0]


def test_a_seed_and_its_negative_are_two():
    assert Chance(1.0, -1).uniform() == Chance(1.0, -1).uniform() != Chance(1.0, 1).uniform()


def test_a_second_thread_waits_for_the_base_model(model):
    """Whatever wrapper it comes through; the thread that is inside may go further in."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    try:
        config = GenerationConfig(do_sample=False, pad_token_id=PAD, eos_token_id=[EOS])
        expected, found = answer(model, PROMPTS, max_new_tokens=5), []
        thread = threading.Thread(target=lambda: found.append(answer(wrapped, PROMPTS, max_new_tokens=5)))
        with generating(model, config):
            thread.start()
            thread.join(0.2)
            assert model.generation_config is config
            with one_set(wrapped, BASE):
                assert answer(model, PROMPTS, max_new_tokens=5) == expected
            assert thread.is_alive()
        thread.join(60)
        assert found == [expected]
        assert model.generation_config is not config
    finally:
        wrapped.unload()


def test_an_answer_says_whether_it_ended(model):
    options = {"pad_token_id": PAD, "tokenizer": NumberTokenizer(), "max_new_tokens": 10}
    free = generate_answers(model, PROMPTS[:2], eos_token_ids=[], **options)
    assert [each.ended for each in free] == [False, False]
    last = int(free[0].text.split()[-1])
    ends = generate_answers(model, PROMPTS[:1], eos_token_ids=[last], **options)
    assert ends[0].ended
    assert ends[0].text == " ".join(free[0].text.split()[: free[0].text.split().index(str(last))])


def test_progress_counts_prompts(model):
    done = []
    answer(model, PROMPTS, max_new_tokens=1, batch_size=3, progress=done.append)
    assert sorted(done) == [1, 3, 3]


def test_no_prompts(model):
    assert answer(model, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[3], []], {}, "prompt 1 has no tokens"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ([[3]], {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ([[3]], {"sampling": Sampling(0.0, [1])}, "the temperature is 0.0; it must be positive"),
        ([[3]], {"sampling": Sampling(1.0, [1, 2])}, "2 seeds for 1 prompts"),
        ([[3]], {"sampling": Sampling(1.0, [1], 1.5)}, "top_p is 1.5; it must be from 0 to 1"),
    ],
)
def test_bad_input(model, prompts, options, message):
    with pytest.raises(DataError, match=message):
        answer(model, prompts, **options)


def test_the_output_projection_gets_one_block_of_memory_and_keeps_no_hook(tiny_model_folder, tiny_tokenizer):
    model = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    head = model.get_output_embeddings()
    forward, contiguous = head.forward, []
    head.forward = lambda hidden: contiguous.append(hidden.is_contiguous()) or forward(hidden)
    generate(model, [[5, 6, 7], [8, 9]], pad_token_id=0, eos_token_ids=2, tokenizer=tiny_tokenizer, max_new_tokens=3)
    assert contiguous
    assert all(contiguous)
    assert len(head._forward_pre_hooks) == 0


@pytest.mark.parametrize(
    ("kind", "more", "together"),
    [
        ("llama", {}, "any"),
        ("minimax", {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4}, "equal"),
        ("rwkv", {"attention_hidden_size": 32}, "none"),
    ],
)
def test_models_that_do_not_skip_padding(kind, more, together):
    """An answer depends on its prompt alone, whatever the architecture does with padding and rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, num_key_value_heads=2, **small, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.25)
    alone = [answer(other, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert answer(other, PROMPTS, max_new_tokens=8, batch_size=7) == alone
    assert _batched_together(other, PROMPTS[0], PAD) == together


@pytest.mark.parametrize("rows", [1, 3])
def test_the_output_projection_gets_rows_of_their_own(model, monkeypatch, rows):
    """Strides of a longer tensor make torch copy the projection, of one row even though it counts as contiguous."""
    strides = []
    hook = model.lm_head.register_forward_hook(
        lambda _, args, __: strides.append(args[0].stride()) if args[0].numel() else None
    )
    try:
        answer(model, [[3, 4, 5, 6]] * rows, max_new_tokens=2)
    finally:
        hook.remove()
    assert set(strides) == {(32, 32, 1)}
