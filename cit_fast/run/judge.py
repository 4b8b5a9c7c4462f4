"""The metric ``judge``: a chat model marks each answer. Never a default; every answer of the judge is kept on disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, field_validator

from cit_fast.data.example import Example
from cit_fast.errors import RunError
from cit_fast.evaluation.metrics import Score
from cit_fast.models.chat import Chat, ChatEndpoint
from cit_fast.text import cut
from cit_fast.values import Section

PROMPT = """You mark an answer to an instruction.

Instruction:
{instruction}

Input:
{input}

A right answer:
{reference}

The answer to mark:
{answer}

How good is it, from 0 (useless or wrong) to {best} (as good as the right answer in content and form)? Reply with the
number alone."""


class JudgeConfig(Section):
    """Who marks, and how it is asked; all of it is part of the run's record. See also
    :class:`cit_fast.models.chat.ChatEndpoint`.
    """

    base_url: str
    """Address of an OpenAI-compatible endpoint."""
    model: str
    """The model's name there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    prompt: str = PROMPT
    """What is asked; it holds {instruction}, {input}, {reference}, {answer} and {best}."""
    best: PositiveInt = 10
    """Marks go from 0 to this."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the request."""

    @field_validator("prompt")
    @classmethod
    def _holds_the_answer(cls, value: str) -> str:
        if "{answer}" not in value:
            raise ValueError("it must hold {answer}, the answer to mark")
        return value

    def chat(self, cache: Path | None) -> Chat:
        """The judge itself."""
        return ChatEndpoint(
            self.base_url, self.model, key_variable=self.key_variable, options=self.options, cache=cache
        )

    def question(self, example: Example, answer: str) -> str:
        """What the judge is asked about one answer."""
        values = {
            "instruction": example.instruction,
            "input": example.input or "(none)",
            "reference": example.references[0],
            "answer": answer or "(empty)",
            "best": str(self.best),
        }
        # One pass: what an answer holds is never taken for a field.
        return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), self.prompt)


def judge_score(config: JudgeConfig, examples: Sequence[Example], answers: Sequence[str], cache: Path | None) -> Score:
    """Marks of the answers, 0 to 100 each, and their mean.

    Raises:
        RunError: the judge cannot be reached, or replies with something else than a mark.
    """
    chat = config.chat(cache)
    questions = [config.question(example, answer) for example, answer in zip(examples, answers, strict=True)]
    points = []
    for question, reply in zip(questions, chat.complete(questions), strict=True):
        match = re.fullmatch(r"\D{0,20}(\d+)(?:\s*/\s*\d+)?\D{0,20}", reply.strip())
        mark = int(match[1]) if match else -1
        if not 0 <= mark <= config.best:
            chat.forget([question])
            raise RunError(
                f"evaluation.judge: {config.model} replied {cut(reply)!r}, not a mark from 0 to {config.best}; the "
                "same command asks again"
            )
        points.append(100.0 * mark / config.best)
    return Score(sum(points) / len(points), points)
