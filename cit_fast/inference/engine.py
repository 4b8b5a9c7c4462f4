"""A worker that answers what many clients ask, in one batch that questions join and leave."""

from __future__ import annotations

import bisect
import contextlib
import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from transformers import GenerationConfig

from cit_fast.errors import CitFastError, DataError
from cit_fast.inference.continual_model import ContinualModel
from cit_fast.inference.questions import WHOLE, BusyError, Heard, Question, Reply, Said, StoppingError
from cit_fast.models.adapter_bank import BASE, RowsLostError
from cit_fast.models.generation import Answer, Sampling, can_run_on, decoded, generate_answers, generating
from cit_fast.models.image_reader import pictures_of
from cit_fast.models.prefix_cache import CacheLostError, PromptReader
from cit_fast.models.prompts import ExampleTooLongError
from cit_fast.models.running_batch import Chance, Row, RunningBatch

_log = logging.getLogger(__name__)
_AT_A_TIME = 4
"""New tokens after which others may join; each such round costs some milliseconds beside the tokens."""


@dataclass(eq=False)
class _Waiting:
    question: Question
    heard: Heard | None = None
    reply: Future[Reply] = field(default_factory=Future)
    tokens: Sequence[int] = ()
    longest: int = 0
    adapter: str = WHOLE
    said: Said = field(default_factory=Said)

    def new_said(self) -> Said:
        """For an answer from the start."""
        return Said(self.question.stop, None if self.heard is None else self._tell)

    def _tell(self, text: str) -> None:
        try:
            if self.heard is not None:
                self.heard(text, self.adapter)
        except Exception:  # noqa: BLE001  # a listener's fault must not take the others' answers
            _log.exception("a listener failed; its answer is given up")
            self.heard = None
            self.reply.cancel()

    def fail(self, error: BaseException) -> None:
        """Tell the client, if there is still one, that there is no answer."""
        if not self.reply.done() and self.reply.set_running_or_notify_cancel():
            self.reply.set_exception(error)


class Engine:
    """Answers questions in one thread, up to ``batch_size`` at a time, whatever their adapter sets.

    A question joins those that are being answered as soon as there is room, and leaves when its answer ends. A model
    whose keys and values cannot be joined (sliding windows, states) answers batch after batch.

    Args:
        model: that answers. ``batch_size``: prompts at a time.
        most_waiting: questions that may wait; the next one is refused.
        grace: seconds that what is being answered has to end when the engine is left; then the process may end
            without it.

    Example::

        with Engine(model) as engine:
            reply = engine.ask(Question(Example("Say hello.", references=("-",)))).result()
    """

    def __init__(
        self, model: ContinualModel, batch_size: int = 16, most_waiting: int = 256, grace: float = 30.0
    ) -> None:
        self.batch_size, self.most_waiting, self.grace = batch_size, most_waiting, grace
        self._lock, self._queue = threading.Lock(), deque[_Waiting]()
        # Wakes the worker; reentrant, for a signal's handler stops the engine.
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopping, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._work, name="cit-fast-engine", daemon=True)
        self._running: dict[Row, _Waiting] = {}
        self._joining: list[_Waiting] = []
        self._replacement: Callable[[ContinualModel], ContinualModel] | None = None
        self.counts: Counter[str] = Counter()
        self._take(model)

    def _take(self, model: ContinualModel) -> None:
        self.model = model
        known = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = known or model.encoder.max_length
        self._encoder = model.encoder.with_limit(None, "error")
        self._reader = PromptReader(model.model, None if model.bank is None else model.bank.answering)
        self._batch = self._empty_batch()
        self._mixes = model.router is None or model.bank is not None

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop, and give what is being answered ``grace`` seconds to end."""
        self.stop()
        self._thread.join(self.grace)
        self._refuse()

    def stop(self) -> None:
        """Take no more questions; what is being answered is answered, what waits is refused."""
        self._stopping = True
        self._calls.put(None)

    @property
    def sets(self) -> tuple[str, ...]:
        """The adapter sets that can answer."""
        return tuple(name for name in self.model.sets if name not in self.model.unusable)

    @property
    def working(self) -> bool:
        """Whether questions are taken and answered."""
        return self._thread.is_alive() and not self._stopping and not self._ended.is_set()

    @property
    def waiting(self) -> int:
        """Questions that wait."""
        return len(self._queue)

    def ask(self, question: Question, heard: Heard | None = None) -> Future[Reply]:
        """Put a question into the queue; one whose reply is cancelled leaves it, or the running batch.

        Args:
            heard: is told the answer's text as it comes, in this engine's thread.

        Raises:
            BusyError: the queue is full. StoppingError: no more questions are taken.
        """
        if self._stopping or self._ended.is_set():
            raise StoppingError("the server is being stopped")
        waiting = _Waiting(question, heard)
        with self._lock:
            if len(self._queue) >= self.most_waiting:
                raise BusyError(f"{self.most_waiting} requests are waiting; try again later")
            self._queue.append(waiting)
        waiting.reply.add_done_callback(lambda _: self._forget(waiting))
        self._calls.put(None)
        if self._ended.is_set():  # in between
            self._refuse()
        return waiting.reply

    def replace(self, load: Callable[[ContinualModel], ContinualModel]) -> None:
        """Answer with another model, once what is being answered has ended; what waits waits for it.

        Args:
            load: called in this engine's thread with the model so far, for the next one; where it fails, that is
                logged, and the model stays.
        """
        with self._lock:
            self._replacement = load
        self._calls.put(None)

    @property
    def replacing(self) -> bool:
        """Whether another model is about to answer."""
        return self._replacement is not None

    # -- the worker ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._running or not self._stopping:
                failure: Exception | None = None
                try:
                    self._round()
                except Exception as error:  # noqa: BLE001  # whatever it is, the clients are told, the next one served
                    _log.exception("%d answers failed", len(self._running) + len(self._joining))
                    failure = error
                if failure is not None:
                    self._again(self._lost(), failure)
        finally:  # what is no Exception, too: nobody is left to wait
            self._ended.set()
            for each in self._lost():
                each.fail(StoppingError("the server has ended"))
            self._refuse()

    def _round(self) -> None:
        """Let in what waits, and answer some tokens of all."""
        load = self._replacement
        if load is None:
            self._let_in()
        elif not self._running:
            self._replace(load)
            with self._lock:
                if self._replacement is load:
                    self._replacement = None
        gone = [row for row, each in self._running.items() if each.reply.cancelled()]
        if not self._joining and not self._running:
            return
        with self._generating():
            self._leave(gone)
            if self._joining:
                self._join()
            if self._running:
                self._step()

    def _replace(self, load: Callable[[ContinualModel], ContinualModel]) -> None:
        try:
            self._take(load(self.model))
        except Exception:  # noqa: BLE001  # whatever it is, what answers so far goes on answering
            _log.exception("the next model cannot be loaded; this one stays")
            self.counts["not_replaced"] += 1  # /metrics says so, too
        else:
            self.counts["replaced"] += 1

    def _let_in(self) -> None:
        """Questions that there is room for; waits for one where nothing is being answered."""
        while len(self._running) + len(self._joining) < self.batch_size and not self._stopping:
            each = self._taken(wait=not self._running and not self._joining)
            if each is None:
                return
            if not each.reply.cancelled() and self._fits(each):
                self._joining.append(each)

    def _taken(self, wait: bool) -> _Waiting | None:
        """The first in the queue; ``None``: there is none, after having been called where it waits."""
        for again in (wait, False):
            with self._lock:
                if self._queue:
                    with contextlib.suppress(queue.Empty):
                        self._calls.get_nowait()  # its own, or as good as that
                    return self._queue.popleft()
            if again:
                self._calls.get()
        return None

    def _forget(self, each: _Waiting) -> None:
        """Take a question out of the queue, if it is still there."""
        with self._lock, contextlib.suppress(ValueError):
            self._queue.remove(each)

    def _refuse(self) -> None:
        """Tell what waits that nobody will answer it."""
        while (left := self._taken(wait=False)) is not None:
            left.fail(StoppingError("the server is being stopped"))

    def _fits(self, each: _Waiting) -> bool:
        """Whether a question can be answered; where it cannot, the client is told, and the others go on without it."""
        try:
            each.tokens = self._prompt(each.question)
            each.longest = each.question.longest(None if self.context is None else self.context - len(each.tokens))
            adapter = each.question.adapter
            if self.model.router is not None and adapter not in (None, BASE, *self.sets):
                raise DataError(f"there is no adapter set {adapter!r}")
        except CitFastError as error:
            each.fail(error)
            return False
        except BaseException as error:  # noqa: BLE001  # a tokenizer's panic is no Exception; the worker must go on
            _log.exception("a question could not be read")
            each.fail(error)
            return False
        return True

    def _prompt(self, question: Question) -> list[int]:
        if question.example.images and self._encoder.images is None:
            raise DataError("messages: this model takes no images")
        ids = self._encoder.prompt(question.example)
        longest = question.longest(1)  # at least
        if self.context is not None and len(ids) + longest > self.context:
            raise ExampleTooLongError(
                f"the prompt has {len(ids)} tokens and the answer may have {longest}; the model's context is "
                f"{self.context}"
            )
        return ids

    # -- one batch that runs on ------------------------------------------------------------------------------------

    def _empty_batch(self) -> RunningBatch:
        return RunningBatch(self._reader, self._encoder.pad_token_id, self._encoder.stop_token_ids)

    @contextlib.contextmanager
    def _generating(self) -> Iterator[None]:
        config = GenerationConfig(
            do_sample=False, pad_token_id=self._encoder.pad_token_id, eos_token_id=list(self._encoder.stop_token_ids)
        )
        with generating(self.model.model, config):
            yield

    def _join(self) -> None:
        """Read the prompts of what was let in; where that fails, they are answered apart, as those with images are."""
        apart = [each for each in self._joining if pictures_of(each.tokens) is not None]
        self._joining = [each for each in self._joining if each not in apart]
        if apart:
            self._answer(apart)
        if not self._joining:
            return
        new, failure = self._joining, None
        try:
            self._route(new)
            if self._mixes and can_run_on(self.model.model, new[0].tokens, self._encoder.pad_token_id):
                rows = {self._row(each): each for each in new}
                self._batch.join(list(rows))
                self._running |= rows
                self._joining = []
                self.counts["joined"] += len(rows)
                return
        except RowsLostError:  # e.g. experts, each given the tokens that are routed to it
            self._mixes = False
        except CacheLostError:  # from now on this model answers batch after batch
            _log.info("%d prompts are read again", len(new), exc_info=True)
        except Exception as error:  # noqa: BLE001  # whatever it is, the client is told and the next one served
            _log.exception("%d prompts could not be read", len(new))
            failure = error
        self._joining = []
        self._again(new, failure if len(new) > 1 else None)  # one alone may have failed because it was to join

    def _step(self) -> None:
        """Some tokens of every answer that is running, and the end of those that end."""
        try:
            if self._batch.rows:  # those that have just joined may have ended with it
                self._batch.step(_AT_A_TIME)
            self._told()
            return
        except RowsLostError:
            self._mixes = False
        except CacheLostError:  # as in _join
            _log.info("%d answers are begun again", len(self._running), exc_info=True)
        self._again(self._lost())

    def _told(self) -> None:
        """Tell the clients what has come, and end the answers that have ended."""
        self.counts["steps"] += 1
        self.counts["rows"] += len(self._running)
        done = []
        for row, each in self._running.items():
            last = row.ended or not row.left
            each.said.grow(decoded(self._encoder.tokenizer, row.tokens), last)
            if last or each.said.stopped:
                done.append(row)
                self._finish(each, row.tokens, row.ended)
        self._leave(done)

    def _row(self, each: _Waiting) -> Row:
        question = each.question
        each.said = each.new_said()
        chance = Chance(question.temperature, question.seed, question.top_p) if question.temperature else None
        return Row(each.tokens, each.longest, each.adapter if self.model.router else None, chance)

    def _leave(self, rows: Sequence[Row]) -> None:
        self._batch.leave(rows)
        for row in rows:
            del self._running[row]

    def _lost(self) -> list[_Waiting]:
        """What was being answered or let in; from then on nothing is."""
        lost = [*self._running.values(), *self._joining]
        self._running, self._joining, self._batch = {}, [], self._empty_batch()
        return lost

    def _finish(self, each: _Waiting, tokens: Sequence[int], ended: bool) -> None:
        """Tell a client that the answer is complete: what has been said, of these tokens up to the end of a stop text.

        Args:
            ended: whether an end token came.
        """
        count = self._until_stop(each.question.stop, tokens) if each.said.stopped else len(tokens)
        answer = Answer(each.said.text, ended or each.said.stopped, count)
        if each.reply.set_running_or_notify_cancel():
            self.counts["answers"] += 1
            self.counts["prompt_tokens"] += len(each.tokens)
            self.counts["answer_tokens"] += answer.tokens
            each.reply.set_result(Reply(answer, each.adapter, len(each.tokens)))

    def _until_stop(self, stop: Sequence[str], tokens: Sequence[int]) -> int:
        """How many of the tokens it takes until a stop text is there."""

        def stopped(count: int) -> bool:
            said = Said(stop)
            said.grow(decoded(self._encoder.tokenizer, tokens[:count]))
            return said.stopped

        return bisect.bisect_left(range(len(tokens)), True, key=stopped)

    def _route(self, asked: Sequence[_Waiting]) -> None:
        if self.model.router is None:
            return
        open_ones = [each for each in asked if each.question.adapter is None]
        chosen = self.model.route([each.question.example for each in open_ones]) if open_ones else []
        for each, name in zip(open_ones, chosen, strict=True):
            each.adapter = name
        for each in asked:
            each.adapter = each.adapter if each.question.adapter is None else each.question.adapter

    # -- batch after batch -----------------------------------------------------------------------------------------

    def _again(self, lost: Sequence[_Waiting], error: Exception | None = None) -> None:
        """Answer questions apart from the running batch, from the start.

        Args:
            error: that they have met together, no longer being handled, for its frames hold what the batch had in
                memory; one question alone is told.
        """
        left = [each for each in lost if not each.reply.done()]
        if error is not None and len(left) == 1:
            left.pop().fail(error.with_traceback(None))
        middle = len(left) if error is None else len(left) // 2
        for half in (left[:middle], left[middle:]):
            if half:
                self._answer(half)

    def _answer(self, asked: Sequence[_Waiting]) -> None:
        """Answer a batch; where that fails, in halves, so that no question takes others with it."""
        failure: Exception | None = None
        answers: list[Answer] = []
        try:
            self._route(asked)
            answers = self._answers(asked)
        except Exception as error:  # noqa: BLE001  # whatever it is, the client is told and the next one served
            _log.exception("a batch of %d failed", len(asked))
            failure = error
        if failure is not None:
            self._again(asked, failure)
            return
        for each, answer in zip(asked, answers, strict=True):
            if not each.said.told:
                each.said = each.new_said()
            if each.said.go_on(decoded(self._encoder.tokenizer, answer.ids)):
                self._finish(each, answer.ids, answer.ended)
            else:  # rounding has made another answer of it
                each.fail(RuntimeError("the answer broke off"))

    def _answers(self, asked: Sequence[_Waiting]) -> list[Answer]:
        found = [Answer("", False)] * len(asked)
        kinds = [(each.longest, each.question.temperature, each.question.top_p) for each in asked]
        for kind in dict.fromkeys(kinds):
            own = [k for k, other in enumerate(kinds) if other == kind]
            longest, temperature, top_p = kind
            answers = generate_answers(
                self.model.model,
                [asked[k].tokens for k in own],
                tokenizer=self._encoder.tokenizer,
                pad_token_id=self._encoder.pad_token_id,
                eos_token_ids=self._encoder.stop_token_ids,
                max_new_tokens=longest,
                batch_size=self.batch_size,
                adapters=None if self.model.router is None else [asked[k].adapter for k in own],
                bank=self.model.bank,
                sampling=Sampling(temperature, [asked[k].question.seed for k in own], top_p) if temperature else None,
            )
            for k, answer in zip(own, answers, strict=True):
                found[k] = answer
        return found
