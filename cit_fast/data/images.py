"""Images of examples: what they are called, and how they are opened, checked and told apart.

An image's name in ``Example.images`` is an absolute path, a ``data:`` URI that holds the
file itself, or an address, behind which nobody looks.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import io
import os
import re
import stat
import urllib.parse
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from cit_fast.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from cit_fast.data.example import Example

IMAGE_MARK = "<image>"
"""Where an image stands in a text."""
MOST_PIXELS = 89_478_485
"""The largest image that is opened, Pillow's own limit: an image of 9,459 by 9,459 pixels takes 256 MiB."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are read. Pillow knows more, and runs another program for some of them."""

OnBad = Literal["error", "skip"]

_DATA = "data:image/png;base64,"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SHOWN = 120  # characters of a name in a message
_RECORDED = 4096  # characters of a data URI in a record
_THUMBNAIL = 128  # pixels of the longer side
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # its value -> Pillow's Transpose
_THREADS = 4

_digests: dict[tuple[str, int, int], str] = {}  # path, size and time of change -> digest


class _UnreadableError(Exception):
    """Why an image cannot be read."""


# ------------------------------------------------------------------------------------------------------------ names


def name_of(text: str, folder: str | Path) -> str:
    """An image's name, as examples have it.

    Args:
        text: a path, a ``data:`` URI or an address, as the data has it.
        folder: where a path starts that is not absolute.
    """
    if text.startswith("file://"):
        text = urllib.parse.unquote(text.removeprefix("file://"))
    if text.startswith("data:") or _ADDRESS.match(text):
        return text
    return str(Path(folder, text).absolute())


def name_of_bytes(content: bytes) -> str:
    """The name of an image that is there as the bytes of a file."""
    return _DATA + base64.b64encode(content).decode("ascii")


def shortened(name: str) -> str:
    """An image's name for a message: never the bytes themselves."""
    if name.startswith("data:"):
        return f"{name[:40]}... ({len(name)} characters)" if len(name) > 40 else name
    return name if len(name) <= _SHOWN else "..." + name[3 - _SHOWN :]


def recorded_name(name: str) -> str:
    """An image's name for records, which are many: that of a thumbnail in the place of a large ``data:`` URI.

    Raises:
        DataError: such a URI that holds no image.
    """
    return thumbnail(name) if name.startswith("data:") and len(name) > _RECORDED else name


def thumbnail(name: str) -> str:
    """An image as a ``data:`` URI of at most 128 pixels a side, for people to look at.

    Raises:
        DataError: as :func:`open_image`.
    """
    image = open_image(name)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    made = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):  # drawings, photographs
        file = io.BytesIO()
        image.save(file, kind, **options)
        made.append(f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode("ascii"))
    return min(made, key=len)


# ---------------------------------------------------------------------------------------------------------- opening


def open_image(name: str, where: str = "") -> Image:
    """An image as a model is shown it: RGB, upright as its EXIF orientation says, what is transparent on white.

    Pixels of 16 bits keep the upper 8. Nothing else of the file is kept, its EXIF data neither.

    Args:
        name: as examples have it. ``where``: the example, for messages.

    Raises:
        DataError: no such file, no image, a broken one, one of more than ``MOST_PIXELS`` pixels, an animation, or
            an address.
    """
    try:
        return _opened(name)
    except _UnreadableError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from error.__cause__


def _opened(name: str) -> Image:
    with closing(_file(name)) as file:
        return _decoded(file, name)


def _file(name: str) -> IO[bytes]:
    """The file of an image."""
    if name.startswith("data:"):
        return io.BytesIO(_bytes_of(name))
    if _ADDRESS.match(name):
        raise _bad(name, "images behind URLs are not fetched; download them and give their paths")
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):  # noqa: PTH116 - a pipe or a device may never end
            raise _bad(name, "no regular file")
        return open(name, "rb")  # noqa: PTH123 - whoever asks closes it
    except FileNotFoundError:
        more = "" if Path(name).parent.is_dir() else "; 'images' of a task names the folder that images start from"
        raise _bad(name, f"no such file{more}") from None
    except (OSError, ValueError) as error:
        raise _bad(name, getattr(error, "strerror", None) or str(error)) from error


def _bytes_of(name: str) -> bytes:
    head, comma, body = name.partition(",")
    if not comma or not head.endswith(";base64"):
        raise _bad(name, "a data URI that is not base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(name, f"broken base64 ({error})") from None


def _decoded(file: IO[bytes], name: str) -> Image:
    import PIL.Image

    try:
        found = PIL.Image.open(file, formats=_known_formats())
        _check_size(found, name)
        if getattr(found, "is_animated", False) and found.format != "MPO":  # a photograph and its previews
            raise _bad(name, "more than one frame; give one of them, as an image of its own")
        found.load()
    except (_UnreadableError, MemoryError):  # the latter says nothing of the file
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise _bad(name, f"more than {MOST_PIXELS:,} pixels; make it smaller") from None
    except PIL.UnidentifiedImageError:
        raise _bad(name, f"no image, or one broken at its start; {', '.join(FORMATS)} can be read") from None
    except Exception as error:  # decoders raise many kinds for a broken file
        raise _bad(name, f"broken ({_said(error)})") from error
    return _rgb(found, name)


def _check_size(image: Image, name: str) -> None:
    if image.width * image.height > MOST_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise _bad(name, f"{size}, more than {MOST_PIXELS:,} in all; make it smaller")


def _rgb(image: Image, name: str) -> Image:
    """The image in RGB, upright, on white, and free of what its file said of it."""
    import PIL.Image

    orientation = _orientation(image)
    if image.mode == "F":
        raise _bad(name, "its pixels are decimals, of which nobody knows the range; save them in 8 bits")
    if image.mode.startswith("I"):
        image = _of_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    try:
        found = image.convert("RGB")
    except ValueError as error:  # Pillow knows no way from this mode
        raise _bad(name, f"its colours ({image.mode}) cannot be made RGB ({_said(error)})") from error
    if orientation in _UPRIGHT:
        found = found.transpose(PIL.Image.Transpose(_UPRIGHT[orientation]))
    found.info = {}  # or a processor would turn it once more
    return found


def _orientation(image: Image) -> Any:
    """The EXIF orientation; none where the EXIF data is broken, which says nothing of the image."""
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - Pillow raises many kinds for it
        return None


def _of_8_bits(image: Image) -> Image:
    import numpy as np
    import PIL.Image

    return PIL.Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow has been built with."""
    import PIL.Image

    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _bad(name: str, why: str) -> _UnreadableError:
    return _UnreadableError(f"image {shortened(name)}: {why}")


# ---------------------------------------------------------------------------------------------------------- digests


def image_digest(name: str) -> str:
    """SHA-256 of an image's file: wherever it lies, and whether examples have its path or the bytes themselves.

    A file is read once, by ``checked_images`` or here, and again when its size or its time of change is another.

    Raises:
        DataError: no such file, or an address.
    """
    try:
        if name.startswith("data:"):
            return hashlib.sha256(_bytes_of(name)).hexdigest()
        with closing(_file(name)) as file:
            state = os.fstat(file.fileno())
            key = name, state.st_size, state.st_mtime_ns
            if key not in _digests:
                _digests[key] = _digest_of(file)
            return _digests[key]
    except _UnreadableError as error:
        raise DataError(str(error)) from error.__cause__
    except OSError as error:
        raise DataError(f"image {shortened(name)}: {error.strerror or error}") from error


def _digest_of(file: IO[bytes]) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


# ---------------------------------------------------------------------------------------------------------- checking


def checked_images(examples: Sequence[Example], on_bad: OnBad) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """Open every image of examples once, before anything is trained on them.

    Args:
        examples: in any order.
        on_bad: what an image means that cannot be read: an ``"error"``, or that its example is left out (``"skip"``).

    Returns:
        The examples whose images can all be read, in their order; and what there is to say, one note or none.

    Raises:
        DataError: the first image that cannot be read, where that is an error.
    """
    problems = _problems(dict.fromkeys(name for one in examples for name in one.images), on_bad)
    kept, left_out = [], []
    for example in examples:
        problem = next((problems[name] for name in example.images if name in problems), None)
        if problem is None:
            kept.append(example)
            continue
        said = f"{example.source or f'task {example.task!r}'}: {problem}"
        if on_bad == "error":
            raise DataError(said)
        left_out.append(said)
    if not left_out:
        return tuple(kept), ()
    counts = f"{len(left_out)} of {len(examples)} examples left out, whose image cannot be read"
    return tuple(kept), (f"{counts}, the first {left_out[0]}",)


def _problems(names: Iterable[str], on_bad: OnBad) -> dict[str, str]:
    """Name -> what is wrong with the image, of those that cannot be read; only the first where that is an error."""
    found: dict[str, str] = {}
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))  # decoders let other threads run
    try:
        names = list(names)
        for name, problem in zip(names, pool.map(_problem, names), strict=True):
            if problem is not None:
                found[name] = problem
                if on_bad == "error":
                    break
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _problem(name: str) -> str | None:
    try:
        _opened(name)
        if not name.startswith("data:"):
            image_digest(name)  # while the file is in memory
    except (_UnreadableError, DataError) as error:
        return str(error)
    return None
