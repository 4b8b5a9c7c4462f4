"""Questions to an engine and its server, as tests ask them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import openai
from served import served

from cit_fast.data import Example
from cit_fast.inference.engine import Engine
from cit_fast.inference.server import Server
from cit_fast.models.running_batch import RunningBatch


def text(example: Example) -> str:
    return f"{example.instruction}\n\n{example.input}"


@contextmanager
def serving(engine: Engine, **options) -> Iterator[str]:
    """A server in a thread; its address."""
    with served(Server(engine, **options).app) as url:
        yield f"{url}/v1"


def client(url: str, key: str = "any", **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, **options)


def asked(url: str, prompt: str, name: str = "auto", **options):
    message = {"role": "user", "content": prompt}
    with client(url) as one:
        return one.chat.completions.create(model=name, messages=[message], max_tokens=6, **options)


class Slow:
    """An engine whose answers wait until they may go on."""

    def __init__(self, monkeypatch) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        plain = RunningBatch.step

        def step(batch, tokens=8):
            self.begun.set()
            assert self.go.wait(30)
            return plain(batch, tokens)

        monkeypatch.setattr(RunningBatch, "step", step)
