"""A merge at a stage's end: the weights go a part of the way from where they were to where training took them::

    theta = (1 - c) theta_before + c theta_after

Source: sequential fine-tuning with averaging (Kleiman et al., SFA, arXiv 2501.05559) and SuRe (Hazard et al., arXiv
2511.22367), which merge so after every task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from cit_fast.data.example import Example
from cit_fast.errors import ConfigError
from cit_fast.evaluation.records import UpdateRecord
from cit_fast.key_parts.gain import answer_surprise
from cit_fast.methods.stage import Finished, Stage
from cit_fast.methods.updates.update import When, due, when_checked
from cit_fast.optim import BalanceSummary
from cit_fast.processes import from_rank_zero

_COARSE, _FINE = (0.25, 0.5, 0.75, 1.0), 0.125
"""Coefficients of the line search, and how far from the best of them it looks again."""


class MergeUpdate:
    """Plain training whose result is merged with the weights that the stage began with.

    Args:
        coefficient: c in [0, 1], the share of the new weights; or ``"auto"``: the one with the smallest mean negative
            log-likelihood of answers, over the earlier tasks' replayed examples and the new tasks' development
            examples (their training examples where they have none), every task counting the same. Six values are
            tried, to an eighth.
        of: ``"product"``: of a LoRA layer the product BA is merged, and the best product of the same rank is kept;
            ``"factors"``: A and B apart. Parameters that belong to no LoRA layer are merged as they are.
        examples: for the search, of all tasks together, >= 2.
        batch_size: examples at a time in the search, >= 1.
        when: the stages at whose end weights are merged, see :data:`cit_fast.methods.updates.When`.

    Raises:
        ConfigError: an option out of range or unknown.
    """

    needs_whole_weights = True

    def __init__(
        self,
        coefficient: float | Literal["auto"] = "auto",
        of: Literal["product", "factors"] = "product",
        examples: int = 64,
        batch_size: int = 16,
        when: When = "from-second",
    ) -> None:
        number = isinstance(coefficient, (int, float)) and not isinstance(coefficient, bool)
        if coefficient != "auto" and not (number and 0 <= coefficient <= 1):
            raise ConfigError(f"coefficient: {coefficient!r} is neither 'auto' nor in [0, 1]")
        if of not in ("product", "factors"):
            raise ConfigError(f"of: {of!r} is unknown; expected product or factors")
        if examples < 2:
            raise ConfigError(f"examples: {examples} is below 2")
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is below 1")
        when_checked(when)
        self.coefficient, self.of, self.examples, self.batch_size, self.when = (
            coefficient,
            of,
            examples,
            batch_size,
            when,
        )
        self._before: dict[str, Tensor] = {}

    def begin(self, stage: Stage) -> None:
        """Keep a copy of what trains.

        Raises:
            ConfigError: the coefficient is to be searched, and no earlier example comes back to search it with.
        """
        if not due(self.when, stage):
            return
        new = {task.name for task in stage.tasks}
        if self.coefficient == "auto" and stage.seen and all(example.task in new for example in stage.examples):
            raise ConfigError(
                "update merge: coefficient auto weighs the new task against the earlier ones by their replayed "
                "examples, and none come back; add a replay, or give a number"
            )
        self._before = {name: p.detach().clone() for name, p in stage.model.named_parameters() if p.requires_grad}

    def wrap(self, optimizer: Optimizer, stage: Stage) -> Optimizer:
        """The same optimizer."""
        return optimizer

    def finish(self, optimizer: Optimizer, stage: Stage) -> Finished:
        """Put the merged weights into the model."""
        if not due(self.when, stage):
            return Finished()
        before, self._before = self._before, {}
        line = _Line(stage.model, before, self.of)
        losses: dict[float, float] = {}
        coefficient = self._searched(stage, line, losses) if self.coefficient == "auto" else float(self.coefficient)
        line.go_to(coefficient)
        note = f"Merged: {100 * coefficient:.3g} % of the way from the weights before to those after training."
        return Finished(record=UpdateRecord(coefficient, sorted(losses.items()), [note]))

    def summary(self, optimizer: Optimizer, stage: Stage) -> BalanceSummary | None:
        """No average, no weights."""
        return None

    def _searched(self, stage: Stage, line: _Line, losses: dict[float, float]) -> float:
        """The best coefficient; of equally good ones the largest."""
        drawn = _drawn(stage, self.examples)

        def best() -> float:
            return min(sorted(losses, reverse=True), key=losses.__getitem__)

        def tried(coefficient: float) -> None:
            if coefficient not in losses and 0 <= coefficient <= 1:
                line.go_to(coefficient)
                losses[coefficient] = from_rank_zero(lambda: _mean_of_tasks(stage, drawn, self.batch_size))

        for coefficient in _COARSE:
            tried(coefficient)
        around = best()
        tried(around - _FINE)
        tried(around + _FINE)
        return best()


def _drawn(stage: Stage, count: int) -> dict[str, list[Example]]:
    """Task -> examples to judge by, as many of each as go into ``count``."""
    new = {task.name: list(task.dev or task.train) for task in stage.tasks}
    earlier: dict[str, list[Example]] = {}
    for example in stage.examples:
        if example.task not in new:
            earlier.setdefault(example.task, []).append(example)
    every, rng = {**earlier, **new}, stage.rng("merge")
    each = max(1, count // len(every))
    return {name: rng.sample(own, min(each, len(own))) for name, own in every.items()}


def _mean_of_tasks(stage: Stage, drawn: Mapping[str, Sequence[Example]], batch_size: int) -> float:
    """Mean over tasks of the mean negative log-likelihood of their answers, in nats per token."""
    flat = [example for own in drawn.values() for example in own]
    found: dict[str, list[float]] = {}
    for index, value in answer_surprise(stage.model, stage.encoder, flat, batch_size=batch_size):
        found.setdefault(flat[index].task, []).append(value)
    return sum(sum(own) / len(own) for own in found.values()) / len(found)


class _Line:
    """The weights between those before and those after a stage.

    Args:
        model: as training left it.
        before: what trained, by name, as it was.
        of: see :class:`MergeUpdate`.
    """

    def __init__(self, model: nn.Module, before: Mapping[str, Tensor], of: str) -> None:
        self.parameters = dict(model.named_parameters())
        self.before = before
        self.after = {name: self.parameters[name].detach().clone() for name in before}
        self.products = dict(_lora_pairs(model, before)) if of == "product" else {}

    @torch.no_grad()
    def go_to(self, coefficient: float) -> None:
        """Set the model's weights to (1 - c) before + c after; at 0 and 1 to the weights themselves."""
        ends = {0.0: self.before, 1.0: self.after}
        if coefficient in ends:
            for name, value in ends[coefficient].items():
                self.parameters[name].copy_(value)
            return
        inside = {name for pair in self.products.items() for name in pair}
        for name, before in self.before.items():
            if name not in inside:
                self.parameters[name].copy_(torch.lerp(before.float(), self.after[name].float(), coefficient))
        for down, up in self.products.items():
            factors = _merged_product(
                (self.before[down], self.before[up]), (self.after[down], self.after[up]), coefficient
            )
            for name, value in zip((down, up), factors, strict=True):
                self.parameters[name].copy_(value)


def _lora_pairs(model: nn.Module, trained: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of A [r, in] and B [out, r] of every LoRA layer on a linear layer whose factors both train."""
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.lora_A:
            down, up = (f"{path}.lora_{factor}.{adapter}.weight" for factor in "AB")
            plain = adapter not in module.lora_variant and isinstance(module.lora_A[adapter], nn.Linear)
            if plain and down in trained and up in trained:
                yield down, up


def _merged_product(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], coefficient: float
) -> tuple[Tensor, Tensor]:
    """A and B of the same rank whose product is nearest to (1 - c) B_0 A_0 + c B_1 A_1; float32 or wider."""
    rank, dtype = len(before[0]), torch.promote_types(before[0].dtype, torch.float32)
    (a_0, b_0), (a_1, b_1) = ([factor.to(dtype) for factor in pair] for pair in (before, after))
    q_up, r_up = torch.linalg.qr(torch.cat([(1 - coefficient) * b_0, coefficient * b_1], 1))
    q_down, r_down = torch.linalg.qr(torch.cat([a_0, a_1]).T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]) @ q_down.T, (q_up @ u[:, :rank]) * root
