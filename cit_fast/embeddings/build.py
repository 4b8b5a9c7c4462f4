"""Build an embedder from its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cit_fast.embeddings.cache import CachedEmbedder
from cit_fast.embeddings.embedder import Embedder
from cit_fast.embeddings.sentence import SentenceEmbedder
from cit_fast.embeddings.token_mean import TokenMeanEmbedder
from cit_fast.errors import ConfigError
from cit_fast.models.pretrained import model_folder


def build_embedder(
    spec: str,
    *,
    model: Any = None,
    tokenizer: Any = None,
    cache: str | Path | None = None,
    device: str | None = None,
) -> Embedder:
    """Build the embedder that ``spec`` names.

    Args:
        spec: ``"tokens"``: token means of ``model``; ``"sentence"``: all-MiniLM-L6-v2; else a folder or hub name of a
            sentence-transformers model (one with a ``modules.json``) or of any other transformers model, for its token
            means.
        model, tokenizer: a live model and its tokenizer, for ``"tokens"``.
        cache: a folder for what was embedded; see :class:`CachedEmbedder`.
        device: where a sentence-embedding model runs.

    Raises:
        ConfigError: no such model, or one that cannot be used.
    """
    embedder: Embedder
    if spec == "tokens":
        if model is None or tokenizer is None:
            raise ConfigError("embedder: 'tokens' needs a model and its tokenizer; or name a model folder")
        embedder = TokenMeanEmbedder.of_model(model, tokenizer)
    elif spec == "sentence":
        embedder = SentenceEmbedder(device=device)
    else:
        folder = model_folder(spec, where="embedder (tokens, sentence or a model)")
        is_sentence_model = (folder / "modules.json").exists()
        embedder = (
            SentenceEmbedder(folder, device=device) if is_sentence_model else TokenMeanEmbedder.from_pretrained(folder)
        )
    return embedder if cache is None else CachedEmbedder(embedder, cache)
