"""Benchmarks of EleutherAI's lm-evaluation-harness on the model as it is, each prompt by the set that its router names.

The harness's own ``HFLM`` computes everything; around it, requests are sorted by the adapter set that answers them.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from cit_fast.data.example import Example
from cit_fast.errors import ConfigError
from cit_fast.models.forward import evaluating
from cit_fast.models.fused_lora import adapters_cast_once
from cit_fast.models.generation import one_set
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run.answer import routed
from cit_fast.run.config import HarnessConfig
from cit_fast.text import first_line
from cit_fast.values import choices

if TYPE_CHECKING:
    from cit_fast.methods.routing import Router

_SHARES = ("acc", "exact_match", "mc1", "mc2", "prompt_level", "inst_level", "pass@")
"""Beginnings of the metrics that are shares in [0, 1] in every task."""


def check_harness(config: HarnessConfig) -> None:
    """See that the harness is installed and has the tasks.

    Raises:
        ConfigError: it is not, or has not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.general.lm_eval: the package lm_eval is not installed; pip install 'cit-fast[lm-eval]'"
        )
    known = _manager(config.include_path, config.lm_eval).all_tasks
    for name in config.lm_eval:
        if name not in known:
            raise ConfigError(f"evaluation.general.lm_eval: unknown task {name!r}; {choices(name, known)}")


def benchmarks(
    model: Any, encoder: PromptEncoder, router: Router | None, config: HarnessConfig, batch_size: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Task -> metric -> value as the harness has it, accuracies and exact matches in per cent; and task -> the first
    metric of which more is better.

    Raises:
        ConfigError: the data of a task cannot be had, the task cannot be answered by a causal language model, or gives
            no number.
    """
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of every setting that is not its default
    try:
        with _own_chance(), evaluating(model), adapters_cast_once(model):
            found = simple_evaluate(
                model=_harness_model(model, encoder, router, batch_size),
                tasks=list(config.lm_eval),
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                bootstrap_iters=0,
                log_samples=False,
                apply_chat_template=encoder.tokenizer.chat_template is not None,
                task_manager=_manager(config.include_path, config.lm_eval),
            )
    except Exception as error:  # whatever the harness, datasets and a task's own code raise
        raise ConfigError(f"evaluation.general.lm_eval: {first_line(error)}") from error
    every = {task: _metrics(values) for task, values in found["results"].items()}
    named = {task: every[task] for task in config.lm_eval if every.get(task)}
    # A tag, and a group that has no score of its own, are measured as the tasks that they stand for.
    shown = named if len(named) == len(config.lm_eval) else {task: values for task, values in every.items() if values}
    if not shown:
        raise ConfigError(f"evaluation.general.lm_eval: {', '.join(config.lm_eval)} gave no number")
    better = found["higher_is_better"]
    main = {
        task: next((name for name in values if _better(better.get(task), name)), "") for task, values in shown.items()
    }
    results = [(shown, {task: name for task, name in main.items() if name})]
    broadcast_object_list(results)  # other processes may differ in a last bit
    return results[0]


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``; a filter that is one of several stays in the name."""
    found = {}
    for name, value in values.items():
        plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if plain and "_stderr" not in name and name != "sample_len":
            metric = name.removesuffix(",none")
            found[metric] = float(value) * (100.0 if metric.startswith(_SHARES) else 1.0)
    return found


def _better(known: dict[str, bool | None] | None, name: str) -> bool:
    """Whether more of a metric is better."""
    return bool((known or {}).get(name.split(",", maxsplit=1)[0]))


@functools.cache
def _manager(folder: str | None, names: tuple[str, ...]) -> Any:
    """Of the tasks in a folder, and of the harness's own where some are meant: looking through these takes seconds."""
    from lm_eval.tasks import TaskManager

    own = None if folder is None else TaskManager(include_path=folder, include_defaults=False)
    return own if own is not None and set(names) <= set(own.all_tasks) else TaskManager(include_path=folder)


@contextmanager
def _own_chance() -> Iterator[None]:
    """The harness seeds what is everyone's; afterwards it is as it was."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # whose state the harness sets
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _harness_model(model: Any, encoder: PromptEncoder, router: Router | None, batch_size: int) -> Any:
    """The harness's model around ours."""
    from lm_eval.models.huggingface import HFLM

    said: dict[str, str] = {}  # a templated prompt -> what its user says

    def by_set(answer: Callable[..., list[Any]], requests: Sequence[Any], quiet: bool) -> list[Any]:
        """The requests' answers, each by its own set."""
        prompts = [said.get(request.args[0], request.args[0]) for request in requests]
        # Without a context there is what follows it, or nothing at all, to tell where a request belongs.
        texts = [
            prompt if prompt.strip() else f"{[*request.args[1:], ''][0]}"
            for prompt, request in zip(prompts, requests, strict=True)
        ]
        sets = None
        if router is not None:
            sets = routed(
                model, encoder, [Example(text if text.strip() else "-", "", ("-",)) for text in texts], router
            )
        found: list[Any] = [None] * len(requests)
        for name in dict.fromkeys([None] if sets is None else sets):
            own = [k for k in range(len(requests)) if sets is None or sets[k] == name]
            with nullcontext() if name is None else one_set(model, name):
                for k, one in zip(own, answer([requests[k] for k in own], disable_tqdm=quiet), strict=True):
                    found[k] = one
        return found

    class RoutedHFLM(HFLM):  # type: ignore[misc]
        """``HFLM`` whose requests go to their own adapter sets."""

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
            return by_set(super().loglikelihood, requests, disable_tqdm)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
            return by_set(super().loglikelihood_rolling, requests, disable_tqdm)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
            return by_set(super().generate_until, requests, disable_tqdm)

        def apply_chat_template(self, chat_history: list[dict[str, str]], *args: Any, **kwargs: Any) -> str:
            prompt: str = super().apply_chat_template(chat_history, *args, **kwargs)
            said[prompt] = next((turn["content"] for turn in reversed(chat_history) if turn["role"] == "user"), prompt)
            return prompt

    return RoutedHFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(encoder.tokenizer),  # it sets the padding that it wants
        backend="seq2seq" if encoder.closes else "causal",
        batch_size=batch_size,
        chat_template_args=dict(encoder.template_options or {}),
    )
