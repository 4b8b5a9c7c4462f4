"""Instructions as points: what embeds them, the cache of it, and the measure that a task becomes (InsCL)."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cit_fast.data.embedding_cache import CachedEmbedder
from cit_fast.data.embedding_weights import read_input_embeddings, read_tokenizer
from cit_fast.data.example import Example, Task
from cit_fast.errors import ConfigError, DataError
from cit_fast.text import first_line

SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS = ("real", "uniform")

__all__ = [
    "SENTENCE_MODEL",
    "WEIGHTS",
    "CachedEmbedder",
    "Embedder",
    "SentenceEmbedder",
    "TokenMeanEmbedder",
    "build_embedder",
    "instruction_measure",
    "task_clouds",
]

_BATCH = 256  # texts whose tokens are held at a time
_HASHED_ROWS = 8192  # of a weight, at a time


class Embedder(Protocol):
    """Turns texts into points."""

    @property
    def name(self) -> str:
        """Identifies the model with its weights: equal names embed a text alike, so caches go by it."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The texts as [texts, d] float32 on the CPU."""


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
            _hash_tensor(digest, self._weight)
            digest.update(_tokenizer_content(self._tokenizer))
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
        except (AttributeError, NotImplementedError):
            module = None
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, Tensor):
            raise ConfigError(f"embedder: {type(model).__name__} has no input embeddings of tokens")
        checked = cls(weight, tokenizer)
        if not hasattr(module, "active_adapters"):  # PEFT's layers have; LoRA and new token rows change what comes out
            return checked
        with torch.no_grad():
            ids = torch.arange(weight.shape[0], device=weight.device)
            return cls(torch.cat([module(some) for some in torch.split(ids, _HASHED_ROWS)]), tokenizer)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> TokenMeanEmbedder:
        """The embedder of a model folder or hub name; of the weights, only the embedding matrix is read.

        A folder with a PEFT adapter stands for its base model; an adapter that changes the embeddings is an error.

        Raises:
            ConfigError: no such model, no safetensors, or nothing in them that is its input embeddings.
        """
        folder = model_folder(str(name))
        return cls(read_input_embeddings(folder, model_folder), read_tokenizer(folder, model_folder))

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
            digest = hashlib.blake2b(settings.encode(), digest_size=16)
            for key, value in sorted(self._model.state_dict().items()):
                digest.update(key.encode())
                _hash_tensor(digest, value)
            digest.update(_tokenizer_content(self._model.tokenizer))
            self._name = f"sentence:{digest.hexdigest()}"
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


def build_embedder(
    spec: str,
    *,
    model: Any = None,
    tokenizer: Any = None,
    cache: str | Path | None = None,
    device: str | None = None,
) -> Embedder:
    """The embedder that a short text describes.

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
        folder = model_folder(spec)
        is_sentence_model = (folder / "modules.json").exists()
        embedder = (
            SentenceEmbedder(folder, device=device) if is_sentence_model else TokenMeanEmbedder.from_pretrained(folder)
        )
    return embedder if cache is None else CachedEmbedder(embedder, cache)


def instruction_measure(examples: Task | Sequence[Example], weights: str = "real") -> tuple[list[str], Tensor]:
    """The discrete measure of a task over its distinct instructions (METHODS.md section 3).

    Args:
        examples: a task, for its training split, or examples.
        weights: ``"real"``: the share of examples that carry the instruction; ``"uniform"``.

    Returns:
        The instructions in order of first appearance, and their weights, [instructions] float64 with sum 1.

    Raises:
        DataError: no examples, or an empty instruction.
        ConfigError: unknown ``weights``.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights: {weights!r} is unknown; expected one of {', '.join(WEIGHTS)}")
    where = "the examples"
    if isinstance(examples, Task):
        where, examples = f"task {examples.name!r}", examples.train
    if not examples:
        raise DataError(f"{where}: no training examples, so it has no instructions to measure")
    for example in examples:
        if not example.instruction.strip():
            raise DataError(f"{example.source or where}: the instruction is empty, so it has no embedding")
    counts = Counter(example.instruction for example in examples)  # in order of first appearance
    share = torch.tensor(list(counts.values()) if weights == "real" else [1] * len(counts), dtype=torch.float64)
    return list(counts), share / share.sum()


def task_clouds(
    tasks: Sequence[Task | Sequence[Example]],
    embedder: Embedder,
    weights: str = "real",
    *,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Tasks as weighted point clouds, ready for :func:`cit_fast.ops.wasserstein_matrix`.

    An instruction that several tasks share is embedded once.

    Args:
        tasks, weights: see :func:`instruction_measure`.
        embedder: makes the points.
        progress: called with the number of instructions embedded so far and in all.

    Returns:
        Clouds [n_i, d] float32 and weights [n_i] float64, one of each per task.

    Raises:
        DataError, ConfigError: as :func:`instruction_measure` and the embedder do.
    """
    measures = [instruction_measure(task, weights) for task in tasks]
    position: dict[str, int] = {}
    for instructions, _ in measures:
        for text in instructions:
            position.setdefault(text, len(position))
    texts, blocks = list(position), []
    for start in range(0, len(texts), 4 * _BATCH):
        blocks.append(embedder.embed(texts[start : start + 4 * _BATCH]))
        if progress is not None:
            progress(min(start + 4 * _BATCH, len(texts)), len(texts))
    points = torch.cat(blocks) if blocks else torch.empty(0, 0)
    clouds = [points[[position[text] for text in instructions]] for instructions, _ in measures]
    return clouds, [share for _, share in measures]


def model_digest(model: Any, tokenizer: Any) -> str:
    """Identifies a model with its weights and its tokenizer."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        _hash_tensor(digest, value)
    digest.update(_tokenizer_content(tokenizer))
    return digest.hexdigest()


def _hash_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"\0{list(tensor.shape)} {tensor.dtype}\0".encode())
    for rows in _blocks(tensor.detach()):
        digest.update(rows.cpu().contiguous().view(torch.uint8).numpy())


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(1) if tensor.dim() == 0 else tensor
    for start in range(0, len(flat), _HASHED_ROWS):
        yield flat[start : start + _HASHED_ROWS]


def _tokenizer_content(tokenizer: Any) -> bytes:
    """What decides the tokens of a text; neither the padding nor the truncation that the last call has left there."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        content = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")
        }
    return json.dumps(content, sort_keys=True).encode()


def model_folder(name: str) -> Path:
    """The folder of a model: the name itself, else what the hub gives for it."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"embedder: {name!r} is neither 'tokens', 'sentence', a folder, nor a hub name like 'organisation/model'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConfigError(f"embedder: the hub does not give {name!r}: {first_line(error)}") from error
