"""What the switch network sees of a prompt: the last token's hidden state of a language model (SwitchCIT).

Source: Wu et al., arXiv 2407.11780.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from cit_fast.embeddings.build import build_embedder
from cit_fast.embeddings.cache import CachedEmbedder
from cit_fast.embeddings.embedder import Embedder
from cit_fast.embeddings.token_mean import TokenMeanEmbedder
from cit_fast.errors import ConfigError, DataError
from cit_fast.methods.stage import Stage
from cit_fast.models.digests import model_digest
from cit_fast.models.encoder_decoder import is_encoder_decoder
from cit_fast.models.image_reader import Prompt, picture_inputs
from cit_fast.models.pretrained import model_folder
from cit_fast.text import first_line

_TOKENS_A_BATCH = 4096  # padded ones
Cut = Literal["middle", "end"]


class LastTokenFeatures:
    """The final layer's hidden state at a text's last token, of a causal language model as it is.

    A longer text than ``max_length`` is read with its middle left out: what is to be done stands at the beginning or at
    the end (``cut="end"``: its first tokens, as SwitchCIT's code does). ``truncated`` counts such texts. Texts are
    padded on the right, where a causal model does not look.

    Args:
        model: of transformers; a PEFT model is read with its adapters off.
        tokenizer: the model's own.
        max_length: tokens read of a text, >= 2.

    Raises:
        ConfigError: a limit below 2.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int = 128, cut: Cut = "middle") -> None:
        if max_length < 2:
            raise ConfigError(f"max_length: {max_length}; expected at least 2 tokens")
        self._model, self._tokenizer, self.max_length, self.cut = model, tokenizer, max_length, cut
        self._name: str | None = None
        self.truncated = 0

    @property
    def name(self) -> str:
        """``last-token:``, the limit, and a digest of weights and tokenizer, taken once."""
        if self._name is None:
            self._name = f"last-token:{self.max_length}:{self.cut}:{model_digest(self._model, self._tokenizer)}"
        return self._name

    @classmethod
    def from_pretrained(
        cls, name: str, max_length: int = 128, device: Any = None, cut: Cut = "middle"
    ) -> LastTokenFeatures:
        """The features of a model folder or hub name.

        Raises:
            ConfigError: no such model, or one that cannot be loaded.
        """
        from transformers import AutoModel, AutoTokenizer

        folder = model_folder(name, where="router.features")
        try:
            model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"features: {name!r} cannot be loaded: {first_line(error)}") from None
        return cls(model.to(device), tokenizer, max_length, cut)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The texts as [texts, d] float32 on the CPU.

        Raises:
            DataError: a text without tokens; the message gives its index.
        """
        return self._states([self._cut(ids) for ids in self._tokenize(texts)])

    def embed_seen(self, prompts: Sequence[Prompt]) -> Tensor:
        """The same of prompts with images, as the model is given them: none of their tokens is left out.

        Raises:
            DataError: an image that cannot be read any more, or that has changed.
        """
        return self._states(prompts)

    def _states(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        longest_first = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
        rows: list[Tensor] = [torch.empty(0)] * len(tokens)
        with _as_the_base(self._model) as decoder, torch.inference_mode():
            for batch in _batches(longest_first, tokens):
                width = len(tokens[batch[0]])
                ids = torch.zeros(len(batch), width, dtype=torch.long)
                mask = torch.zeros_like(ids)
                for row, index in enumerate(batch):
                    ids[row, : len(tokens[index])] = torch.as_tensor(tokens[index])
                    mask[row, : len(tokens[index])] = 1
                device = next(decoder.parameters()).device
                seen = picture_inputs(
                    [(tokens[index], getattr(tokens[index], "pictures", None)) for index in batch], width
                )
                inputs = {"input_ids": ids, "attention_mask": mask, **seen}
                hidden = decoder(
                    **{name: value.to(device) for name, value in inputs.items()}, use_cache=False
                ).last_hidden_state
                last = (mask.sum(1) - 1).to(device)
                states = hidden[torch.arange(len(batch), device=device), last].float().cpu()
                for index, state in zip(batch, states, strict=True):
                    rows[index] = state.clone()
        return torch.stack(rows) if rows else torch.empty(0, 0)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        tokens: list[list[int]] = self._tokenizer(
            list(texts), padding=False, truncation=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for index, ids in enumerate(tokens):
            if not texts[index].strip() or not ids:
                raise DataError(f"text {index}: it is empty, so it has no features")
        return tokens

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_length:
            return ids
        self.truncated += 1
        if self.cut == "end":
            return ids[: self.max_length]
        head = self.max_length // 2
        return ids[:head] + ids[head - self.max_length :]


def _batches(order: Sequence[int], tokens: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Texts of similar length together, so many as the longest, the first, leaves room for."""
    start = 0
    while start < len(order):
        count = max(1, _TOKENS_A_BATCH // len(tokens[order[start]]))
        yield list(order[start : start + count])
        start += count


def _reader(base: Any) -> Any:
    return base.get_encoder() if is_encoder_decoder(base.config) else base.base_model


@contextlib.contextmanager
def _as_the_base(model: Any) -> Iterator[Any]:
    """The decoder of ``model`` without head and adapters, in evaluation mode; as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield _reader(model.get_base_model())
        else:
            yield _reader(model)
    finally:
        for module in training:
            module.training = True


def base_token_embedder(stage: Stage) -> Embedder:
    """Mean token embeddings of the base model, whatever an adapter has made of them.

    Raises:
        ConfigError: there is no model, or it has no input embeddings.
    """
    if stage.model is None or stage.encoder is None:
        raise ConfigError("router: 'tokens' means the base model's token embeddings, and there is no model")
    module = stage.model.get_input_embeddings()
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    if weight is None:
        raise ConfigError(f"router: {type(stage.model).__name__} has no input embeddings of tokens")
    return TokenMeanEmbedder(weight, stage.encoder.tokenizer)


def build_features(spec: str, stage: Stage, max_length: int, cut: Cut = "middle") -> Embedder:
    """What makes prompts features.

    Args:
        spec: ``"base"``: last-token states of the base model; ``"tokens"``: its mean token embeddings; ``"sentence"``:
            all-MiniLM-L6-v2; else a folder or hub name of a sentence-transformers model, or of any causal language
            model for its last-token states.
        max_length: tokens read for last-token states; ``cut``: what of a longer text is not.

    Raises:
        ConfigError: no such model, or one that cannot be used.
    """
    cache = None if stage.cache is None else stage.cache / "embeddings"
    if spec == "base":
        if stage.model is None or stage.encoder is None:
            raise ConfigError("router: features 'base' are those of the base model, and there is no model")
        return LastTokenFeatures(stage.model, stage.encoder.tokenizer, max_length, cut)
    if spec == "tokens":
        return base_token_embedder(stage)
    if spec == "sentence":
        return build_embedder(spec, cache=cache)
    if (model_folder(spec, where="router.features (base, tokens, sentence or a model)") / "modules.json").exists():
        return build_embedder(spec, cache=cache)
    device = getattr(stage.model, "device", None)
    features = LastTokenFeatures.from_pretrained(spec, max_length, device, cut)
    return features if cache is None else CachedEmbedder(features, cache)
