"""KPIG: cross-entropy on the full instruction, and a masked one that must go on reading like the earlier model::

    L    = L_CE(d) + lambda * L_JSD( p_t(d^m) || p_{t-1}(d^m) )    at temperature beta, per example
    beta = 2 - min(G(d, d^m), 1)

G is the information gain of the example's key parts under M_{t-1}, the model as the previous stage left it (of the
first stage: the base model). The more an answer depends on the key parts, the sharper the comparison.

Source: He et al., ACL 2025, arXiv 2403.10056. Its L_JSD divides p by beta; here the logits are divided, the logarithms
are base 2, and the mean is over response tokens, the end of the turn included, as in the cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cit_fast.data.example import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.evaluation.records import ObjectiveRecord
from cit_fast.files import file_checksum
from cit_fast.key_parts.head import Head, head_of
from cit_fast.key_parts.hidden import pair_collator
from cit_fast.key_parts.layout import GroupingCollator
from cit_fast.key_parts.pairs import encode_pairs
from cit_fast.key_parts.sources import chat_of, check_key_parts, discovered_note, key_parts_for_run
from cit_fast.key_parts.teacher import TeacherStates, teacher_states
from cit_fast.key_parts.wordings import chat_pools, data_pools, draw_wordings, given_pools
from cit_fast.methods.objectives.cross_entropy import CrossEntropy
from cit_fast.methods.objectives.earlier_model import Compared, FrozenPairCollator, copied_head, with_divergence
from cit_fast.methods.stage import Stage, StageInputs
from cit_fast.models.forward import evaluating
from cit_fast.ops import masked_jsd


class KPIG:
    """The loss of KPIG; one forward pass for both instructions, and no logits.

    Examples without key parts are trained by cross-entropy alone; the stage's record says how many there were.

    Args:
        lambda_: weight of the divergence, >= 0.
        alpha: decay of the information gain per answer token, in (0, 1].
        temperature: ``"gain"`` for 2 - min(G, 1) per example, or one positive number for all.
        masked: compare the models on the masked instruction; without it on the full one, G being what it was (the
            paper's ablation without mask).
        jsd: with the divergence; without it the loss is plain cross-entropy (the paper's ablation without JSD).
        key_parts: where key parts come from: ``"auto"`` (the data, else discovery), or a source of
            :func:`cit_fast.key_parts.sources.find_key_parts`.
        instructions: which wording an example is trained with: ``"own"``, the one it has; ``"data"``, one drawn from
            those that its task has in the data; ``"pool"``, one drawn from ``pool``; or a chat model's options, to draw
            from a pool that it makes. See :func:`cit_fast.key_parts.wordings.draw_wordings`.
        pool: a file of wordings for each task (``cit-fast pool`` makes one); without it ``"pool"`` is ``"own"``, which
            the record says.
        share_prefix: see :func:`cit_fast.key_parts.hidden.pair_collator`.
        batch_size: examples at a time in the pass of the earlier model.

    Raises:
        ConfigError: an option out of range or unknown.
    """

    def __init__(
        self,
        lambda_: float = 0.02,
        alpha: float = 0.3,
        temperature: Literal["gain"] | float = "gain",
        masked: bool = True,
        jsd: bool = True,
        key_parts: str | dict[str, Any] = "auto",
        instructions: str | dict[str, Any] = "own",
        share_prefix: bool | Literal["auto"] = "auto",
        batch_size: int = 16,
        pool: str | None = None,
    ) -> None:
        if not (lambda_ >= 0 and math.isfinite(lambda_)):
            raise ConfigError(f"lambda_: {lambda_} is negative or not finite")
        if not 0 < alpha <= 1:
            raise ConfigError(f"alpha: {alpha} is outside (0, 1]")
        if temperature != "gain" and not (
            isinstance(temperature, (int, float)) and temperature > 0 and math.isfinite(temperature)
        ):
            raise ConfigError(f"temperature: {temperature!r} is neither 'gain' nor a positive number")
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is below 1")
        check_key_parts(key_parts)
        if isinstance(instructions, Mapping):
            if "local" not in instructions:
                chat_of(instructions, None)  # what is wrong with its options should not wait until a stage begins
        elif instructions not in {"own", "data", "pool"}:
            raise ConfigError(
                f"instructions: {instructions!r} is unknown; expected 'own', 'data', 'pool' or a chat model like "
                "{base_url: ...}"
            )
        if pool is not None and instructions != "pool":
            raise ConfigError(f"pool: {pool!r} is for instructions: pool, and instructions is {instructions!r}")
        self.lambda_, self.alpha, self.temperature, self.masked, self.jsd = lambda_, alpha, temperature, masked, jsd
        self.key_parts, self.instructions = key_parts, instructions
        self.share_prefix, self.batch_size = share_prefix, batch_size
        self.pool = pool
        self._plain = CrossEntropy(share_prefix=share_prefix)
        self._pools = given_pools(pool)
        self._frozen_head: Head | None = None

    def prepare(self, stage: Stage) -> StageInputs:
        """The stage's examples as pairs, and what M_{t-1} says about them.

        Raises:
            DataError: key parts that cannot be found, or that cover a whole instruction.
            ConfigError: a model whose head is not understood.
        """
        model, encoder = stage.model, stage.encoder
        examples, wordings = self._reworded(stage)
        notes = []
        if self.instructions == "pool" and self.pool is None:
            notes.append(
                "No pool of wordings is given (objective.pool): every example keeps its own, as in the paper's "
                "ablation without diversity."
            )
        if not (self.jsd and self.lambda_):
            plain = self._plain.prepare(replace(stage, examples=tuple(examples)))
            return replace(plain, record=ObjectiveRecord(wordings=wordings, notes=notes))
        given = examples
        examples = key_parts_for_run(
            given, self.key_parts, model, encoder, alpha=self.alpha, run=stage.kept, cache=stage.cache
        )
        notes += discovered_note(given, examples, self.key_parts)
        encoded = encode_pairs(encoder, examples)
        masked = [pair for pair in encoded.pairs if pair.masked is not None]
        collate = pair_collator(model, encoder.pad_token_id, self.share_prefix)
        with evaluating(model):
            head = head_of(model)  # which tries the model: before anything is wrapped around it
        self._frozen_head = copied_head(head)
        frozen = teacher_states(
            model,
            masked,
            collate,
            alpha=self.alpha,
            context="masked" if self.masked else "full",
            batch_size=self.batch_size,
            folder=stage.scratch,
        )
        record = _record(examples, frozen, len(encoded.pairs) - len(masked), wordings)
        record.notes += notes
        if self.pool is not None:
            record.details["pool"] = file_checksum(Path(self.pool))
        features = encoded.pairs if self.masked else [replace(pair, masked=None) for pair in encoded.pairs]
        temperature = None if self.temperature == "gain" else float(self.temperature)
        collator = FrozenPairCollator(GroupingCollator(collate), frozen, temperature, head.weight.shape[1])
        return StageInputs(features, collator, encoded.truncated, encoded.skipped, frozen.seconds, record)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | int | None) -> Tensor:
        """See :class:`cit_fast.methods.objectives.Objective`; both terms are sums over response tokens."""
        if "frozen" not in batch:
            return self._plain(model, batch, num_items)

        def divergence(side: Compared, temperature: Tensor) -> Tensor:
            return self.lambda_ * masked_jsd(
                *(side.masked, side.frozen, side.head.weight, side.before.weight, temperature),
                torch.ones_like(temperature),
                bias_live=side.head.bias,
                bias_frozen=side.before.bias,
                **side.head.options,
            )

        return with_divergence(model, batch, num_items, self._frozen_head, divergence, "kpig")

    def _reworded(self, stage: Stage) -> tuple[list[Example], dict[str, int]]:
        """The examples with the wordings they are trained with, and how many wordings each task has."""
        if self.instructions == "own" or (self.instructions == "pool" and not self._pools):
            return list(stage.examples), {}
        if self.instructions == "pool":
            drawn = draw_wordings(stage.examples, self._pools, stage.rng("objective"))
            names = {task.name for task in stage.known}
            return drawn, {task: len(pool) for task, pool in self._pools.items() if task in names}
        known = [example for task in stage.known for example in task.train]
        if isinstance(self.instructions, Mapping):
            pools = chat_pools(known, chat_of(self.instructions, stage.cache))
        else:
            pools = data_pools(known)
        if not pools:
            raise DataError(
                "instructions: no task has wordings that can stand for one another (each example needs an input beside "
                "its instruction); use instructions: own"
            )
        drawn = draw_wordings(stage.examples, pools, stage.rng("objective"))
        return drawn, {task: len(pool) for task, pool in pools.items()}


def _record(
    examples: Sequence[Example], frozen: TeacherStates, without: int, wordings: dict[str, int]
) -> ObjectiveRecord:
    """What the stage's record says: mean gain of each task, and how many examples could be compared."""
    by_task: dict[str, list[float]] = {}
    for index, gain in sorted(frozen.gains.items()):
        by_task.setdefault(examples[index].task, []).append(gain)
    left_out = (
        f"{without} of {without + len(frozen.gains)} examples have no key parts: cross-entropy alone trains them."
    )
    return ObjectiveRecord(
        gains={task: sum(gains) / len(gains) for task, gains in by_task.items()},
        compared=len(frozen.gains),
        without_key_parts=without,
        wordings=wordings,
        seconds=frozen.seconds,
        notes=[left_out] if without else [],
    )
