"""A tokenizer and a language model so small that a run takes a second."""

from __future__ import annotations

from pathlib import Path

from tests.support.toy_folders import bpe_tokenizer, llama_folder


def model_folder(folder: Path) -> Path:
    words = bpe_tokenizer(["user system assistant"], 300)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return llama_folder(folder, words, **sizes, initializer_range=0.3, tie_word_embeddings=False)
