"""A text as a sentence-embedding model reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cit_fast.errors import ConfigError, DataError
from cit_fast.models.digests import model_digest
from cit_fast.text import first_line

SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


class SentenceEmbedder:
    """A sentence-embedding model, run by the sentence-transformers library (``pip install 'cit-fast[embeddings]'``).

    A text longer than the model's limit (256 tokens for the default) is embedded by its beginning, which is the
    library's way. Equal texts in other batches may differ in the last bits: padding decides the order of sums.

    Args:
        name: a folder, for which no network is used, or a hub name.
        device: where the model runs; ``None``: the library's choice.
        batch_size: texts at a time.

    Raises:
        ConfigError: the library is missing, or the model cannot be loaded.
    """

    def __init__(self, name: str | Path = SENTENCE_MODEL, *, device: str | None = None, batch_size: int = 64) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError(
                f"embedder: a sentence-embedding model needs the package sentence-transformers ({error}); "
                "pip install 'cit-fast[embeddings]'"
            ) from None
        try:
            self._model = SentenceTransformer(
                str(name),
                device=device,
                local_files_only=Path(name).is_dir(),
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except Exception as error:  # the library raises whatever the one below it does
            raise ConfigError(f"embedder: {name} cannot be loaded: {first_line(error)}") from error
        self._model.eval()
        self._batch_size = batch_size
        self._name: str | None = None

    @property
    def name(self) -> str:
        """``sentence:`` and a digest of the weights, the modules' settings and the tokenizer, taken once."""
        if self._name is None:
            settings = (
                f"{self._model} {self._model.max_seq_length} {self._model.prompts} {self._model.default_prompt_name}"
            )
            self._name = f"sentence:{model_digest(self._model, self._model.tokenizer, settings)}"
        return self._name

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The texts as [texts, d] float32 on the CPU.

        Raises:
            DataError: an empty text; the message gives its index.
        """
        for index, text in enumerate(texts):
            if not text.strip():
                raise DataError(f"text {index}: it is empty, so it has no embedding")
        points: Tensor = self._model.encode(
            list(texts) or ["d"],  # the library has no [0, d]
            batch_size=self._batch_size,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return points[: len(texts)].to("cpu", torch.float32)
