"""The server, with OpenAI's own client over real connections."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn
from rich.console import Console

from cit_fast import ContinualModel, ContinualTrainer, cli
from cit_fast.data import Example, TaskStream
from cit_fast.errors import DataError, RunError
from cit_fast.evaluation import read_stages
from cit_fast.inference import engine as engine_module
from cit_fast.inference.engine import Engine, Question, StoppingError
from cit_fast.inference.server import Server, bound
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.generation import Answer


@pytest.fixture(scope="module")
def model(finished):
    return ContinualModel.from_run(finished, device="cpu")


@pytest.fixture(scope="module")
def examples(stream):
    return [example for task in stream for example in task.test]


def text(example: Example) -> str:
    return f"{example.instruction}\n\n{example.input}"


@contextmanager
def serving(engine: Engine, **options) -> Iterator[str]:
    """A server in a thread; its address."""
    listening = bound("127.0.0.1", 0)
    config = uvicorn.Config(Server(engine, **options).app, log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def address(model):
    with Engine(model, batch_size=8) as engine, serving(engine) as url:
        yield url


def client(url: str, key: str = "any", **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, **options)


def asked(url: str, prompt: str, name: str = "auto", **options):
    message = {"role": "user", "content": prompt}
    with client(url) as one:
        return one.chat.completions.create(model=name, messages=[message], max_tokens=6, **options)


def test_many_clients_each_get_their_own_answer(model, address, examples):
    """Thirty-two clients at once, sets mixed: nothing lost, and each as the model answers it alone."""
    prompts = [text(example) for example in examples]
    expected = dict(zip(prompts, model.generate(prompts, max_new_tokens=6, batch_size=1), strict=True))
    sets = dict(zip(prompts, model.route(prompts), strict=True))
    assert len(set(sets.values())) == 3
    every = [prompts[k % len(prompts)] for k in range(160)]
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda prompt: asked(address, prompt), every))
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
    assert int(counts["cit_fast_batches_total"]) < int(counts["cit_fast_answers_total"])  # some were answered together
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


@pytest.mark.parametrize(
    ("answer", "stop", "expected"),
    [
        (Answer("one two three", False), ["three", "two"], ("one ", "stop")),
        (Answer("one two three", True), "four", ("one two three", "stop")),
        (Answer("one two three", False), None, ("one two three", "length")),
        (Answer("one", False), [""], ("one", "length")),
    ],
)
def test_an_answer_ends_before_what_stops_it(address, monkeypatch, answer, stop, expected):
    monkeypatch.setattr(engine_module, "generate_answers", lambda *_, **__: [answer])
    choice = asked(address, "Say something.", stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages: .*at least 1 item"),
        ({"messages": [{"role": "user", "content": "  "}]}, "must be the user's, and say something"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text alone, .* 'image_url'"),
        ({"n": 2}, "n: .*1"),
        ({"temperature": -1}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 100_000}, "the model's context is "),
        ({"tools": [{"type": "function"}]}, "tools: "),
        ({"response_format": {"type": "json_object"}}, "only text"),
    ],
)
def test_what_cannot_be_asked_is_named(address, change, message):
    body = {"model": "auto", "messages": [{"role": "user", "content": "Say hello."}], **change}
    reply = httpx.post(f"{address}/chat/completions", json=body, timeout=60)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error["message"]


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
        assert httpx.get(url.removesuffix("/v1") + "/health").status_code == 200


class Slow:
    """A model whose batches wait until they may go on."""

    def __init__(self, model: ContinualModel, monkeypatch) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        plain = Engine._replies

        def replies(engine, questions):
            self.begun.set()
            assert self.go.wait(30)
            return plain(engine, questions)

        monkeypatch.setattr(Engine, "_replies", replies)


def test_a_full_queue_refuses_and_a_slow_answer_times_out(model, monkeypatch, examples):
    slow = Slow(model, monkeypatch)
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
        assert engine.counts["answers"] == 2  # the second was given up before its batch began


def test_a_client_that_hangs_up_costs_nothing_more(model, monkeypatch, examples):
    slow = Slow(model, monkeypatch)
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
        assert engine.counts["answers"] <= 3


def test_one_bad_question_takes_no_other_with_it(model, examples):
    with Engine(model, batch_size=4) as engine:
        good = [Question(example, max_new_tokens=4) for example in examples[:3]]
        futures = [engine.ask(each) for each in (*good, Question(examples[0], adapter="gone", max_new_tokens=4))]
        assert [f.result().answer.text for f in futures[:3]] == model.generate(examples[:3], 4)
        with pytest.raises(DataError, match="no adapter set 'gone'"):
            futures[3].result()


def test_what_fails_inside_is_told_and_logged(model, monkeypatch, caplog):
    """The client learns the kind of the error alone; whoever runs the server finds where it comes from."""

    def replies(engine, questions):
        raise RuntimeError("a secret path")

    monkeypatch.setattr(Engine, "_replies", replies)
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


def test_a_batch_that_fails_is_tried_in_halves(model, monkeypatch, examples):
    sizes, plain = [], Engine._replies

    def replies(engine, questions):
        sizes.append(len(questions))
        if any(question.seed == 13 for question in questions):
            raise MemoryError("no room")
        return plain(engine, questions)

    slow = Slow(model, monkeypatch)
    with Engine(model, batch_size=4) as engine:
        first = engine.ask(Question(examples[0], max_new_tokens=4))
        assert slow.begun.wait(30)
        monkeypatch.setattr(Engine, "_replies", replies)
        futures = [engine.ask(Question(examples[k], max_new_tokens=4, seed=12 + k)) for k in range(4)]
        slow.go.set()
        first.result(30)
        with pytest.raises(MemoryError):
            futures[1].result(30)
        answers = [futures[k].result(30).answer.text for k in (0, 2, 3)]
    assert answers == model.generate([examples[k] for k in (0, 2, 3)], 4)
    assert sizes == [4, 2, 1, 1, 2]


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


def test_stopping_answers_the_batch_and_refuses_the_rest(model, monkeypatch, examples):
    slow = Slow(model, monkeypatch)
    with Engine(model, batch_size=1, most_waiting=4) as engine:
        running = engine.ask(Question(examples[0], max_new_tokens=4))
        assert slow.begun.wait(30)
        waiting = engine.ask(Question(examples[1], max_new_tokens=4))
        threading.Timer(0.2, slow.go.set).start()
    assert running.result(1).answer is not None
    with pytest.raises(StoppingError):
        waiting.result(1)
    with pytest.raises(StoppingError):
        engine.ask(Question(examples[2]))


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
