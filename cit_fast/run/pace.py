"""How long stages take on this machine: measured by every stage that ends, kept for plans and for the time left."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch

from cit_fast.cache import JsonCache, cache_folder
from cit_fast.errors import RunError
from cit_fast.evaluation.records import StageRecord
from cit_fast.methods.config import MethodConfig
from cit_fast.run.config import RunConfig
from cit_fast.run.environment import describe_environment
from cit_fast.run.plan import StagePlan

_ANSWERING = {"max_new_tokens", "batch_size", "batch_tokens", "decode", "engine"}
"""What decides how fast prompts are answered."""


@dataclass(frozen=True)
class Pace:
    """What one stage took.

    Args:
        step: seconds of a step, router, replay and the earlier model's pass left out; ``example``: training tokens of
            an example, the mean, replayed ones left out; 0: unknown.
        prompt: seconds to answer a test prompt.
        memory: bytes, the most that the process, or the GPU's allocator, has held.
    """

    step: float
    example: float
    prompt: float
    memory: int

    def seconds(self, stage: StagePlan) -> float | None:
        """Of a stage that is planned; ``None`` where its data is not here."""
        if stage.steps is None or stage.prompts is None:
            return None
        longer = 1.0
        if stage.examples and stage.tokens and self.example:
            longer = stage.tokens / stage.examples / self.example
        return stage.steps * self.step * longer + stage.prompts * self.prompt


class Paces:
    """The paces of a configuration's methods on this machine: of its model, adapter, batches and versions.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        environment = {name: value for name, value in describe_environment().items() if name != "system"}
        sections = {
            "model": config.model.model_dump(mode="json"),
            "adapter": config.adapter,
            "training": config.training,
            "evaluation": config.evaluation.model_dump(mode="json", include=_ANSWERING, exclude_none=True),
        }
        self._by_tokens = config.training.get("tokens_per_batch") is not None
        setting = json.loads(json.dumps({"pace": environment, **sections}, default=str))
        self._cache = JsonCache(cache_folder() / "pace", setting)

    def of(self, method: MethodConfig) -> Pace | None:
        """What the last stage of this method took here, else of any method; ``None`` before there was one."""
        found = self._cache.get(_key(method)) or self._cache.get(_ANY)
        return None if found is None else Pace(**{each.name: found[each.name] for each in fields(Pace)})

    def keep(self, method: MethodConfig, stage: StageRecord, example: float, answered: int) -> None:
        """Keep what a stage took.

        Args:
            stage: its record; ``example``: tokens of one of its examples; ``answered``: test prompts.
        """
        if not (stage.steps and answered):
            return
        prompt = stage.evaluate_seconds / answered
        try:
            example = 0.0 if self._by_tokens else example  # longer examples then take more steps, not longer ones
            pace = Pace(stage.train_seconds / stage.steps, example, prompt, peak_memory())
            for key in (_key(method), _ANY):
                self._cache.put(key, asdict(pace))
        except RunError:
            return  # a cache that cannot be written is no reason to stop a run


_ANY = "any method"


def _key(method: MethodConfig) -> str:
    return json.dumps(method.model_dump(mode="json", exclude={"name"}), sort_keys=True, default=str)


def peak_memory() -> int:
    """Bytes that this process has held at most: resident, or on the GPU where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class TimeLeft:
    """How long all methods of a run still take.

    Args:
        stages: of every method its stages; ``paces``: of every method, where one is known.
    """

    def __init__(self, stages: Sequence[Sequence[StagePlan]], paces: Sequence[Pace | None]) -> None:
        self._stages, self._paces = stages, paces
        self._method = 0
        self._prompt: float | None = None  # seconds; of this run, once some are answered

    def begin(self, method: int) -> None:
        """Method ``method``, from 0, begins."""
        self._method = method

    def answered(self, seconds: float, prompts: int) -> None:
        """Prompts have been answered; the next ones take as long."""
        if prompts:
            self._prompt = seconds / prompts

    def left(self, stage: int, steps: int, step: float) -> float | None:
        """Seconds until the end of the run; ``None`` where too little is known.

        Args:
            stage: from 1, in training now.
            steps: that it still has to take; ``step``: seconds that one takes now.
        """
        pace = self._paces[self._method]
        prompt = self._prompt if self._prompt is not None or pace is None else pace.prompt
        own, *later = self._stages[self._method :]
        coming = [*own[stage:], *(planned for stages in later for planned in stages)]
        counts = [(planned.steps, planned.prompts) for planned in coming]
        now = own[stage - 1].prompts
        if prompt is None or now is None or any(None in pair for pair in counts):
            return None
        seconds = steps * step + now * prompt
        return seconds + sum((more or 0) * step + (asked or 0) * prompt for more, asked in counts)


def duration(seconds: float) -> str:
    """For people: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
