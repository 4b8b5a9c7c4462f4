"""Self-distillation fine-tuning: the model says the new task's answers in its own words, and learns these.

Source: Yang et al., ACL 2024, arXiv 2402.13669.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from cit_fast.data.example import Example, Task
from cit_fast.errors import ConfigError
from cit_fast.evaluation.metrics import JUDGE
from cit_fast.evaluation.records import ObjectiveRecord
from cit_fast.methods.objectives.cross_entropy import CrossEntropy
from cit_fast.methods.own_answers import draw_answers, metric_scores, with_answer
from cit_fast.methods.stage import Stage, StageInputs

TEMPLATE = """\
Below are an instruction that describes a task along with a reference answer. Using the reference answer as a guide, \
write your own response.

### Instruction:
{instruction}

### Reference Answer:
{reference}

### Response:"""
"""The paper's, for tasks without one of their own."""


class SDFT:
    """Cross-entropy on answers that the model before the stage has reworded.

    M_{t-1} sees each new example with its reference and answers in its own words; what it says is closer to what it
    would say anyway, and to learn it moves the model less. An answer takes the reference's place if the task's metric
    scores it at least ``least`` against that reference; the paper checks final results in the same way. Replayed
    examples, and conversations, stay as they are.

    Args:
        template: what the model is asked, with ``{instruction}`` (and input) and ``{reference}``.
        least: in [0, 100]; of a task that a judge scores every answer counts.
        temperature: of the draw, >= 0; 0 for the most likely answer.
        max_new_tokens: of an answer, >= 1; one that has not ended by then does not count.
        batch_size: prompts at a time, >= 1.

    Raises:
        ConfigError: an option out of range, or a template that leaves something out.
    """

    def __init__(
        self,
        template: str = TEMPLATE,
        least: float = 50.0,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        batch_size: int = 64,
    ) -> None:
        for field in ("{instruction}", "{reference}"):
            if field not in template:
                raise ConfigError(f"template: has no {field}")
        if not 0 <= least <= 100:
            raise ConfigError(f"least: {least} is outside [0, 100]")
        if not 0 <= temperature < float("inf"):
            raise ConfigError(f"temperature: {temperature} is negative or not finite")
        for name, size in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if size < 1:
                raise ConfigError(f"{name}: {size} is below 1")
        self.template, self.least, self.temperature = template, least, temperature
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._plain = CrossEntropy()

    def prepare(self, stage: Stage) -> StageInputs:
        """The stage's examples, the new ones with the model's own answers where these are good."""
        started = time.perf_counter()
        tasks = {task.name: task for task in stage.tasks}
        asked = [k for k, example in enumerate(stage.examples) if example.task in tasks and not example.messages]
        own = draw_answers(
            *(stage, [self._asking(stage.examples[k]) for k in asked]),
            part="sdft",
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        found = {k: own.texts[n][0] for n, k in enumerate(asked) if own.texts.get(n)}
        good = self._good(stage, found, tasks)
        seconds = time.perf_counter() - started
        examples = tuple(
            with_answer(example, found[k]) if k in good else example for k, example in enumerate(stage.examples)
        )
        inputs = self._plain.prepare(replace(stage, examples=examples))
        kept = Counter(stage.examples[k].task for k in good)
        note = f"{len(good)} of {len(asked)} new answers are the model's own."
        record = ObjectiveRecord(seconds=seconds, notes=[note], details={"own answers": dict(kept)})
        return replace(inputs, seconds=inputs.seconds + seconds, record=record)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """See :class:`cit_fast.methods.objectives.Objective`."""
        return self._plain(model, batch, num_items)

    def _asking(self, example: Example) -> Example:
        """The request to answer in its own words."""
        text = f"{example.instruction}\n{example.input}".strip()
        asked = self.template.replace("{reference}", example.references[0]).replace("{instruction}", text)
        return Example(asked, "", example.references[:1], example.task, images=example.images, source=example.source)

    def _good(self, stage: Stage, found: Mapping[int, str], tasks: Mapping[str, Task]) -> set[int]:
        """Those of the examples whose own answers may stand for the reference."""
        good: set[int] = set()
        for name, task in tasks.items():
            numbers = [k for k in found if stage.examples[k].task == name]
            if task.metric == JUDGE:
                good.update(numbers)
            elif numbers:
                scores = metric_scores(task, [(stage.examples[k], found[k]) for k in numbers])
                good.update(k for k, value in zip(numbers, scores, strict=True) if value >= self.least)
        return good
