"""Text helpers: words of any script, the form in which labels are compared, errors in one line."""

from __future__ import annotations

import unicodedata

import regex

# Letters of scripts that are written without spaces between words: each, with its marks, counts as a word.
_UNSPACED = r"[[\u3040-\u30ff\p{Han}\uac00-\ud7a3\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]&&\p{L}]"
_SPACED = rf"[[\p{{L}}\p{{N}}]--{_UNSPACED}]"
# Vowel signs and accents, and the two joiners that shape what stands beside them, belong to the letter before them.
_MARKS = r"[\p{M}\u200c\u200d]"
LETTERS = rf"\p{{L}}(?:\p{{L}}|{_MARKS})*"
"""A pattern of the package ``regex``: a run of letters with their marks, without digits."""
_WORD = regex.compile(rf"{_UNSPACED}{_MARKS}*|{_SPACED}(?:{_SPACED}|{_MARKS})*", regex.V1)
_UNSPACED_LETTER = regex.compile(rf"{_UNSPACED}{_MARKS}*", regex.V1)
_NAME = regex.compile(r"[\p{L}\p{N}_][\p{L}\p{N}\p{M}_.+-]*")
_QUOTES = " \"'`“”‘’"


def composed(text: str) -> str:
    """The text in Unicode's form NFC, in which a letter and its accent are one character where there is one."""
    return unicodedata.normalize("NFC", text)


def words(text: str) -> list[str]:
    """The words of a text, case-folded and without punctuation.

    A word is a run of letters and digits with the marks that belong to them (vowel signs of Indic scripts, accents).
    Of scripts that are written without spaces (Chinese, Japanese, Thai, ...) each character is one.
    """
    found: list[str] = _WORD.findall(composed(text.casefold()))
    return found


def word_count(text: str) -> int:
    """How many words a text has, as white space parts them; of scripts without spaces each character is one."""
    return len(_UNSPACED_LETTER.sub(" x ", composed(text)).split())


def normalise_label(text: str) -> str:
    """The form in which labels are compared: case-folded, single spaces, no quotes around, no final stop."""
    text = composed(" ".join(text.casefold().split()))
    return text.strip(_QUOTES).rstrip(".\u3002").strip(_QUOTES) or text


def is_file_name(name: str) -> bool:
    """Whether a name can be a file's on every system: letters, digits, ``.``, ``_``, ``-`` and ``+``."""
    return _NAME.fullmatch(name) is not None and len(name.encode()) <= 200


def file_name(text: str) -> str:
    """The text with ``_`` for what a file's name cannot have; empty where nothing is left."""
    return str(regex.sub(r"[^\p{L}\p{N}\p{M}_.+-]", "_", composed(text))).lstrip(".+-")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def cut(text: str, most: int = 80) -> str:
    """The text in one line of at most ``most`` characters, with an ellipsis where there were more."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def short_name(name: str, most: int) -> str:
    """A name of at most ``most`` characters, cut in the middle: endings tell tasks apart, too."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"
