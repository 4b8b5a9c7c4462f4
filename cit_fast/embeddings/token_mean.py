"""A text as the mean of its tokens' input embeddings."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cit_fast.embeddings.weights import read_input_embeddings, read_tokenizer
from cit_fast.errors import ConfigError, DataError
from cit_fast.models.digests import ROWS, hash_tensor, tokenizer_content
from cit_fast.models.pretrained import model_folder

_BATCH = 256  # texts whose tokens are held at a time


class TokenMeanEmbedder:
    """A text is the mean of its tokens' input embeddings, special tokens left out (InsCL, arXiv 2403.11435).

    A text gets the same bits alone and in any batch. ``weight`` is used where it is, not copied: after training on,
    make a new embedder.

    Args:
        weight: [V, d], floating point, on any device; a model's input embeddings.
        tokenizer: of transformers.

    Raises:
        ConfigError: ``weight`` is no such matrix, or holds no values here (a shard, a meta tensor).
    """

    def __init__(self, weight: Tensor, tokenizer: Any) -> None:
        shard = hasattr(weight, "device_mesh")  # a DTensor, whose import takes a second
        if shard or weight.is_meta or weight.numel() == 0:
            kind = "a shard of it" if shard else "a meta tensor" if weight.is_meta else "empty"
            raise ConfigError(
                f"embedder: the input embeddings must be whole, and the weight is {kind}; gather it first (FSDP: "
                "full_tensor() on every process; DeepSpeed: zero.GatheredParameters) and pass the tensor"
            )
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ConfigError(
                f"embedder: the input embeddings are {list(weight.shape)} {weight.dtype}; "
                "expected [V, d], floating point"
            )
        self._weight, self._tokenizer = weight.detach(), tokenizer
        self._name: str | None = None

    @property
    def name(self) -> str:
        """``tokens:`` and a digest of the weight's bytes and of the tokenizer, taken once."""
        if self._name is None:
            digest = hashlib.blake2b(digest_size=16)
            hash_tensor(digest, self._weight)
            digest.update(tokenizer_content(self._tokenizer))
            self._name = f"tokens:{digest.hexdigest()}"
        return self._name

    @classmethod
    def of_model(cls, model: Any, tokenizer: Any) -> TokenMeanEmbedder:
        """The embedder of a live transformers model, PEFT-wrapped or not; adapters of the embeddings count.

        Raises:
            ConfigError: the model is sharded (FSDP, ZeRO-3), or has no input embeddings.
        """
        try:
            module = model.get_input_embeddings()
        except (AttributeError, NotImplementedError) as error:  # of transformers: no such thing in this architecture
            raise ConfigError(f"embedder: {type(model).__name__} has no input embeddings of tokens") from error
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            raise ConfigError(f"embedder: {type(model).__name__} has no input embeddings of tokens")
        checked = cls(weight, tokenizer)
        if not hasattr(module, "active_adapters"):  # PEFT's layers have; LoRA and new token rows change what comes out
            return checked
        with torch.no_grad():
            ids = torch.arange(weight.shape[0], device=weight.device)
            return cls(torch.cat([module(some) for some in torch.split(ids, ROWS)]), tokenizer)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> TokenMeanEmbedder:
        """The embedder of a model folder or hub name; of the weights, only the embedding matrix is read.

        A folder with a PEFT adapter stands for its base model; an adapter that changes the embeddings is an error.

        Raises:
            ConfigError: no such model, no safetensors, or nothing in them that is its input embeddings.
        """
        folder = model_folder(str(name), where="embedder")
        return cls(read_input_embeddings(folder), read_tokenizer(folder))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The texts as [texts, d] float32 on the CPU.

        Raises:
            DataError: a text without tokens, or a token beyond the weight's rows; the message gives the text's index.
        """
        points = torch.empty(len(texts), self._weight.shape[1])
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            tokens = self._tokens(batch, start)
            ids = torch.tensor(list(itertools.chain.from_iterable(tokens)))
            offsets = torch.tensor([0, *(len(each) for each in tokens[:-1])]).cumsum(0)
            distinct, position = torch.unique(ids, return_inverse=True)
            if int(distinct[-1]) >= len(self._weight):
                index = start + next(i for i, each in enumerate(tokens) if max(each) >= len(self._weight))
                raise DataError(
                    f"text {index}: its tokens run to {int(distinct[-1])}, and the embeddings have "
                    f"{len(self._weight)} rows; is this the model's own tokenizer?"
                )
            rows = self._weight[distinct.to(self._weight.device)].to("cpu", torch.float32)
            points[start : start + len(batch)] = F.embedding_bag(position, rows, offsets, mode="mean")
        return points

    def _tokens(self, texts: list[str], start: int) -> list[list[int]]:
        encoded = self._tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False
        )
        tokens: list[list[int]] = encoded["input_ids"]
        for index, each in enumerate(tokens, start):
            if not each:
                raise DataError(f"text {index}: {texts[index - start]!r} has no tokens, so it has no embedding")
        return tokens
