"""Scores of answers about pictures: CoIN's strict equality, boxes by their overlap, and VQA accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cit_fast.errors import DataError

IOU_THRESHOLD = 0.5
"""A box counts where it overlaps the wanted one by more than this."""

Box = tuple[float, float, float, float]

_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*"
_BOX = re.compile(rf"\s*(?:\[{','.join([_NUMBER] * 4)}\]|{','.join([_NUMBER] * 4)})\s*", re.ASCII)
_MOST = 1e9  # a coordinate beyond is no place in a picture, and its area could overflow


def truth_alignment(prediction: str, reference: str) -> float:
    """100 if the texts are the same but for case and white space around them.

    CoIN's evaluation of VQAv2, GQA, VizWiz and OCR-VQA (Chen et al. 2024, arXiv 2403.08350), which LCIA takes over: its
    scripts strip what the model wrote and compare ``upper()``. There is no other normalisation: ``red.`` is not
    ``red``.
    """
    return 100.0 * (prediction.strip().upper() == reference.strip().upper())


def parse_box(text: str) -> Box | None:
    """The box ``(x1, y1, x2, y2)`` that a text is, as ``[x1, y1, x2, y2]`` or ``x1,y1,x2,y2``; ``None`` for another.

    Its corners are in order: x1 <= x2 and y1 <= y2.

    >>> parse_box("[0.1, 0.2, 0.5, 1]"), parse_box("the box is 1,2,3,4"), parse_box("3,2,1,4")
    ((0.1, 0.2, 0.5, 1.0), None, None)
    """
    found = _BOX.fullmatch(text)
    if found is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in found.groups() if number is not None)
    inside = all(abs(edge) <= _MOST for edge in (x1, y1, x2, y2))
    return (x1, y1, x2, y2) if inside and x1 <= x2 and y1 <= y2 else None


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]; boxes without area overlap only where they are equal."""
    width, height = (min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) for axis in (0, 1))
    shared = max(0.0, width) * max(0.0, height)
    whole = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return min(1.0, shared / whole) if whole > 0 else float(one == other)


def iou_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]], labels: Sequence[str]) -> list[float]:
    """100 for each answer that is a box and overlaps a wanted box by more than ``IOU_THRESHOLD``, else 0.

    CoIN's evaluation of grounding, where ``IoU > 0.5`` counts. Its script also cuts the last digit off every answer,
    which is not done here.

    Raises:
        DataError: a reference that is no box.
    """
    values = []
    for index, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        given, best = parse_box(prediction), 0.0
        for answer in answers:
            wanted = parse_box(answer)
            if wanted is None:
                raise DataError(
                    f"metric iou: example {index}: the reference {answer!r} is no box; one is 'x1,y1,x2,y2' with "
                    "x1 <= x2 and y1 <= y2, in brackets or not"
                )
            best = max(best, overlap(given, wanted)) if given else best
        values.append(100.0 * (best > IOU_THRESHOLD))
    return values


# The words that the official script completes with their apostrophe. Where leaving it out makes another word (well,
# its, shell) it completes nothing.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_COMPLETED = {
    word[: apostrophe.start()] + word[apostrophe.end() :]: word
    for word in _CONTRACTIONS.split()
    for apostrophe in re.finditer("'", word)
}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_DIGITS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def vqa_answer(text: str) -> str:
    """An answer in the form in which the official script of VQA v2 compares answers.

    White space becomes single spaces. Punctuation that has a space beside it, or any where a number has a comma,
    goes; other punctuation becomes a space; a full stop goes unless a digit follows. Then: lower case, numbers up to
    ten as digits, no articles, apostrophes of contractions where they were left out.

    >>> vqa_answer("The  two dogs, dont!"), vqa_answer("1,000.5 m."), vqa_answer("t-shirt")
    ("2 dogs don't", '1000.5 m', 't shirt')
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    kept = text
    for sign in _PUNCTUATION:
        gone = f"{sign} " in text or f" {sign}" in text or _COMMA_IN_NUMBER.search(text)
        kept = kept.replace(sign, "" if gone else " ")
    words = [_DIGITS.get(word, word) for word in _FULL_STOP.sub("", kept).lower().split()]
    return " ".join(_COMPLETED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]], labels: Sequence[str]) -> list[float]:
    """The accuracy of VQA v2 (Antol et al. 2015, arXiv 1505.00468; Goyal et al. 2017), in [0, 100].

    References are what each person answered, ten in VQA. For each person left out, an answer that at least three of the
    others gave is worth 1 and one that k < 3 gave k/3; the mean of these counts. Answers are compared as
    ``vqa_answer`` makes them, always: the official script leaves them as they are where all persons agree. With
    fewer than four references no three others can agree, and an answer equal to any of them is right.
    """
    values = []
    for prediction, answers in zip(predictions, references, strict=True):
        given = vqa_answer(prediction)
        same, count = sum(given == vqa_answer(answer) for answer in answers), len(answers)
        if count < 4:
            values.append(100.0 * (same > 0))
        else:
            others_agree, one_agrees = min(max(same - 1, 0), 3), min(same, 3)
            left_out = (same * others_agree + (count - same) * one_agrees) / 3
            values.append(100.0 * (left_out / count))
    return values
