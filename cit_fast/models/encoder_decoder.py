"""Encoder-decoders (T5, BART): the encoder reads the prompt, the decoder writes the answer.

Everywhere else a prompt and its answer are one sequence, as a causal model reads them; a batch cuts it where the answer
begins. The decoder's row begins a place before the answer, with its start token: what predicts a token stands one place
before it, as in a causal model, so losses need not know which kind they train.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cit_fast.errors import ConfigError
from cit_fast.models.wrappers import unwrap

DECODER_LENGTHS: tuple[int, ...] = (4, 8, 16, 24)
"""Padded lengths of answers alone, before those of whole sequences."""
_IGNORED = -100


def is_encoder_decoder(config: Any) -> bool:
    """Whether a model of this transformers configuration reads a prompt with an encoder and answers with a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    return bool(getattr(config, "is_encoder_decoder", False)) and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING


def decoder_start(model: nn.Module) -> int | None:
    """The token with which the decoder begins; ``None`` for a causal model.

    Args:
        model: in wrappers or not.

    Raises:
        ConfigError: an encoder-decoder whose configuration names none.
    """
    config: Any = getattr(unwrap(model), "config", None)
    if not is_encoder_decoder(config):
        return None
    for name in ("decoder_start_token_id", "pad_token_id"):  # T5 begins with its padding token
        token = getattr(config, name, None)
        if token is not None:
            return int(token)
    raise ConfigError(f"{type(config).__name__}: names no decoder_start_token_id, so no answer could begin")


def few_tokens(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """What a model takes for a trial on some tokens, [B, T] int64."""
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return inputs if decoder_start(model) is None else {**inputs, "decoder_input_ids": tokens}


def cut_rows(
    rows: Sequence[tuple[Sequence[int], Sequence[int], int]],
    start: int,
    pad: int,
    width_of: Callable[[int, bool], int],
) -> dict[str, Tensor]:
    """Sequences of prompt and answer as a batch for encoder and decoder.

    Args:
        rows: of each its tokens, its labels (-100 where nothing is learned), and how many tokens the prompt has.
        start: the decoder's start token. ``pad``: fills rows on the right; it is masked, or not learned.
        width_of: the length of the longest row, and whether it is the decoder's -> the padded length.

    Returns:
        int64: ``input_ids`` and ``attention_mask`` [B, T] of the prompts; ``decoder_input_ids`` and ``labels`` [B, S]
        of the answers. Token k of a sequence stands at ``k - prompt + 1`` of its row in the latter.
    """
    prompts = [list(ids[:cut]) for ids, _, cut in rows]
    answers = [[start, *ids[cut:]] for ids, _, cut in rows]
    labels = [[_IGNORED, *own[cut:]] for _, own, cut in rows]
    width, length = width_of(max(map(len, prompts)), False), width_of(max(map(len, answers)), True)

    def filled(values: Sequence[Sequence[int]], to: int, value: int) -> Tensor:
        return torch.tensor([[*each, *[value] * (to - len(each))] for each in values], dtype=torch.int64)

    return {
        "input_ids": filled(prompts, width, pad),
        "attention_mask": filled([[1] * len(each) for each in prompts], width, 0),
        "decoder_input_ids": filled(answers, length, pad),
        "labels": filled(labels, length, _IGNORED),
    }


def around_text(tokenizer: Any, closes: bool) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before a plain text, and where prompts have an encoder of their own, what after it."""
    found, bos, eos = tokenizer("a")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id
    before = [bos] if bos is not None and found[:1] == [bos] else []
    return before, [eos] if closes and found[-1:] == [eos] else []
