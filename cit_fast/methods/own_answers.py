"""Answers that the model itself gives to examples' prompts, before a stage is trained."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cit_fast.data.example import Example, Task
from cit_fast.evaluation.metrics import score
from cit_fast.methods.stage import Stage
from cit_fast.models.generation import Answer, Sampling, generate_answers
from cit_fast.processes import split_over_ranks


@dataclass
class OwnAnswers:
    """What became of some prompts, by the number of their example.

    Args:
        texts: the different answers that ended and say something, in the order they were drawn.
        too_long: prompts that leave no room for an answer; ``unended``: how many answers of a prompt did not end.
    """

    texts: dict[int, list[str]]
    too_long: set[int]
    unended: Counter[int] = field(default_factory=Counter)


def draw_answers(
    stage: Stage,
    examples: Sequence[Example],
    *,
    part: str,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> OwnAnswers:
    """Answers of the model as it is; several processes share the work, and each gets all of them.

    Each draw has a chance of its own: an answer depends neither on its batch nor on the number of processes.

    Args:
        part: whose chance it is, see :meth:`~cit_fast.methods.stage.Stage.rng`.
        samples: answers per prompt; ``temperature``: of the draws, 0 for the most likely answer.
        max_new_tokens: of an answer; ``batch_size``: prompts at a time.
    """
    encoder = stage.encoder.with_limit(stage.encoder.max_length, "skip")
    encoded = encoder.encode_prompts(examples, reserve=max_new_tokens)
    asked = dict(zip(encoded.indices, encoded.prompts, strict=True))
    draws = [(number, sample) for number in asked for sample in range(samples)]

    def work(mine: Sequence[tuple[int, int]]) -> list[tuple[int, int, Answer]]:
        seeds = [stage.rng(f"{part}/{number}/{sample}").getrandbits(64) for number, sample in mine]
        found = generate_answers(
            stage.model,
            [asked[number] for number, _ in mine],
            pad_token_id=encoder.pad_token_id,
            eos_token_ids=encoder.stop_token_ids,
            tokenizer=encoder.tokenizer,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            sampling=Sampling(temperature, seeds) if temperature else None,
        )
        return [(*draw, answer) for draw, answer in zip(mine, found, strict=True)]

    answers = defaultdict[int, list[str]](list)
    own = OwnAnswers({}, set(range(len(examples))) - set(asked))
    for number, _, answer in sorted(split_over_ranks(draws, work)):
        own.unended[number] += not answer.ended
        if answer.ended and answer.text and answer.text not in answers[number]:
            answers[number].append(answer.text)
    own.texts = dict(answers)
    return own


def with_answer(example: Example, text: str) -> Example:
    """The example with an answer in the place of its references."""
    messages = example.messages and (*example.messages[:-1], (example.messages[-1][0], text))
    return replace(example, references=(text,), messages=messages)


def metric_scores(task: Task, answered: Sequence[tuple[Example, str]]) -> list[float]:
    """What the task's metric gives each answer, in [0, 100]."""
    return score(
        task.metric,
        [text for _, text in answered],
        [example.references for example, _ in answered],
        labels=task.labels,
        inputs=[example.input or example.instruction for example, _ in answered],
    ).per_example
