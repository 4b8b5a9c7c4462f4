"""The server, with OpenAI's own client over real connections."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from asking import Slow, asked, client, serving, text
from rich.console import Console

from cit_fast import ContinualModel, ContinualTrainer, cli
from cit_fast.data import Example, TaskStream
from cit_fast.errors import RunError
from cit_fast.evaluation import read_stages
from cit_fast.inference.engine import Engine
from cit_fast.inference.server import bound, following, looks
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.running_batch import RunningBatch
from cit_fast.run.rollback import rollback, undo_rollback


@pytest.fixture(scope="module")
def address(model):
    with Engine(model, batch_size=8) as engine, serving(engine) as url:
        yield url


def test_many_clients_each_get_their_own_answer(model, address, examples):
    """Thirty-two clients at once, sets mixed: nothing lost, and each as the model answers it alone."""
    prompts = [text(example) for example in examples]
    expected = dict(zip(prompts, model.generate(prompts, max_new_tokens=6, batch_size=1), strict=True))
    sets = dict(zip(prompts, model.route(prompts), strict=True))
    assert len(set(sets.values())) == 3
    every = [prompts[k % len(prompts)] for k in range(160)]
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda prompt: asked(address, prompt), every))
    assert len(set(expected.values())) >= 3
    for prompt, reply in zip(every, replies, strict=True):
        assert reply.choices[0].message.content == expected[prompt]
        assert reply.model == sets[prompt]
        assert reply.choices[0].finish_reason in ("stop", "length")
    tokens = len(model.encoder.prompt(Example(every[0], references=("-",))))
    assert replies[0].usage.prompt_tokens == tokens
    assert replies[0].usage.total_tokens == tokens + replies[0].usage.completion_tokens
    metrics = httpx.get(address.removesuffix("/v1") + "/metrics").text
    counts = dict(line.rsplit(" ", 1) for line in metrics.splitlines())
    assert int(counts["cit_fast_answers_total"]) >= 160
    assert int(counts["cit_fast_rows_total"]) > int(counts["cit_fast_steps_total"])  # some were answered together
    assert httpx.get(address.removesuffix("/v1") + "/health").json()["status"] == "ok"


def test_models_and_sets_by_name(model, address, examples):
    with client(address) as one:
        names = [each.id for each in one.models.list()]
    assert names == ["auto", "base", *model.sets]
    prompt = text(examples[0])
    for name in (*model.sets, "base"):
        reply = asked(address, prompt, name)
        adapter = BASE if name == "base" else name
        assert reply.choices[0].message.content == model.generate([prompt], 6, adapters=[adapter])[0]
        assert reply.model == name
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist; there are auto, base, "):
        asked(address, prompt, "gpt")


def test_conversations_completions_and_streams(model, address, examples):
    prompt = text(examples[0])
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": prompt}]},
    ]
    one = client(address)
    reply = one.chat.completions.create(model="auto", messages=turns, max_completion_tokens=6)
    pairs = (("system", "Be brief."), ("user", "Hello."), ("assistant", "Hello!"), ("user", prompt), ("assistant", "-"))
    assert reply.choices[0].message.content == model.generate([Example("", references=("-",), messages=pairs)], 6)[0]
    expected = model.generate([prompt], 6)[0]
    plain = one.completions.create(model="auto", prompt=prompt, max_tokens=6)
    assert plain.choices[0].text == expected
    said = [{"role": "user", "content": prompt}]
    options = {"model": "auto", "max_tokens": 6, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(one.chat.completions.create(messages=said, **options))
    one.close()
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage.completion_tokens > 0
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    drawn = [asked(address, prompt, temperature=1.5, seed=7).choices[0].message.content for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_an_answer_ends_before_what_stops_it(model, address, examples):
    prompt = text(examples[0])
    answer = model.generate([prompt], 12)[0]
    stop = answer[len(answer) // 2 :][:3]
    assert len(stop) == 3
    said, options = [{"role": "user", "content": prompt}], {"model": "auto", "max_tokens": 12, "stop": [stop, ""]}
    with client(address) as one:
        choice = one.chat.completions.create(messages=said, **options).choices[0]
        chunks = list(one.chat.completions.create(messages=said, stream=True, **options))
    assert (choice.message.content, choice.finish_reason) == (answer[: answer.index(stop)], "stop")
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stream_comes_as_the_answer_is_made(model, address, examples):
    prompt = text(examples[0])
    expected = model.generate([prompt], 24)[0]
    with client(address) as one:
        said = [{"role": "user", "content": prompt}]
        chunks = list(one.chat.completions.create(model="auto", messages=said, max_tokens=24, stream=True))
        plain = list(one.completions.create(model="auto", prompt=prompt, max_tokens=24, stream=True))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert len(pieces) > 2
    assert "".join(pieces) == expected == "".join(c.choices[0].text for c in plain)
    assert {c.model for c in chunks} == set(model.route([prompt]))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({c.id for c in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages: .*at least 1 item"),
        ({"messages": [{"role": "user", "content": "  "}]}, "must be the user's, and say something"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of the user's is 'image_url'"),
        ({"n": 2}, "n: .*1"),
        ({"temperature": -1}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 100_000}, "the model's context is "),
        ({"tools": [{"type": "function"}]}, "tools: "),
        ({"response_format": {"type": "json_object"}}, 'response_format: only {"type": "text"} is possible here'),
        ({"frequency_penalty": 0.5}, "frequency_penalty: only 0 "),
        ({"presence_penalty": -1}, "presence_penalty: only 0 "),
        ({"logit_bias": {"5": 100}}, "logit_bias: only {} "),
        ({"echo": True}, "echo: only false "),
        ({"suffix": "x"}, 'suffix: only "" '),
        ({"best_of": 3}, "best_of: only 1 "),
        ({"functions": [{"name": "f"}]}, "functions: only "),
        ({"logprobs": True, "top_logprobs": 5}, "logprobs: only false "),
        ({"top_logprobs": 5}, "top_logprobs: only 0 "),
        ({"modalities": ["text", "audio"]}, "modalities: only "),
        ({"top_p": 1.5}, "top_p: "),
        ({"messages": [{"role": "user", "content": None}]}, "messages: one of the user has no content"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": None, "tool_calls": [{}]},
                    {"role": "user", "content": "a"},
                ]
            },
            "messages: this model calls no tools, and one of them does",
        ),
    ],
)
def test_what_cannot_be_asked_is_named(address, change, message):
    body = {"model": "auto", "messages": [{"role": "user", "content": "Say hello."}], **change}
    reply = httpx.post(f"{address}/chat/completions", json=body, timeout=60)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error["message"]


def test_what_changes_nothing_may_be_asked(address):
    neutral = {
        "n": 1, "best_of": 1, "echo": False, "suffix": "", "functions": [], "tools": [], "logprobs": False,
        "top_logprobs": 0, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "modalities": ["text"],
        "response_format": {"type": "text"}, "top_p": 1,
    }  # fmt: skip
    said = [{"role": "user", "content": "Say hello."}]
    plain = {"model": "auto", "messages": said, "max_tokens": 6}
    nothing = dict.fromkeys([*neutral, "model", "temperature", "stream", "stop", "seed", "user", "stream_options"])
    silent = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": None}, *said]
    bodies = [plain, plain | neutral, plain | nothing, plain | {"messages": silent}]
    replies = [httpx.post(f"{address}/chat/completions", json=body, timeout=60) for body in bodies]
    assert [reply.status_code for reply in replies] == [200] * 4
    said_each = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert said_each[0] == said_each[1] == said_each[2]


def test_an_answer_without_a_limit_may_have_what_is_left_of_the_context(model, examples, monkeypatch):
    with Engine(model) as engine, serving(engine) as url:
        tokens = len(model.encoder.prompt(Example(text(examples[0]), references=("-",))))
        monkeypatch.setattr(engine, "context", tokens + 3)
        said = {"messages": [{"role": "user", "content": text(examples[0])}]}
        reply = httpx.post(f"{url}/chat/completions", json=said, timeout=60)
        assert reply.status_code == 200
        usage, reason = reply.json()["usage"], reply.json()["choices"][0]["finish_reason"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], reason) == (tokens, 3, "length")
        monkeypatch.setattr(engine, "context", tokens)
        reply = httpx.post(f"{url}/chat/completions", json=said, timeout=60)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_only_the_likeliest_are_drawn(address, examples):
    """Of so small a share, the most likely token alone, whatever the seed."""
    greedy = asked(address, text(examples[0])).choices[0].message.content
    options = [{"temperature": 2.0, "seed": seed} for seed in range(4)]
    every = {asked(address, text(examples[0]), **each).choices[0].message.content for each in options}
    assert len(every) > 1
    assert {asked(address, text(examples[0]), top_p=1e-6, **each).choices[0].message.content for each in options} == {
        greedy
    }


def test_other_bad_requests(address):
    reply = httpx.post(f"{address}/chat/completions", content=b"{")
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "the request is no JSON")
    reply = httpx.post(f"{address}/chat/completions", content=b"x" * (9 << 20))
    assert reply.status_code == 413
    assert httpx.get(f"{address}/chat/completions").status_code == 405
    assert httpx.get(f"{address}/nothing").status_code == 404


def test_a_key_is_asked_for(model, examples):
    with Engine(model) as engine, serving(engine, key="secret") as url:
        for key in ("wrong", "secret2"):
            reply = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        with client(url, "secret") as one:
            assert one.models.list().data
        for header in ("bearer secret", "BEARER  secret", "secret"):
            assert httpx.get(f"{url}/models", headers={"Authorization": header}).status_code == 200
        assert httpx.get(url.removesuffix("/v1") + "/health").status_code == 200


def test_a_full_queue_refuses_and_a_slow_answer_times_out(model, monkeypatch, examples):
    slow = Slow(monkeypatch)
    with Engine(model, batch_size=1, most_waiting=1) as engine, serving(engine, timeout=1.0) as url:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(asked, url, text(examples[0]))
            assert slow.begun.wait(30)
            second = pool.submit(asked, url, text(examples[1]))
            while engine.waiting < 1:
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError, match="1 requests are waiting"):
                asked(url, text(examples[2]))
            for future in (first, second):
                with pytest.raises(openai.InternalServerError, match="took too long"):
                    future.result()
            slow.go.set()
        while engine.waiting:
            time.sleep(0.01)
        monkeypatch.undo()
        assert asked(url, text(examples[0])).choices[0].message.content is not None  # and it goes on
        assert engine.counts["answers"] == 1  # what was given up was computed no further


def test_a_client_that_hangs_up_costs_nothing_more(model, monkeypatch, examples):
    slow = Slow(monkeypatch)
    with Engine(model, batch_size=1) as engine, serving(engine) as url:
        body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(asked, url, text(examples[0]))
            assert slow.begun.wait(30)
            for stream in (False, True):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{url}/chat/completions", json={**body, "stream": stream}, timeout=0.5)
            deadline = time.monotonic() + 10
            time.sleep(0.5)
            slow.go.set()
            assert first.result().choices[0].message.content is not None
            while engine.waiting and time.monotonic() < deadline:
                time.sleep(0.01)
        assert asked(url, text(examples[1])).choices[0].message.content is not None
        assert engine.counts["answers"] == 2


def test_what_fails_inside_is_told_and_logged(model, monkeypatch, caplog):
    """The client learns the kind of the error alone; whoever runs the server finds where it comes from."""

    def step(batch, tokens):
        raise RuntimeError("a secret path")

    monkeypatch.setattr(RunningBatch, "step", step)
    with Engine(model) as engine, serving(engine) as url:
        with pytest.raises(openai.InternalServerError, match="RuntimeError while answering") as told:
            asked(url, "Say hello.")
        said = {"messages": [{"role": "user", "content": "Say hello."}], "stream": True}
        streamed = httpx.post(f"{url}/chat/completions", json=said).text
        assert engine.working
    assert "secret" not in str(told.value) + streamed
    assert '"type": "server_error"' in streamed
    assert "a secret path" in caplog.text
    assert 'raise RuntimeError("a secret path")' in caplog.text


def test_health_says_when_nobody_answers(model):
    with serving(Engine(model)) as url:  # whose worker was never started
        reply = httpx.get(url.removesuffix("/v1") + "/health")
    assert (reply.status_code, reply.json()["status"]) == (503, "stopped")


def test_a_model_that_was_trained_whole(tiny_model_folder, stream, tmp_path):
    settings = {
        "output": str(tmp_path),
        "model": {"name": str(tiny_model_folder)},
        "adapter": None,
        "data": {"max_length": 96},
        "training": {"max_steps": 1, "use_cpu": True},
        "evaluation": {"max_new_tokens": 2, "untrained": False, "tasks": "seen"},
        "methods": ["sequential"],
    }
    (folder,) = ContinualTrainer(settings, stream=TaskStream(stream[:1]), console=Console(quiet=True)).run()
    with Engine(ContinualModel.from_run(folder, device="cpu")) as engine, serving(engine) as url:
        with client(url) as one:
            assert [each.id for each in one.models.list()] == ["auto"]
        assert asked(url, "Say hello.").model == "auto"
        with pytest.raises(openai.NotFoundError):
            asked(url, "Say hello.", "base")


def test_a_set_that_goes_and_comes_back_loses_nobody(finished, examples, tmp_path, monkeypatch):
    """Thirty-two clients while the run is rolled back and forth beneath: every answer is that of one of its stages."""
    monkeypatch.setattr("cit_fast.inference.server._LOOK", 0.01)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    prompts = [text(example) for example in examples]
    loaded = [ContinualModel.from_run(folder, device="cpu", stage=stage) for stage in (2, None)]
    expected = [dict(zip(prompts, one.generate(prompts, 6), strict=True)) for one in loaded]
    gone = (set(loaded[1].sets) - set(loaded[0].sets)).pop()
    assert expected[0] != expected[1]
    since = looks(folder)
    model, later = ContinualModel.from_run(folder, device="cpu"), []
    before = model.model
    with Engine(model, batch_size=8) as engine, following(folder, engine, since), serving(engine) as url:

        def ask(number):
            reply = asked(url, prompts[number % len(prompts)])
            return prompts[number % len(prompts)], reply.choices[0].message.content

        def wait_for(sets):
            deadline = time.monotonic() + 30
            while set(engine.model.sets) != set(sets) or engine._replacement is not None:
                assert time.monotonic() < deadline
                time.sleep(0.01)

        with ThreadPoolExecutor(32) as pool:
            replies = pool.map(ask, range(320))
            rollback(folder, 2)
            wait_for(loaded[0].sets)
            with client(url) as one:
                assert gone not in [each.id for each in one.models.list()]
            later = [asked(url, prompt).choices[0].message.content for prompt in prompts]
            undo_rollback(folder)
            wait_for(loaded[1].sets)
            assert asked(url, prompts[0], gone).model == gone
            answers = list(replies)
        assert engine.model.model is before  # one base model for all of them
    assert len(answers) == 320
    assert all(answer in (expected[0][prompt], expected[1][prompt]) for prompt, answer in answers)
    assert later == [expected[0][prompt] for prompt in prompts]


def test_a_load_that_failed_is_tried_again(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("cit_fast.inference.server._LOOK", 0.01)
    folder, plain, calls = tmp_path / "run", ContinualModel.from_run, []
    shutil.copytree(finished, folder)
    since = looks(folder)

    def from_run(*given, **options):
        calls.append(1)
        if len(calls) < 3:
            raise OSError("no room")
        return plain(*given, **options)

    with Engine(plain(folder, device="cpu")) as engine:
        monkeypatch.setattr(ContinualModel, "from_run", from_run)
        with following(folder, engine, since):
            (folder / "stages" / ".04.tmp").mkdir()  # is none yet
            time.sleep(0.1)
            assert not calls
            rollback(folder, 2)
            deadline = time.monotonic() + 30
            while len(engine.sets) == 3:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert len(calls) == 3


def test_the_command_serves_a_stage_and_stops_when_told(finished, examples, tmp_path):
    """A process of its own: an earlier stage, a key from the environment, SIGTERM, and a port that is taken."""
    environment = {**os.environ, "CIT_FAST_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cit_fast.cli", "serve", str(finished), "--port"]
    process = subprocess.Popen(
        [*command, "0", "--stage", "1"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        first = read_stages(finished)[1].adapter
        assert f"{finished}: serving auto, base, {first} at http://127.0.0.1:" in line
        url = line.split(" at ")[1].strip()
        with client(url, "secret") as one:
            said = [{"role": "user", "content": text(examples[0])}]
            reply = one.chat.completions.create(model="auto", messages=said, max_tokens=6)
        earlier = ContinualModel.from_run(finished, device="cpu", stage=1)
        assert reply.choices[0].message.content == earlier.generate([text(examples[0])], 6)[0]
        port = url.split(":")[2].split("/")[0]
        taken = subprocess.run([*command, port], env=environment, capture_output=True, text=True, check=False)
        assert taken.returncode == 2
        assert f"127.0.0.1:{port}: cannot be served on (Address already in use); choose another --port" in taken.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert output == ""  # nothing more was printed than that line


def test_addresses_that_cannot_be_had(monkeypatch, capsys, finished):
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(RunError, match="cannot be served on"):
        bound("127.0.0.1", listening.getsockname()[1])
    with pytest.raises(RunError, match="cannot be served on"):
        bound("nowhere.invalid", 80)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["cit-fast", "serve", str(finished)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "pip install 'cit-fast[serve]'" in capsys.readouterr().err
