"""A worker that answers what many clients ask, in mixed batches."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

from cit_fast.data.example import Example
from cit_fast.errors import CitFastError, DataError
from cit_fast.inference.continual_model import ContinualModel
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.generation import Answer, Sampling, generate_answers
from cit_fast.models.prompts import ExampleTooLongError

_log = logging.getLogger(__name__)
WHOLE = "auto"
"""What answers where the model itself was trained, and there are no sets."""


class BusyError(CitFastError):
    """As many questions wait as may wait."""


class StoppingError(CitFastError):
    """The server is being stopped."""


@dataclass(frozen=True)
class Question:
    """What one client asks.

    Args:
        example: the prompt. ``adapter``: the set that answers, :data:`BASE` for none; ``None``: the router chooses.
        max_new_tokens: of the answer. ``temperature``: 0 for the most likely token at every step; ``seed``: of the
            draws otherwise.
    """

    example: Example
    adapter: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What a client is told: the answer, the set that gave it, and how many tokens the prompt has."""

    answer: Answer
    adapter: str
    prompt_tokens: int


@dataclass
class _Waiting:
    question: Question
    reply: Future[Reply] = field(default_factory=Future)


class Engine:
    """Answers questions in one thread, as many at a time as wait, up to ``batch_size``, whatever their adapter sets.

    Args:
        model: that answers. ``batch_size``: prompts at a time.
        most_waiting: questions that may wait; the next one is refused.
        grace: seconds that a batch has to end when the engine is left; then the process may end without it.

    Example::

        with Engine(model) as engine:
            reply = engine.ask(Question(Example("Say hello.", references=("-",)))).result()
    """

    def __init__(
        self, model: ContinualModel, batch_size: int = 16, most_waiting: int = 256, grace: float = 30.0
    ) -> None:
        self.model, self.batch_size, self.grace = model, batch_size, grace
        known = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = known or model.encoder.max_length
        self._encoder = model.encoder.with_limit(None, "error")
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(most_waiting)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="cit-fast-engine", daemon=True)
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop, and give the batch that has begun ``grace`` seconds to end."""
        self.stop()
        self._thread.join(self.grace)
        self._refuse()

    def stop(self) -> None:
        """Take no more questions; what is in the batch is answered, what waits is refused."""
        self._stopping.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes the worker where nothing waits

    @property
    def sets(self) -> tuple[str, ...]:
        """The adapter sets that can answer."""
        return tuple(name for name in self.model.sets if name not in self.model.unusable)

    @property
    def working(self) -> bool:
        """Whether questions are taken and answered."""
        return self._thread.is_alive() and not self._stopping.is_set()

    @property
    def waiting(self) -> int:
        """Questions that wait, about."""
        return self._queue.qsize()

    def ask(self, question: Question) -> Future[Reply]:
        """Put a question into the queue; a reply that is cancelled before its batch begins is not computed.

        Raises:
            BusyError: the queue is full. StoppingError: no more questions are taken.
        """
        if self._stopping.is_set():
            raise StoppingError("the server is being stopped")
        waiting = _Waiting(question)
        try:
            self._queue.put_nowait(waiting)
        except queue.Full:
            raise BusyError(f"{self._queue.maxsize} requests are waiting; try again later") from None
        return waiting.reply

    # -- the worker ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stopping.is_set():
            first = self._queue.get()
            batch = [] if first is None else [first]
            while len(batch) < self.batch_size:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                batch += [] if more is None else [more]
            asked = [each for each in batch if each.reply.set_running_or_notify_cancel()]
            asked = [each for each in asked if self._fits(each)]
            if asked:
                self.counts["batches"] += 1
                self._answer(asked)
        self._refuse()

    def _refuse(self) -> None:
        """Tell what waits that nobody will answer it."""
        while True:
            try:
                left = self._queue.get_nowait()
            except queue.Empty:
                return
            if left is not None and left.reply.set_running_or_notify_cancel():
                left.reply.set_exception(StoppingError("the server is being stopped"))

    def _fits(self, each: _Waiting) -> bool:
        """Whether a question can be answered; where it cannot, the client is told, and the batch goes on without it."""
        try:
            self._prompt(each.question)
            adapter = each.question.adapter
            if self.model.router is not None and adapter not in (None, BASE, *self.sets):
                raise DataError(f"there is no adapter set {adapter!r}")
        except CitFastError as error:
            each.reply.set_exception(error)
            return False
        except Exception as error:  # noqa: BLE001  # whatever a prompt makes of a tokenizer; the worker must go on
            _log.exception("a question could not be read")
            each.reply.set_exception(error)
            return False
        return True

    def _answer(self, asked: list[_Waiting]) -> None:
        """Answer a batch; where that fails, in halves, so that no question takes others with it."""
        failure: Exception | None = None
        replies: list[Reply] = []
        try:
            replies = self._replies([each.question for each in asked])
        except Exception as error:  # noqa: BLE001  # whatever it is, the client is told and the next one served
            _log.exception("a batch of %d failed", len(asked))
            failure = error.with_traceback(None)  # whose frames hold what the batch had in memory
        if failure is not None and len(asked) > 1:
            for half in (asked[: len(asked) // 2], asked[len(asked) // 2 :]):
                self._answer(half)
        elif failure is not None:
            asked[0].reply.set_exception(failure)
        for each, reply in zip(asked, replies, strict=False):
            self.counts["answers"] += 1
            self.counts["prompt_tokens"] += reply.prompt_tokens
            self.counts["answer_tokens"] += reply.answer.tokens
            each.reply.set_result(reply)

    def _replies(self, questions: list[Question]) -> list[Reply]:
        prompts = [self._prompt(question) for question in questions]
        sets = self._sets(questions)
        found: list[Reply | None] = [None] * len(questions)
        kinds = Counter((question.max_new_tokens, question.temperature) for question in questions)
        for longest, temperature in kinds:
            own = [k for k, q in enumerate(questions) if (q.max_new_tokens, q.temperature) == (longest, temperature)]
            answers = generate_answers(
                self.model.model,
                [prompts[k] for k in own],
                tokenizer=self._encoder.tokenizer,
                pad_token_id=self._encoder.pad_token_id,
                eos_token_ids=self._encoder.stop_token_ids,
                max_new_tokens=longest,
                batch_size=self.batch_size,
                adapters=None if self.model.router is None else [sets[k] for k in own],
                bank=self.model.bank,
                sampling=Sampling(temperature, [questions[k].seed for k in own]) if temperature else None,
            )
            for k, answer in zip(own, answers, strict=True):
                found[k] = Reply(answer, sets[k], len(prompts[k]))
        return [reply for reply in found if reply is not None]

    def _prompt(self, question: Question) -> list[int]:
        ids = self._encoder.prompt(question.example)
        if self.context is not None and len(ids) + question.max_new_tokens > self.context:
            raise ExampleTooLongError(
                f"the prompt has {len(ids)} tokens and the answer may have {question.max_new_tokens}; the model's "
                f"context is {self.context}"
            )
        return ids

    def _sets(self, questions: list[Question]) -> list[str]:
        if self.model.router is None:
            return [WHOLE] * len(questions)
        open_questions = [k for k, question in enumerate(questions) if question.adapter is None]
        chosen = dict(
            zip(open_questions, self.model.route([questions[k].example for k in open_questions]), strict=True)
        )
        return [chosen[k] if question.adapter is None else question.adapter for k, question in enumerate(questions)]
