"""Images as hostile and careless people make them: opened, checked, told apart."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cit_fast.data import Example, images
from cit_fast.data.images import (
    MOST_PIXELS,
    checked_images,
    image_digest,
    name_of,
    name_of_bytes,
    open_image,
    recorded_name,
    thumbnail,
)
from cit_fast.errors import DataError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size=(64, 64)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def two_colours():
    """Red above blue."""
    image = Image.new("RGB", (8, 16), RED)
    image.paste(BLUE, (0, 8, 8, 16))
    return image


def vast_png(width, height):
    """A PNG of this size, in a few hundred bytes, whose pixels are not even there."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def failing(name, where="here:1"):
    with pytest.raises(DataError) as caught:
        open_image(name, where)
    message = str(caught.value)
    assert message.startswith(f"{where}: image ")
    assert "\n" not in message
    assert len(message) < 400
    return message


def example(name, number=1):
    names = name if isinstance(name, tuple) else (str(name),)
    return Example("What?", references=("x",), images=names, source=f"here:{number}")


@pytest.fixture
def put(tmp_path):
    def put(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return put


# --------------------------------------------------------------------------------------------------- what can be read


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(put, kind):
    image = open_image(put("a.dat", saved(Image.new("RGB", (9, 5), RED), kind)))
    assert (image.mode, image.size, type(image)) == ("RGB", (9, 5), Image.Image)
    assert np.abs(np.array(image.getpixel((4, 2))) - RED).max() < 8


def test_one_pixel_is_an_image():
    assert open_image(name_of_bytes(saved(Image.new("1", (1, 1), 1)))).getpixel((0, 0)) == (255, 255, 255)


def clear_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, *BLUE])
    image.putpixel((1, 0), 1)
    return saved(image, transparency=0)


def clear_colour():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), BLUE)
    return saved(image, transparency=(1, 2, 3))


def clear_pixels(mode, blue):
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), blue)
    return saved(image)


@pytest.mark.parametrize(
    ("content", "second"),
    [
        (clear_palette(), BLUE),
        (clear_colour(), BLUE),
        (clear_pixels("RGBA", (*BLUE, 255)), BLUE),
        (clear_pixels("RGBA", (*BLUE, 51)), (204, 204, 255)),
        (clear_pixels("LA", (9, 255)), (9, 9, 9)),
    ],
    ids=["palette", "one colour", "pixels", "half clear", "grey"],
)
def test_what_is_transparent_is_white(content, second):
    image = open_image(name_of_bytes(content))
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((1, 0))) == ("RGB", (255, 255, 255), second)


def test_cmyk_grey_and_16_bits_become_rgb():
    cmyk = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(np.array(open_image(name_of_bytes(cmyk)).getpixel((4, 4))) - RED).max() < 8
    assert open_image(name_of_bytes(saved(Image.new("L", (2, 2), 77)))).getpixel((0, 0)) == (77, 77, 77)
    deep = saved(Image.fromarray(np.full((2, 2), 0x8123, dtype=np.uint16)))
    assert open_image(name_of_bytes(deep)).getpixel((1, 1)) == (0x81, 0x81, 0x81)
    deeper = saved(Image.fromarray(np.full((2, 2), 0x8123, dtype=np.int32)), "TIFF")
    assert open_image(name_of_bytes(deeper)).getpixel((1, 1)) == (0x81, 0x81, 0x81)


def test_decimal_pixels_are_refused():
    floats = saved(Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)), "TIFF")
    assert "its pixels are decimals" in failing(name_of_bytes(floats))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright_and_are_turned_once(orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that the orientation undoes
    shown = two_colours()
    stored = shown.transpose(Image.Transpose(undo[orientation])) if orientation in undo else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(name_of_bytes(saved(stored, "PNG", exif=exif)))
    assert image.size == (8, 16)
    assert np.array_equal(np.asarray(image), np.asarray(shown))
    assert 0x0112 not in image.getexif()


def test_broken_exif_data_says_nothing_of_the_image():
    content = saved(two_colours(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_image(name_of_bytes(content)).size == (8, 16)


def test_a_photograph_with_previews_is_one_image():
    content = saved(Image.new("RGB", (9, 5)), "MPO", save_all=True, append_images=[Image.new("RGB", (3, 3))])
    assert Image.open(io.BytesIO(content)).is_animated
    assert open_image(name_of_bytes(content)).size == (9, 5)


def test_the_bytes_may_be_of_any_format_and_declare_another():
    jpeg = base64.b64encode(saved(noise(), "JPEG")).decode()
    for head in ("data:image/png;base64,", "data:image/jpeg;base64,", "data:;base64,"):
        assert open_image(head + jpeg).size == (64, 64)


# ------------------------------------------------------------------------------------------------ what cannot be read


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.png", b"no image at all", "no image, or one broken at its start; PNG, JPEG"),
        ("empty.png", b"", "no image, "),
        ("a.png", saved(noise())[:3000], "broken (image file is truncated"),
        ("a.jpg", saved(noise(), "JPEG")[:1200], "broken (image file is truncated"),
        ("a.png", saved(noise()).replace(b"IDAT", b"IDAU", 1), "no image, or one broken at its start"),
        ("a.eps", saved(noise(), "EPS"), "no image, "),  # Pillow runs Ghostscript for it
        ("a.gif", saved(noise(), "GIF", save_all=True, append_images=[two_colours()]), "more than one frame; give one"),
        ("a.png", saved(noise(), "PNG", save_all=True, append_images=[noise((64, 63))]), "more than one frame"),
        ("a.tif", saved(noise(), "TIFF", save_all=True, append_images=[noise()]), "more than one frame"),
        ("a.png", vast_png(20_000, 20_000), f"more than {MOST_PIXELS:,}"),
        ("a.png", vast_png(10_000, 10_000), f"more than {MOST_PIXELS:,}"),
    ],
    ids=["text", "empty", "cut png", "cut jpeg", "no pixels", "eps", "gif", "apng", "tiff", "20000", "10000"],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_what_cannot_be_read(put, name, content, said):
    path = put(name, content)
    assert said in failing(path)
    assert f"here:1: image {path}: " in failing(path)
    assert said in failing(name_of_bytes(content))


def test_the_warning_of_a_vast_image_is_an_error_where_warnings_are(put):
    assert f"more than {MOST_PIXELS:,} pixels; make it smaller" in failing(put("a.png", vast_png(10_000, 10_000)))


def test_a_limit_that_others_raised_is_kept(put, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = put("a.png", vast_png(20_000, 20_000))
    assert (
        failing(path)
        == f"here:1: image {path}: 20000 x 20000 pixels, more than {MOST_PIXELS:,} in all; make it smaller"
    )


def test_files_that_are_none(tmp_path, put):
    assert failing(str(tmp_path / "a.png")).endswith("a.png: no such file")
    assert failing(str(tmp_path / "coco" / "a.png")).endswith(
        "no such file; 'images' of a task names the folder that images start from"
    )
    assert "no regular file" in failing(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.png")
    assert "no regular file" in failing(str(tmp_path / "pipe.png"))
    assert "null" in failing("/a\0.png")
    assert "/..." not in failing("/" + "a" * 300 + ".png")
    assert "Not a directory" in failing(put("a.png", b"") + "/b.png")
    assert "surrogates not allowed" in failing("/\ud800.png")


@pytest.mark.parametrize("name", ["https://example.org/a.png", "http://example.org/a.png", "s3://bucket/a.png"])
def test_addresses_are_not_fetched(name):
    said = f"here:1: image {name}: images behind URLs are not fetched; download them and give their paths"
    assert failing(name) == said
    with pytest.raises(DataError, match="images behind URLs are not fetched"):
        checked_images([example(name)], "error")
    with pytest.raises(DataError, match="images behind URLs are not fetched"):
        image_digest(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("data:image/png;base64,!!!", "broken base64 ("),
        ("data:image/png;base64,aGVsbG8", "broken base64 ("),
        ("data:image/svg+xml,<svg/>", "a data URI that is not base64"),
        ("data:", "a data URI that is not base64"),
    ],
)
def test_broken_data_uris(name, said):
    assert said in failing(name)


def test_messages_never_hold_the_bytes():
    name = name_of_bytes(b"x" * 100_000)
    said = failing(name)
    assert said.startswith("here:1: image data:image/png;base64,eHh4")
    assert f"... ({len(name)} characters): " in said
    with pytest.raises(DataError, match=r"^image \.\.\.[a/]+\.png: no such file"):
        open_image("/" + "/".join(["a" * 100] * 3) + ".png")


def test_no_files_stay_open(put):
    good, bad = put("a.png", saved(noise())), put("b.png", saved(noise())[:3000])
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir()))
    kept = [open_image(good) for _ in range(20)]
    for _ in range(20):
        failing(bad)
        image_digest(bad)
    assert len(list(opened.iterdir())) == before
    assert kept[0].tobytes() == kept[-1].tobytes()


def test_threads_open_images_together(put):
    path = put("a.png", saved(noise()))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: open_image(path).tobytes(), range(64)))
    assert set(found) == {noise().tobytes()}


# ------------------------------------------------------------------------------------------------------------ digests


def test_digests_are_of_the_content(put, tmp_path):
    content = saved(noise())
    path = put("a.png", content)
    expected = hashlib.sha256(content).hexdigest()
    assert image_digest(path) == image_digest(put("b.png", content)) == image_digest(name_of_bytes(content)) == expected
    with pytest.raises(DataError, match=r"^image .*c\.png: no such file"):
        image_digest(str(tmp_path / "c.png"))


def test_a_changed_file_has_another_digest(put):
    path = put("a.png", saved(noise()))
    before = image_digest(path)
    state = Path(path).stat()
    put("a.png", saved(noise())[:-1] + b"?")  # of the same size
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert image_digest(path) != before


def test_a_file_is_digested_once(put, monkeypatch):
    path, checked = put("once.png", saved(noise())), put("checked.png", saved(noise()))
    before = image_digest(path)
    checked_images([example(checked)], "error")
    monkeypatch.setattr(hashlib, "sha256", None)
    assert image_digest(path) == image_digest(checked) == before


# ------------------------------------------------------------------------------------------------------------ checking


def test_every_image_is_opened_once(put, monkeypatch):
    opened = []
    inner = images._opened
    monkeypatch.setattr(images, "_opened", lambda name: opened.append(name) or inner(name))
    good, other = put("a.png", saved(noise())), put("b.png", saved(two_colours()))
    examples = [example(good), example((good, other)), example(other), example(())]
    assert checked_images(examples, "error") == (tuple(examples), ())
    assert sorted(opened) == [good, other]


def test_the_first_bad_image_is_an_error(put, tmp_path):
    good, bad = put("a.png", saved(noise())), put("b.png", b"no image")
    examples = [example(good, 1), example((good, bad), 2), example(tmp_path / "gone.png", 3)]
    with pytest.raises(DataError, match=r"^here:2: image .*b\.png: no image, ") as caught:
        checked_images(examples, "error")
    assert "\n" not in str(caught.value)
    nowhere = Example("What?", references=("x",), images=(bad,), task="shapes")
    with pytest.raises(DataError, match=r"^task 'shapes': image .*b\.png: no image, "):
        checked_images([nowhere], "error")


def test_nothing_more_is_opened_after_an_error(monkeypatch):
    opened = []

    def slow(name):
        opened.append(name)
        if name == "/0.png":
            raise images._UnreadableError("broken")
        time.sleep(0.01)

    monkeypatch.setattr(images, "_opened", slow)
    monkeypatch.setattr(images, "image_digest", lambda name: "")
    with pytest.raises(DataError, match=r"^here:1: broken"):
        checked_images([example(f"/{number}.png") for number in range(200)], "error")
    assert len(opened) < 100


def test_examples_with_a_bad_image_are_left_out_and_counted(put, tmp_path):
    good, bad = put("a.png", saved(noise())), put("b.png", b"no image")
    examples = [example(good, 1), example((good, bad), 2), example(tmp_path / "gone.png", 3), example(bad, 4)]
    kept, notes = checked_images(examples, "skip")
    assert kept == (examples[0],)
    (note,) = notes
    assert note.startswith(
        f"3 of 4 examples left out, whose image cannot be read, the first here:2: image {bad}: no image, "
    )
    assert "\n" not in note


def test_names(tmp_path):
    assert name_of("a/b.png", "/data") == "/data/a/b.png"
    assert name_of("./a.png", "/data") == "/data/a.png"
    assert name_of("/a.png", "/data") == "/a.png"
    assert name_of("file:///a%20b.png", "/data") == "/a b.png"
    assert name_of("https://example.org/a.png", "/data") == "https://example.org/a.png"
    assert name_of("data:image/png;base64,eA==", "/data") == "data:image/png;base64,eA=="


def test_a_record_has_a_thumbnail_in_the_place_of_much_data(tmp_path):
    small, large = name_of_bytes(saved(two_colours())), name_of_bytes(saved(noise((400, 300))))
    assert [recorded_name(name) for name in ("/a/b.png", small)] == ["/a/b.png", small]
    kept = recorded_name(large)
    assert kept == thumbnail(large)
    assert len(kept) < len(large) / 10
    assert open_image(kept).size == (128, 96)
    # A drawing keeps its pixels; what is small is not made larger.
    drawn = open_image(thumbnail(small))
    assert (drawn.size, drawn.getpixel((0, 0)), drawn.getpixel((7, 15))) == ((8, 16), RED, BLUE)
    with pytest.raises(DataError, match="no such file"):
        thumbnail(str(tmp_path / "gone.png"))
