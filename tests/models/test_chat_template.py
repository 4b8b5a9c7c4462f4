"""What is trained is what the chat template renders; kinds of templates in small, and those that TRL ships."""

from __future__ import annotations

import copy
import datetime
import re
from pathlib import Path

import pytest

from cit_fast.data import Example
from cit_fast.errors import ConfigError, DataError
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
