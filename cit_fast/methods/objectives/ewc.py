"""Elastic weight consolidation: a spring on every weight, as stiff as the earlier tasks need the weight.

Source: Kirkpatrick et al., PNAS 2017 (arXiv 1612.00796), with one anchor for all tasks and the sum of their Fisher
information (online EWC: Schwarz et al., ICML 2018, arXiv 1805.06370, without its decay).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.records import ObjectiveRecord
from cit_fast.methods.objectives.cross_entropy import CrossEntropy
from cit_fast.methods.stage import Stage, StageInputs
from cit_fast.models.collation import PaddingCollator
from cit_fast.models.digests import fingerprint
from cit_fast.models.encoder_decoder import decoder_start
from cit_fast.models.forward import evaluating
from cit_fast.models.kept_tensors import read_tensors, write_tensors
from cit_fast.models.parked_sets import set_names
from cit_fast.models.prompts import IGNORED, Encoded


class EWC:
    """Cross-entropy with a quadratic penalty around the weights that the stage began with::

        L = L_CE + lambda / 2 sum_i F_i (theta_i - theta*_i)^2

    F_i sums, over the earlier tasks, the mean over a task's examples of (d log p(y | x) / d theta_i)^2, with the
    answer y of the data (the empirical Fisher information) and the weights that the task left; theta* are the weights
    before the stage. The Fisher information of a task is found when the next one begins.

    Args:
        lambda_: weight of the penalty, >= 0 and finite.
        examples: of each task for its Fisher information, >= 1; drawn at random from those it was trained on.

    Raises:
        ConfigError: an option out of range.
    """

    needs_whole_weights = True

    def __init__(self, lambda_: float = 100.0, examples: int = 64) -> None:
        if not (lambda_ >= 0 and math.isfinite(lambda_)):
            raise ConfigError(f"lambda_: {lambda_} is negative or not finite")
        if examples < 1:
            raise ConfigError(f"examples: {examples} is below 1")
        self.lambda_, self.examples = lambda_, examples
        self._plain = CrossEntropy()
        self._springs: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._kept: tuple[int, dict[str, Tensor]] = (0, {})  # in memory, where there is no folder

    def prepare(self, stage: Stage) -> StageInputs:
        """The stage's examples for cross-entropy, and the springs.

        Raises:
            ConfigError: a model with several adapter sets, whose tasks do not share their weights.
            RunError: what an earlier stage kept is missing or damaged.
        """
        sets = sorted(set_names(stage.model))
        if len(sets) > 1:
            raise ConfigError(
                f"objective ewc holds one set of weights, and there are {', '.join(sets)}; router: shared"
            )
        inputs = self._plain.prepare(stage)
        self._springs = []
        if not stage.seen or not self.lambda_:
            return inputs
        started = time.perf_counter()
        parameters = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
        fisher = self._fisher(stage, parameters)
        self._springs = [(p, p.detach().clone(), fisher[name].to(p.device)) for name, p in parameters.items()]
        seconds = time.perf_counter() - started
        trace = math.fsum(float(value.sum()) for value in fisher.values())
        record = ObjectiveRecord(seconds=seconds, details={"trace of the Fisher information": trace})
        return replace(inputs, seconds=inputs.seconds + seconds, record=record)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """See :class:`cit_fast.methods.objectives.Objective`; a micro-batch bears its tokens' share of the penalty."""
        loss = self._plain(model, batch, num_items)
        if not self._springs:
            return loss
        pulls = [
            ((_wide(p) - _wide(before)).square() * stiff.to(_wide(p).dtype)).sum() for p, before, stiff in self._springs
        ]
        penalty = torch.stack(pulls).sum()
        tokens = (batch["labels"][:, 1:] != IGNORED).sum()
        share = 1.0 if num_items is None else tokens / num_items
        return loss + (share * self.lambda_ / 2 * penalty).to(loss.dtype)

    def _fisher(self, stage: Stage, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Of all earlier tasks together, by parameter's name, float32."""
        drawn = self._drawn(stage)
        digest = hashlib.blake2b(repr([each.input_ids for each in drawn]).encode(), digest_size=16)
        digest.update(fingerprint(stage.model).encode())
        path = None if stage.kept is None else _path(stage.kept, stage.index)
        if path is not None:
            known = read_tensors(path, digest.hexdigest(), check=True)
            if known is not None:
                return known
        before = self._before(stage, parameters)
        squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        collate = PaddingCollator(stage.encoder.pad_token_id, decoder_start=decoder_start(stage.model))
        with evaluating(stage.model), torch.enable_grad():
            for each in drawn:
                batch = {name: value.to(stage.model.device) for name, value in collate([each]).items()}
                loss = self._plain(stage.model, batch, 1)  # the sum over the answer's tokens
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for square, gradient in zip(squares.values(), gradients, strict=True):
                    if gradient is not None:
                        square.add_(gradient.float().square(), alpha=1 / len(drawn))
        fisher = {name: (square + before[name].to(square.device)).cpu() for name, square in squares.items()}
        if path is not None:
            write_tensors(path, digest.hexdigest(), fisher)
        self._kept = (stage.index, fisher)
        return fisher

    def _drawn(self, stage: Stage) -> list[Encoded]:
        """Encoded examples of the task that was trained last."""
        task = stage.seen[-1]
        some = stage.rng("ewc").sample(task.train, min(self.examples, len(task.train)))
        encoded = stage.encoder.with_limit(stage.encoder.max_length, "skip").encode_all(some).encoded
        if not encoded:
            raise ConfigError(f"objective ewc: no example of task {task.name!r} fits data.max_length")
        return encoded

    def _before(self, stage: Stage, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Of the tasks before the last one."""
        if stage.index <= 2:  # by its number: what was dropped since has left its information
            return {name: torch.zeros(p.shape) for name, p in parameters.items()}
        index, found = self._kept
        if index != stage.index - 1 and stage.kept is not None:
            found = read_tensors(_path(stage.kept, stage.index - 1), None, check=True) or {}
        if {name: value.shape for name, value in found.items()} != {name: p.shape for name, p in parameters.items()}:
            where = "in memory" if stage.kept is None else _path(stage.kept, stage.index - 1)
            raise RunError(f"objective ewc: the Fisher information of the stages before is not there ({where})")
        return found


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or as wide as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _path(kept: Path, index: int) -> Path:
    """Where the sum over the tasks before stage ``index`` is."""
    return kept / "ewc" / f"{index:02d}.safetensors"
