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
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from cit_fast.errors import CitFastError, ConfigError, DataError, RunError
from cit_fast.evaluation.run_files import MOVING
from cit_fast.inference.engine import Engine
from cit_fast.inference.openai_format import (
    BASE_NAME,
    ChatRequest,
    Chunks,
    CompletionRequest,
    TextRequest,
    UnknownModelError,
    completion,
    parsed,
)
from cit_fast.inference.questions import Answerer, BusyError, Reply, StoppingError, UpstreamError
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.prompts import ExampleTooLongError

_log = logging.getLogger(__name__)
KEY = "CIT_FAST_API_KEY"
"""Environment variable: where it is set, a client must send it as its API key."""
_LARGEST = 8 << 20  # bytes of a request
_ALIVE = 10.0  # seconds between signs of life in a stream


class _TooLargeError(CitFastError):
    """A request of too many bytes."""


_STATUS: dict[type[BaseException], tuple[int, str, str | None]] = {
    UnknownModelError: (404, "invalid_request_error", "model_not_found"),
    _TooLargeError: (413, "invalid_request_error", None),
    ExampleTooLongError: (400, "invalid_request_error", "context_length_exceeded"),
    BusyError: (429, "rate_limit_error", "rate_limit_exceeded"),
    StoppingError: (503, "server_error", None),
    UpstreamError: (502, "server_error", "upstream"),
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
    """The application over what answers.

    Args:
        engine: answers: an :class:`Engine` or an :class:`~cit_fast.inference.upstream.Upstream`.
        key: that a client must send; ``None``: none is asked for.
        timeout: seconds that a request may take, its wait included.
    """

    def __init__(self, engine: Answerer, key: str | None = None, timeout: float = 300.0) -> None:
        self.engine, self.key, self.timeout = engine, key, timeout
        self._started, self._statuses = time.time(), dict[int, int]()
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._checked(self._models)),
                Route("/v1/chat/completions", self._checked(self._chat), methods=["POST"]),
                Route("/v1/completions", self._checked(self._text), methods=["POST"]),
            ]
        )

    @property
    def names(self) -> dict[str, str | None]:
        """What a client may ask for -> the set; ``None``: the router chooses."""
        sets = self.engine.sets
        return {"auto": None, **({BASE_NAME: BASE} if sets else {}), **{name: name for name in sets}}

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
        return await self._answered(request, ChatRequest)

    async def _text(self, request: Request) -> Response:
        return await self._answered(request, TextRequest)

    async def _answered(self, request: Request, kind: type[ChatRequest] | type[TextRequest]) -> Response:
        asked = parsed(await _body(request), kind)
        question = asked.question(asked.example, self.names)
        if asked.stream:
            pieces: asyncio.Queue[_Piece] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def heard(text: str, adapter: str) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the client's connection
                    loop.call_soon_threadsafe(pieces.put_nowait, (text, adapter))

            reply = asyncio.wrap_future(self.engine.ask(question, heard))
            reply.add_done_callback(lambda _: pieces.put_nowait(None))
            return StreamingResponse(self._streamed(asked, reply, pieces), media_type="text/event-stream")
        reply = asyncio.wrap_future(self.engine.ask(question))
        gone = asyncio.create_task(_gone(request))
        try:
            both: set[asyncio.Future[Any]] = {reply, gone}
            await asyncio.wait(both, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                raise ClientDisconnect if gone.done() else asyncio.TimeoutError
            return JSONResponse(completion(asked, reply.result()))
        finally:
            reply.cancel()  # an answer that nobody waits for is computed no further
            gone.cancel()

    async def _streamed(
        self, asked: CompletionRequest, reply: asyncio.Future[Reply], pieces: asyncio.Queue[_Piece]
    ) -> AsyncIterator[str]:
        """Server-sent events, one for each piece of the answer as it comes."""
        ends = time.monotonic() + self.timeout
        chunks = Chunks(asked)
        try:
            while True:
                left = ends - time.monotonic()
                if left <= 0:
                    raise asyncio.TimeoutError
                try:
                    piece = await asyncio.wait_for(pieces.get(), min(_ALIVE, left))
                except asyncio.TimeoutError:
                    yield ": still at it\n\n"
                    continue
                if piece is None:
                    break
                yield _event(chunks.of_piece(*piece))
            for chunk in chunks.of_end(reply.result()):
                yield _event(chunk)
        except Exception as error:  # noqa: BLE001  # the status has been sent; the client is told in the stream
            yield _event(_as_error(error)[1])
        finally:
            reply.cancel()
        yield "data: [DONE]\n\n"

    def _checked(self, handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """The handler behind the key, with its errors as OpenAI's clients expect them, and counted."""

        async def handle(request: Request) -> Response:
            try:
                if self.key is not None:
                    given = _given_key(request.headers.get("authorization", ""))
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


def _given_key(header: str) -> str:
    """The key in an ``Authorization`` header, whose scheme may be written in any case, or left out."""
    scheme, _, key = header.strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else header.strip()


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


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


_Piece = tuple[str, str] | None
"""Further text of an answer and its set; ``None`` at its end."""


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


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
    upstream: str | None = None,
    follow: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a run until the process is told to stop; what is being answered then is answered, what waits is refused.

    Args:
        run: a run folder. ``stage``: of it, by default the last.
        host, port: where. ``batch_size``, ``most_waiting``: of the :class:`Engine`.
        timeout: seconds that a request may take.
        upstream: address of a server that holds the run's sets and answers; only the router runs here.
        follow: serve the run's last stage also when that becomes another one.
        say: prints a line when it is ready.

    Raises:
        RunError: the address cannot be had; and as :meth:`ContinualModel.from_run`.
        ConfigError: ``upstream`` is no URL, or ``follow`` with a stage or an upstream.
    """
    if follow and (stage is not None or upstream is not None):
        raise ConfigError("serve: --follow serves the last stage from here; leave out --stage and --upstream")
    from cit_fast.inference.continual_model import ContinualModel
    from cit_fast.inference.upstream import KEY as UPSTREAM_KEY
    from cit_fast.inference.upstream import Upstream, routing_model

    with contextlib.ExitStack() as stack:
        stack.enter_context(_ending_when_told())
        listening = stack.enter_context(bound(host, port))
        engine: Engine | Upstream
        if upstream is None:
            since = looks(run) if follow else None
            engine = Engine(ContinualModel.from_run(run, stage=stage), batch_size, most_waiting)
            if since is not None:
                stack.enter_context(following(run, engine, since))
        else:
            key = os.environ.get(UPSTREAM_KEY) or None
            engine = Upstream(routing_model(run, stage), upstream, key, most_waiting)
        stack.enter_context(engine)
        server = Server(engine, os.environ.get(KEY) or None, timeout)
        config = uvicorn.Config(server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=30)
        say(f"{run}: serving {', '.join(server.names)} at http://{host}:{listening.getsockname()[1]}/v1")
        _Uvicorn(config, engine).run(sockets=[listening])


_LOOK, _LONGEST = 1.0, 60.0  # seconds between looks, and between attempts to load


@contextlib.contextmanager
def following(run: Path, engine: Engine, since: object) -> Iterator[None]:
    """Inside, the engine answers with the run's last stage, whichever that is: after `learn`, after `rollback`.

    Args:
        since: what :func:`looks` said before the engine's model was loaded.
    """
    from cit_fast.inference.continual_model import ContinualModel

    served = [since]

    def load(before: ContinualModel) -> ContinualModel:
        now = looks(run)
        model = ContinualModel.from_run(run, before.model.device.type, like=before)
        served[0] = now
        return model

    def watch() -> None:
        tried, pause = 0.0, _LOOK
        while not ended.wait(_LOOK):
            if engine.replacing:
                continue
            if looks(run) == served[0]:
                pause = _LOOK
            elif time.monotonic() - tried >= pause:  # a load that failed is tried again, less and less often
                tried, pause = time.monotonic(), min(2 * pause, _LONGEST)
                engine.replace(load)

    ended = threading.Event()
    thread = threading.Thread(target=watch, name="cit-fast-follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def looks(run: Path) -> object:
    """What differs when another stage is the last one: the committed stages, when the last was written, a move."""
    names = sorted((path.name for path in (run / "stages").glob("*") if path.name.isdigit()), key=int)
    found: list[object] = [names]
    for path in (run / "stages" / names[-1] / "stage.json" if names else run, run / MOVING):
        with contextlib.suppress(OSError):
            found.append((path.name, path.stat().st_mtime_ns, path.stat().st_ino))
    return found


class _Uvicorn(uvicorn.Server):
    """Tells the engine first when it is told to stop: what waits need not be waited for."""

    def __init__(self, config: uvicorn.Config, engine: Answerer) -> None:
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
