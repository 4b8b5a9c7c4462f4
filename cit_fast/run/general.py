"""What else a model has lost: general abilities that no task of the stream asks for.

Probes are small questions with several answers, of which the model should find the right one most likely. The
divergence is KL(base || tuned), in nats a token, of the next-token predictions on general prompts and on prompts of the
stream: how far tuning has moved the model. Forgetting follows it closely (RL's Razor, arXiv 2509.04259). It is computed
from hidden states, so that no logits are held.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor

from cit_fast.data.example import Example, Task
from cit_fast.evaluation.records import GeneralRecord
from cit_fast.key_parts.head import Head, head_of
from cit_fast.methods.routing import Router
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.collation import PaddingCollator
from cit_fast.models.forward import evaluating, hidden_rows
from cit_fast.models.fused_lora import adapters_cast_once
from cit_fast.models.generation import one_set
from cit_fast.models.prompts import IGNORED, Encoded, PromptEncoder
from cit_fast.ops import linear_kl_divergence
from cit_fast.run.answer import routed
from cit_fast.run.config import HarnessConfig
from cit_fast.run.harness import benchmarks
from cit_fast.run.label_choice import most_likely

_FOLDER = Path(__file__).parents[1] / "evaluation" / "general"
_STREAM_PROMPTS = 60
_AT_A_TIME = 8


class Probe(NamedTuple):
    """A question of a skill; the first of its answers is right."""

    skill: str
    question: Example
    answers: tuple[str, ...]


def probes() -> list[Probe]:
    """Those that are shipped: 15 of each of 8 skills."""
    found, skill = [], ""
    for line in (_FOLDER / "probes.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            skill = line.strip("[]")
        elif line and not line.startswith("#"):
            question, *answers = line.split(" | ")
            found.append(Probe(skill, Example(question, "", (answers[0],), task=skill), tuple(answers)))
    return found


def general_prompts() -> list[Example]:
    """The 60 general prompts that are shipped."""
    lines = (_FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return [Example(line, "", ("-",), task="general") for line in lines if line]


def measure(
    model: Any,
    encoder: PromptEncoder,
    tasks: Sequence[Task],
    split: str,
    router: Router | None = None,
    base: Callable[[], Any] | None = None,
    untrained: bool = False,
    harness: HarnessConfig | None = None,
    batch_size: int = 16,
) -> GeneralRecord:
    """General abilities of a model as it answers now, every prompt by the set that its router names.

    Args:
        tasks: of the stream, whose prompts the second divergence is on; ``split``: of theirs. An encoder-decoder
            predicts no tokens of its prompts, and has no divergence.
        base: loads the base model, where ``model`` has no adapters that could be switched off.
        untrained: whether this is the base model itself, whose divergence is 0.
        harness: benchmarks to measure beside; ``batch_size``: of theirs.

    Raises:
        ConfigError: a benchmark cannot be measured.
    """
    encoder = encoder.with_limit(encoder.max_length, "skip")
    scores = _probe_scores(model, encoder, router)
    beside = ({}, {}) if harness is None else benchmarks(model, encoder, router, harness, batch_size)
    if encoder.closes:
        return GeneralRecord(scores, {}, *beside)
    if untrained:
        return GeneralRecord(scores, {"general": 0.0, "stream": 0.0}, *beside)
    each = max(1, _STREAM_PROMPTS // max(1, len(tasks)))
    prompts = {
        "general": general_prompts(),
        "stream": [example for task in tasks for example in getattr(task, split)[:each]][:_STREAM_PROMPTS],
    }
    before = None if isinstance(model, PeftModel) or base is None else base()
    found = {name: _divergence(model, encoder, some, router, before) for name, some in prompts.items() if some}
    return GeneralRecord(scores, found, *beside)


def _probe_scores(model: Any, encoder: PromptEncoder, router: Router | None) -> dict[str, float]:
    """Skill -> per cent of its probes whose right answer is the likeliest; one that does not fit counts as wrong."""
    every = probes()
    encoded = encoder.encode_prompts([probe.question for probe in every], reserve=32)
    some = [every[index] for index in encoded.indices]
    chosen = most_likely(
        model,
        encoded.prompts,
        [[encoder.answer(probe.question, answer) for answer in probe.answers] for probe in some],
        pad_token_id=encoder.pad_token_id,
        batch_size=32,
        adapters=routed(model, encoder, [probe.question for probe in some], router),
    )
    picked = [list(chosen)]
    broadcast_object_list(picked)  # others may differ in a last bit
    right = {id(probe) for probe, number in zip(some, picked[0], strict=True) if number == 0}
    skills = dict.fromkeys(probe.skill for probe in every)
    return {
        skill: 100 * statistics.mean(id(probe) in right for probe in every if probe.skill == skill) for skill in skills
    }


def _divergence(
    model: Any, encoder: PromptEncoder, examples: Sequence[Example], router: Router | None, before: Any
) -> float:
    """Mean KL(base || tuned) over the tokens of the prompts, in nats."""
    encoded = encoder.encode_prompts(examples)
    kept = [examples[index] for index in encoded.indices]
    sets = routed(model, encoder, kept, router)
    total, tokens = 0.0, 0
    for name in dict.fromkeys([None] if sets is None else sets):
        own = [ids for k, ids in enumerate(encoded.prompts) if sets is None or sets[k] == name]
        tokens += sum(len(ids) - 1 for ids in own)
        if name == BASE:  # the base model answers, as before
            continue
        for batch in _batches(own, encoder.pad_token_id):
            with torch.no_grad():
                with _answering(model, name):
                    live, head = _hidden(model, batch)
                with _answering(model, BASE) if before is None else evaluating(before):
                    frozen, old = _hidden(model if before is None else before, batch)
                weight = torch.ones(len(live), device=live.device)
                total += float(
                    linear_kl_divergence(
                        *(live, frozen, head.weight, old.weight, 1.0, weight),
                        bias_live=head.bias,
                        bias_frozen=old.bias,
                        **head.options,
                    )
                )
    found = [total / tokens if tokens else 0.0]
    broadcast_object_list(found)
    return max(0.0, found[0])


@contextmanager
def _answering(model: Any, name: str | None) -> Iterator[None]:
    """In evaluation mode, with a set active: ``None`` for the one that is."""
    with evaluating(model), adapters_cast_once(model), nullcontext() if name is None else one_set(model, name):
        yield


def _batches(prompts: Sequence[Sequence[int]], pad: int) -> Iterator[dict[str, Tensor]]:
    """Of prompts of like length; every token but the first is predicted."""
    order = sorted((list(ids) for ids in prompts if len(ids) > 1), key=len)
    collate = PaddingCollator(pad)
    for start in range(0, len(order), _AT_A_TIME):
        yield collate([Encoded(ids, [IGNORED, *ids[1:]], 1) for ids in order[start : start + _AT_A_TIME]])


def _hidden(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Head]:
    """[T, d]: what predicts the batch's labelled tokens, and the projection that does."""
    device = PartialState().device
    inputs = {name: value.to(device) for name, value in batch.items()}
    labels = inputs.pop("labels")
    ahead = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    places = (ahead.flatten() != IGNORED).nonzero()[:, 0]
    return hidden_rows(model, inputs, places)[0], head_of(model)
