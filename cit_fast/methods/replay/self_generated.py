"""Replay without anything kept: prompts that the model writes itself, with its own answers.

A chat model that is given its template up to where the user speaks goes on with what a user might say (Magpie, Xu et
al., arXiv 2406.08464). As the stage before left it, it answers that, and both come back while the new task is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from cit_fast.data.example import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.methods.own_answers import draw_answers, with_answer
from cit_fast.methods.stage import Stage
from cit_fast.models.generation import Answer, Sampling, generate_answers
from cit_fast.processes import split_over_ranks

NAME = "self-generated"
"""The task's name that its examples carry."""


class SelfGenerated:
    """Examples whose prompts and answers are the model's own, as it was before the stage.

    Args:
        count: prompts to write for a stage; those that do not end, or say what another one says, are left out.
        temperature: of the prompts, > 0; an answer is the most likely one.
        max_new_tokens: of a prompt and of an answer. ``batch_size``: written at a time.
    """

    def __init__(self, count: int, temperature: float, max_new_tokens: int, batch_size: int) -> None:
        self.count, self.temperature = count, temperature
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def draw(self, stage: Stage) -> tuple[list[Example], str]:
        """The examples of a stage, and what to say of them.

        Raises:
            ConfigError: a model whose chat template does not tell where a user speaks.
        """
        asked = self._prompts(stage)
        own = draw_answers(
            *(stage, asked),
            part=NAME,
            temperature=0.0,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        drawn = [with_answer(example, own.texts[k][0]) for k, example in enumerate(asked) if own.texts.get(k)]
        return drawn, f"Self-generated: {len(drawn)} of {self.count} prompts that the model wrote come back."

    def _prompts(self, stage: Stage) -> list[Example]:
        """What the model writes where a user speaks: different texts that end, in the order they were drawn."""
        turn = stage.encoder.user_turn()
        if turn is None:
            raise ConfigError(
                "replay.generated: the chat template does not tell where a user speaks; the model cannot write prompts"
            )
        begin, end = turn

        def work(mine: Sequence[int]) -> list[tuple[int, Answer]]:
            seeds = [stage.rng(f"{NAME}/prompt/{k}").getrandbits(64) for k in mine]
            found = generate_answers(
                stage.model,
                [begin] * len(mine),
                pad_token_id=stage.encoder.pad_token_id,
                eos_token_ids=end,
                tokenizer=stage.encoder.tokenizer,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                sampling=Sampling(self.temperature, seeds),
            )
            return list(zip(mine, found, strict=True))

        answers = [answer for _, answer in sorted(split_over_ranks(range(self.count), work))]
        found = []
        for text in dict.fromkeys(answer.text for answer in answers if answer.ended and answer.text.strip()):
            try:
                found.append(Example(text, "", ("?",), NAME))
            except DataError:  # half a character
                continue
        return found
