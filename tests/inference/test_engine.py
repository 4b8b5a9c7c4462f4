"""The engine alone: what joins, what fails, what is lost, what ends."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import CancelledError

import pytest
from asking import Slow, client, serving, text

from cit_fast.data import Example
from cit_fast.errors import DataError, RunError
from cit_fast.inference import engine as engine_module
from cit_fast.inference.engine import Engine
from cit_fast.inference.questions import BusyError, Question, StoppingError
from cit_fast.models.adapter_bank import RowsLostError
from cit_fast.models.generation import Answer
from cit_fast.models.prefix_cache import CacheLostError
from cit_fast.models.running_batch import RunningBatch


def test_one_bad_question_takes_no_other_with_it(model, examples):
    with Engine(model, batch_size=4) as engine:
        good = [Question(example, max_new_tokens=4) for example in examples[:3]]
        futures = [engine.ask(each) for each in (*good, Question(examples[0], adapter="gone", max_new_tokens=4))]
        assert [f.result().answer.text for f in futures[:3]] == model.generate(examples[:3], 4)
        with pytest.raises(DataError, match="no adapter set 'gone'"):
            futures[3].result()


def failing(monkeypatch, longest: int) -> list[int]:
    """Any batch with a question of so many tokens fails; the sizes of batches that are tried apart."""
    sizes, join, answers = [], RunningBatch.join, Engine._answers

    def join_or_fail(batch, rows):
        if any(row.longest == longest for row in rows):
            raise MemoryError("no room")
        join(batch, rows)

    def answers_or_fail(engine, asked):
        sizes.append(len(asked))
        if any(each.question.max_new_tokens == longest for each in asked):
            raise MemoryError("no room")
        return answers(engine, asked)

    monkeypatch.setattr(RunningBatch, "join", join_or_fail)
    monkeypatch.setattr(Engine, "_answers", answers_or_fail)
    return sizes


def test_prompts_that_cannot_be_read_are_tried_in_halves(model, monkeypatch, examples):
    slow, sizes = Slow(monkeypatch), failing(monkeypatch, 5)
    with Engine(model, batch_size=5) as engine:
        first = engine.ask(Question(examples[0], max_new_tokens=4))
        assert slow.begun.wait(30)
        futures = [engine.ask(Question(examples[k], max_new_tokens=5 if k == 1 else 4)) for k in range(4)]
        slow.go.set()
        with pytest.raises(MemoryError):
            futures[1].result(30)
        answers = [each.result(30).answer.text for each in (first, futures[0], *futures[2:])]
    assert answers == model.generate([examples[k] for k in (0, 0, 2, 3)], 4)
    assert sizes == [2, 1, 1, 2]


def test_a_prompt_that_cannot_join_is_tried_alone_once(model, monkeypatch, examples):
    sizes = failing(monkeypatch, 5)
    with Engine(model) as engine:
        with pytest.raises(MemoryError):
            engine.ask(Question(examples[0], max_new_tokens=5)).result(30)
        assert sizes == [1]
        monkeypatch.setattr(RunningBatch, "join", lambda *_: 1 / 0)
        assert engine.ask(Question(examples[0], max_new_tokens=4)).result(30).answer.text
    assert sizes == [1, 1]


@pytest.mark.parametrize("joins", [True, False])
def test_tokens_are_counted_to_the_end_of_a_stop_text(model, monkeypatch, examples, joins):
    """However many more have been made of it by then."""
    monkeypatch.setattr(engine_module, "can_run_on", lambda *_: joins)
    with Engine(model) as engine:
        whole = engine.ask(Question(examples[0], max_new_tokens=24)).result(30).answer
        for stop in set(whole.text[1:].replace(" ", "")):
            found = engine.ask(Question(examples[0], max_new_tokens=24, stop=(stop,))).result(30).answer
            assert found.text == whole.text[: whole.text.index(stop)]
            most = whole.text.index(stop) + 1  # of a character or more each
            assert 1 <= found.tokens <= most
            again = engine.ask(Question(examples[0], max_new_tokens=found.tokens)).result(30).answer
            assert again.text.startswith(found.text + stop)
            assert found.tokens == 1 or stop not in shorter(engine, examples[0], found.tokens - 1)


def shorter(engine: Engine, example: Example, tokens: int) -> str:
    return engine.ask(Question(example, max_new_tokens=tokens)).result(30).answer.text


def test_answers_that_fail_together_are_tried_apart(model, monkeypatch, examples):
    """One that was told a part of its answer is told the rest, or that it broke off where it became another one."""
    plain, calls = RunningBatch.step, []

    def step(batch, tokens=8):
        calls.append(len(batch.rows))
        if len(calls) == 2:
            raise MemoryError("no room")
        return plain(batch, tokens)

    expected = model.generate(examples[:3], 24)
    monkeypatch.setattr(RunningBatch, "step", step)
    for changed in (False, True):
        calls.clear()
        heard: list[str] = []
        with Engine(model, batch_size=4) as engine, monkeypatch.context() as patch:
            if changed:
                patch.setattr(engine, "_answers", lambda some: [Answer("other", True, 1, (5,))] * len(some))
            engine._let_in, held = (lambda: time.sleep(0.01)), engine._let_in
            asked = [engine.ask(Question(examples[k], max_new_tokens=24)) for k in range(2)]
            told = engine.ask(Question(examples[2], max_new_tokens=24), lambda text, _, heard=heard: heard.append(text))
            engine._let_in = held
            if changed:
                with pytest.raises(RuntimeError, match="the answer broke off"):
                    told.result(30)
            else:
                assert told.result(30).answer.text == "".join(heard) == expected[2]
                assert [each.result(30).answer.text for each in asked] == expected[:2]
        assert calls[0] == calls[1] == 3
        assert len(heard) > (0 if changed else 1)


@pytest.mark.parametrize("where", ["_generating", "_leave"])
def test_what_was_let_in_is_not_lost(model, monkeypatch, examples, where):
    """Whatever fails between a question's place in the queue and its place in the batch."""
    plain, failed = getattr(Engine, where), []

    def fails_once(engine, *given):
        if engine._joining and not failed:
            failed.append(len(engine._joining))
            raise MemoryError("no room")
        return plain(engine, *given)

    monkeypatch.setattr(Engine, where, fails_once)
    with Engine(model, batch_size=4) as engine:
        engine._let_in, held = (lambda: time.sleep(0.01)), engine._let_in
        asked = [engine.ask(Question(each, max_new_tokens=4)) for each in examples[:2]]
        engine._let_in = held
        answers = [each.result(30).answer.text for each in asked]
    assert failed == [2]
    assert answers == model.generate(examples[:2], 4)


def test_a_worker_that_ends_leaves_nobody_waiting(model, monkeypatch, examples):
    class Panic(BaseException):
        pass

    def step(batch, tokens=8):
        raise Panic

    monkeypatch.setattr(RunningBatch, "step", step)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with Engine(model, batch_size=1) as engine:
        asked = [engine.ask(Question(each, max_new_tokens=4)) for each in examples[:2]]
        for each in asked:
            with pytest.raises(StoppingError):
                each.result(30)
        assert not engine.working
        with pytest.raises(StoppingError):
            engine.ask(Question(examples[0]))


def test_a_prompt_that_panics_a_tokenizer_is_refused_alone(model, monkeypatch, examples):
    class Panic(BaseException):
        pass

    plain = Engine._prompt

    def prompt(engine, question):
        if question.seed == 13:
            raise Panic
        return plain(engine, question)

    monkeypatch.setattr(Engine, "_prompt", prompt)
    with Engine(model) as engine:
        with pytest.raises(Panic):
            engine.ask(Question(examples[0], max_new_tokens=4, seed=13)).result(30)
        assert engine.ask(Question(examples[0], max_new_tokens=4)).result(30).answer.text


def test_a_question_joins_answers_that_are_under_way(model, monkeypatch, examples):
    """It does not wait for a long one, and neither changes the other."""
    slow = Slow(monkeypatch)
    order: list[str] = []
    with Engine(model, batch_size=4) as engine:
        long = engine.ask(Question(examples[0], max_new_tokens=40))
        assert slow.begun.wait(30)
        short = engine.ask(Question(examples[4], max_new_tokens=3))
        for name, each in (("long", long), ("short", short)):
            each.add_done_callback(lambda _, name=name: order.append(name))
        slow.go.set()
        texts = [long.result(30).answer.text, short.result(30).answer.text]
        assert engine.counts["joined"] == 2
    assert order == ["short", "long"]
    assert texts == [model.generate([examples[0]], 40)[0], model.generate([examples[4]], 3)[0]]


def test_a_listener_that_fails_loses_its_own_answer_alone(model, examples):
    with Engine(model, batch_size=4) as engine:
        bad = engine.ask(Question(examples[0], max_new_tokens=24), lambda *_: 1 / 0)
        good = engine.ask(Question(examples[1], max_new_tokens=24))
        with pytest.raises(CancelledError):
            bad.result(30)
        assert good.result(30).answer.text == model.generate([examples[1]], 24)[0]
        assert engine.working


def test_where_rows_cannot_be_mixed_batches_are_answered(model, monkeypatch, examples):
    """Experts lose the batch's rows, others the cache; models of states keep no keys and values at all."""
    expected = model.generate(examples[:3], 4)
    for name, error in itertools.product(("step", "join"), (RowsLostError, CacheLostError)):

        def lost(batch, tokens, error=error):
            raise error

        with monkeypatch.context() as patch, Engine(model) as engine:
            patch.setattr(RunningBatch, name, lost)
            for _ in range(2):
                asked = [engine.ask(Question(each, max_new_tokens=4)) for each in examples[:3]]
                assert [each.result(30).answer.text for each in asked] == expected
            assert not engine.counts["steps"]
    monkeypatch.setattr(engine_module, "can_run_on", lambda *_: False)
    with Engine(model) as engine, serving(engine) as url:
        assert asked_streaming(url, text(examples[0])) == model.generate([text(examples[0])], 6)[0]


def asked_streaming(url: str, prompt: str) -> str:
    with client(url) as one:
        said = [{"role": "user", "content": prompt}]
        chunks = one.chat.completions.create(model="auto", messages=said, max_tokens=6, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_stopping_answers_the_batch_and_refuses_the_rest(model, monkeypatch, examples):
    slow = Slow(monkeypatch)
    with Engine(model, batch_size=1, most_waiting=4) as engine:
        running = engine.ask(Question(examples[0], max_new_tokens=4))
        assert slow.begun.wait(30)
        waiting = engine.ask(Question(examples[1], max_new_tokens=4))
        threading.Timer(0.2, slow.go.set).start()
    assert running.result(1).answer is not None
    with pytest.raises(StoppingError):
        waiting.result(1)
    with pytest.raises(StoppingError):
        engine.ask(Question(examples[2]))


def test_a_question_that_is_given_up_leaves_its_place(model, monkeypatch, examples):
    slow = Slow(monkeypatch)
    with Engine(model, batch_size=1, most_waiting=2) as engine:
        first = engine.ask(Question(examples[0], max_new_tokens=4))
        assert slow.begun.wait(30)
        given_up = [engine.ask(Question(examples[1], max_new_tokens=4)) for _ in range(2)]
        with pytest.raises(BusyError):
            engine.ask(Question(examples[2], max_new_tokens=4))
        assert [each.cancel() for each in given_up] == [True, True]
        assert engine.waiting == 0
        last = engine.ask(Question(examples[2], max_new_tokens=4))
        slow.go.set()
        assert [each.result(30).answer.text for each in (first, last)] == model.generate([examples[0], examples[2]], 4)
        assert engine.counts["answers"] == 2


def test_replacing_takes_no_place_in_the_queue(model, monkeypatch, examples):
    slow = Slow(monkeypatch)
    with Engine(model, batch_size=1, most_waiting=1) as engine:
        first = engine.ask(Question(examples[0], max_new_tokens=4))
        assert slow.begun.wait(30)
        for _ in range(3):
            engine.replace(lambda before: before)
        assert engine.waiting == 0
        second = engine.ask(Question(examples[1], max_new_tokens=4))
        assert engine.waiting == 1
        slow.go.set()
        assert [each.result(30).answer.text for each in (first, second)] == model.generate(examples[:2], 4)
        assert engine.counts["replaced"] == 1


def test_a_stage_that_cannot_be_loaded_leaves_the_one_before(model, examples, caplog):
    def load(_before):
        raise RunError("damaged")

    with Engine(model) as engine:
        engine.replace(load)
        answer = engine.ask(Question(examples[0], max_new_tokens=4)).result(30)
        assert answer.answer.text == model.generate([examples[0]], 4)[0]
    assert "the next model cannot be loaded; this one stays" in caplog.text
    assert (engine.counts["replaced"], engine.counts["not_replaced"]) == (0, 1)


def test_a_client_is_told_once(examples):
    """Whoever has an answer, or has gone, is not told of what fails afterwards."""
    answered, gone = (engine_module._Waiting(Question(examples[0])) for _ in range(2))
    answered.reply.set_result("the answer")
    gone.reply.cancel()
    for each in (answered, gone, gone):
        each.fail(RuntimeError("too late"))
    assert answered.reply.result() == "the answer"
    assert gone.reply.cancelled()
