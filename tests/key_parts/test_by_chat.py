"""Key parts by a chat model (cit_fast.key_parts.by_chat), against the stub server that is here."""

from __future__ import annotations

import json

import pytest

from cit_fast.data import Example
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.key_parts.by_chat import locate, read_spans
from cit_fast.key_parts.sources import find_key_parts

EXAMPLES = [
    Example("Name the year in words.", "7", ("seven",)),
    Example("Answer briefly, in one sentence.", "", ("yes",)),
    Example("Name the year in words.", "8", ("eight",)),
]


def completion(text: str) -> tuple[int, dict, dict]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


def source(server, **options):
    fast = {"key_variable": "CIT_FAST_TEST_KEY", "timeout": 5.0}
    return {"llm": {"base_url": server.url, "model": "stub", **fast, **options}}


def by_instruction(answers, asked_again=None):
    def respond(prompt, attempt):
        text = next(text for text in answers if text in prompt)
        again = not prompt.endswith('"in one sentence"].')
        return completion((asked_again or answers)[text] if again else answers[text])

    return respond


def test_found_verified_counted_and_kept(serve, tmp_path):
    answers = {
        "Name the year": 'Here: {"key_parts": ["the year", {"span": "in words"}, "in Words"]}',
        "Answer briefly": '```json\n["briefly", "sentence", "one sentence", "as JSON"]\n```',
    }
    with serve(by_instruction(answers)) as server:
        found = find_key_parts(EXAMPLES, source(server), cache=tmp_path)
        assert len(server.prompts) == 2  # one per distinct instruction
        assert find_key_parts(EXAMPLES, source(server), cache=tmp_path) == found
        assert len(server.prompts) == 2
    assert [example.key_part_texts for example in found.examples] == [
        ("the year", "in words"),
        ("briefly", "one sentence"),
        ("the year", "in words"),
    ]
    assert found.summary == {
        "source": "llm", "instructions": 2, "with_key_parts": 2, "without": 0, "spans": 4, "dropped": 2,
    }  # fmt: skip


def test_useless_answers_are_asked_for_again_in_other_words(serve):
    first = {"Name the year": "the year", "Answer briefly": '["nicht drin"]'}
    second = {"Name the year": '["Name the year in words."]', "Answer briefly": '["briefly"]'}
    with serve(by_instruction(first, second)) as server:
        found = find_key_parts(EXAMPLES, source(server, unusable="none"))
        assert found.examples[0].key_parts == ()  # the whole instruction is no key part of it
        assert found.examples[1].key_part_texts == ("briefly",)
        assert found.summary["without"] == 1
        assert len(set(server.prompts)) == len(server.prompts) == 5
        with pytest.raises(DataError, match=r"key_parts.llm: 1 of 2 instructions .* 'Name the year in words.' was"):
            find_key_parts(EXAMPLES, source(server))


def test_a_server_that_fails_is_no_answer(serve):
    with serve(lambda prompt, attempt: (400, {"error": "no"}, {})) as server, pytest.raises(RunError, match="HTTP 400"):
        find_key_parts(EXAMPLES, source(server))


def test_an_option_the_chat_model_does_not_have():
    with pytest.raises(ConfigError, match="chat model"):
        find_key_parts(EXAMPLES, {"llm": {"model": "stub", "url": "http://x"}})


def test_a_local_chat_model_is_asked_as_well(tiny_model_folder):
    """Its answers are noise: every instruction is left without key parts, none with a span that is not there."""
    found = find_key_parts(
        EXAMPLES, {"llm": {"local": str(tiny_model_folder), "max_new_tokens": 4, "unusable": "none"}}
    )
    assert found.summary["without"] == 2


@pytest.mark.parametrize(
    ("answer", "spans"),
    [
        ('["a b", "c"]', ["a b", "c"]),
        ('I see [no] list [] but ["x "]', ["x"]),
        ('[{"text": "a"}, {"other": "b"}, 3, null, ""]', ["a"]),
        ("[1, 2]", []),
        ("none", []),
        ("[" * 5000, []),
    ],
)
def test_read_spans(answer, spans):
    assert read_spans(answer) == spans


@pytest.mark.parametrize(
    ("text", "named", "spans", "foreign"),
    [
        ("a b a c", ["a", "a", "a"], ((0, 1), (4, 5)), 0),
        ("one two three four", ["two three", "three", "one two"], ((0, 13),), 0),
        ("one two", ["one", "two"], (), 0),
        ("one two.", ["One", "two"], ((4, 7),), 1),
        ("a.b", ["a.b", "."], (), 0),
    ],
)
def test_locate(text, named, spans, foreign):
    assert locate(text, named) == (spans, foreign)


def test_prompts_show_the_instruction_as_it_is(serve):
    seen = []

    def respond(prompt, attempt):
        seen.append(prompt)
        return completion(json.dumps(["{braces}"]))

    with serve(respond) as server:
        find_key_parts([Example("Fill in {braces}, please.", references=("x",))], source(server))
    assert "<<<\nFill in {braces}, please.\n>>>" in seen[0]
