"""Requests and replies as OpenAI's clients send and expect them."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cit_fast.data.example import Example
from cit_fast.data.images import IMAGE_MARK
from cit_fast.errors import CitFastError, DataError
from cit_fast.inference.questions import Question, Reply
from cit_fast.models.adapter_bank import BASE

BASE_NAME = "base"
"""What clients call the base model alone."""


class UnknownModelError(CitFastError):
    """A set that is not there."""


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[Any] | None = None

    @property
    def text(self) -> str:
        """The parts that are text, joined, with a mark where an image stands; empty where the assistant said nothing.

        Raises:
            DataError: a part of another kind, a call of a tool, or nothing said by somebody else.
        """
        if self.tool_calls:
            raise DataError("messages: this model calls no tools, and one of them does")
        if self.content is None:
            if self.role != "assistant":
                raise DataError(f"messages: one of the {self.role} has no content")
            return ""
        if isinstance(self.content, str):
            return self.content
        return "".join(map(self._part, self.content))

    @property
    def images(self) -> tuple[str, ...]:
        """The images in it, as examples have them."""
        parts = self.content if isinstance(self.content, list) else []
        return tuple(part["image_url"]["url"] for part in parts if part.get("type") == "image_url")

    def _part(self, part: Mapping[str, Any]) -> str:
        kind, address = part.get("type"), part.get("image_url")
        if kind == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if kind != "image_url" or not isinstance(address, Mapping) or self.role != "user":
            raise DataError(
                f"messages: a part of the {self.role}'s is {kind!r}; text, and a user's image_url, are read"
            )
        if not str(address.get("url")).startswith("data:"):  # neither a file here nor anything else is fetched
            raise DataError("messages: an image must come as a data: URI; addresses and paths are not opened")
        return IMAGE_MARK


class CompletionRequest(BaseModel):
    """What both kinds of request have; what is not known here changes nothing."""

    model_config = ConfigDict(extra="ignore")
    model: str = "auto"
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, ge=0.0, le=1.0)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None

    def question(self, example: Example, names: Mapping[str, str | None]) -> Question:
        """For the engine.

        Args:
            names: that a client may ask for -> the set.

        Raises:
            UnknownModelError: no such set.
        """
        if self.model not in names:
            raise UnknownModelError(f"the model {self.model!r} does not exist; there are {', '.join(names)}")
        longest = self.max_completion_tokens or self.max_tokens
        seed = secrets.randbits(62) if self.seed is None else self.seed
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Question(example, names[self.model], longest, self.temperature, seed, stop, self.top_p)


class ChatRequest(CompletionRequest):
    """A conversation to go on with."""

    messages: list[Message] = Field(min_length=1)

    @property
    def example(self) -> Example:
        """The conversation, as one whose answer is still to come."""
        turns = [("system" if one.role == "developer" else one.role, one.text) for one in self.messages]
        if turns[-1][0] != "user" or not turns[-1][1].strip():
            raise DataError("messages: the last one must be the user's, and say something")
        images = tuple(image for one in self.messages for image in one.images)
        if len(turns) == 1:
            return Example(turns[0][1], references=("-",), images=images)
        return Example("", references=("-",), messages=(*turns, ("assistant", "-")), images=images)


class TextRequest(CompletionRequest):
    """A prompt without turns."""

    prompt: str

    @property
    def example(self) -> Example:
        """The prompt, as ``cit-fast generate`` reads one."""
        if not self.prompt.strip():
            raise DataError("prompt: it is empty")
        return Example(self.prompt, references=("-",))


_Kind = TypeVar("_Kind", bound=CompletionRequest)


# What would change the answer and is not there: the one value that changes nothing.
_NEUTRAL: Final[Mapping[str, Any]] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tools": [],
    "top_logprobs": 0,
}


def parsed(body: Any, kind: type[_Kind]) -> _Kind:
    """A request, checked; ``null`` is as if it were not there.

    Raises:
        DataError: what is wrong with it, and where.
    """
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if value is not None}
        for name, neutral in _NEUTRAL.items():
            if body.get(name, neutral) != neutral:
                raise DataError(f"{name}: only {json.dumps(neutral)} is possible here; leave it out")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{'.'.join(map(str, first['loc'])) or 'the request'}: {first['msg']}") from None


def _of_chat(asked: CompletionRequest) -> bool:
    return isinstance(asked, ChatRequest)


def _common(asked: CompletionRequest, adapter: str, chunk: bool) -> dict[str, Any]:
    chat = _of_chat(asked)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": ("chat.completion" if chat else "text_completion") + (".chunk" if chunk and chat else ""),
        "created": int(time.time()),
        "model": BASE_NAME if adapter == BASE else adapter,
    }


def _reason(reply: Reply) -> str:
    return "stop" if reply.answer.ended else "length"


def _usage(reply: Reply) -> dict[str, int]:
    asked, answered = reply.prompt_tokens, reply.answer.tokens
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def completion(asked: CompletionRequest, reply: Reply) -> dict[str, Any]:
    """The whole reply, as one object."""
    text = reply.answer.text
    said = {"message": {"role": "assistant", "content": text}} if _of_chat(asked) else {"text": text}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": _reason(reply)}
    return {**_common(asked, reply.adapter, False), "choices": [choice], "usage": _usage(reply)}


class Chunks:
    """The events of one streamed answer, as OpenAI's clients expect them."""

    def __init__(self, asked: CompletionRequest) -> None:
        self._asked, self._common = asked, dict[str, Any]()

    def of_piece(self, text: str, adapter: str) -> dict[str, Any]:
        """Further text."""
        first = not self._common
        self._common = self._common or _common(self._asked, adapter, True)
        if not _of_chat(self._asked):
            return self._chunk({"text": text}, None)
        return self._chunk({"delta": {**({"role": "assistant"} if first else {}), "content": text}}, None)

    def of_end(self, reply: Reply) -> list[dict[str, Any]]:
        """What comes when the answer is complete."""
        found = [] if self._common else [self.of_piece("", reply.adapter)]  # an empty answer
        found.append(self._chunk({"delta": {}} if _of_chat(self._asked) else {"text": ""}, _reason(reply)))
        if (self._asked.stream_options or {}).get("include_usage"):
            found.append({**self._common, "choices": [], "usage": _usage(reply)})
        return found

    def _chunk(self, said: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        return {**self._common, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}
