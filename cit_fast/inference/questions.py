"""What a client asks and is told, whoever answers: this process (:mod:`~cit_fast.inference.engine`) or another server
(:mod:`~cit_fast.inference.upstream`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from cit_fast.data.example import Example
from cit_fast.errors import CitFastError
from cit_fast.models.generation import Answer

WHOLE = "auto"
"""What answers where the model itself was trained, and there are no sets."""
_UNASKED = 256
"""Tokens of an answer at most, where nobody says how many."""


class BusyError(CitFastError):
    """As many questions wait as may wait."""


class StoppingError(CitFastError):
    """The server is being stopped."""


class UpstreamError(CitFastError):
    """The server behind this one does not answer as it should."""


@dataclass(frozen=True)
class Question:
    """What one client asks.

    Args:
        example: the prompt. ``adapter``: the set that answers, :data:`~cit_fast.models.adapter_bank.BASE` for none;
            ``None``: the router chooses.
        max_new_tokens: of the answer; ``None``: 256, or what is left of the model's context.
        temperature: 0 for the most likely token at every step; ``seed``: of the draws otherwise; ``top_p``: from 0 to
            1, they are of the likeliest tokens that have so much of the probability together.
        stop: the answer ends before the first of these texts.
    """

    example: Example
    adapter: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_p: float = 1.0

    def longest(self, left: int | None) -> int:
        """Tokens that the answer may have.

        Args:
            left: of the model's context after the prompt; ``None``: it has no limit.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return _UNASKED if left is None else min(_UNASKED, left)


@dataclass(frozen=True)
class Reply:
    """What a client is told: the answer, the set that gave it, and how many tokens the prompt has."""

    answer: Answer
    adapter: str
    prompt_tokens: int


Heard = Callable[[str, str], None]
"""Called with each further piece of an answer's text and the set that gives it, from a thread of the answerer's."""


class Answerer(Protocol):
    """Answers questions, many at a time."""

    counts: Counter[str]
    """Of what it has done so far."""

    @property
    def sets(self) -> tuple[str, ...]:
        """The adapter sets that can answer; none where the model itself was trained."""

    @property
    def working(self) -> bool:
        """Whether questions are taken and answered."""

    @property
    def waiting(self) -> int:
        """Questions that wait, about."""

    def ask(self, question: Question, heard: Heard | None = None) -> Future[Reply]:
        """Put a question; one whose reply is cancelled costs nothing more.

        Args:
            heard: is told the answer's text as it comes.

        Raises:
            BusyError: as many wait as may. StoppingError: no more questions are taken.
        """

    def stop(self) -> None:
        """Take no more questions."""


class Said:
    """An answer's text as it grows; hands out what no later token can change.

    White space around an answer is no part of it, though a stop text may be white space; and one may be half there.

    Args:
        stop: the answer ends before the first of these texts.
        heard: is told each further piece.
    """

    def __init__(self, stop: Sequence[str] = (), heard: Callable[[str], None] | None = None) -> None:
        self._stop, self._heard = [each for each in stop if each], heard
        self.text, self.stopped = "", False
        self._told = 0

    @property
    def told(self) -> str:
        """What has been handed out."""
        return self.text[: self._told] if self._heard is not None else ""

    def go_on(self, text: str) -> bool:
        """Take the whole answer, made anew; whether it begins as what has been handed out."""
        told, again = self.told, Said(self._stop)
        again.grow(text, last=True)
        if not again.text.startswith(told):
            return False
        self.text, self.stopped, self._told = again.text, again.stopped, len(again.text)
        if self._heard is not None and again.text != told:
            self._heard(again.text[len(told) :])
        return True

    def grow(self, text: str, last: bool = False) -> None:
        """Take the answer's text so far.

        Args:
            text: all of it. ``last``: nothing more comes.
        """
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(places)
        self.text = (text[: min(places)] if places else text.rstrip() if last else text).lstrip()
        safe = len(self.text) if last or self.stopped else len(self._certain(text).lstrip())
        if self._heard is not None and safe > self._told:
            self._heard(self.text[self._told : safe])
        self._told = max(self._told, safe)

    def _certain(self, text: str) -> str:
        """Without an incomplete character, white space and the beginning of a stop text at the end."""
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        begun = max((k for stop in self._stop for k in range(1, len(stop)) if text.endswith(stop[:k])), default=0)
        return text[: len(text) - begun].rstrip()
