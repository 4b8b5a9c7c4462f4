"""A vision-language model's processor: from a prompt and its images to tokens and pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cit_fast.data.images import open_image
from cit_fast.errors import ConfigError, DataError
from cit_fast.models.wrappers import sees_images
from cit_fast.text import first_line

# What transformers' processors raise for files, sizes and counts that they do not take.
_REFUSED = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
"""Inputs that have a number for every token."""


def without_videos(kind: type) -> type:
    """A processor's class that needs no processor of videos: that one needs torchvision, which images do not."""

    def attributes(cls: Any) -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]  # type: ignore[attr-defined]

    def arguments(cls: Any, *args: Any, **options: Any) -> list[Any]:
        found = list(super(made, cls)._get_arguments_from_pretrained(*args, **options))
        return [*found, None] if "video_processor" in inspect.signature(kind).parameters else found

    made: Any = type(
        kind.__name__,
        (kind,),
        {"get_attributes": classmethod(attributes), "_get_arguments_from_pretrained": classmethod(arguments)},
    )
    return made  # type: ignore[no-any-return]


def load_image_reader(folder: Path, config: Any, tokenizer: Any) -> ImageReader | None:
    """The reader of a model folder; ``None`` for a model that takes no images.

    Args:
        config: transformers' configuration of the model.
        tokenizer: of the model; the processor takes it instead of its own.

    Raises:
        ConfigError: the folder holds no processor that can be loaded.
    """
    if not sees_images(config):
        return None
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    if type(config) not in PROCESSOR_MAPPING:
        raise ConfigError(f"model.name: transformers has no processor of images for {type(config).__name__}")
    kind = PROCESSOR_MAPPING[type(config)]
    if not is_torchvision_available() and "video_processor" in kind.get_attributes():
        kind = without_videos(kind)
    try:
        processor = kind.from_pretrained(folder)
    except (*_REFUSED, ImportError) as error:  # ImportError: a package that it wants
        raise ConfigError(
            f"model.name: {folder}: its processor of images cannot be loaded: {first_line(error)}"
        ) from error
    processor.tokenizer = tokenizer
    return ImageReader(processor, config)


class ImageReader:
    """Turns prompts with images into the inputs of one model.

    Args:
        processor: of transformers. ``config``: of the model.

    Raises:
        ConfigError: the processor does not work on a blank image.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        self.processor = processor
        self.token = str(processor.image_token)
        """Where a prompt's text has an image."""
        named = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
        named.append(processor.tokenizer.convert_tokens_to_ids(self.token))
        self.token_ids = frozenset(token for token in named if isinstance(token, int))
        """Tokens that stand for an image, and for nothing else."""
        from PIL import Image

        try:
            self._blank = self._read(self.token, [Image.new("RGB", (32, 32))])
        except _REFUSED as error:
            raise ConfigError(f"model.name: its processor of images does not work: {first_line(error)}") from error
        self.of_tokens = tuple(name for name in _OF_TOKENS if name in self._blank)
        self._fits = False

    def check_fits(self, model: nn.Module) -> None:
        """See once that the model takes what the processor makes, on a blank image.

        Args:
            model: of transformers, adapters in it or not, with its weights.

        Raises:
            ConfigError: it does not.
        """
        if self._fits:
            return
        device = next(model.parameters()).device
        try:
            with torch.inference_mode():
                model(**{name: value.to(device) for name, value in self._blank.items()}, use_cache=False)
        except torch.OutOfMemoryError:  # which says nothing of them
            raise
        except _REFUSED as error:
            raise ConfigError(
                "model.name: the model does not take what its processor makes of a blank image, so its "
                f"preprocessor_config.json or processor_config.json may be another model's: {first_line(error)}"
            ) from error
        self._fits = True

    def read(self, text: str, names: Sequence[str], where: str) -> dict[str, Tensor]:
        """What the model takes for one prompt.

        Args:
            text: the prompt, with :attr:`token` where an image goes. ``names``: the images in that order, as
                ``Example.images`` has them. ``where``: the example, for messages.

        Returns:
            ``input_ids`` [1, T] int64, and the other inputs as the processor makes them for a batch of one.

        Raises:
            DataError: an image that cannot be read, or whose size the processor does not take.
        """
        images = [open_image(name, where) for name in names]
        try:
            return self._read(text, images)
        except _REFUSED as error:
            raise DataError(
                f"{where}: the model's processor does not take these images: {first_line(error)}"
            ) from error

    def prompt(
        self,
        text: str,
        names: Sequence[str],
        where: str,
        before: Sequence[int],
        tokenize: Callable[[str], list[int]],
    ) -> Prompt:
        """The tokens of a prompt.

        Args:
            text, names, where: as in :meth:`read`. ``before``: tokens that stand before the text.
            tokenize: a text without images.

        Raises:
            DataError: another number of places than of images, or what :meth:`read` raises.
        """
        places = text.count(self.token)
        if places != len(names):
            raise DataError(
                f"{where}: {len(names)} images, and the prompt has {places} places for them: {self.token!r} stands "
                "in a text, or the chat template takes fewer"
            )
        ids = self.read(text, names, where)["input_ids"][0].tolist() if names else tokenize(text)
        pictures = Pictures(self, text, tuple(names), where, len(before), len(before) + len(ids))
        return Prompt([*before, *ids], pictures)

    def _read(self, text: str, images: Sequence[Any]) -> dict[str, Tensor]:
        made = self.processor(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False)
        return {name: value for name, value in made.items() if isinstance(value, Tensor) and name != "attention_mask"}


@dataclass(frozen=True, slots=True)
class Pictures:
    """A prompt's images, in a model that takes some; a prompt may have none of them.

    Args:
        reader: of the model. ``text``: the prompt, with the reader's token where an image goes.
        names: of the images. ``where``: the example, for messages.
        start, end: the tokens of the text, of the prompt's or training example's.
    """

    reader: ImageReader
    text: str
    names: tuple[str, ...]
    where: str
    start: int
    end: int

    def inputs(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """What the model takes beside the tokens, for a batch of one, which has no padding.

        Raises:
            DataError: an image that cannot be read, or that has another size than when the prompt was made.
        """
        found = self.reader.read(self.text, self.names, self.where) if self.names else {}
        if found and found.pop("input_ids")[0].tolist() != list(ids[self.start : self.end]):
            raise DataError(f"{self.where}: an image has changed since the run began; put the old one back")
        for name in self.reader.of_tokens:
            own = torch.zeros(1, len(ids), dtype=torch.int64)
            if name in found:
                own[:, self.start : self.end] = found[name]
            found[name] = own
        return found


class Prompt(list[int]):
    """The tokens of a prompt for a model that takes images."""

    __slots__ = ("pictures",)

    def __init__(self, tokens: Sequence[int], pictures: Pictures) -> None:
        super().__init__(tokens)
        self.pictures = pictures


def pictures_of(prompt: Sequence[int]) -> Pictures | None:
    """The images of a prompt that has some."""
    pictures: Pictures | None = getattr(prompt, "pictures", None)
    return pictures if pictures is not None and pictures.names else None


def spoken(prompt: Sequence[int]) -> list[int]:
    """A prompt's tokens without those that stand for images or come before them."""
    pictures = pictures_of(prompt)
    if pictures is None:
        return list(prompt)
    last = max((k for k, token in enumerate(prompt) if token in pictures.reader.token_ids), default=-1)
    return list(prompt[last + 1 :]) or [pictures.reader.processor.tokenizer.eos_token_id]


def picture_inputs(
    rows: Sequence[tuple[Sequence[int], Pictures | None]], width: int, *, left: bool = False
) -> dict[str, Tensor]:
    """What a model takes beside the tokens for a batch, empty for one that takes no images.

    Args:
        rows: of each row its tokens without padding, and its images.
        width: of the batch with its padding, which stands on the right, or on the ``left``.

    Returns:
        Numbers for every token, [rows, width] int64, where the model wants them; and the images of all rows one after
        another, padded to the largest where a processor cuts them into pieces.

    Raises:
        DataError: what :meth:`Pictures.inputs` raises.
    """
    merged: dict[str, list[Tensor]] = {}
    for ids, pictures in rows:
        for name, value in ({} if pictures is None else pictures.inputs(ids)).items():
            room = width - len(ids) if name in _OF_TOKENS else 0
            merged.setdefault(name, []).append(nn.functional.pad(value, (room, 0) if left else (0, room)))
    return {name: _stacked(values) for name, values in merged.items()}


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """The tensors one after another, each padded with zeros to the largest."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        room = [(0, most - size) for most, size in zip(shape, value.shape[1:], strict=True)]
        padded.append(nn.functional.pad(value, [end for pair in reversed(room) for end in pair]))
    return torch.cat(padded)
