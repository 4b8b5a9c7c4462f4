"""Pools of wordings by a chat model, whose answers are of every kind (beside the server that stands in for one)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from cit_fast.data import Example
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.key_parts.wordings import LARGEST_POOL, STRATEGIES, Wording, chat_pools
from cit_fast.models.chat import ChatEndpoint

ONE = Example("Write the number in words.", "42", ("forty-two",), "numbers", ((17, 25),))
TWO = replace(ONE, instruction="Give words for the number.", input="7", key_parts=((5, 10),))


def completion(text: str):
    return 200, {"choices": [{"message": {"content": text}}]}, {}


def wordings(count: int, mark: str) -> str:
    return json.dumps(
        [{"instruction": f"{mark} {k}: put it in words.", "key_parts": ["in words"]} for k in range(count)]
    )


@pytest.fixture
def chat_at(tmp_path):
    def make(server, **options):
        return ChatEndpoint(server.url, "stub", cache=tmp_path / "chat", **options)

    return make


def test_every_strategy_gives_its_share_and_answers_are_kept(serve, chat_at):
    def respond(prompt, attempt):
        (name,) = [name for name, how in STRATEGIES.items() if how in prompt]
        return completion(f"Of course!\n{wordings(20, name)}")

    with serve(respond) as server:
        pools = chat_pools([ONE, ONE, TWO], chat_at(server))
        assert len(server.requests) == 4
        assert all("<<<Write the number in words.>>>" in prompt for prompt in server.prompts)  # the most frequent
        assert all('["in words"]' in prompt for prompt in server.prompts)
        assert chat_pools([ONE, ONE, TWO], chat_at(server)) == pools
        assert len(server.requests) == 4
    pool = pools["numbers"]
    assert len(pool) == LARGEST_POOL
    assert pool[0] == Wording(ONE.instruction, ONE.key_parts)
    shares = Counter(wording.instruction.split()[0] for wording in pool[1:])
    assert set(shares) == set(STRATEGIES)
    assert max(shares.values()) - min(shares.values()) <= 1
    assert all(wording.instruction[slice(*wording.key_parts[0])] == "in words" for wording in pool[1:])


USABLE = {"instruction": "Spell it out as words.", "key_parts": ["as words"]}
UNUSABLE = {
    "no key parts": {"instruction": "Spell it.", "key_parts": []},
    "key part not in it": {"instruction": "Spell it out.", "key_parts": ["in words"]},
    "everything is a key part": {"instruction": "Spell it!", "key_parts": ["Spell it"]},
    "overlapping": {"instruction": "Spell it in words.", "key_parts": ["in words", "words"]},
    "no text": {"instruction": 5, "key_parts": ["x"]},
    "no object": "Spell it out.",
    "half a character": {"instruction": "Spell \ud83d out.", "key_parts": ["out"]},
    "the same again": {"instruction": ONE.instruction, "key_parts": ["words"]},
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_used_is_left_out(serve, chat_at, kind):
    with serve(lambda prompt, attempt: completion(json.dumps([UNUSABLE[kind], USABLE]))) as server:
        pool = chat_pools([ONE], chat_at(server))["numbers"]
    assert [wording.instruction for wording in pool] == [ONE.instruction, USABLE["instruction"]]


@pytest.mark.parametrize("garbage", ["I am sorry.", "[1, 2", "[]", "{}", json.dumps([USABLE])[:-3]])
def test_an_answer_of_no_use_names_the_task_and_is_asked_again(serve, chat_at, garbage):
    good = []
    with serve(lambda prompt, attempt: completion(json.dumps([USABLE]) if good else garbage)) as server:
        with pytest.raises(DataError, match="no usable rewording for task 'numbers'"):
            chat_pools([ONE], chat_at(server))
        good.append(True)
        assert len(chat_pools([ONE], chat_at(server))["numbers"]) == 2
        assert len(server.requests) == 8


def test_a_server_that_says_nothing_is_an_error_that_keeps_the_answers(serve, chat_at):
    def respond(prompt, attempt):
        return (200, 0.5, {}) if STRATEGIES["breadth"] in prompt else completion(json.dumps([USABLE]))

    with (
        serve(respond) as server,
        pytest.raises(RunError, match=r"no answer to 1 of 4 prompts .*nothing came within 0.1 s"),
    ):
        chat_pools([ONE], chat_at(server, timeout=0.1, attempts=1, concurrency=1))


@pytest.mark.parametrize("size", [1, 32])
def test_sizes_out_of_range_are_refused(size):
    with pytest.raises(ConfigError, match=f"size: {size} wordings per task; expected 2 to 31"):
        chat_pools([ONE], None, size)
