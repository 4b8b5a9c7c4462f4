from __future__ import annotations

import json
import logging
import threading
import time

import pytest

from cit_fast.errors import ConfigError, RunError
from cit_fast.models.chat import ChatEndpoint, LocalChat, build_chat

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("CIT_FAST_TEST_KEY", KEY)


def endpoint(server, cache=None, **options) -> ChatEndpoint:
    fast = {"key_variable": "CIT_FAST_TEST_KEY", "attempts": 1, "timeout": 5.0}
    return ChatEndpoint(server.url, "stub", cache=cache, **{**fast, **options})


def completion(text: str) -> tuple[int, dict, dict]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


def echo(prompt, attempt):
    return completion(f" answer to {prompt}\n")


def test_answers_in_order_and_every_prompt_once(serve):
    with serve(echo) as server:
        chat = endpoint(server, system="Be brief.", options={"max_tokens": 9})
        assert chat.complete(["a", "b", "a"]) == ["answer to a", "answer to b", "answer to a"]
        assert chat.complete([]) == []
    assert sorted(server.prompts) == ["a", "b"]
    headers, body = server.requests[0]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body["path"] == "/v1/chat/completions"
    assert {key: body[key] for key in ("model", "temperature", "max_tokens")} == {
        "model": "stub",
        "temperature": 0,
        "max_tokens": 9,
    }
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_no_key_and_no_key_of_someone_else(serve, monkeypatch, tmp_path):
    monkeypatch.delenv("CIT_FAST_TEST_KEY")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-of-the-owner")
    with serve(echo) as server:
        endpoint(server, options={"temperature": None, "top_k": 1}).complete(["a"])
    headers, body = server.requests[0]
    assert "authorization" not in headers
    assert body["top_k"] == 1  # a field that only some servers know
    assert "temperature" not in body


def test_several_at_a_time_but_no_more_than_allowed(serve):
    gate = threading.Barrier(3, timeout=5)

    def respond(prompt, attempt):
        gate.wait()
        return completion(prompt)

    with serve(respond) as server:
        assert endpoint(server, concurrency=3).complete(list("abcdef")) == list("abcdef")
    assert server.most_at_once == 3


def test_what_may_pass_is_tried_again(serve):
    with serve(lambda _, attempt: completion("at last") if attempt == 2 else (503, {}, {})) as server:
        assert endpoint(server, attempts=2).complete(["a"]) == ["at last"]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "garbage", ["<html>busy</html>", {}, {"choices": []}, {"choices": [{"message": {"content": None}}]}, [1], ""]
)
def test_a_reply_that_is_no_completion(serve, garbage):
    message = r"no answer to 1 of 1 prompts \(no completion came back: "
    with serve(lambda *_: (200, garbage, {})) as server, pytest.raises(RunError, match=message):
        endpoint(server).complete(["b"])


def test_a_server_that_says_nothing_times_out_and_is_reported(serve):
    message = r"chat/completions: no answer to 1 of 1 prompts \(nothing came within 0.1 s, 1 attempts\)$"
    with serve(lambda *_: (200, 0.4, {})) as server, pytest.raises(RunError, match=message):
        endpoint(server, timeout=0.1).complete(["a"])


def test_no_server(serve):
    with serve(echo) as server:
        chat = endpoint(server)
    with pytest.raises(RunError, match="the connection failed: ConnectError, 1 attempts"):
        chat.complete(["a"])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 301])
def test_what_will_not_pass_is_asked_once(serve, status):
    refusal = status, {"error": "no"}, {"Location": "http://127.0.0.1:1/"}
    with serve(lambda *_: refusal) as server, pytest.raises(RunError, match=f"HTTP {status}") as caught:
        endpoint(server, attempts=3, concurrency=1).complete(["a", "b"])
    assert len(server.requests) == 1
    assert ("is the key in CIT_FAST_TEST_KEY right?" in str(caught.value)) == (status in {401, 403})


def test_what_came_before_a_failure_is_kept_and_never_asked_again(serve, tmp_path):
    down = threading.Event()
    down.set()

    def respond(prompt, attempt):
        return (500, {}, {}) if prompt == "c" and down.is_set() else completion(prompt.upper())

    with serve(respond) as server:
        chat = endpoint(server, tmp_path, concurrency=1)
        with pytest.raises(RunError, match=r"no answer to 2 of 4 prompts \(HTTP 500: '{}'\); the 2 that came"):
            chat.complete(["a", "b", "c", "d"])
        assert server.prompts == ["a", "b", "c"]
        down.clear()
        again = endpoint(server, tmp_path, concurrency=1)
        assert again.complete(["a", "b", "c", "d"]) == ["A", "B", "C", "D"]
        assert server.prompts[3:] == ["c", "d"]
        assert endpoint(server, tmp_path, system="other").complete(["a"]) == ["A"]  # other words, another answer
        assert server.prompts[5:] == ["a"]


def test_damaged_answers_are_asked_again(serve, tmp_path):
    with serve(echo) as server:
        chat = endpoint(server, tmp_path)
        chat.complete(["a", "b"])
        files = sorted(tmp_path.glob("*/*.json"))
        assert len(files) == 2
        files[0].write_text('{"key"')
        files[1].write_text(json.dumps({"key": "something else", "answer": "wrong"}))
        assert endpoint(server, tmp_path).complete(["a", "b"]) == ["answer to a", "answer to b"]
    assert len(server.requests) == 4


def test_two_that_want_the_same_ask_once(serve, tmp_path):
    def respond(prompt, attempt):
        time.sleep(0.1)
        return completion(prompt)

    with serve(respond) as server:
        found = []
        both = [threading.Thread(target=lambda: found.append(endpoint(server, tmp_path).complete(["a"]))) for _ in "12"]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert found == [["a"], ["a"]]
    assert len(server.requests) == 1


def test_the_key_is_nowhere_but_in_the_request(serve, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)

    def respond(prompt, attempt):
        return completion("fine") if prompt == "a" else (401, {"error": f"Incorrect API key provided: {KEY}"}, {})

    with serve(respond) as server:
        chat = endpoint(server, tmp_path, concurrency=1)
        with pytest.raises(RunError) as caught:
            chat.complete(["a", "b"])
    assert server.requests[0][0]["authorization"] == f"Bearer {KEY}"
    texts = [str(caught.value), repr(chat), repr(vars(chat)), caplog.text, *capfd.readouterr()]
    texts += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) > 6
    assert not any(KEY in text for text in texts)
    assert "Incorrect API key provided: ***" in str(caught.value)
    assert caught.value.__context__ is None  # an error behind it might show the request


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url: not an http or https address"),
        ({"base_url": "ftp://host/v1"}, "base_url: not an http or https address"),
        ({"base_url": "https://me:secret@host/v1"}, "base_url: carries credentials"),
        ({"base_url": "https://host/v1?key=secret"}, "base_url: carries credentials"),
        ({"key_variable": "sk-secret"}, "key_variable: not the name of an environment variable"),
        ({"attempts": 0}, "attempts: 0 is below 1"),
        ({"concurrency": 0}, "concurrency: 0 is below 1"),
        ({"base_url": "http://host:port/v1"}, "base_url: not an http or https address"),
        ({"timeout": 0}, "timeout: 0 seconds; expected more than 0"),
        ({"api_key": "sk-secret"}, "unexpected keyword argument 'api_key'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_chat({"base_url": "http://host/v1", "model": "m", **options}, None)
    assert "secret" not in str(caught.value)


def test_without_openai(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cit-fast\[llm\]'"):
        build_chat({"base_url": "http://host/v1", "model": "m"}, None)


def test_a_local_model_answers_alike_and_once(tiny_model_folder, tmp_path, monkeypatch):
    chat = build_chat({"local": str(tiny_model_folder), "max_new_tokens": 5, "batch_size": 2}, tmp_path)
    assert isinstance(chat, LocalChat)
    first = chat.complete(["Sort the names.", "Name a colour.", "Count to ten."])
    alone = LocalChat.from_pretrained(str(tiny_model_folder), max_new_tokens=5).complete(["Count to ten."])
    assert first[2:] == alone
    monkeypatch.setattr(chat.model, "generate", lambda *a, **k: pytest.fail("asked again"))
    assert chat.complete(["Count to ten.", "Sort the names."]) == [first[2], first[0]]


def test_a_local_model_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="no chat model can be loaded"):
        build_chat({"local": str(tmp_path)}, None)


def test_a_local_model_without_a_chat_template(tiny_tokenizer):
    class Bare:
        chat_template = None

    with pytest.raises(ConfigError, match="no chat template"):
        LocalChat(None, Bare(), "bare")
