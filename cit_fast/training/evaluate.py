"""Scores of a model on tasks: prompts shared out over the processes, answers gathered, each task by its own metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from cit_fast.data.example import Example, Task
from cit_fast.data.prompts import PromptEncoder
from cit_fast.errors import DataError
from cit_fast.evaluation.generation import generate
from cit_fast.evaluation.metrics import score
from cit_fast.evaluation.predictions import Prediction
from cit_fast.training.config import EvaluationConfig


def evaluate(
    model: Any, encoder: PromptEncoder, tasks: Sequence[Task], config: EvaluationConfig, title: str = ""
) -> tuple[dict[str, float], dict[str, list[Prediction]]]:
    """Answer every example of the tasks' split and score the answers.

    Returns:
        task name -> score in [0, 100], and task name -> its predictions in the order of its examples.
    """
    state = PartialState()
    asked: list[tuple[Task, Example]] = []
    prompts: list[list[int]] = []
    for task in tasks:
        split = getattr(task, config.split)
        encoded = encoder.encode_prompts(split, reserve=config.max_new_tokens)
        asked += [(task, split[index]) for index in encoded.indices]
        prompts += encoded.prompts
    bar = tqdm(
        total=len(prompts), desc=f"{title}: answering", unit="prompt", leave=False, disable=not state.is_main_process
    )

    def advance(count: int) -> None:
        bar.update(count * state.num_processes)

    with bar, state.split_between_processes(list(range(len(prompts)))) as mine:
        answers = generate(
            model,
            [prompts[index] for index in mine],
            tokenizer=encoder.tokenizer,
            pad_token_id=encoder.pad_token_id,
            eos_token_ids=encoder.stop_token_ids,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            progress=advance,
        )
    if state.num_processes > 1:
        answers = gather_object(answers)
    scores: dict[str, float] = {}
    predictions: dict[str, list[Prediction]] = {}
    for task in tasks:
        own = [index for index, (of, _) in enumerate(asked) if of is task]
        references = [asked[index][1].references for index in own]
        if not own:
            raise DataError(f"task {task.name!r}: every {config.split} example is longer than data.max_length allows")
        result = score(task.metric, [answers[index] for index in own], references, labels=task.labels)
        scores[task.name] = result.value
        predictions[task.name] = [
            Prediction(encoder.tokenizer.decode(prompts[index]), answers[index], right, points)
            for index, right, points in zip(own, references, result.per_example, strict=True)
        ]
    return scores, predictions
