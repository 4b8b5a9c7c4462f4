"""Pools of wordings by a chat model, whose answers are of every kind (beside the server that stands in for one)."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from cit_fast.data import Example
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.key_parts.wordings import LARGEST_POOL, STRATEGIES, Wording, chat_pools, read_pools, write_pools
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


def test_a_pool_evolves_from_its_own_members(serve, chat_at):
    """30 evolutions, each of a member drawn at random by a strategy drawn at random; answers are kept."""

    def respond(prompt, attempt):
        evolution = re.search(r"\(rewording (\d+), strategy: (\w+)\)", prompt)
        assert STRATEGIES[evolution[2]] in prompt
        assert "An input: 42\nIts answer: forty-two" in prompt
        return completion(f"Of course!\n{wordings(1, f'{evolution[2]} {evolution[1]}')}")

    with serve(respond) as server:
        pools = chat_pools([ONE, ONE, TWO], chat_at(server))
        prompts = server.prompts
        assert len(prompts) == LARGEST_POOL - 1
        assert chat_pools([ONE, ONE, TWO], chat_at(server)) == pools
        assert len(server.requests) == LARGEST_POOL - 1
    pool = pools["numbers"]
    assert len(pool) == LARGEST_POOL
    assert pool[0] == Wording(ONE.instruction, ONE.key_parts)  # the most frequent
    assert {wording.instruction.split()[0] for wording in pool[1:]} == set(STRATEGIES)
    parents = [re.search("^<<<(.*)>>>", prompt, re.MULTILINE)[1] for prompt in prompts]
    known = [wording.instruction for wording in pool]
    assert all(parent in known[: k + 1] for k, parent in enumerate(parents))  # what was there then
    assert len(set(parents)) > 10  # recursive: most are rewordings of rewordings
    assert all('Its key parts: ["in words"]' in prompt for prompt in prompts)
    assert all(wording.instruction[slice(*wording.key_parts[0])] == "in words" for wording in pool[1:])


def test_a_pool_is_a_file(tmp_path):
    pools = {"numbers": (Wording(ONE.instruction, ONE.key_parts), Wording("No key part here."))}
    path = tmp_path / "pool.json"
    write_pools(path, pools, {"model": "stub"})
    assert read_pools(path) == pools
    assert json.loads(path.read_text())["made_by"] == {"model": "stub"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks: tasks["numbers"][0].update(key_parts=["in figures"]),
         r"tasks\.numbers\.0: key part 'in figures' is not in its wording, 'Write the number in words\.'"),
        (lambda tasks: tasks["numbers"][0].update(key_parts=["in words", "words"]), r"tasks\.numbers\.0: .*overlap"),
        (lambda tasks: tasks["numbers"].append("Say it."), r"tasks\.numbers\.1: expected an object"),
        (lambda tasks: tasks.update(numbers=[]), r"tasks\.numbers: 0 wordings; expected 1 to 31"),
        (lambda tasks: tasks.update(numbers=3), "no pool of wordings: 'tasks' must hold a list for each task"),
    ],
)  # fmt: skip
def test_a_pool_file_that_cannot_be_used(tmp_path, change, message):
    path = tmp_path / "pool.json"
    write_pools(path, {"numbers": (Wording(ONE.instruction, ONE.key_parts),)}, {})
    content = json.loads(path.read_text())
    change(content["tasks"])
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"pool\\.json: {message}") as caught:
        read_pools(path)
    assert "\n" not in str(caught.value)


def test_a_pool_file_that_is_none(tmp_path):
    path = tmp_path / "pool.json"
    with pytest.raises(DataError, match=r"pool\.json: no such file; cit-fast pool makes one"):
        read_pools(path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"pool\.json: broken"):
        read_pools(path)
    path.write_text('{"format_version": 9, "tasks": {}}')
    with pytest.raises(DataError, match="format version 9; this cit-fast reads 1"):
        read_pools(path)


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
        assert len(server.requests) == 4  # it is not asked thirty times
        good.append(True)
        assert len(chat_pools([ONE], chat_at(server))["numbers"]) == 2  # 30 times the same rewording


def test_a_server_that_says_nothing_is_an_error_that_keeps_the_answers(serve, chat_at):
    def respond(prompt, attempt):
        return (200, 0.5, {}) if "(rewording 3," in prompt else completion(json.dumps([USABLE]))

    with (
        serve(respond) as server,
        pytest.raises(RunError, match=r"no answer to 1 of 1 prompts .*nothing came within 0.1 s"),
    ):
        chat_pools([ONE], chat_at(server, timeout=0.1, attempts=1, concurrency=1))


@pytest.mark.parametrize("size", [1, 32])
def test_sizes_out_of_range_are_refused(size):
    with pytest.raises(ConfigError, match=f"size: {size} wordings per task; expected 2 to 31"):
        chat_pools([ONE], None, size)
