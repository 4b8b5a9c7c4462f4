"""Clauses of an instruction: the pieces that may each be its key part, found by punctuation and conjunctions alone.

Punctuation of any script separates (also without a space after it, where a script has none); of conjunctions and the
like there is a short list in six European languages. No model, no grammar: what is too short to say something by itself
goes with its neighbour in the sentence.
"""

from __future__ import annotations

import re

import regex

MOST_CLAUSES = 24
"""Clauses of one instruction at most; in a longer one, neighbours go together."""

_LEAST_WORDS = 3  # of a clause
_PIECE = 3  # words of the pieces of an instruction that is a single clause; one, if it is no longer

# A full stop ends a sentence where white space and then no small letter follows ("e.g. blood sugar" goes on).
_SENTENCE_END = re.compile(
    r"[.!?…]+[\"'”’»)\]]*(?:\s+(?![^\W\d_A-Z]*[a-zà-ÿ])|\s*$)|[。！？।؟።]+[\"”’」』）]*|\s*\n\s*"
)
# What joins two clauses belongs to neither; what subordinates one is its first word.
_COORDINATE = "and|or|but|und|oder|aber|et|ou|mais|y|o|pero|ma|mas"
_SUBORDINATE = (
    "if|unless|when|while|because|so|then|which|who|where|whether|with|without|using|by|based|according|"
    "wenn|weil|damit|sowie|mit|ohne|avec|sans|pour|afin|con|sin|para|senza|per|com|sem"
)
_CLAUSE_END = re.compile(
    r"[,;:][\"'”’»)\]]*(?=\s|$)|[，、；：،؛]+|[()（）\[\]]|\s[–—-]\s|"
    rf"(?<=\s)(?:{_COORDINATE})(?=\s)|(?<=\s)(?=(?:{_SUBORDINATE})\s)",
    re.IGNORECASE,
)
# Scripts written without spaces: about two characters make a word.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\u200c\u200d]*")

Span = tuple[int, int]


def clauses(instruction: str) -> list[Span]:
    """Character spans of the instruction's clauses, ascending and apart from each other.

    A clause has no white space around it, nor the mark that ends it, nor an "and" before it. An instruction that
    is a single clause gives pieces of three words, or of one if it is no longer, so that there is something to choose
    from.

    >>> [text[a:b] for text in ["Name the city, and answer in one word."] for a, b in clauses(text)]
    ['Name the city', 'answer in one word']
    """
    found: list[Span] = []
    for sentence in _between(instruction, (0, len(instruction)), _SENTENCE_END):
        found += _joined(instruction, _between(instruction, sentence, _CLAUSE_END))
    if len(found) == 1:
        found = _pieces(instruction, found[0])
    size = -(-len(found) // MOST_CLAUSES) or 1
    return [(some[0][0], some[-1][1]) for some in (found[k : k + size] for k in range(0, len(found), size))]


def _between(text: str, span: Span, mark: re.Pattern[str]) -> list[Span]:
    """What is between the marks, without white space around it; pieces without a letter or a digit are left out."""
    start, end = span
    edges = [start]
    for match in mark.finditer(text, start, end):
        edges += match.span()
    edges.append(end)
    trimmed = (_trimmed(text, a, b) for a, b in zip(edges[::2], edges[1::2], strict=True))
    return [(a, b) for a, b in trimmed if _WORD.search(text, a, b)]


def _trimmed(text: str, start: int, end: int) -> Span:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _joined(text: str, pieces: list[Span]) -> list[Span]:
    """The pieces of one sentence, short ones put together: first with each other, then with what is before or after."""
    runs: list[Span] = []
    open_run = False  # whether the last run is made of short pieces only
    for start, end in pieces:
        short = _words(text, start, end) < _LEAST_WORDS
        if short and open_run:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
        open_run = short
    joined: list[Span] = []
    for start, end in runs:
        if joined and min(_words(text, start, end), _words(text, *joined[-1])) < _LEAST_WORDS:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _words(text: str, start: int, end: int) -> float:
    piece = text[start:end]
    return len(_WORD.findall(_UNSPACED.sub(" ", piece))) + len(_UNSPACED.findall(piece)) / 2


def _pieces(text: str, span: Span) -> list[Span]:
    """A clause in pieces of a few words; where words are not spaced, of twice as many characters."""
    words = [
        match.span()
        for match in re.finditer(rf"{_UNSPACED.pattern}{{1,2}}|(?:(?!{_UNSPACED.pattern})\S)+", text[span[0] : span[1]])
    ]
    size = _PIECE if len(words) > _PIECE else 1
    starts = range(0, len(words), size)
    pieces = [(span[0] + words[k][0], span[0] + words[min(k + size, len(words)) - 1][1]) for k in starts]
    return [(a, b) for a, b in pieces if _WORD.search(text, a, b)]
