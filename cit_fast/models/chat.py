"""Chat models that answer prompts: any OpenAI-compatible endpoint, or a local transformers model.

Both keep every answer on disk by content as it comes: what was answered once is never asked again, and what a failed
or killed run has got is there for the next one. Nothing here reaches the network unless an endpoint is named.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock
from tqdm.auto import tqdm

from cit_fast.errors import ConfigError, RunError
from cit_fast.files import read_checked_json, write_checked_json
from cit_fast.text import first_line

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0
_BAR_FROM = 20  # prompts; fewer are done before one has read it


class Chat(ABC):
    """Answers prompts.

    Args:
        identity: everything that decides an answer besides the prompt, as plain JSON values.
        cache: folder where answers are kept by content; ``None``: nowhere.
    """

    def __init__(self, identity: Mapping[str, Any], cache: Path | None) -> None:
        self.identity = dict(identity)
        self.cache = cache

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """One answer per prompt, in order; a prompt that occurs twice is asked once.

        Raises:
            RunError: a prompt got no answer; the message says why, and how many answers are kept.
        """
        kept = {prompt: answer for prompt in dict.fromkeys(prompts) if (answer := self._kept(prompt)) is not None}
        open_prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt not in kept]
        if open_prompts:
            # Of several processes that want the same answers, one asks and the others find them.
            with nullcontext() if self.cache is None else FileLock(self._folder(self.cache) / ".lock"):
                late = {prompt: answer for prompt in open_prompts if (answer := self._kept(prompt)) is not None}
                kept |= late
                asked = [prompt for prompt in open_prompts if prompt not in late]
                with tqdm(total=len(asked), desc="asking the chat model", disable=len(asked) < _BAR_FROM) as bar:
                    for prompt, answer in self._answers(asked):
                        kept[prompt] = answer
                        self._keep(prompt, answer)
                        bar.update(1)
        return [kept[prompt] for prompt in prompts]

    def forget(self, prompts: Sequence[str]) -> None:
        """Keep the answers to these prompts no longer: they were of no use, and the next call asks again."""
        if self.cache is not None:
            for prompt in prompts:
                self._path(self.cache, prompt).unlink(missing_ok=True)

    @abstractmethod
    def _answers(self, prompts: Sequence[str]) -> Iterator[tuple[str, str]]:
        """``(prompt, answer)`` for every prompt, each as soon as it is there, in any order."""

    def _folder(self, cache: Path) -> Path:
        name = hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=12).hexdigest()
        folder = cache / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder}: answers cannot be kept there ({error.strerror})") from error
        return folder

    def _path(self, cache: Path, prompt: str) -> Path:
        return self._folder(cache) / f"{hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()}.json"

    def _kept(self, prompt: str) -> str | None:
        if self.cache is None:
            return None
        try:
            found = read_checked_json(self._path(self.cache, prompt))
            answer = found["answer"] if found["prompt"] == prompt else None
        except (OSError, RunError, KeyError):
            return None  # not there, or damaged: asked again
        return answer if isinstance(answer, str) else None

    def _keep(self, prompt: str, answer: str) -> None:
        if self.cache is not None:
            kept = {"model": self.identity, "prompt": prompt, "answer": answer}
            write_checked_json(self._path(self.cache, prompt), kept)


class ChatEndpoint(Chat):
    """Any server that speaks the OpenAI chat completions protocol.

    Args:
        base_url: of the server, up to and without ``/chat/completions`` (``https://api.openai.com/v1``,
            ``http://localhost:8000/v1``).
        model: the model's name there.
        key_variable: name of the environment variable that holds the key; a variable that is not set means no key,
            which many local servers want. The key itself is read when it is needed, and is never written anywhere.
        system: a system message before every prompt; empty: none.
        options: further fields of the request, such as ``max_tokens``; ``None`` takes a field away. Without a word
            about it ``temperature`` is 0.
        timeout: seconds until a server that says nothing counts as failed.
        attempts: requests per prompt at most, >= 1; between them it waits ``backoff`` seconds, then twice as long, or
            as long as the server asks, but never over a minute.
        concurrency: requests under way at a time, >= 1.
        cache: see :class:`Chat`.

    Raises:
        ConfigError: an option out of range, credentials in the address, or the package requests is missing.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        system: str = "",
        options: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        attempts: int = 5,
        backoff: float = 1.0,
        concurrency: int = 8,
        cache: Path | None = None,
    ) -> None:
        address = urlsplit(base_url)
        if address.scheme not in {"http", "https"} or not address.hostname:
            raise ConfigError("base_url: not an http or https address such as https://api.openai.com/v1")
        if address.username or address.password or address.query:
            raise ConfigError("base_url: carries credentials or a query; put the key into an environment variable")
        if not key_variable.isidentifier():
            raise ConfigError("key_variable: not the name of an environment variable (it must not be the key itself)")
        for name, value, least in (("attempts", attempts, 1), ("concurrency", concurrency, 1)):
            if value < least:
                raise ConfigError(f"{name}: {value} is below {least}")
        if not timeout > 0 or not backoff >= 0:
            raise ConfigError(f"timeout, backoff: {timeout}, {backoff}; seconds, the first above 0")
        if importlib.util.find_spec("requests") is None:
            raise ConfigError("chat model: the package requests is missing; pip install 'cit-fast[llm]'")
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.key_variable, self.timeout, self.attempts = key_variable, timeout, attempts
        self.backoff, self.concurrency = backoff, concurrency
        fields = {"temperature": 0, **(options or {})}
        self.body = {"model": model, **{name: value for name, value in fields.items() if value is not None}}
        self.system = system
        super().__init__({"url": self.url, "system": system, **self.body}, cache)

    def _answers(self, prompts: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Several requests at a time; the first prompt that fails for good ends it, once those under way are done."""
        if not prompts:
            return
        stop = threading.Event()
        todo = iter(prompts)
        under_way: dict[Future[str], str] = {}
        failed: list[tuple[str, _FailedError]] = []
        answered = 0
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="chat") as pool:
            try:
                while True:
                    while not failed and len(under_way) < self.concurrency and (prompt := next(todo, None)) is not None:
                        under_way[pool.submit(self._answer, prompt, stop)] = prompt
                    if not under_way:
                        break
                    for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                        prompt = under_way.pop(done)
                        try:
                            answer = done.result()
                        except _FailedError as error:
                            failed.append((prompt, error))
                            stop.set()
                        else:
                            answered += 1
                            yield prompt, answer
            finally:
                stop.set()  # however this ends, nobody waits for another attempt
        if failed:
            where = (
                f"; the {answered} that came are kept in {self._folder(self.cache)}" if self.cache is not None else ""
            )
            raise RunError(
                f"{self.url}: no answer to {len(prompts) - answered} of {len(prompts)} prompts "
                f"({failed[0][1]}){where}{', so the same command goes on from there' if where else ''}"
            ) from None

    def _answer(self, prompt: str, stop: threading.Event) -> str:
        turns = [{"role": "system", "content": self.system}] if self.system else []
        body = {**self.body, "messages": [*turns, {"role": "user", "content": prompt}]}
        delay = self.backoff
        for attempt in range(1, self.attempts + 1):
            try:
                return self._request(body)
            except _FailedError as error:
                if not error.may_pass or attempt == self.attempts:
                    raise _FailedError(f"{error}, {attempt} attempts" if attempt > 1 else str(error)) from None
                pause = error.wait if error.wait is not None else delay
            delay *= 2
            if stop.wait(min(pause, _LONGEST_WAIT)):
                raise _FailedError("given up because another request failed")
        raise AssertionError

    def _request(self, body: dict[str, Any]) -> str:
        import requests

        key = os.environ.get(self.key_variable, "")
        try:
            # An answer that sends us elsewhere is none: the key goes to the address the user gave, or nowhere.
            response = requests.post(
                self.url, json=body, auth=_Bearer(key), timeout=self.timeout, allow_redirects=False
            )
        except requests.Timeout:
            raise _FailedError(f"nothing came within {self.timeout:g} s", may_pass=True) from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise _FailedError(f"the connection failed: {type(error).__name__}", may_pass=True) from None
        except (requests.RequestException, UnicodeError) as error:
            raise _FailedError(f"the request cannot be made: {type(error).__name__}") from None
        if response.status_code != 200:
            hint = f" (is the key in {self.key_variable} right?)" if response.status_code in {401, 403} else ""
            raise _FailedError(
                f"HTTP {response.status_code}{hint}: {_excerpt(response.text, key)}",
                may_pass=response.status_code in _RETRIED,
                wait=_seconds(response.headers.get("Retry-After")),
            )
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            answer = None
        if not isinstance(answer, str):
            raise _FailedError(f"no chat completion came back: {_excerpt(response.text, key)}", may_pass=True)
        return answer.strip()


class LocalChat(Chat):
    """A chat model of transformers on this machine; greedy, so that the same prompt gets the same answer.

    Args:
        model: a causal language model; ``tokenizer``: its tokenizer, with a chat template.
        name: tells models apart in the cache.
        system: a system message before every prompt; empty: none.
        max_new_tokens: longest answer; ``batch_size``: prompts at a time.
        cache: see :class:`Chat`.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        system: str = "",
        max_new_tokens: int = 256,
        batch_size: int = 8,
        cache: Path | None = None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(f"{name}: its tokenizer has no chat template; name a chat model")
        super().__init__({"local": name, "system": system, "max_new_tokens": max_new_tokens}, cache)
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> LocalChat:
        """Load a folder or a hub name, on the GPU where there is one.

        Raises:
            ConfigError: there is no such model.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name}: no chat model can be loaded: {first_line(error)}") from None
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, name, **options)

    def _answers(self, prompts: Sequence[str]) -> Iterator[tuple[str, str]]:
        from cit_fast.models.generation import generate

        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        pad = self.tokenizer.pad_token_id
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            tokens = [
                self.tokenizer.apply_chat_template(
                    [*turns, {"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
                )["input_ids"]
                for prompt in batch
            ]
            answers = generate(
                self.model,
                tokens,
                pad_token_id=pad if pad is not None else (ends if isinstance(ends, int) else ends[0]),
                eos_token_ids=ends,
                tokenizer=self.tokenizer,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )
            yield from zip(batch, answers, strict=True)


class _FailedError(Exception):
    """One request that brought no answer; ``may_pass``: another attempt may, after ``wait`` seconds if given."""

    def __init__(self, message: str, may_pass: bool = False, wait: float | None = None) -> None:
        super().__init__(message)
        self.may_pass, self.wait = may_pass, wait


class _Bearer:
    """Puts the key on a request. Given as ``auth``, so that requests does not take another one from ~/.netrc."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: Any) -> Any:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _excerpt(text: str, key: str) -> str:
    """The beginning of what a server said, on one line; a key that it repeats is taken out."""
    if key:
        text = text.replace(key, "***")
    line = " ".join(text.split())
    return repr(line[:200] + ("…" if len(line) > 200 else ""))


def _seconds(value: str | None) -> float | None:
    """Retry-After, where it is a number of seconds; a date is left to the usual wait."""
    return float(value) if value and value.isdecimal() else None


def build_chat(spec: Mapping[str, Any], cache: Path | None) -> Chat:
    """A chat model from a configuration: ``{base_url, model, ...}`` or ``{local: folder or name, ...}``.

    Raises:
        ConfigError: an unknown or a missing key, named.
    """
    options = dict(spec)
    try:
        if "local" in options:
            return LocalChat.from_pretrained(options.pop("local"), **options, cache=cache)
        return ChatEndpoint(**options, cache=cache)
    except TypeError as error:
        raise ConfigError(f"chat model: {str(error).rpartition('() ')[2]}") from None
