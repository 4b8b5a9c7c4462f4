"""An anchor for general ability: prompts of no task, answered once by the base model, that come back in every stage."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from cit_fast.cache import JsonCache
from cit_fast.data.example import Example
from cit_fast.data.readers import text_of_file
from cit_fast.data.sources import find_tasks, load_task
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.methods.own_answers import draw_answers, with_answer
from cit_fast.methods.stage import Stage
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.generation import one_set

NAME = "anchor"
"""The task's name that its examples carry."""
_UNKNOWN = ("?",)  # the reference of a prompt that is not answered yet


class Anchor:
    """Examples whose answers are the base model's own.

    The base model answers all prompts before anything is trained, greedily, and the run keeps what it said. Without
    adapters it is not there later, so a run that goes on needs what it kept.

    Args:
        prompts: a text file with a prompt in each line, or whatever ``data.tasks`` takes as text (a built-in name, a
            data file, a folder), of which the training prompts count and the answers do not. What the tasks so far are
            evaluated on stays out.
        count: examples that come back in a stage (all, where there are fewer).
        max_new_tokens, batch_size: of the answers; prompts whose answer does not end are left out.
    """

    def __init__(self, prompts: str, count: int, max_new_tokens: int, batch_size: int) -> None:
        self.prompts, self.count = prompts, count
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._answered: list[Example] | None = None

    def draw(self, stage: Stage) -> tuple[list[Example], str]:
        """The examples of a stage, and what to say of them.

        Raises:
            ConfigError: the prompts cannot be read, none got an answer, or all are evaluated on.
            RunError: what the base model said is gone, and it cannot be asked again.
        """
        if self._answered is None:
            asked = self._read()
            answers = self._answers(stage, asked)
            self._answered = [with_answer(one, text) for one, text in zip(asked, answers, strict=True) if text]
            self._asked = len(asked)
        if not self._answered:
            raise ConfigError(
                f"replay.anchor: none of the {self._asked} prompts of {self.prompts} got an answer of the base model "
                f"that ends within {self.max_new_tokens} tokens"
            )
        # Both the same file: what a task holds out of its training set is here, too.
        evaluated = {(each.instruction, each.input) for task in stage.known for each in (*task.dev, *task.test)}
        free = [each for each in self._answered if (each.instruction, each.input) not in evaluated]
        if not free:
            raise ConfigError(f"replay.anchor: all prompts of {self.prompts} are evaluated on; give others")
        drawn = stage.rng(NAME).sample(free, min(self.count, len(free)))
        left_out = len(self._answered) - len(free)
        return drawn, (
            f"Anchor: {len(drawn)} prompts come back with what the base model says; it answered "
            f"{len(self._answered)} of {self._asked}."
            + (f" {left_out} stay out: a task's dev or test split has them." if left_out else "")
        )

    def _read(self) -> list[Example]:
        try:
            if self.prompts.endswith(".txt"):
                lines = [line.strip() for line in text_of_file(Path(self.prompts)).splitlines()]
                return [Example(line, "", _UNKNOWN, NAME) for line in lines if line]
            tasks = [load_task(source, dev=0, test=0) for source in find_tasks([self.prompts])]
        except DataError as error:
            raise ConfigError(f"replay.anchor: {error}") from None
        conversations = [example for task in tasks for example in task.train if example.messages]
        if conversations:
            raise ConfigError(f"replay.anchor: {conversations[0].source or self.prompts}: a conversation; give prompts")
        given = [each for task in tasks for each in task.train]
        return [Example(each.instruction, each.input, _UNKNOWN, NAME, images=each.images) for each in given]

    def _answers(self, stage: Stage, asked: Sequence[Example]) -> list[str]:
        """What the base model says to each prompt, an empty text where that does not end."""
        setting = {"max_new_tokens": self.max_new_tokens, "greedy": True}
        kept = JsonCache(None if stage.kept is None else stage.kept / NAME, setting)
        texts = json.dumps([[each.instruction, each.input, *each.images] for each in asked])
        key = hashlib.blake2b(texts.encode(), digest_size=16).hexdigest()
        found = (kept.get(key) or {}).get("answers")
        if isinstance(found, list) and len(found) == len(asked):
            return [str(text) for text in found]
        if stage.index > 1 and not isinstance(stage.model, PeftModel):
            raise RunError(
                f"{kept.folder}: what the base model said to the anchor's prompts is gone, and without adapters there "
                "is no base model to ask again; start again in another output"
            )
        base = one_set(stage.model, BASE) if isinstance(stage.model, PeftModel) else contextlib.nullcontext()
        with base:
            own = draw_answers(
                *(stage, asked),
                part=NAME,
                temperature=0.0,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )
        answers = [own.texts[k][0] if own.texts.get(k) else "" for k in range(len(asked))]
        kept.put(key, {"answers": answers})
        return answers
