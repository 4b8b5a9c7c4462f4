"""A run's router before a stand-in that checks what it is asked, and answers with the run's own sets."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import openai
import pytest
import torch
from peft import LoraConfig
from served import served
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from cit_fast import ContinualModel
from cit_fast.data import Example
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.inference import upstream as upstream_module
from cit_fast.inference.export import export_adapters, start_vllm
from cit_fast.inference.questions import BusyError, Question, StoppingError, UpstreamError
from cit_fast.inference.server import Server, bound
from cit_fast.inference.upstream import LateModel, Upstream, routing_model
from cit_fast.methods.routing.features import LastTokenFeatures, base_token_embedder
from cit_fast.methods.stage import Stage
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.config import ModelConfig
from cit_fast.models.generation import generate_answers


class StandIn:
    """What vLLM does with a completion of tokens, for a run's sets.

    Args:
        kind: "vllm" or "sglang", whose names for sets differ.
        sets: that it has loaded.
    """

    def __init__(self, model: ContinualModel, kind: str = "vllm", sets: tuple[str, ...] | None = None) -> None:
        self.model, self.kind, self.sets = model, kind, model.sets if sets is None else sets
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.failures: list[str] = []  # of the next requests, the next one last
        self.lock = threading.Lock()
        self.ended = 0
        self.base, self.text = "the/base", ""
        self.context: int | None = None
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    async def models(self, _request):
        if self.failures and self.failures[-1] == "models":
            self.failures.pop()
            return JSONResponse({"error": "loading"}, 503)
        card = {"object": "model", "owned_by": self.kind}
        found = [{**card, "id": self.base, "parent": None, "max_model_len": self.context}]
        found += [{**card, "id": name, "parent": self.base} for name in self.sets]
        return JSONResponse({"object": "list", "data": found})

    def adapter(self, name: str) -> str | None:
        """The set of a name; SGLang answers with the base model whatever it does not know."""
        if self.kind == "sglang":
            return name.partition(":")[2] or BASE
        return BASE if name == self.base else name if name in self.sets else None

    async def completions(self, request):
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization"))
        with self.lock:
            failure = self.failures.pop() if self.failures else ""
        if failure.isdigit():
            return JSONResponse({"error": {"message": f"status {failure} it is"}}, int(failure))
        adapter = self.adapter(body["model"])
        if adapter is None:
            return JSONResponse({"message": "no such model"}, 404)
        assert body["stream"] is True
        assert all(isinstance(token, int) for token in body["prompt"])
        assert body["stop_token_ids"] == list(self.model.encoder.stop_token_ids)
        with self.lock:
            (answer,) = generate_answers(
                self.model.model,
                [body["prompt"]],
                tokenizer=self.model.encoder.tokenizer,
                pad_token_id=self.model.encoder.pad_token_id,
                eos_token_ids=body["stop_token_ids"],
                max_new_tokens=body["max_tokens"],
                adapters=[adapter],
                bank=self.model.bank,
            )
        return StreamingResponse(self.events(answer, failure), media_type="text/event-stream")

    async def events(self, answer, failure):
        def event(content):
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

        try:
            text = " " + (self.text or answer.text) + "\n"  # white space around an answer is no part of it
            for k in range(0, len(text), 3):
                if failure == "breaks" and k > 6:
                    raise ConnectionResetError("a stand-in's fault")
                if failure == "error" and k > 6:
                    yield event({"error": {"message": "the engine is dead", "type": "InternalServerError"}})
                    return
                yield event({"choices": [{"index": 0, "text": text[k : k + 3], "finish_reason": None}]})
                if failure == "abort":
                    yield event({"choices": [{"index": 0, "text": "", "finish_reason": "abort"}]})
                    return
                if failure == "slow":
                    await asyncio.sleep(5)
            reason = "stop" if answer.ended else "length"
            yield event({"choices": [{"index": 0, "text": "", "finish_reason": reason}]})
            yield event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": answer.tokens}})
            yield "data: [DONE]\n\n"
        finally:
            self.ended += 1


@pytest.fixture
def there(model):
    return StandIn(model)


@pytest.fixture
def upstream(there, finished, monkeypatch):
    monkeypatch.setattr("cit_fast.inference.upstream._WAIT", 0.01)
    with served(there.app) as url, Upstream(routing_model(finished), f"{url}/v1", key="there") as found:
        yield found


def text(example: Example) -> str:
    return f"{example.instruction}\n\n{example.input}"


def test_many_clients_get_the_answers_of_their_sets(model, there, upstream, examples):
    """Thirty-two clients of our server, which asks the other one: as the run itself answers."""
    prompts = [text(example) for example in examples]
    expected = dict(zip(prompts, model.generate(prompts, max_new_tokens=12), strict=True))
    sets = dict(zip(prompts, model.route(prompts), strict=True))
    assert len(set(sets.values())) == 3
    there.failures = ["503", "429", "500"]  # of some of them
    with served(Server(upstream).app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as one:

        def ask(prompt, stream):
            said = [{"role": "user", "content": prompt}]
            reply = one.chat.completions.create(model="auto", messages=said, max_tokens=12, stream=stream)
            if not stream:
                assert reply.usage.completion_tokens > 0
                return reply.choices[0].message.content, reply.model
            chunks = list(reply)
            return "".join(c.choices[0].delta.content or "" for c in chunks), chunks[0].model

        assert [each.id for each in one.models.list()] == ["auto", "base", *model.sets]
        every = [prompts[k % len(prompts)] for k in range(64)]
        with ThreadPoolExecutor(32) as pool:
            replies = list(pool.map(ask, every, [k % 2 == 0 for k in range(64)]))
        assert replies == [(expected[prompt], sets[prompt]) for prompt in every]
        base = one.completions.create(model="base", prompt=prompts[0], max_tokens=12)
        assert base.choices[0].text == model.generate(prompts[:1], 12, adapters=[BASE])[0]
        metrics = httpx.get(f"{url}/metrics").text
    assert "cit_fast_answers_total 65" in metrics
    assert "cit_fast_retries_total 3" in metrics
    assert set(there.keys) == {"Bearer there"}
    assert {each["model"] for each in there.asked} == {"the/base", *model.sets}


def test_what_is_asked_goes_with_it(model, there, upstream, examples):
    answer = model.generate([examples[0]], 12)[0]
    stop = answer[len(answer) // 2 :][:3]
    heard: list[tuple[str, str]] = []
    question = Question(examples[0], max_new_tokens=12, temperature=0.5, seed=3, stop=(stop,), top_p=0.9)
    reply = upstream.ask(question, lambda *piece: heard.append(piece)).result(30)
    (asked,) = there.asked
    assert asked["prompt"] == model.encoder.prompt(examples[0])
    assert (asked["max_tokens"], asked["temperature"], asked["seed"], asked["top_p"]) == (12, 0.5, 3, 0.9)
    assert "stop" not in asked  # cut here, as without another server
    assert reply.answer.text == answer[: answer.index(stop)] == "".join(piece for piece, _ in heard)
    assert reply.answer.ended
    assert reply.prompt_tokens == len(asked["prompt"])
    assert {adapter for _, adapter in heard} == {reply.adapter} == set(model.route([examples[0]]))


@pytest.mark.parametrize(("left", "longest"), [(5, 5), (1000, 256), (None, 256)])
def test_an_answer_without_a_limit_may_have_what_is_left_there(model, there, upstream, examples, left, longest):
    there.context = None if left is None else len(model.encoder.prompt(examples[0])) + left
    upstream.ask(Question(examples[0])).result(30)
    assert there.asked[0]["max_tokens"] == longest


def test_sglang_is_told_base_and_set(model, finished, examples):
    """There a set's name alone would be taken for the base model's, and the base model would answer."""
    there = StandIn(model, "sglang")
    with served(there.app) as url, Upstream(routing_model(finished), f"{url}/v1") as upstream:
        replies = [upstream.ask(Question(each, max_new_tokens=6)).result(30) for each in examples[:2]]
        upstream.ask(Question(examples[0], BASE, 6)).result(30)
    assert [reply.answer.text for reply in replies] == model.generate(examples[:2], 6)
    assert [each["model"] for each in there.asked] == [*(f"the/base:{reply.adapter}" for reply in replies), "the/base"]
    assert there.keys == [None] * 3


@pytest.mark.parametrize("failure", ["breaks", "error", "abort"])
def test_an_answer_that_breaks_off(model, there, upstream, examples, failure):
    """It is asked for again, unless the client has heard a part of it."""
    there.failures = [failure] * 2
    assert (
        upstream.ask(Question(examples[0], max_new_tokens=12)).result(30).answer.text
        == model.generate([examples[0]], 12)[0]
    )
    assert len(there.asked) == 3
    there.failures = [failure]
    heard: list[str] = []
    with pytest.raises(UpstreamError, match=r"broke off|cannot be reached"):
        upstream.ask(Question(examples[0], max_new_tokens=12), lambda text, _: heard.append(text)).result(30)
    assert model.generate([examples[0]], 12)[0].startswith("".join(heard))
    assert heard


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\u2029b\x0bc", "ünï"])
def test_any_text_comes_through(there, upstream, examples, text):
    """Some servers leave characters as they are that end a line elsewhere."""
    there.text = text
    assert upstream.ask(Question(examples[0], max_new_tokens=12)).result(30).answer.text == text
    assert len(there.asked) == 1


def test_a_server_that_is_started_again_under_another_name(there, upstream, examples):
    upstream.ask(Question(examples[0], BASE, 4)).result(30)
    there.base = "another/name"
    upstream.ask(Question(examples[0], BASE, 4)).result(30)
    assert [each["model"] for each in there.asked] == ["the/base", "the/base", "another/name"]


def test_a_password_in_the_address_is_sent_and_not_told(model, finished, examples, caplog):
    there = StandIn(model)
    caplog.set_level("INFO")
    with served(there.app) as url:
        own = url.replace("http://", "http://me:secret@")
        for key, sent in ((None, "Basic bWU6c2VjcmV0"), ("there", "Bearer there")):
            with Upstream(routing_model(finished), f"{own}/v1", key) as upstream:
                upstream.ask(Question(examples[0], max_new_tokens=4)).result(30)
            assert there.keys.pop() == sent
    assert "secret" not in caplog.text


def test_an_upstream_that_stays_away(model, there, upstream, examples, finished):
    there.failures = ["models"] * 2  # it is being started
    assert upstream.ask(Question(examples[0], max_new_tokens=4)).result(30)
    there.failures = ["500"] * 10
    with pytest.raises(UpstreamError, match=r"http://127.0.0.1:\d+/v1: status 500$"):
        upstream.ask(Question(examples[0], max_new_tokens=4)).result(30)
    there.failures = []
    with bound("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
    gone = Upstream(routing_model(finished), f"http://me:secret@127.0.0.1:{port}/v1")
    with gone, served(Server(gone).app) as url:
        said = {"messages": [{"role": "user", "content": "Say hello."}]}
        reply = httpx.post(f"{url}/v1/chat/completions", json=said, timeout=60)
    assert reply.status_code == 502
    assert f"http://127.0.0.1:{port}/v1: cannot be reached (ConnectError)" in reply.json()["error"]["message"]
    assert "secret" not in reply.text


def test_a_set_that_is_not_there_and_requests_that_are_refused(model, finished, examples, monkeypatch):
    monkeypatch.setattr("cit_fast.inference.upstream._WAIT", 0.01)
    there = StandIn(model, sets=model.sets[:1])
    with served(there.app) as url, Upstream(routing_model(finished), f"{url}/v1", most_waiting=1) as upstream:
        with pytest.raises(UpstreamError, match=f"does not serve the adapter set '{model.sets[1]}'"):
            upstream.ask(Question(examples[0], model.sets[1])).result(30)
        there.failures = ["401"]
        with pytest.raises(UpstreamError, match=r"refuses the API key .CIT_FAST_UPSTREAM_API_KEY"):
            upstream.ask(Question(examples[0], model.sets[0])).result(30)
        there.failures = ["400"]
        with pytest.raises(DataError, match="status 400 it is"):
            upstream.ask(Question(examples[0], model.sets[0])).result(30)
        there.failures = ["slow"]
        slow = upstream.ask(Question(examples[0], model.sets[0], 12))
        with pytest.raises(BusyError, match="1 requests are waiting"):
            upstream.ask(Question(examples[0]))
        while len(there.asked) < 3:
            threading.Event().wait(0.01)
        slow.cancel()
        while not there.ended:  # the other server has been hung up on
            threading.Event().wait(0.01)
        assert upstream.waiting == 0
    assert not upstream.working
    with pytest.raises(StoppingError):
        upstream.ask(Question(examples[0]))


@pytest.mark.parametrize("url", ["gpu:8001", "ftp://gpu/v1", "http://", "http://gpu:x/v1"])
def test_no_url(finished, url):
    with pytest.raises(ConfigError, match="upstream: no URL"):
        Upstream(routing_model(finished), url)


def test_a_router_reads_what_it_looks_into(finished, model, examples, tiny_model_folder, monkeypatch):
    """Of the base model nothing, the token embeddings, or all of it."""
    read, plain = [], upstream_module.load_model
    monkeypatch.setattr(upstream_module, "load_model", lambda *given: read.append(1) or plain(*given))
    routed = routing_model(finished)
    assert routed.route(examples[:2]) == model.route(examples[:2])
    late = LateModel(tiny_model_folder, ModelConfig(name=str(tiny_model_folder)))
    weight = model.model.get_input_embeddings().weight
    assert torch.equal(late.get_input_embeddings().weight, weight)
    assert base_token_embedder(Stage(late, model.encoder)).embed(["a word"]).shape == (1, weight.shape[1])
    assert not read
    ours, theirs = (LastTokenFeatures(one, model.encoder.tokenizer).embed(["two words"]) for one in (late, model.model))
    torch.testing.assert_close(ours, theirs)
    assert len(read) == 1


def test_export_for_vllm(finished, model, tmp_path):
    """The script starts `vllm` with every set, from anywhere."""
    names = export_adapters(finished, tmp_path / "out", engine="vllm")
    script = tmp_path / "out" / "start-vllm.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "vllm"
    fake.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv[1:]]))\n")
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PORT": "7"}
    ran = subprocess.run(
        [script, "--dtype", "auto"], env=environment, cwd="/", capture_output=True, text=True, check=True
    )
    folder, *words = json.loads(ran.stdout)
    assert folder == str(tmp_path / "out")
    assert words[0] == "serve"
    assert words[2:4] == ["--served-model-name", "base"]
    assert words[-4:] == ["--port", "7", "--dtype", "auto"]
    options = dict(pairwise(words))
    assert options["--max-lora-rank"] == "8"  # of 4
    assert (options["--max-loras"], options["--max-cpu-loras"]) == ("3", "3")
    places = words[words.index("--lora-modules") + 1 : -4]
    assert places == [f"{name}=./{name}" for name in names]
    assert all((tmp_path / "out" / name / "adapter_model.safetensors").exists() for name in model.sets)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 1024},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_what_vllm_would_serve_otherwise_is_refused(options):
    """vLLM reads over a pattern of ranks, and answers with another scaling."""
    adapters = {"good": LoraConfig(r=16), "odd": LoraConfig(**{"r": 16, **options})}
    with pytest.raises(
        RunError, match=r"adapter set 'odd': vLLM serves LoRA of a causal model, of one rank up to 512.*--merge odd"
    ):
        start_vllm("base", None, adapters)
    script = start_vllm("a model", "v1", {"good": LoraConfig(r=17, use_rslora=True)})
    assert "vllm serve 'a model' --revision v1 " in script
    assert "--max-lora-rank 32 " in script
