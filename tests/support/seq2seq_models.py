"""Tiny encoder-decoders with random weights, made from configurations of real architectures, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from toy_folders import bpe_tokenizer

KINDS = ("t5", "bart")


def seq2seq_tokenizer() -> Any:
    """Bytes as tokens; no chat template; a text ends with EOS."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = bpe_tokenizer([], 259)
    tokenizer.chat_template = None
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def seq2seq_folder(folder: Path, kind: str) -> Path:
    """A model of two layers on each side, hidden size 32, saved with its tokenizer."""
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    tokenizer = seq2seq_tokenizer()
    tokens = {
        "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "t5":
            config = T5Config(
                d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                decoder_start_token_id=tokenizer.pad_token_id, initializer_factor=2.0, **tokens,
            )  # fmt: skip
            model: Any = T5ForConditionalGeneration(config)
        else:
            config = BartConfig(
                d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, init_std=0.3, max_position_embeddings=256,
                decoder_start_token_id=tokenizer.eos_token_id, forced_bos_token_id=None, bos_token_id=None, **tokens,
            )  # fmt: skip
            model = BartForConditionalGeneration(config)
        model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
