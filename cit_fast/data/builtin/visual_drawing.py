"""Small pictures of plain shapes, digits and bars: described, painted and written as PNG with integers alone.

Nothing here depends on a library's rasteriser, fonts or compressor, so a picture has the same bytes everywhere.
"""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache

from cit_fast.data.builtin.kinds import Draw

SIDE = 64
"""Pixels of a picture's side."""
CELL = 16
"""Pixels of a cell's side; a picture has 4 x 4 of them."""
CELLS = SIDE // CELL

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 75, 215),
    "yellow": (225, 195, 40),
    "purple": (150, 50, 180),
    "black": (35, 35, 35),
}
_JITTER = 22  # of each channel of a colour, up or down
_LIGHT = (222, 250)  # the background's shades

# Rows of five pixels, from the top.
_DIGITS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)

_Rgb = tuple[int, int, int]
_HEXADECIMAL = b"0123456789abcdef".ljust(256, b"f")


@dataclass(frozen=True, slots=True)
class Mark:
    """Something painted: what it is (a shape, ``bar`` or a digit), its box in pixels, its colour's name and shade."""

    what: str
    left: int
    top: int
    width: int
    height: int
    colour: str
    shade: _Rgb

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column of the cell that holds its centre, from the top left."""
        return (self.top + self.height // 2) // CELL, (self.left + self.width // 2) // CELL

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Its first and last column and row, ``(x1, y1, x2, y2)`` in hundredths of the side: integers in [0, 98]."""
        edges = (self.left, self.top, self.left + self.width - 1, self.top + self.height - 1)
        x1, y1, x2, y2 = (edge * 100 // SIDE for edge in edges)
        return x1, y1, x2, y2


@dataclass(frozen=True, slots=True)
class Picture:
    """A background and what is painted on it, in order; at most 15 marks."""

    background: _Rgb
    marks: tuple[Mark, ...]

    def painted(self) -> tuple[bytes, list[_Rgb]]:
        """The colour number of each pixel, row by row from the top left, and the colours."""
        pixels = bytearray(SIDE * SIDE)
        for number, mark in enumerate(self.marks, 1):
            for row, start, end in _runs(mark.what, mark.width, mark.height):
                first = (mark.top + row) * SIDE + mark.left
                pixels[first + start : first + end] = bytes([number]) * (end - start)
        return bytes(pixels), [self.background, *(mark.shade for mark in self.marks)]

    def png(self) -> bytes:
        """The bytes of a PNG file: sixteen colours at most, not compressed."""
        pixels, colours = self.painted()
        halves = pixels.translate(_HEXADECIMAL).decode("ascii")  # of a byte, which holds two pixels
        raw = bytes.fromhex("".join("00" + halves[start : start + SIDE] for start in range(0, SIDE * SIDE, SIDE)))
        stored = b"\x78\x01\x01" + struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF) + raw
        return (
            b"\x89PNG\r\n\x1a\n"
            + _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 4, 3, 0, 0, 0))
            + _chunk(b"PLTE", bytes(channel for colour in colours for channel in colour))
            + _chunk(b"IDAT", stored + struct.pack(">I", zlib.adler32(raw)))
            + _chunk(b"IEND", b"")
        )

    def address(self) -> str:
        """The picture as a ``data:`` address, as ``Example.images`` takes it."""
        return "data:image/png;base64," + base64.b64encode(self.png()).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _inside(what: str, size: int, x: int, y: int) -> bool:
    """Whether a pixel of a square of that size belongs to the shape."""
    across, down = abs(2 * x + 1 - size), abs(2 * y + 1 - size)
    if what == "circle":
        return across * across + down * down <= size * size
    if what == "triangle":
        return across <= y + 1
    if what == "cross":
        return min(across, down) <= size // 3
    return True


@lru_cache(maxsize=4096)
def _runs(what: str, width: int, height: int) -> tuple[tuple[int, int, int], ...]:
    """The painted pixels of a mark: runs of ``(row, start, end)`` within its box."""
    if what.isdigit():
        rows = _DIGITS[int(what)].split()
        inside = [[rows[y * 7 // height][x * 5 // width] == "1" for x in range(width)] for y in range(height)]
    else:
        inside = [[what == "bar" or _inside(what, width, x, y) for x in range(width)] for y in range(height)]
    runs = []
    for y, row in enumerate(inside):
        start = None
        for x, on in enumerate([*row, False]):
            if on and start is None:
                start = x
            elif not on and start is not None:
                runs.append((y, start, x))
                start = None
    return tuple(runs)


def draw_background(draw: Draw) -> _Rgb:
    """A light shade of grey."""
    grey = draw.between(*_LIGHT)
    return grey, grey, grey


def draw_shade(draw: Draw, colour: str) -> _Rgb:
    """A shade of the colour."""
    red, green, blue = (channel + draw.between(-_JITTER, _JITTER) for channel in COLOURS[colour])
    return max(0, red), max(0, green), max(0, blue)


def draw_shape(draw: Draw, what: str, colour: str, row: int, column: int, *, smallest: int = 10) -> Mark:
    """A shape of any size from ``smallest`` to 15 pixels, anywhere in its cell."""
    size = draw.between(smallest, 15)
    left, top = (CELL * cell + draw.between(0, CELL - size) for cell in (column, row))
    return Mark(what, left, top, size, size, colour, draw_shade(draw, colour))


def draw_digit(draw: Draw, digit: int, colour: str, row: int, column: int) -> Mark:
    """A digit of 10 x 14 pixels, anywhere in its cell."""
    left, top = CELL * column + draw.between(1, 5), CELL * row + draw.between(0, 2)
    return Mark(str(digit), left, top, 10, 14, colour, draw_shade(draw, colour))


def draw_bar(draw: Draw, steps: int, colour: str, column: int) -> Mark:
    """A bar in a column that stands on the lower edge, ``steps`` (1 to 8) times 8 pixels high less at most 2."""
    width, height = draw.between(9, 13), 8 * steps - draw.between(0, 2)
    left = CELL * column + draw.between(1, CELL - width - 1)
    return Mark("bar", left, SIDE - height, width, height, colour, draw_shade(draw, colour))
