"""What is trained is what the chat template renders; kinds of templates in small, and those that TRL ships."""

from __future__ import annotations

import copy
import datetime
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import Metaspace

from cit_fast.data import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.key_parts.pairs import encode_pair
from cit_fast.models.prompts import PromptEncoder

HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant to user: ' + m['content'] + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# As Qwen3: a thought that an answer brings is rendered, and where it brings none, an empty one is.
TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
EMPTY = TURN + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OPEN = TURN + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
PARTS = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% for part in m['content'] %}"
    "{{ part['text'] if part['text'] is defined else '' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TALK = Example(
    "c", references=("No",), messages=(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "No"))
)


@pytest.fixture
def with_template(tiny_tokenizer):
    def with_template(template):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return with_template


def turns(example):
    if example.messages:
        return [{"role": role, "content": content} for role, content in example.messages]
    return [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": example.references[0]}]


def trained(tokenizer, example, **options):
    """The text that is trained, how much of it is the prompt, and what is learned."""
    encoder = PromptEncoder(tokenizer, **options)
    encoded = encoder.example(example)
    assert encoder.prompt(example) == encoded.input_ids[: encoded.prompt_length]
    ids, start = encoded.input_ids, encoded.prompt_length
    return tokenizer.decode(ids), tokenizer.decode(ids[start:])


@pytest.mark.parametrize("template", [HARMONY, EMPTY, OPEN, PARTS], ids=["header", "empty", "open", "parts"])
@pytest.mark.parametrize("example", [Example("Is it?", references=("Yes",)), TALK], ids=["question", "talk"])
def test_the_text_is_the_templates(with_template, template, example):
    tokenizer = with_template(template)
    text, learned = trained(tokenizer, example)
    assert text.strip() == tokenizer.apply_chat_template(turns(example), tokenize=False).strip()
    assert learned == example.references[0] + "<|im_end|>"
    assert turns(example)[-2]["content"] in text


def test_a_thought_that_the_answer_brings_is_learned(with_template):
    tokenizer = with_template(EMPTY)
    example = Example("Is it?", references=("<think>\nhm\n</think>\n\nYes",))
    text, learned = trained(tokenizer, example)
    assert text.strip() == tokenizer.apply_chat_template(turns(example), tokenize=False).strip()
    assert learned == "<think>\nhm\n</think>\n\nYes<|im_end|>"
    with pytest.raises(DataError, match=r"does not render this answer as it is; set data.template_options"):
        trained(with_template(OPEN.replace("{{ m['content']", "{{ m['content'].split('</think>')[-1]")), example)


def test_a_template_that_never_says_what_users_say(with_template):
    tokenizer = with_template("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(ConfigError, match="leaves the question out of the prompt"):
        PromptEncoder(tokenizer)
    assert tokenizer.chat_template == "{% for m in messages %}{{ m['role'] }}{% endfor %}"


def test_a_template_that_fails(with_template):
    with pytest.raises(ConfigError, match="the chat template fails: TypeError"):
        PromptEncoder(with_template("{{ messages[0]['content'] + 1 }}"))


def test_today_is_one_date(with_template, tiny_tokenizer):
    form = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(format=\"%Y-%m-%d\") }} "
    day = datetime.date(2026, 11, 27)
    text, _ = trained(with_template(form + tiny_tokenizer.chat_template), TALK, date=day)
    assert text.startswith("27 Nov 2026 2026-11-27 ")
    encoder = PromptEncoder(with_template(form + tiny_tokenizer.chat_template))
    assert (encoder.writes_date, encoder.date) == (True, datetime.date.today())
    assert not PromptEncoder(tiny_tokenizer).writes_date
    with pytest.raises(ConfigError, match="the format must be written out in the template"):
        PromptEncoder(with_template("{% set f = '%d' %}{{ strftime_now(f) }}" + tiny_tokenizer.chat_template))


SHIPPED = sorted((Path(pytest.importorskip("trl").__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_templates_of_published_models(tiny_tokenizer, path):
    template = path.read_text(encoding="utf-8")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    marks = set(re.findall(r"<\|?[a-zA-Z_:/0-9]+\|?>|<｜[^｜]*｜>|\[/?INST\]", template))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(marks)})
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    tokenizer.chat_template = template
    encoder = PromptEncoder(tokenizer, max_length=None)
    for example in (Example("Is it?", references=("Yes",)), TALK):
        encoded = encoder.example(example)
        text = tokenizer.decode(encoded.input_ids)
        prompt = encoder.prompt(example)  # marks of a template may begin before the answer's first letter
        assert tokenizer.decode(prompt) == tokenizer.decode(encoded.input_ids[: len(prompt)])
        assert len(prompt) >= encoded.prompt_length
        rendered = tokenizer.apply_chat_template(turns(example), tokenize=False)
        if encoder.writes_date:
            text, rendered = (re.sub(r"\d{4}-\d\d-\d\d|\d\d \w+ \d{4}", "DATE", each) for each in (text, rendered))
        # A template without an end of turn gets EOS, and nothing after the end of the last turn is learned.
        assert rendered.strip().startswith(text.removesuffix("<eos>").strip())
        assert "No" in text or "Yes" in text


def llama_2(answer="' ' + m['content'] + ' '"):
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ " + answer + " + '<|im_end|>' }}{% endif %}{% endfor %}"
    )


@pytest.mark.parametrize("spaces", ["byte level", "metaspace"])
def test_white_space_before_an_answer_is_the_answers(tiny_tokenizer, spaces):
    """As Llama 2 and Mistral: the prompt is where the assistant begins to speak, the tokens are the template's."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    if spaces == "metaspace":
        tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme="always")
    tokenizer.chat_template = llama_2()
    said = [{"role": "user", "content": "Is it?"}]
    asked = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*said, {"role": "assistant", "content": "No"}], return_dict=False)
    encoder = PromptEncoder(tokenizer)
    encoded = encoder.example(Example("Is it?", references=("No",)))
    learned = encoded.input_ids[encoded.prompt_length :]
    assert encoder.prompt(Example("Is it?", references=("x",))) == encoded.input_ids[: encoded.prompt_length] == asked
    assert encoded.input_ids[:-1] == whole[: len(encoded.input_ids) - 1]
    assert learned[-1] == encoder.end_of_turn_id
    assert encoder.answer(Example("Is it?", references=("x",)), "No") == learned


MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}BLOCK"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "block",
    [
        "{% generation %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}",
        "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
        "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ '\n' }}",
    ],
    ids=["the header in the block", "the end outside", "no end at all"],
)
def test_what_is_scored_of_a_marked_conversation_is_the_answer_and_its_end(with_template, block):
    """Wherever the template draws the line around what the assistant says."""
    tokenizer = with_template(MARKED.replace("BLOCK", block))
    encoder = PromptEncoder(tokenizer)
    encoded = encoder.example(TALK)
    assert encoded.input_ids[: encoded.prompt_length] == encoder.prompt(TALK)
    learned = tokenizer.decode(encoded.labels[encoded.prompt_length :])
    assert learned.rstrip("\n") == "No" + tokenizer.decode([encoder.end_of_turn_id])
    pair = encode_pair(encoder, replace(TALK, references=("No",)))
    assert tokenizer.decode(pair.full.input_ids[slice(*pair.scored)]) == "No"
    before = [token for token in encoded.labels[: encoded.prompt_length] if token != -100]
    assert tokenizer.decode(before).count("b") == 1  # the assistant's first turn
    assert (encoder.end_of_turn_id in before) == ("<|im_end|>" in block)


def test_an_answer_that_the_template_ends_at_once_is_refused(with_template):
    encoder = PromptEncoder(
        with_template(MARKED.replace("BLOCK", "{% generation %}{{ m['content'] }}{% endgeneration %}"))
    )
    ended = replace(TALK, references=("<|im_end|>",), messages=(*TALK.messages[:-1], ("assistant", "<|im_end|>")))
    with pytest.raises(DataError, match=r"the answer '<\|im_end\|>' has no tokens of its own"):
        encode_pair(encoder, ended)


def test_an_answer_that_names_a_special_token_is_text(tiny_tokenizer):
    encoder = PromptEncoder(tiny_tokenizer)
    encoded = encoder.example(Example("Say it.", references=("say <|im_end|> now",)))
    learned = encoded.input_ids[encoded.prompt_length :]
    assert learned.index(encoder.end_of_turn_id) == len(learned) - 1
    assert tiny_tokenizer.decode(learned[:-1], skip_special_tokens=True) == "say <|im_end|> now"
