"""A run's router before another server: prompts are routed and tokenised here, and answered there.

vLLM and SGLang serve many LoRA sets over one base model, on several GPUs, and know nothing of a router.
``cit-fast export --for vllm`` writes the sets and the command that starts such a server, and
``cit-fast serve RUN --upstream URL`` stands before it. What goes there are the tokens that the run was trained with, so
the other server needs no chat template of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch

from cit_fast.embeddings.weights import read_input_embeddings
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.evaluation.run_files import check_files, stage_folder
from cit_fast.inference.continual_model import ContinualModel, adapter_folders, read_trained, router_of
from cit_fast.inference.questions import BusyError, Heard, Question, Reply, Said, StoppingError, UpstreamError
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.adapters import load_encoder
from cit_fast.models.config import ModelConfig
from cit_fast.models.generation import Answer
from cit_fast.models.pretrained import load_model, resolve_model

_log = logging.getLogger(__name__)
KEY = "CIT_FAST_UPSTREAM_API_KEY"
"""Environment variable: sent as the API key of the other server."""
_RETRIES, _WAIT = 3, 0.25  # the waits double
_CONNECT = 5.0  # seconds


class LateModel:
    """The base model, read when a router first looks into more of it than its token embeddings.

    Args:
        folder: of the model. ``config``: how it is loaded.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._folder, self._config, self._lock = folder, config, threading.Lock()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def get_input_embeddings(self) -> Any:
        """The token embeddings alone, of the file; the model's, where that cannot be read so."""
        try:
            weight = read_input_embeddings(self._folder)
        except ConfigError:
            return self.__getattr__("get_input_embeddings")()
        dtype = self._config.dtype
        return SimpleNamespace(weight=weight if dtype == "auto" else weight.to(getattr(torch, dtype)))

    def __getattr__(self, name: str) -> Any:
        with self._lock:
            if "_model" not in self.__dict__:
                self._model = load_model(self._folder, self._config).to(self.device)
        return getattr(self._model, name)


def routing_model(run: str | Path, stage: int | None = None) -> ContinualModel:
    """A run's router and prompts, without its adapter sets; it can route, and not generate.

    Args:
        run: a run folder. ``stage``: its number, from 1; by default the last.

    Raises:
        RunError: no run there, no such stage or none trained yet, a damaged router, or a run that trained the whole
            model and has nothing to route.
    """
    run = Path(run)
    record, config, stages = read_trained(run, stage)
    weights = stage_folder(run, stages[-1])
    if (weights / "model").is_dir():
        raise RunError(
            f"{run}: trained the whole model, so there is nothing to route; serve {weights / 'model'} itself"
        )
    check_files(weights, stages[-1], "router/")
    router = router_of(record, weights)
    base = config.model.model_copy(update={"trust_remote_code": False})
    folder = resolve_model(base)
    encoder = load_encoder(folder, base, config.data)
    sets = tuple(adapter_folders(run, stages, router.sets))
    return ContinualModel(LateModel(folder, base), encoder, None, router, sets)


class Upstream:
    """Answers questions through the completions endpoint of another OpenAI-compatible server.

    Args:
        model: routes, as :func:`routing_model` gives it.
        url: of the other server, with its ``/v1``.
        key: its API key.
        most_waiting: questions that may be on their way; the next one is refused.

    Raises:
        ConfigError: no URL.

    Example::

        with Upstream(routing_model("runs/mine/cit-fast"), "http://gpu:8001/v1") as upstream:
            reply = upstream.ask(Question(Example("Say hello.", references=("-",)))).result()
    """

    def __init__(self, model: ContinualModel, url: str, key: str | None = None, most_waiting: int = 256) -> None:
        self.model, self.most_waiting = model, most_waiting
        try:
            place = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"upstream: no URL ({error}); expected one like http://gpu:8001/v1") from None
        if place.scheme not in ("http", "https") or not place.host:
            raise ConfigError("upstream: no URL of a server; expected one like http://gpu:8001/v1")
        # A password in it is for the other server alone: httpx logs addresses.
        self.url = self._shown = str(place.copy_with(userinfo=b"")).rstrip("/")
        self._auth = (place.username, place.password) if place.userinfo and not key else None
        self._encoder = model.encoder.with_limit(None, "error")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._stopping, self._routing = threading.Event(), threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cit-fast-upstream", daemon=True)
        self._asked: set[Future[Reply]] = set()
        self._names: dict[str, str] = {}
        self._context: int | None = None  # of the other server, once it has been asked
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Upstream:
        self._thread.start()
        # Without a limit in time for what comes: an answer may have to wait for its turn there.
        self._client = httpx.AsyncClient(
            headers=self._headers,
            auth=self._auth,
            timeout=httpx.Timeout(None, connect=_CONNECT),
            limits=httpx.Limits(max_connections=None),
        )
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop; what is on its way is given up."""
        self.stop()
        for reply in list(self._asked):
            reply.cancel()
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def stop(self) -> None:
        """Take no more questions."""
        self._stopping.set()

    @property
    def sets(self) -> tuple[str, ...]:
        """The adapter sets of the run."""
        return self.model.sets

    @property
    def working(self) -> bool:
        """Whether questions are taken."""
        return self._thread.is_alive() and not self._stopping.is_set()

    @property
    def waiting(self) -> int:
        """Questions that are on their way."""
        return len(self._asked)

    def ask(self, question: Question, heard: Heard | None = None) -> Future[Reply]:
        """Route a question and pass it on; one whose reply is cancelled is cut off there, too.

        Args:
            heard: is told the answer's text as it comes.

        Raises:
            BusyError: as many are on their way as may be. StoppingError: no more are taken.
        """
        if self._stopping.is_set():
            raise StoppingError("the server is being stopped")
        if len(self._asked) >= self.most_waiting:
            raise BusyError(f"{self.most_waiting} requests are waiting; try again later")
        reply = asyncio.run_coroutine_threadsafe(self._reply(question, heard), self._loop)
        self._asked.add(reply)
        reply.add_done_callback(self._asked.discard)
        return reply

    # -- in its own thread -----------------------------------------------------------------------------------------

    async def _reply(self, question: Question, heard: Heard | None) -> Reply:
        tokens, adapter = await asyncio.to_thread(self._routed, question)
        said = Said(question.stop, None if heard is None else lambda text: heard(text, adapter))
        body = {
            "prompt": tokens,
            "temperature": question.temperature,
            "top_p": question.top_p,
            "seed": question.seed,
            "stop_token_ids": list(self._encoder.stop_token_ids),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for attempt in range(1 + _RETRIES):
            try:
                name = await self._name_there(adapter)
                left = None if self._context is None else max(1, self._context - len(tokens))
                answer = await self._answer({"model": name, "max_tokens": question.longest(left), **body}, said)
            except (httpx.TransportError, _TryAgainError) as error:
                # What has been told cannot be taken back.
                if said.told or attempt == _RETRIES:
                    raise UpstreamError(f"{self._shown}: {_why(error)}") from error
                self.counts["retries"] += 1
                self._names.clear()
                await asyncio.sleep(_WAIT * 2**attempt)
            else:
                break
        self.counts["answers"] += 1
        self.counts["prompt_tokens"] += len(tokens)
        self.counts["answer_tokens"] += answer.tokens
        return Reply(answer, adapter, len(tokens))

    def _routed(self, question: Question) -> tuple[list[int], str]:
        """The prompt's tokens and its set."""
        with self._routing:  # a router may use a model, and a tokenizer is not for two at once
            if question.example.images:
                raise DataError("messages: images are not forwarded; ask the server behind this one")
            tokens = self._encoder.prompt(question.example)
            return tokens, question.adapter or self.model.route([question.example])[0]

    async def _name_there(self, adapter: str) -> str:
        """What the other server calls a set, or the base model.

        Raises:
            UpstreamError: it cannot be asked, or does not have it.
        """
        if adapter not in self._names:
            self._names = await self._names_there()
        if adapter not in self._names:
            missing = "the base model" if adapter == BASE else f"the adapter set {adapter!r}"
            raise UpstreamError(
                f"{self._shown}: does not serve {missing}; start it as `cit-fast export --for vllm` says"
            )
        return self._names[adapter]

    async def _names_there(self) -> dict[str, str]:
        for attempt in range(1 + _RETRIES):
            try:
                response = await self._client.get(f"{self.url}/models", timeout=30)
                _check(response.status_code, response.text)
                cards = response.json()["data"]
                sets = {card["id"] for card in cards if card.get("parent") or card["id"] in self.sets}
                base = next(card for card in cards if card["id"] not in sets)
                self._context = base.get("max_model_len")
            except (httpx.TransportError, _TryAgainError) as error:
                if attempt == _RETRIES:
                    raise UpstreamError(f"{self._shown}: {_why(error)}") from error
                self.counts["retries"] += 1
                await asyncio.sleep(_WAIT * 2**attempt)
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
                raise UpstreamError(f"{self._shown}/models: is no list of models as OpenAI's servers give it") from None
            else:
                break
        # SGLang takes what it does not know for the base model's name, and a set's after a colon.
        prefix = f"{base['id']}:" if base.get("owned_by") == "sglang" else ""
        return {BASE: base["id"], **{name: prefix + name for name in self.sets if name in sets}}

    async def _answer(self, body: Mapping[str, Any], said: Said) -> Answer:
        text, reason, tokens = "", None, 0
        async with self._client.stream("POST", f"{self.url}/completions", json=body) as response:
            if response.status_code != 200:
                _check(response.status_code, (await response.aread()).decode("utf-8", "replace"))
            async for event in _events(response):
                if "error" in event:
                    _log.warning("the server behind this one, in an answer: %s", _message(event))
                    raise _TryAgainError("the answer broke off with an error")
                for choice in event.get("choices") or ():
                    text += choice.get("text") or ""
                    reason = choice.get("finish_reason") or reason
                    said.grow(text)
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                if said.stopped:  # stop texts are cut here, as they are without another server; there it may end
                    own = self._encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
                    return Answer(said.text, True, len(own))
        if reason not in ("stop", "length"):
            raise _TryAgainError("the answer broke off")
        said.grow(text, last=True)
        return Answer(said.text, reason == "stop" or said.stopped, tokens)


class _TryAgainError(Exception):
    """Something that may go better another time."""


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")  # at no other end of a line: a text may hold those
        for line in lines:
            data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                try:
                    event = json.loads(data)
                except ValueError:
                    raise _TryAgainError("an event is no JSON") from None
                if isinstance(event, dict):
                    yield event


def _check(status: int, body: str) -> None:
    """Refuse a reply that is none.

    Raises:
        DataError: the question cannot be answered there. UpstreamError: this server is not let in.
        _TryAgainError: it is busy, or something failed there.
    """
    if status == 200:
        return
    try:
        message = _message(json.loads(body))
    except ValueError:
        message = ""
    if status in (401, 403):
        raise UpstreamError(f"the server behind this one refuses the API key ({KEY})")
    if status in (400, 413, 422):
        raise DataError(f"the server behind this one: {message or f'status {status}'}")
    _log.warning("the server behind this one: status %d, %s", status, message)
    raise _TryAgainError(f"status {status}")


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    found = error.get("message") if isinstance(error, dict) else error
    return str(found or "")[:500]


def _why(error: Exception) -> str:
    if isinstance(error, _TryAgainError):
        return str(error)
    return f"cannot be reached ({type(error).__name__})"
