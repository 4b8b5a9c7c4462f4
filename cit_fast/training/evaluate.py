"""Scores of a model on tasks: prompts shared out over the processes, answers gathered, each task by its own metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from tqdm.auto import tqdm

from cit_fast.data.example import Example, Task
from cit_fast.data.prompts import PromptEncoder
from cit_fast.errors import ConfigError, DataError
from cit_fast.evaluation.generation import generate
from cit_fast.evaluation.metrics import score
from cit_fast.evaluation.predictions import Prediction, judged
from cit_fast.evaluation.violations import Constraints
from cit_fast.routing import Router
from cit_fast.training.config import EvaluationConfig


@dataclass(frozen=True)
class Evaluated:
    """What :func:`evaluate` found.

    Args:
        scores: task name -> score in [0, 100]; ``violations``: task name -> rates, as a StageRecord has them.
        predictions: task name -> its predictions, in the order of its examples.
        truncated: prompts whose input was shortened to fit; ``skipped``: examples left out because they cannot fit.
    """

    scores: dict[str, float]
    predictions: dict[str, list[Prediction]]
    truncated: int
    skipped: int
    violations: dict[str, dict[str, float]] = field(default_factory=dict)


def evaluate(
    model: Any,
    encoder: PromptEncoder,
    tasks: Sequence[Task],
    config: EvaluationConfig,
    router: Router | None = None,
    title: str = "",
) -> Evaluated:
    """Answer every example of the tasks' split, each with the adapter set its router names, and score the answers.

    Raises:
        DataError: no example of a task fits.
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
    answers = _answers(model, encoder, [example for _, example in asked], prompts, config, router, title)
    scores: dict[str, float] = {}
    predictions: dict[str, list[Prediction]] = {}
    for task in tasks:
        own = [index for index, (of, _) in enumerate(asked) if of is task]
        references = [asked[index][1].references for index in own]
        result = score(task.metric, [answers[index] for index in own], references, labels=task.labels)
        scores[task.name] = result.value
        inputs = [asked[index][1].input if task.extractive else None for index in own]
        predictions[task.name] = [
            Prediction(encoder.tokenizer.decode(prompts[index]), answers[index], right, points, text)
            for index, right, points, text in zip(own, references, result.per_example, inputs, strict=True)
        ]
    violations = {task.name: judged(Constraints.of(task), predictions[task.name]) for task in tasks}
    return Evaluated(scores, predictions, truncated, skipped, violations)


def _answers(
    model: Any,
    encoder: PromptEncoder,
    examples: Sequence[Example],
    prompts: Sequence[list[int]],
    config: EvaluationConfig,
    router: Router | None,
    title: str,
) -> list[str]:
    """The answers in the order of the prompts, which are shared out over the processes."""
    state = PartialState()
    switches = router is not None and isinstance(model, PeftModel)
    sets = router.answer(examples) if router is not None and switches else [""] * len(prompts)
    unknown = set(sets) - set(model.peft_config) if switches else set()
    if unknown:
        raise ConfigError(f"router: answers with the adapter set {min(unknown)!r}, which no task has trained yet")
    answers = [""] * len(prompts)
    bar = tqdm(
        total=len(prompts), desc=f"{title}: answering", unit="prompt", leave=False, disable=not state.is_main_process
    )

    def advance(count: int) -> None:
        bar.update(count * state.num_processes)

    with bar:
        for name in dict.fromkeys(sets):
            if switches:
                model.set_adapter(name)
            indices = [index for index, chosen in enumerate(sets) if chosen == name]
            with state.split_between_processes(indices) as mine:
                found = generate(
                    model,
                    [prompts[index] for index in mine],
                    tokenizer=encoder.tokenizer,
                    pad_token_id=encoder.pad_token_id,
                    eos_token_ids=encoder.stop_token_ids,
                    max_new_tokens=config.max_new_tokens,
                    batch_size=config.batch_size,
                    progress=advance,
                )
            for index, answer in zip(indices, gather_object(found) if state.num_processes > 1 else found, strict=True):
                answers[index] = answer
    return answers
