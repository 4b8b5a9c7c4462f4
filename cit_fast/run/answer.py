"""Scores of a model on tasks: prompts shared out over the processes, answers gathered, each task by its own metric."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from tqdm.auto import tqdm

from cit_fast.cache import cache_folder
from cit_fast.data.constraints import Constraints
from cit_fast.data.example import Example, Task
from cit_fast.data.images import recorded_name
from cit_fast.errors import ConfigError, DataError
from cit_fast.evaluation.metrics import JUDGE, score
from cit_fast.evaluation.predictions import Prediction, judged
from cit_fast.methods.routing import Router
from cit_fast.methods.stage import Stage
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.generation import generate
from cit_fast.models.parked_sets import set_names
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run.config import EvaluationConfig
from cit_fast.run.judge import judge_score
from cit_fast.run.label_choice import most_likely
from cit_fast.run.outside_engine import OutsideEngine

Images = tuple[str, ...] | None


@dataclass(frozen=True)
class Evaluated:
    """What :func:`evaluate` found.

    Args:
        scores: task name -> score in [0, 100]; ``violations``: task name -> rates, as a StageRecord has them.
        predictions: task name -> its predictions, in the order of its examples.
        truncated: prompts whose input was shortened to fit; ``skipped``: examples left out because they cannot fit.
        answered_by: task name -> adapter set -> how many of its prompts the router sent there, :data:`BASE` for none
            of the sets; empty without a router. ``routing_seconds``: wall time the router took.
        taken_over: how many answers are those of an earlier stage; ``chosen``: how many of the others are the likeliest
            of their task's labels.
        taken_from: task name -> the stage whose predictions these are, all of them.
    """

    scores: dict[str, float]
    predictions: dict[str, list[Prediction]]
    truncated: int
    skipped: int
    violations: dict[str, dict[str, float]] = field(default_factory=dict)
    answered_by: dict[str, dict[str, int]] = field(default_factory=dict)
    routing_seconds: float = 0.0
    taken_over: int = 0
    chosen: int = 0
    taken_from: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Before:
    """What earlier stages answered last.

    Args:
        predictions: task name -> its predictions; of tasks that have been answered.
        stage: task name -> the stage that has them in a file of its own.
        changed: task name -> the adapter sets that have been trained since it was answered.
    """

    predictions: Mapping[str, Sequence[Prediction]]
    stage: Mapping[str, int]
    changed: Mapping[str, Collection[str]]

    def answer(self, task: str, position: int, prompt: str, images: Images, adapter: str) -> str | None:
        """The answer to the same prompt by the same set, if that has not changed."""
        known = self.predictions.get(task, ())
        if position >= len(known) or adapter in self.changed[task]:
            return None
        one = known[position]
        return one.prediction if (one.prompt, one.images, one.adapter) == (prompt, images, adapter) else None


def evaluate(
    model: Any,
    encoder: PromptEncoder,
    tasks: Sequence[Task],
    config: EvaluationConfig,
    router: Router | None = None,
    title: str = "",
    before: Before | None = None,
    engine: OutsideEngine | None = None,
) -> Evaluated:
    """Answer every example of the tasks' split, each with the adapter set its router names, and score the answers.

    With an ``engine`` its server answers instead of the model. Where an adapter set has not changed since its answers
    ``before``, they are taken over. With ``decode: labels`` the answer to an example of a task with labels is the
    likeliest of them.

    Raises:
        DataError: no example of a task fits.
        RunError: the engine's server does not answer.
    """
    asked: list[tuple[Task, Example]] = []
    prompts: list[list[int]] = []
    truncated = skipped = 0
    for task in tasks:
        split = getattr(task, config.split)
        encoded = encoder.encode_prompts(split, reserve=config.max_new_tokens)
        if not encoded.prompts:
            raise DataError(f"task {task.name!r}: every {config.split} example is longer than data.max_length allows")
        asked += [(task, split[index]) for index in encoded.indices]
        prompts += encoded.prompts
        truncated, skipped = truncated + encoded.truncated, skipped + len(encoded.skipped)
    # All tasks are answered together, so that batches are full and the router reads each prompt once.
    started = time.perf_counter()
    sets = routed(model, encoder, [example for _, example in asked], router)
    routing_seconds = time.perf_counter() - started
    texts = [encoder.text_of(prompt) for prompt in prompts]
    images = [tuple(map(recorded_name, example.images)) or None for _, example in asked]
    answers, taken_over = _taken_over(before, [task.name for task, _ in asked], texts, images, sets)
    new = [index for index, answer in enumerate(answers) if answer is None]
    questions = [_Question(*asked[index], prompts[index], None if sets is None else sets[index]) for index in new]
    if engine is not None:
        asked_there = [question.prompt for question in questions], [question.adapter for question in questions]
        found = engine.answers(model, *asked_there) if new else []
    else:
        found = _answers(model, encoder, questions, config, title) if new else []
    for index, answer in zip(new, found, strict=True):
        answers[index] = answer
    chosen = sum(question.among_labels(config) for question in questions)
    scores: dict[str, float] = {}
    predictions: dict[str, list[Prediction]] = {}
    answered_by: dict[str, dict[str, int]] = {}
    for task in tasks:
        own = [index for index, (of, _) in enumerate(asked) if of is task]
        references = [asked[index][1].references for index in own]
        examples, own_answers = [asked[index][1] for index in own], [str(answers[index]) for index in own]
        if task.metric == JUDGE and config.judge is not None:
            result = judge_score(config.judge, examples, own_answers, cache_folder() / "chat")
        else:
            own_inputs = [example.input or example.instruction for example in examples]
            result = score(task.metric, own_answers, references, labels=task.labels, inputs=own_inputs)
        scores[task.name] = result.value
        # What a score is computed from again.
        inputs = [_kept_input(task, example) for example in examples]
        if sets is not None:
            answered_by[task.name] = dict(Counter(sets[index] for index in own))
        predictions[task.name] = [
            Prediction(
                *(texts[index], answer, right, points, text, None if sets is None else sets[index]),
                images=images[index],
            )
            for index, answer, right, points, text in zip(
                own, own_answers, references, result.per_example, inputs, strict=True
            )
        ]
    same = {}
    if before is not None:
        same = {task: n for task, n in before.stage.items() if predictions.get(task) == before.predictions[task]}
    violations = {task.name: judged(Constraints.of(task), predictions[task.name]) for task in tasks}
    return Evaluated(
        scores, predictions, truncated, skipped, violations, answered_by, routing_seconds, taken_over, chosen, same
    )


def _taken_over(
    before: Before | None,
    tasks: Sequence[str],
    prompts: Sequence[str],
    images: Sequence[Images],
    sets: Sequence[str] | None,
) -> tuple[list[str | None], int]:
    """For each prompt the answer that still holds, or ``None``; and how many hold."""
    answers: list[list[str | None]] = [[None] * len(prompts)]
    if before is not None and sets is not None:
        place: Counter[str] = Counter()
        for index, (task, prompt, shown, name) in enumerate(zip(tasks, prompts, images, sets, strict=True)):
            answers[0][index] = before.answer(task, place[task], prompt, shown, name)
            place[task] += 1
        broadcast_object_list(answers)  # one process decides, as about the sets
    return answers[0], sum(answer is not None for answer in answers[0])


def _kept_input(task: Task, example: Example) -> str | None:
    if task.metric == "sari":
        return example.input or example.instruction
    return example.input if task.extractive else None


def routed(model: Any, encoder: PromptEncoder, examples: Sequence[Example], router: Router | None) -> list[str] | None:
    """For each example the adapter set that answers it; ``None`` where there is nothing to choose from."""
    if router is None or not isinstance(model, PeftModel):
        return None
    sets = [router.answer(examples, Stage(model, encoder, cache=cache_folder()))]
    broadcast_object_list(sets)  # one process decides: others may differ in a last bit, and wait for another's prompts
    unknown = set(sets[0]) - {*set_names(model), BASE}
    if unknown:
        raise ConfigError(f"router: answers with the adapter set {min(unknown)!r}, which no task has trained yet")
    return sets[0]


class _Question(NamedTuple):
    """An example to answer: its task, its prompt as tokens, and the adapter set, ``None`` where there is one only."""

    task: Task
    example: Example
    prompt: list[int]
    adapter: str | None

    def among_labels(self, config: EvaluationConfig) -> bool:
        """Whether the answer is one of the task's labels by construction."""
        return config.decode == "labels" and bool(self.task.labels)


def _answers(
    model: Any, encoder: PromptEncoder, questions: Sequence[_Question], config: EvaluationConfig, title: str
) -> list[str]:
    """The answers in the order of the questions, which are shared out over the processes."""
    state = PartialState()
    bar = tqdm(
        total=len(questions), desc=f"{title}: answering", unit="prompt", leave=False, disable=not state.is_main_process
    )

    def asked(some: Sequence[_Question]) -> dict[str, Any]:
        """What both ways to answer take."""
        sets = [question.adapter for question in some]
        return {
            "prompts": [question.prompt for question in some],
            "adapters": None if None in sets else sets,
            "pad_token_id": encoder.pad_token_id,
            "batch_size": config.batch_size,
            "progress": lambda count: bar.update(count * state.num_processes),
        }

    with bar, state.split_between_processes(list(range(len(questions)))) as numbers:
        mine = [questions[number] for number in numbers]
        closed = [question for question in mine if question.among_labels(config)]
        free = [question for question in mine if not question.among_labels(config)]
        generated = generate(
            model,
            **asked(free),
            tokenizer=encoder.tokenizer,
            eos_token_ids=encoder.stop_token_ids,
            max_new_tokens=config.max_new_tokens,
            batch_tokens=config.batch_tokens,
        )
        labels = [[encoder.answer(each.example, label) for label in each.task.labels] for each in closed]
        chosen = most_likely(model, choices=labels, **asked(closed))
        texts = iter(generated)
        picked = (each.task.labels[number] for each, number in zip(closed, chosen, strict=True))
        found = [next(picked) if each.among_labels(config) else next(texts) for each in mine]
    return gather_object(found) if state.num_processes > 1 else found
