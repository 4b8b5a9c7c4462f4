from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cit_fast.data import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.models.prompts import ExampleTooLongError, PromptEncoder
from cit_fast.models.wrappers import learned_positions

END = "<|im_end|>"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=30)
SOLID = TEXT.filter(str.strip)
# {% generation %} around what the assistant says, as in the templates that TRL ships.
MARKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def with_template(tiny_tokenizer):
    def with_template(template):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return with_template


def chat(*contents, system=None):
    turns = [("user" if n % 2 == 0 else "assistant", content) for n, content in enumerate(contents)]
    messages = ([("system", system)] if system is not None else []) + turns
    return Example(contents[-2], references=(contents[-1],), messages=tuple(messages), source="chat:1")


def learned(tokenizer, encoded):
    return tokenizer.decode([token for token in encoded.labels if token != -100])


# ------------------------------------------------------------------------------------------------------ what it says


@given(instruction=SOLID, text=TEXT, answer=SOLID)
def test_round_trip_with_template(tiny_tokenizer, instruction, text, answer):
    encoder = PromptEncoder(tiny_tokenizer)
    example = Example(instruction, text, (answer, "other"))
    encoded = encoder.example(example)
    content = f"{instruction}\n\n{text}" if text.strip() else instruction
    assert tiny_tokenizer.decode(encoded.input_ids) == TURN.format(content) + answer + END
    assert encoded.input_ids[: encoded.prompt_length] == encoder.prompt(example)
    assert encoded.labels[: encoded.prompt_length] == [-100] * encoded.prompt_length
    assert encoded.labels[encoded.prompt_length :] == encoded.input_ids[encoded.prompt_length :]
    assert learned(tiny_tokenizer, encoded) == answer + END
    assert encoded.input_ids[-1] in encoder.stop_token_ids
    assert not encoded.truncated


@given(instruction=SOLID, text=TEXT, answer=SOLID)
def test_round_trip_without_template(tiny_tokenizer, instruction, text, answer):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = None
    encoder = PromptEncoder(tokenizer, system_prompt="Be brief.")
    encoded = encoder.example(Example(instruction, text, (answer,)))
    content = f"{instruction}\n\n{text}" if text.strip() else instruction
    assert tokenizer.decode(encoded.input_ids) == f"Be brief.\n\n{content}\n\n{answer}{END}"
    assert learned(tokenizer, encoded) == answer + END
    assert encoder.prompt(Example(instruction, text, (answer,))) == encoded.input_ids[: encoded.prompt_length]


def test_bos_only_where_the_tokenizer_writes_one(with_template):
    from tokenizers.processors import TemplateProcessing

    tokenizer = with_template(None)
    tokenizer.bos_token = "<|im_start|>"  # noqa: S105
    start = tokenizer.bos_token_id
    example = Example("Add.", "", ("3",))
    assert PromptEncoder(tokenizer).prompt(example)[0] != start
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", start), (END, tokenizer.eos_token_id)]
    )
    assert tokenizer.decode(PromptEncoder(tokenizer).prompt(example)) == "<|im_start|>Add.\n\n"


def test_masked_variant_has_the_same_response(tiny_tokenizer):
    example = Example("Give the date.", "today", ("1 May",), key_parts=((5, 13),))
    encoder = PromptEncoder(tiny_tokenizer)
    full, masked = encoder.example(example), encoder.example(example, masked=True)
    assert tiny_tokenizer.decode(masked.input_ids).startswith(TURN.format("Give [MASK].\n\ntoday"))
    assert tiny_tokenizer.decode(encoder.prompt(example, masked=True)) == TURN.format("Give [MASK].\n\ntoday")
    assert full.labels[full.prompt_length :] == masked.labels[masked.prompt_length :]
    assert (full, masked) == encoder.pair(example)


DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nI am Tiny.<|im_end|>\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("system_prompt", "expected"),
    [(None, "I am Tiny."), ("", ""), ("Be brief.", "Be brief.")],
)
def test_system_prompt(with_template, tiny_tokenizer, system_prompt, expected):
    tokenizer = with_template(DEFAULT_SYSTEM + tiny_tokenizer.chat_template)
    encoder = PromptEncoder(tokenizer, system_prompt=system_prompt)
    prompt = tokenizer.decode(encoder.prompt(Example("Hi", "", ("a",))))
    assert prompt == f"<|im_start|>system\n{expected}<|im_end|>\n" + TURN.format("Hi")
    own = tokenizer.decode(encoder.prompt(chat("u", "a", system="Own.")))
    assert own == "<|im_start|>system\nOwn.<|im_end|>\n" + TURN.format("u")


def test_template_options(with_template):
    tokenizer = with_template("{% if brief %}{{ 'Be brief. ' }}{% endif %}" + MARKING)
    encoder = PromptEncoder(tokenizer, template_options={"brief": True})
    assert tokenizer.decode(encoder.prompt(Example("Hi", "", ("a",)))) == "Be brief. " + TURN.format("Hi")


# ---------------------------------------------------------------------------------------------------- conversations


def test_only_the_last_turn_is_learned_without_marks(tiny_tokenizer):
    encoder = PromptEncoder(tiny_tokenizer)
    encoded = encoder.example(chat("one", "two", "three", "four", system="s"))
    text = "<|im_start|>system\ns<|im_end|>\n" + TURN.format("one") + "two<|im_end|>\n" + TURN.format("three")
    assert tiny_tokenizer.decode(encoded.input_ids) == text + "four" + END
    assert learned(tiny_tokenizer, encoded) == "four" + END
    assert encoder.prompt(chat("one", "two", "three", "four", system="s")) == encoded.input_ids[: encoded.prompt_length]


@given(contents=st.lists(SOLID, min_size=2, max_size=6).filter(lambda contents: len(contents) % 2 == 0))
def test_every_turn_is_learned_where_the_template_marks_it(tiny_tokenizer, contents):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = MARKING
    encoder = PromptEncoder(tokenizer)
    encoded = encoder.example(chat(*contents))
    whole = "".join(
        TURN.format(user) + answer + END + "\n" for user, answer in zip(contents[::2], contents[1::2], strict=True)
    )
    assert tokenizer.decode(encoded.input_ids) == whole.removesuffix("\n")
    assert learned(tokenizer, encoded) == "".join(answer + END for answer in contents[1::2])
    assert all(label in (-100, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    assert tokenizer.decode(encoded.input_ids[encoded.prompt_length :]) == contents[-1] + END


def test_a_template_that_marks_nothing(with_template):
    encoder = PromptEncoder(with_template(MARKING.replace("== 'assistant'", "== 'nobody'")))
    with pytest.raises(DataError, match=r"^chat:1: the chat template marks no token as the assistant's"):
        encoder.example(chat("one", "two", "three", "four"))


def test_masked_conversation(tiny_tokenizer):
    example = replace(chat("one", "two", "say three", "four"), key_parts=((4, 9),))
    encoder = PromptEncoder(tiny_tokenizer)
    masked = encoder.example(example, masked=True)
    assert TURN.format("say [MASK]") in tiny_tokenizer.decode(masked.input_ids)
    assert learned(tiny_tokenizer, masked) == "four" + END
    for broken in (
        replace(example, instruction="say other", key_parts=((4, 9),)),
        replace(example, messages=(("assistant", "four"),)),
    ):
        with pytest.raises(DataError, match=r"^chat:1: the instruction with the key parts is not in the last user"):
            encoder.example(broken, masked=True)


def test_refused_conversation(with_template, tiny_tokenizer):
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = with_template(refuse + tiny_tokenizer.chat_template)
    with pytest.raises(DataError, match=r"^chat:1: the chat template refuses the conversation: System role not"):
        PromptEncoder(tokenizer).example(chat("u", "a", system="s"))
    with pytest.raises(ConfigError, match=r"^system_prompt 's': the chat template refuses"):
        PromptEncoder(tokenizer, system_prompt="s")


# ------------------------------------------------------------------------------------------------------- length limit


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=400),
    room=st.integers(0, 60),
    masked=st.booleans(),
)
def test_truncation_shortens_the_input_only(tiny_tokenizer, text, room, masked):
    assume(text.strip())
    example = Example("Repeat this.", text, ("the whole answer",), key_parts=((7, 11),), source="long:1")
    bare = PromptEncoder(tiny_tokenizer, max_length=None).example(replace(example, input=""), masked=masked)
    whole = PromptEncoder(tiny_tokenizer, max_length=None).example(example, masked=masked)
    limit = len(bare.input_ids) + room
    encoded = PromptEncoder(tiny_tokenizer, max_length=limit).example(example, masked=masked)
    assert len(encoded.input_ids) <= limit
    assert encoded.truncated == (len(whole.input_ids) > limit)
    assert encoded.labels[encoded.prompt_length :] == whole.labels[whole.prompt_length :]
    if not encoded.truncated:
        assert encoded == whole
        return
    prompt = tiny_tokenizer.decode(encoded.input_ids[: encoded.prompt_length])
    before, after = TURN.format("Repeat [MASK]." if masked else "Repeat this.").split("<|im_end|>", 1)
    assert prompt.startswith(before)
    assert prompt.endswith("<|im_end|>" + after)
    kept = prompt.removeprefix(before).removesuffix("<|im_end|>" + after).removeprefix("\n\n")
    assert text.startswith(kept)
    # What one more character would cost shows that as much as possible was kept, to within a token and a character.
    more = PromptEncoder(tiny_tokenizer, max_length=None).example(
        replace(example, input=text[: len(kept) + 1]), masked=masked
    )
    assert len(more.input_ids) > limit or limit - len(encoded.input_ids) <= 1 or not text[: len(kept) + 1].strip()


def test_long_input_is_cut_in_few_steps(tiny_tokenizer, monkeypatch):
    encoder = PromptEncoder(tiny_tokenizer, max_length=100)
    calls = []
    tokenize = encoder._tokenize
    monkeypatch.setattr(encoder, "_tokenize", lambda text, **_: calls.append(text) or tokenize(text))
    encoded = encoder.example(Example("Sum up.", "lazy dog 12 " * 5000, ("short",)))
    assert 99 <= len(encoded.input_ids) <= 100
    assert len(calls) < 10  # halving alone would take 18


@pytest.mark.parametrize("has_template", [True, False])
def test_what_cannot_fit(tiny_tokenizer, with_template, has_template):
    tokenizer = tiny_tokenizer if has_template else with_template(None)
    long = Example("Repeat " * 50, "input", ("answer",), source="file.jsonl:7")
    short = Example("Repeat.", "word " * 100, ("answer",), source="file.jsonl:8")
    encoder = PromptEncoder(tokenizer, max_length=60)
    for encode in (encoder.example, encoder.prompt, encoder.pair):
        with pytest.raises(ExampleTooLongError) as caught:
            encode(long)
        message = str(caught.value)
        assert message.startswith("file.jsonl:7: ")
        assert message.endswith(
            " tokens, 60 allowed, and without its input it is still too long; "
            "raise max_length or choose on_overflow: skip"
        )
    with pytest.raises(ExampleTooLongError):
        encoder.encode_all([short, long])
    unnamed = replace(long, source="", task="repeat")
    with pytest.raises(DataError, match=r"^an example of task 'repeat': "):
        encoder.example(unnamed)


def test_error_on_overflow_does_not_shorten(tiny_tokenizer):
    encoder = PromptEncoder(tiny_tokenizer, max_length=40, on_overflow="error")
    with pytest.raises(ExampleTooLongError, match=r"^a:1: \d+ tokens, 40 allowed; raise max_length$"):
        encoder.encode_all([Example("Hi", "word " * 50, ("a",), source="a:1")])


def test_skipping_is_counted(tiny_tokenizer):
    examples = [
        Example("Hi", "", ("a",), source="a:1"),
        Example("Hi " * 100, "", ("a",), source="a:2", key_parts=((0, 2),)),
        Example("Hi you", "word " * 100, ("a",), source="a:3", key_parts=((0, 2),)),
        Example("Hi", "", ("a " * 100,), source="a:4"),
    ]
    encoder = PromptEncoder(tiny_tokenizer, max_length=60, on_overflow="skip")
    for result in (encoder.encode_all(examples), encoder.encode_all(examples, masked=True)):
        assert (result.indices, result.truncated, result.skipped) == ([0, 2], 1, ("a:2", "a:4"))
        assert [one.truncated for one in result.encoded] == [False, True]
    full, masked = encoder.encode_pairs(examples)
    assert (full.indices, full.truncated, full.skipped) == (masked.indices, masked.truncated, masked.skipped)
    assert (full.indices, full.truncated, full.skipped) == ([0, 2], 1, ("a:2", "a:4"))
    prompts = encoder.encode_prompts(examples, reserve=10)
    assert (prompts.indices, prompts.truncated, prompts.skipped) == ([0, 2, 3], 1, ("a:2",))
    assert max(map(len, prompts.prompts)) in (49, 50)
    with pytest.raises(ExampleTooLongError):
        encoder.example(examples[1])


@given(room=st.integers(0, 40))
def test_pairs_share_what_is_left_of_the_input(tiny_tokenizer, room):
    example = Example("Give the date now.", "12 May " * 20, ("1 May",), key_parts=((5, 6), (9, 10)), source="a:1")
    unlimited = PromptEncoder(tiny_tokenizer, max_length=None)
    longest_bare = max(
        len(unlimited.example(replace(example, input=""), masked=masked).input_ids) for masked in (False, True)
    )
    full, masked = PromptEncoder(tiny_tokenizer, max_length=longest_bare + room).pair(example)
    assert full.truncated
    assert masked.truncated
    assert max(len(full.input_ids), len(masked.input_ids)) <= longest_bare + room
    texts = [tiny_tokenizer.decode(one.input_ids) for one in (full, masked)]
    rest = [text.partition(" now.")[2] for text in texts]
    assert rest[0] == rest[1]


def test_early_turns_are_dropped(tiny_tokenizer, with_template):
    example = chat("one " * 20, "two", "three", "four", "five", "six", system="s")
    system = "<|im_start|>system\ns<|im_end|>\n"
    for tokenizer in (tiny_tokenizer, with_template(MARKING)):
        tail = chat("three", "four", "five", "six", system="s")
        expected = PromptEncoder(tokenizer).example(tail)
        encoder = PromptEncoder(tokenizer, max_length=len(expected.input_ids))
        encoded = encoder.example(example)
        assert encoded == replace(expected, truncated=True)
        assert tokenizer.decode(encoded.input_ids).startswith(system + TURN.format("three"))
    full, masked = encoder.pair(example)
    assert full == masked == encoded
    with pytest.raises(ExampleTooLongError, match=r"^chat:1: "):
        PromptEncoder(tiny_tokenizer, max_length=20).example(example)


# ----------------------------------------------------------------------------------------------------- the tokenizer


def test_end_of_turn_that_is_not_eos(with_template, tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer.chat_template)
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    encoder = PromptEncoder(tokenizer)
    end = tokenizer.convert_tokens_to_ids(END)
    assert encoder.end_of_turn_id == end
    assert encoder.stop_token_ids == (end, tokenizer.eos_token_id)
    assert encoder.example(Example("Hi", "", ("a",))).input_ids[-1] == end


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_template_without_an_end_of_turn(with_template, template):
    tokenizer = with_template(template)
    encoder = PromptEncoder(tokenizer)
    assert encoder.stop_token_ids == (tokenizer.eos_token_id,)


def test_padding_token(with_template, tiny_tokenizer):
    assert PromptEncoder(tiny_tokenizer).pad_token_id == tiny_tokenizer.pad_token_id
    tokenizer = with_template(None)
    tokenizer.pad_token = None
    assert PromptEncoder(tokenizer).pad_token_id == tokenizer.eos_token_id


def test_unusable_settings(with_template, tiny_tokenizer):
    tokenizer = with_template(None)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no EOS token"):
        PromptEncoder(tokenizer)
    with pytest.raises(ConfigError, match="max_length must be at least 1 token, not 0"):
        PromptEncoder(tiny_tokenizer, max_length=0)
    with pytest.raises(ConfigError, match="on_overflow must be one of truncate, skip, error, not 'cut'"):
        PromptEncoder(tiny_tokenizer, on_overflow="cut")


def test_long_texts_give_no_warning(with_template, tiny_tokenizer, caplog):
    tokenizer = with_template(tiny_tokenizer.chat_template)
    tokenizer.model_max_length = 16
    logger = logging.getLogger("transformers")
    caplog.set_level(logging.WARNING, "transformers")  # whatever a Trainer before this test has set
    logger.addHandler(caplog.handler)  # it does not propagate
    try:
        tokenizer("Hi " * 50)
        assert caplog.records  # twice where the logger propagates, as it does under CI
        caplog.clear()
        tokenizer.deprecation_warnings.clear()  # it warns once
        PromptEncoder(tokenizer).example(Example("Hi " * 50, "", ("a",)))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_a_long_conversation_is_not_rendered_once_per_turn(tiny_tokenizer, monkeypatch):
    tokenizer, calls = copy.deepcopy(tiny_tokenizer), []
    rendered = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(1) or rendered(*a, **k))
    encoder = PromptEncoder(tokenizer, max_length=200)
    long = chat(*[f"turn {n}" for n in range(2000)])
    encoded = encoder.example(long)
    assert encoded.truncated
    assert 150 < len(encoded.input_ids) <= 200
    assert len(calls) < 30


# ------------------------------------------------------------------------------------------------- what the model has


def model_of(rows, positions=None):
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(rows, 2)
            if positions is not None:
                self.embed_positions = nn.Embedding(positions, 2)

        def get_input_embeddings(self):
            return self.tokens

    return Model()


def test_tokens_and_positions_that_the_model_lacks(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    encoder = PromptEncoder(tokenizer, max_length=64)
    encoder.fit_to(model_of(rows, positions=64))
    assert encoder.pad_token_id == tokenizer.eos_token_id  # padding is masked, so any token serves
    encoder.example(Example("Add.", "", ("3",)))
    with pytest.raises(
        DataError, match=r"^a:1: token '\[PAD\]' \(\d+\) is not among the model's \d+; the tokenizer is"
    ):
        encoder.example(Example("Add [PAD].", "", ("3",), source="a:1"))
    with pytest.raises(ConfigError, match=r"data.max_length: 64 tokens, but the model has 63 positions"):
        encoder.fit_to(model_of(rows, positions=63))
    with pytest.raises(ConfigError, match="positions"):
        PromptEncoder(tokenizer, max_length=None).fit_to(model_of(rows, positions=63))


@pytest.mark.parametrize(
    ("kind", "more", "positions"),
    [
        ("gpt2", {"n_positions": 32}, 32),
        ("opt", {"max_position_embeddings": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}, 32),
        ("llama", {"max_position_embeddings": 32}, None),
        ("bloom", {}, None),
    ],
)
def test_learned_positions(kind, more, positions):
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, **more}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, intermediate_size=64, **small))
    assert learned_positions(model) == positions
    if positions is not None:
        import torch

        model(input_ids=torch.ones(1, positions, dtype=torch.long))
        with pytest.raises(IndexError):
            model(input_ids=torch.ones(1, positions + 1, dtype=torch.long))


def test_another_limit_leaves_what_is_known_of_the_model(encoder, tiny_model_folder):
    """A padding token that the model does not have stays replaced."""
    encoder._vocabulary = 7
    assert encoder.with_limit(None, "error")._vocabulary == 7
