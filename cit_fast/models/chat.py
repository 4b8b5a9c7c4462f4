"""Chat models that answer prompts: any OpenAI-compatible endpoint, or a local transformers model.

Both keep every answer on disk by content as it comes: what was answered once is never asked again, and what a failed
or killed run has got is there for the next one. Nothing here reaches the network unless an endpoint is named.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from cit_fast.cache import JsonCache
from cit_fast.errors import ConfigError, RunError
from cit_fast.text import cut, first_line

_Read = TypeVar("_Read")
_BAR_FROM = 20  # prompts; fewer are done before one has read it


class Chat(ABC):
    """Answers prompts.

    Args:
        identity: everything that decides an answer besides the prompt, as plain JSON values.
        cache: folder where answers are kept by content; ``None``: nowhere.
    """

    one_asks: ClassVar[bool] = True
    """Whether of several processes that want answers one asks, and the others find what it got."""

    def __init__(self, identity: Mapping[str, Any], cache: Path | None) -> None:
        self.identity = dict(identity)
        self.cache = JsonCache(cache, self.identity)

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """One answer per prompt, in order; a prompt that occurs twice is asked once.

        Raises:
            RunError: a prompt got no answer; the message says why, and how many answers are kept.
        """
        kept = {prompt: answer for prompt in dict.fromkeys(prompts) if (answer := self._kept(prompt)) is not None}
        open_prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt not in kept]
        if open_prompts:
            # Of several processes that want the same answers, one asks and the others find them.
            with self.cache.locked() if self.one_asks else nullcontext():
                late = {prompt: answer for prompt in open_prompts if (answer := self._kept(prompt)) is not None}
                kept |= late
                asked = [prompt for prompt in open_prompts if prompt not in late]
                with tqdm(total=len(asked), desc="asking the chat model", disable=len(asked) < _BAR_FROM) as bar:
                    for prompt, answer in self._answers(asked):
                        kept[prompt] = answer
                        self.cache.put(prompt, {"answer": answer})
                        bar.update(1)
        return [kept[prompt] for prompt in prompts]

    def knows(self, prompt: str) -> bool:
        """Whether the answer is kept already."""
        return self._kept(prompt) is not None

    def forget(self, prompts: Sequence[str]) -> None:
        """Keep the answers to these prompts no longer: they were of no use, and the next call asks again."""
        for prompt in prompts:
            self.cache.forget(prompt)

    @abstractmethod
    def _answers(self, prompts: Sequence[str]) -> Iterator[tuple[str, str]]:
        """``(prompt, answer)`` for every prompt, each as soon as it is there, in any order."""

    def _kept(self, prompt: str) -> str | None:
        answer = (self.cache.get(prompt) or {}).get("answer")
        return answer if isinstance(answer, str) else None


class ChatEndpoint(Chat):
    """Any server that speaks the OpenAI chat completions protocol, through the package ``openai``.

    That package makes the connections, repeats requests that failed for a reason that may pass (no connection, a
    timeout, HTTP 408, 409, 429 and 5xx), and waits in between as long as the server asks.

    Args:
        base_url: of the server, up to and without ``/chat/completions`` (``https://api.openai.com/v1``,
            ``http://localhost:8000/v1``). A redirect is an error: the key goes to this address or nowhere.
        model: the model's name there.
        key_variable: name of the environment variable that holds the key; a variable that is not set means no key,
            which many local servers want. The key itself is read when it is needed, and is never written anywhere.
        system: a system message before every prompt; empty: none.
        options: further fields of the request, such as ``max_tokens``; ``None`` takes a field away. Without a word
            about it ``temperature`` is 0.
        timeout: seconds until a server that says nothing counts as failed.
        attempts: requests per prompt at most, >= 1.
        concurrency: requests under way at a time, >= 1.
        cache: see :class:`Chat`.

    Raises:
        ConfigError: an option out of range, credentials in the address, or the package openai is missing.
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
        concurrency: int = 8,
        cache: Path | None = None,
    ) -> None:
        check_address(base_url)
        if not key_variable.isidentifier():
            raise ConfigError("key_variable: not the name of an environment variable (it must not be the key itself)")
        for name, value, least in (("attempts", attempts, 1), ("concurrency", concurrency, 1)):
            if value < least:
                raise ConfigError(f"{name}: {value} is below {least}")
        if not timeout > 0:
            raise ConfigError(f"timeout: {timeout} seconds; expected more than 0")
        if importlib.util.find_spec("openai") is None:
            raise ConfigError("chat model: the package openai is missing; pip install 'cit-fast[llm]'")
        self.base_url, self.url = base_url, f"{base_url.rstrip('/')}/chat/completions"
        self.key_variable, self.timeout, self.attempts = key_variable, timeout, attempts
        self.concurrency = concurrency
        fields = {"temperature": 0, **(options or {})}
        self.body = {"model": model, **{name: value for name, value in fields.items() if value is not None}}
        self.system = system
        super().__init__({"url": self.url, "system": system, **self.body}, cache)

    def _answers(self, prompts: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Several requests at a time; after the first prompt that fails no other is asked, and the error is raised."""
        if not prompts:
            return
        stop = threading.Event()
        failed: list[_NoAnswerError] = []
        answered = 0
        # Left early (Ctrl-C), the client is closed before the pool waits for its threads, which ends their requests.
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="chat") as pool, self._client() as client:
            asked = {pool.submit(self._answer, client, prompt, stop): prompt for prompt in prompts}
            try:
                for done in as_completed(asked):
                    try:
                        answer = done.result()
                    except _NoAnswerError as error:
                        failed.append(error)
                        continue
                    if answer is not None:
                        answered += 1
                        yield asked[done], answer
            finally:
                stop.set()
        if failed:
            kept = f"; the {answered} that came are kept in {self.cache.folder}" if self.cache.folder else ""
            raise RunError(
                f"{self.url}: no answer to {len(prompts) - answered} of {len(prompts)} prompts "
                f"({failed[0]}){kept}{', so the same command goes on from there' if kept else ''}"
            )

    def _client(self) -> Any:
        from openai import DefaultHttpxClient, OpenAI

        return OpenAI(
            base_url=self.base_url,
            api_key=os.environ.get(self.key_variable) or "none",  # given none, it takes that of another variable
            timeout=self.timeout,
            max_retries=self.attempts - 1,
            http_client=DefaultHttpxClient(follow_redirects=False),
        )

    def _answer(self, client: Any, prompt: str, stop: threading.Event) -> str | None:
        """The answer to one prompt, or ``None`` where another prompt has failed already."""
        if stop.is_set():
            return None
        try:
            return self._request(client, prompt)
        except BaseException:
            stop.set()
            raise

    def _request(self, client: Any, prompt: str) -> str:
        """One answer by ``openai``, whose errors become one line without the key.

        The reply is read as the JSON that it is: not every server names its content type, as the typed reply needs.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError, Omit

        headers = {} if os.environ.get(self.key_variable) else {"Authorization": Omit()}
        # Whatever fails is one line: why, after how many attempts, and never the key.
        try:
            reply = self._ask(client, prompt, headers)
        except APITimeoutError:
            raise _NoAnswerError(f"nothing came within {self.timeout:g} s, {self.attempts} attempts") from None
        except APIConnectionError as error:
            cause = type(error.__cause__ or error).__name__
            raise _NoAnswerError(f"the connection failed: {cause}, {self.attempts} attempts") from None
        except APIStatusError as error:
            hint = f" (is the key in {self.key_variable} right?)" if error.status_code in {401, 403} else ""
            said = excerpt(error.response.text, self.key_variable)
            raise _NoAnswerError(f"HTTP {error.status_code}{hint}: {said}") from None
        except UnicodeError as error:
            raise _NoAnswerError(f"the request cannot be made: {type(error).__name__}") from None
        try:
            answer = self._said(json.loads(reply)["choices"][0])
        except (ValueError, LookupError, TypeError):
            answer = None
        if not isinstance(answer, str):
            raise _NoAnswerError(f"no completion came back: {excerpt(reply, self.key_variable)}")
        return answer.strip()

    def _ask(self, client: Any, prompt: str, headers: Mapping[str, Any]) -> str:
        """One request, and the body of the reply."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        fields = {name: value for name, value in self.body.items() if name != "model"}
        reply = client.chat.completions.with_raw_response.create(
            model=self.body["model"],
            messages=[*turns, {"role": "user", "content": prompt}],
            extra_body=fields,
            extra_headers=headers,
        )
        return str(reply.text)

    def _said(self, choice: Any) -> Any:
        """The text in a reply."""
        return choice["message"]["content"]


class CompletionEndpoint(ChatEndpoint):
    """Prompts as tokens, each for a model of its own, through the completions protocol of such a server.

    Args:
        identity: what decides an answer beside the prompt and the model's name, whatever the server's address is.
        **options: of :class:`ChatEndpoint`, but no system message and no model.
    """

    one_asks = False  # each has prompts of its own

    def __init__(self, base_url: str, *, identity: Mapping[str, Any], **options: Any) -> None:
        super().__init__(base_url, "", **options)
        self.url = f"{base_url.rstrip('/')}/completions"
        self.names: dict[str, str] = {}
        self.cache = JsonCache(options.get("cache"), {"completions": {**self.body, **identity}})

    @staticmethod
    def prompt(model: str, tokens: Sequence[int]) -> str:
        """What :meth:`complete` takes: the tokens for a model, whose name there is in ``names``."""
        return json.dumps([model, list(tokens)])

    def client(self) -> Any:
        """The package's own client of the server."""
        return self._client()

    def _ask(self, client: Any, prompt: str, headers: Mapping[str, Any]) -> str:
        model, tokens = json.loads(prompt)
        fields = {name: value for name, value in self.body.items() if name != "model"}
        made = client.completions.with_raw_response.create(
            model=self.names[model], prompt=tokens, extra_body=fields, extra_headers=headers
        )
        return str(made.text)

    def _said(self, choice: Any) -> Any:
        return choice["text"]


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


class _NoAnswerError(Exception):
    """One prompt that got no answer; the message says why."""


def check_address(base_url: str) -> None:
    """See that this is the address of a server, without credentials.

    Raises:
        ConfigError: it is not; the message begins with ``base_url:``.
    """
    try:
        address = urlsplit(base_url)
        right = address.scheme in {"http", "https"} and bool(address.hostname) and address.port != 0
    except ValueError:  # a port that is no number
        right = False
    if not right:
        raise ConfigError("base_url: not an http or https address such as https://api.openai.com/v1")
    if address.username or address.password or address.query:
        raise ConfigError("base_url: carries credentials or a query; put the key into an environment variable")


def excerpt(text: str, key_variable: str) -> str:
    """The beginning of what a server said, on one line; a key that it repeats is taken out."""
    key = os.environ.get(key_variable)
    return repr(cut(text.replace(key, "***") if key else text, 200))


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


def first_list(answer: str, read: Callable[[list[Any]], list[_Read]]) -> list[_Read]:
    """What ``read`` makes of the first JSON list in ``answer`` that it can use; empty where it can use none.

    Chat models say things around the list they were asked for, and put lists into objects.

    >>> first_list('Sure [1]: {"names": ["a", "b"]}', lambda items: [item for item in items if isinstance(item, str)])
    ['a', 'b']
    """
    decoder = json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\[", answer)):
        try:
            items, _ = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            continue
        if found := read(items):
            return found
    return []


def ask_until_usable(
    chat: Chat,
    prompts: Mapping[str, str],
    reminders: Sequence[str],
    read: Callable[[str, str], _Read],
    *,
    forget: bool,
) -> tuple[dict[str, _Read], dict[str, str]]:
    """Ask about each instruction until the answer is of use, each time in other words.

    The same words would bring the same answer, from the cache or from a model that does not sample.

    Args:
        chat: answers the prompts, and keeps what it answered.
        prompts: instruction -> what to ask about it.
        reminders: what each attempt adds to the prompt.
        read: makes of ``(instruction, answer)`` what is wanted, or something false where the answer is of no use.
        forget: whether answers of no use are forgotten where no attempt brought a better one, so that the next call
            asks again.

    Returns:
        What was read for each instruction, and the last answer about each of the others.

    Raises:
        RunError: the model did not answer.
    """
    found: dict[str, _Read] = {}
    answers: dict[str, str] = {}

    for reminder in reminders:
        left = [each for each in prompts if each not in found]
        replies = chat.complete([prompts[each] + reminder for each in left]) if left else []
        answers = dict(zip(left, replies, strict=True))
        found |= {each: value for each, answer in answers.items() if (value := read(each, answer))}
    unusable = {each: answer for each, answer in answers.items() if each not in found}
    if forget:
        chat.forget([prompts[each] + reminder for each in unusable for reminder in reminders])
    return found, unusable
