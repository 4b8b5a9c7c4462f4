"""The protocol of an objective, and the plain way to make a stage's batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from cit_fast.data.example import Example
from cit_fast.methods.stage import Stage, StageInputs
from cit_fast.models.collation import choose_collator
from cit_fast.models.encoder_decoder import decoder_start


class Objective(Protocol):
    """What one of the four parts of a method must offer to compute the loss."""

    def prepare(self, stage: Stage) -> StageInputs:
        """What the stage trains on, in the form that the loss wants.

        Called once before the stage is trained, on every process, with the model as the previous stage left it.
        :func:`plain_inputs` is the usual answer.
        """

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """Loss of one micro-batch: sum over its response tokens divided by ``num_items``.

        Args:
            model: the model as the Trainer wraps it (DDP, FSDP, DeepSpeed); call it, not its insides.
            batch: what the collator made: input_ids, labels (-100 outside the response), attention_mask, ...
            num_items: response tokens of the whole accumulated (global) batch; ``None``: of this batch.
        """


def plain_inputs(stage: Stage, examples: Sequence[Example]) -> StageInputs:
    """Prompts with their answers, in batches as the model's attention takes them: padded, or packed for flash."""
    encoded = stage.encoder.encode_all(examples)
    collator = choose_collator(
        stage.model.config._attn_implementation,
        stage.model.device,
        pad_token_id=stage.encoder.pad_token_id,
        max_length=stage.encoder.max_length,
        images=stage.encoder.images is not None,
        decoder_start=decoder_start(stage.model),
    )
    return StageInputs(encoded.encoded, collator, encoded.truncated, encoded.skipped)
