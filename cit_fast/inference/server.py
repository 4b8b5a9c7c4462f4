"""An OpenAI-compatible server over a run: ``cit-fast serve RUN``.

``/v1/chat/completions`` and ``/v1/completions`` answer with the adapter set that ``model`` names, ``base`` for the base
model alone, or ``auto`` for the one that the router chooses; ``model`` of the reply says which it was. Without a
temperature the most likely token is taken at every step, as everywhere in cit-fast. ``/v1/models``, ``/health`` and
``/metrics`` say what there is and how it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from cit_fast.data.example import Example
from cit_fast.errors import CitFastError, DataError, RunError
from cit_fast.inference.engine import BusyError, Engine, Question, Reply, StoppingError
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.prompts import ExampleTooLongError

_log = logging.getLogger(__name__)
KEY = "CIT_FAST_API_KEY"
"""Environment variable: where it is set, a client must send it as its API key."""
_LARGEST = 8 << 20  # bytes of a request
_ALIVE = 10.0  # seconds between signs of life in a stream
_BASE_NAME = "base"


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The parts that are text, joined.

        Raises:
            DataError: a part of another kind.
        """
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise DataError(f"messages: this model reads text alone, and a part is {part.get('type')!r}")
        return "".join(part["text"] for part in self.content)


class _Asked(BaseModel):
    """What both kinds of request have; what is not known here changes nothing."""

    model_config = ConfigDict(extra="ignore")
    model: str = "auto"
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    # What would change the answer and is not there.
    n: Literal[1] | None = None
    logprobs: Literal[False, 0] | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    response_format: dict[str, Any] | None = None

    def question(self, example: Example, names: Mapping[str, str | None]) -> Question:
        """For the engine.

        Args:
            names: that a client may ask for -> the set.

        Raises:
            _UnknownModelError: no such set.
        """
        if self.model not in names:
            raise _UnknownModelError(f"the model {self.model!r} does not exist; there are {', '.join(names)}")
        if self.response_format not in (None, {"type": "text"}):
            raise DataError("response_format: only text is given")
        longest = self.max_completion_tokens or self.max_tokens or 256
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return Question(example, names[self.model], longest, self.temperature, seed)


class _ChatAsked(_Asked):
    messages: list[_Message] = Field(min_length=1)

    @property
    def example(self) -> Example:
        """The conversation, as one whose answer is still to come."""
        turns = [("system" if one.role == "developer" else one.role, one.text) for one in self.messages]
        if turns[-1][0] != "user" or not turns[-1][1].strip():
            raise DataError("messages: the last one must be the user's, and say something")
        if len(turns) == 1:
            return Example(turns[0][1], references=("-",))
        return Example("", references=("-",), messages=(*turns, ("assistant", "-")))


class _TextAsked(_Asked):
    prompt: str

    @property
    def example(self) -> Example:
        """The prompt, as ``cit-fast generate`` reads one."""
        if not self.prompt.strip():
            raise DataError("prompt: it is empty")
        return Example(self.prompt, references=("-",))


class _UnknownModelError(CitFastError):
    """A set that is not there."""


class _TooLargeError(CitFastError):
    """A request of too many bytes."""


_STATUS: dict[type[BaseException], tuple[int, str, str | None]] = {
    _UnknownModelError: (404, "invalid_request_error", "model_not_found"),
    _TooLargeError: (413, "invalid_request_error", None),
    ExampleTooLongError: (400, "invalid_request_error", "context_length_exceeded"),
    BusyError: (429, "rate_limit_error", "rate_limit_exceeded"),
    StoppingError: (503, "server_error", None),
    asyncio.TimeoutError: (504, "server_error", "timeout"),
    CitFastError: (400, "invalid_request_error", None),
}


def _as_error(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and body, as OpenAI's clients expect an error."""
    for kind, (status, name, code) in _STATUS.items():
        if isinstance(error, kind):
            message = str(error) or "the answer took too long"
            return status, {"error": {"message": message, "type": name, "param": None, "code": code}}
    _log.error("a request failed", exc_info=error)
    message = f"{type(error).__name__} while answering"  # nothing of its text: it may quote a path or a prompt
    return 500, {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


class Server:
    """The application over an engine.

    Args:
        engine: answers. ``key``: that a client must send; ``None``: none is asked for.
        timeout: seconds that a request may take, its wait included.
    """

    def __init__(self, engine: Engine, key: str | None = None, timeout: float = 300.0) -> None:
        self.engine, self.key, self.timeout = engine, key, timeout
        self._started, self._statuses = time.time(), dict[int, int]()
        self.names: dict[str, str | None] = {"auto": None}
        if engine.model.router is not None:
            self.names |= {_BASE_NAME: BASE, **{name: name for name in engine.sets}}
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._checked(self._models)),
                Route("/v1/chat/completions", self._checked(self._chat), methods=["POST"]),
                Route("/v1/completions", self._checked(self._text), methods=["POST"]),
            ]
        )

    # -- what it says of itself ----------------------------------------------------------------------------------

    async def _health(self, _request: Request) -> Response:
        working = self.engine.working
        body = {"status": "ok" if working else "stopped", "waiting": self.engine.waiting}
        return JSONResponse(body, 200 if working else 503)

    async def _metrics(self, _request: Request) -> Response:
        lines = [f"cit_fast_{name}_total {count}" for name, count in sorted(self.engine.counts.items())]
        lines += [f'cit_fast_requests_total{{status="{status}"}} {n}' for status, n in sorted(self._statuses.items())]
        lines += [
            f"cit_fast_waiting {self.engine.waiting}",
            f"cit_fast_uptime_seconds {time.time() - self._started:.0f}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def _models(self, _request: Request) -> Response:
        made = int(self._started)
        listed = [{"id": name, "object": "model", "created": made, "owned_by": "cit-fast"} for name in self.names]
        return JSONResponse({"object": "list", "data": listed})

    # -- answers -------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._answered(request, _ChatAsked)

    async def _text(self, request: Request) -> Response:
        return await self._answered(request, _TextAsked)

    async def _answered(self, request: Request, kind: type[_ChatAsked] | type[_TextAsked]) -> Response:
        asked = _parsed(await _body(request), kind)
        reply = asyncio.wrap_future(self.engine.ask(asked.question(asked.example, self.names)))
        if asked.stream:
            return StreamingResponse(self._streamed(asked, reply), media_type="text/event-stream")
        gone = asyncio.create_task(_gone(request))
        try:
            both: set[asyncio.Future[Any]] = {reply, gone}
            await asyncio.wait(both, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                reply.cancel()  # its batch may have begun; then the answer is nobody's
                raise ClientDisconnect if gone.done() else asyncio.TimeoutError
            return JSONResponse(_completion(asked, reply.result()))
        finally:
            gone.cancel()

    async def _streamed(self, asked: _Asked, reply: asyncio.Future[Reply]) -> AsyncIterator[str]:
        """Server-sent events; the answer comes in one piece, for a batch is answered together."""
        began = time.monotonic()
        try:
            while not reply.done():
                left = self.timeout - (time.monotonic() - began)
                if left <= 0:
                    raise asyncio.TimeoutError
                await asyncio.wait({reply}, timeout=min(_ALIVE, left))
                if not reply.done():
                    yield ": still at it\n\n"
            for chunk in _chunks(asked, reply.result()):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except Exception as error:  # noqa: BLE001  # the status has been sent; the client is told in the stream
            yield f"data: {json.dumps(_as_error(error)[1])}\n\n"
        finally:
            reply.cancel()
        yield "data: [DONE]\n\n"

    def _checked(self, handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """The handler behind the key, with its errors as OpenAI's clients expect them, and counted."""

        async def handle(request: Request) -> Response:
            try:
                if self.key is not None:
                    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
                    if not secrets.compare_digest(given.encode(), self.key.encode()):
                        body = {"message": "wrong or no API key", "type": "invalid_request_error", "param": None}
                        return self._counted(JSONResponse({"error": {**body, "code": "invalid_api_key"}}, 401))
                return self._counted(await handler(request))
            except ClientDisconnect:
                return self._counted(Response(status_code=499))
            except Exception as error:  # noqa: BLE001  # whatever it is, the server goes on
                status, body = _as_error(error)
                wait = {"Retry-After": "1"} if status in (429, 503) else None
                return self._counted(JSONResponse(body, status, headers=wait))

        return handle

    def _counted(self, response: Response) -> Response:
        self._statuses[response.status_code] = self._statuses.get(response.status_code, 0) + 1
        return response


async def _body(request: Request) -> Any:
    """The JSON of a request.

    Raises:
        DataError: it is none. _TooLargeError: it is too large.
    """
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > _LARGEST:
            raise _TooLargeError(f"a request may have {_LARGEST >> 20} MB")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise DataError("the request is no JSON") from None


def _parsed(body: Any, kind: type[Any]) -> Any:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{'.'.join(map(str, first['loc'])) or 'the request'}: {first['msg']}") from None


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def _cut(asked: _Asked, reply: Reply) -> tuple[str, str]:
    """The answer up to the first of the texts that stop it, and why it ends."""
    text, stops = reply.answer.text, [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    places = [text.find(stop) for stop in stops if stop and stop in text]
    if places:
        return text[: min(places)], "stop"
    return text, "stop" if reply.answer.ended else "length"


def _common(asked: _Asked, reply: Reply, chunk: bool) -> dict[str, Any]:
    chat = isinstance(asked, _ChatAsked)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": ("chat.completion" if chat else "text_completion") + (".chunk" if chunk and chat else ""),
        "created": int(time.time()),
        "model": _BASE_NAME if reply.adapter == BASE else reply.adapter,
    }


def _usage(reply: Reply) -> dict[str, int]:
    asked, answered = reply.prompt_tokens, reply.answer.tokens
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def _completion(asked: _Asked, reply: Reply) -> dict[str, Any]:
    text, reason = _cut(asked, reply)
    said: Mapping[str, Any] = {"text": text}
    if isinstance(asked, _ChatAsked):
        said = {"message": {"role": "assistant", "content": text}}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
    return {**_common(asked, reply, False), "choices": [choice], "usage": _usage(reply)}


def _chunks(asked: _Asked, reply: Reply) -> list[dict[str, Any]]:
    text, reason = _cut(asked, reply)
    common = _common(asked, reply, True)

    def chunk(said: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        return {**common, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}

    if isinstance(asked, _ChatAsked):
        found = [chunk({"delta": {"role": "assistant", "content": text}}, None), chunk({"delta": {}}, reason)]
    else:
        found = [chunk({"text": text}, reason)]
    if (asked.stream_options or {}).get("include_usage"):
        found.append({**common, "choices": [], "usage": _usage(reply)})
    return found


def bound(host: str, port: int) -> socket.socket:
    """A socket to serve on; 0 for any free port.

    Raises:
        RunError: the address cannot be had.
    """
    try:
        return socket.create_server((host, port), reuse_port=False)
    except OSError as error:
        reason = os.strerror(error.errno) if isinstance(error.errno, int) and error.errno > 0 else error.strerror
        raise RunError(f"{host}:{port}: cannot be served on ({reason}); choose another --port") from None


def serve(
    run: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    stage: int | None = None,
    batch_size: int = 16,
    most_waiting: int = 256,
    timeout: float = 300.0,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a run until the process is told to stop; what is being answered then is answered, what waits is refused.

    Args:
        run: a run folder. ``stage``: of it, by default the last.
        host, port: where. ``batch_size``, ``most_waiting``: of the :class:`Engine`.
        timeout: seconds that a request may take.
        say: prints a line when it is ready.

    Raises:
        RunError: the address cannot be had; and as :meth:`ContinualModel.from_run`.
    """
    from cit_fast.inference.continual_model import ContinualModel

    with contextlib.ExitStack() as stack:
        stack.enter_context(_ending_when_told())
        listening = stack.enter_context(bound(host, port))
        engine = stack.enter_context(Engine(ContinualModel.from_run(run, stage=stage), batch_size, most_waiting))
        server = Server(engine, os.environ.get(KEY) or None, timeout)
        config = uvicorn.Config(server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=30)
        say(f"{run}: serving {', '.join(server.names)} at http://{host}:{listening.getsockname()[1]}/v1")
        _Uvicorn(config, engine).run(sockets=[listening])


class _Uvicorn(uvicorn.Server):
    """Tells the engine first when it is told to stop: what waits need not be waited for."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        self._engine.stop()
        super().handle_exit(sig, frame)


@contextlib.contextmanager
def _ending_when_told() -> Iterator[None]:
    """SIGINT and SIGTERM end the process in order, whenever they come; uvicorn raises them again in the end."""

    def told(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
