"""Tags of instructions: what is to be done, to what. Found without a model, or asked of one; then made comparable.

An offline tagger finds verbs with their objects and noun phrases by rule, with nothing to download; an LLM gives tags
in the manner of InsTag (Lu et al. 2023, arXiv 2308.07074). Either way tags are normalised, and those that mean the same
by their embeddings are replaced by the most frequent of them.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import regex
import simplemma

from cit_fast.errors import ConfigError, DataError
from cit_fast.methods.replay.insinfo import tag_frequencies
from cit_fast.models.chat import Chat, ask_until_usable, first_list
from cit_fast.text import LETTERS, cut

if TYPE_CHECKING:
    from cit_fast.embeddings.embedder import Embedder


@runtime_checkable  # a part's options are checked against their types
class Tagger(Protocol):
    """Gives every instruction its tags."""

    def tags(self, instructions: Sequence[str]) -> list[list[str]]:
        """One list of tags per instruction, in the order given; empty where there is nothing to tag."""


# --- making tags comparable ---------------------------------------------------------------------------------


_ENDING = re.compile(r"['’](?:s|d|m|t|re|ve|ll)\b")


def normalise(tag: str) -> str:
    """A tag in lower case, letters only, each word in its dictionary form (of English); may be empty.

    >>> normalise("Summarized Articles (2)")
    'summarize article'
    """
    without_endings = _ENDING.sub("", tag.lower())
    return " ".join(_lemma(word) for word in regex.findall(LETTERS, without_endings))


@functools.cache
def _lemma(word: str) -> str:
    return str(simplemma.lemmatize(word, lang="en")).lower()


def merge_similar(
    tags: Sequence[Iterable[str]], embedder: Embedder, *, eps: float = 0.1, min_samples: int = 5
) -> list[list[str]]:
    """Normalised tags, with those that mean the same replaced by the most frequent of them, each once per instruction.

    Distinct tags are embedded and clustered by DBSCAN under the cosine distance; a cluster's name is the tag that most
    instructions carry (of equals, the first in the alphabet). Tags in no cluster stay as they are.

    Args:
        tags: of each instruction.
        embedder: gives a tag its vector.
        eps: largest distance between neighbours; ``min_samples``: tags that make a cluster, itself included.

    Returns:
        For each instruction its tags in alphabetical order.

    Source: InsCL (arXiv 2403.11435) and its released code.
    """
    from sklearn.cluster import DBSCAN

    clean = [sorted({normal for tag in own if (normal := normalise(tag))}) for own in tags]
    frequencies = tag_frequencies(clean)
    distinct = sorted(frequencies)
    if not distinct:
        return clean
    vectors = embedder.embed(distinct).numpy()
    labels = DBSCAN(eps=eps, min_samples=min_samples, metric="cosine").fit_predict(vectors).tolist()
    clusters: dict[int, list[str]] = {}
    for tag, label in zip(distinct, labels, strict=True):
        if label >= 0:
            clusters.setdefault(label, []).append(tag)
    names = {tag: min(own, key=lambda each: (-frequencies[each], each)) for own in clusters.values() for tag in own}
    return [sorted({names.get(tag, tag) for tag in own}) for own in clean]


# --- without a model ----------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that carry grammar, or the wording of instructions in general; none of them can be part of a tag.
_AUXILIARY = _words("""
    am are be been being can cannot could did do does doing had has have having is may might must ought shall should was
    were will would
""")
_GRAMMAR = _AUXILIARY | _words("""
    a about above across after again against all along also although always an and another any anything around as at
    because before behind below beneath beside besides between beyond both but by dear despite down during each either
    else enough even ever every everything except few for from further here he her hers herself him himself his how
    however i if in inside instead into it its itself just least less like many me more most much my myself near neither
    never next no nobody none nor not nothing of off on once one only onto or other others otherwise our ours ourselves
    out outside over own per perhaps please quite rather same several she since so some something still such than that
    the their theirs them themselves then there these they this those though through throughout till to too toward
    towards two under unless until up upon us very via we what whatever when where whether which while who whole whom
    whose why with within without yes yet you your yours yourself
    able according based certain corresponding different e example examples expected etc eg ex first following follows g
    given ie last let need needed needs provide provided second shown specific task tasks third way ways
""")
# A word in its base form right after one of these is a verb.
_BEFORE_VERB = _words("to please can cannot could may might must shall should will would not you then")
_LONGEST_PHRASE = 3
_SENTENCE_END = ".!?;:\n"


class OfflineTagger:
    """Verbs with the heads of their objects, and noun phrases, found by rule in English text.

    Verbs are words in their base form that begin a sentence (an instruction commands), or follow ``to`` or a modal
    verb, or go on from an earlier verb after ``and``. Noun phrases are the words between those that carry grammar.

    Args:
        most: tags per instruction at most: verbs with their objects first, then noun phrases by how often the
            instruction names them.
    """

    def __init__(self, most: int = 12) -> None:
        if most < 1:
            raise ConfigError(f"most: {most} is not a positive number of tags")
        self.most = most

    def tags(self, instructions: Sequence[str]) -> list[list[str]]:
        """Normalised tags of each instruction, the most telling first."""
        return [self._tags(instruction) for instruction in instructions]

    def _tags(self, instruction: str) -> list[str]:
        actions: list[str] = []
        phrases: Counter[str] = Counter()
        for sentence in _sentences(instruction):
            verbs = _verbs(sentence)
            runs = _runs(sentence, verbs)
            for verb in verbs:
                # The object is the first phrase after the verb, with at most an article and a pronoun in between.
                near = next((run for run in runs if verb < run[0] <= verb + 4), None)
                noun = sentence[near[-1]] if near and "," not in sentence[verb : near[0]] else ""
                actions.append(normalise(f"{sentence[verb]} {noun}"))
            for run in runs:
                phrases[normalise(" ".join(sentence[k] for k in run[-_LONGEST_PHRASE:]))] += 1
        found = dict.fromkeys([*actions, *(phrase for phrase, _ in phrases.most_common())])
        return [tag for tag in found if len(tag) > 1][: self.most]


def _sentences(text: str) -> list[list[str]]:
    """Words and commas (which stand for every mark inside a sentence) of each sentence, in lower case."""
    without_endings = _ENDING.sub("", text.lower())
    sentences: list[list[str]] = [[]]
    for token in regex.findall(rf"{LETTERS}(?:-{LETTERS})*|\d+|[^\w ]|\n", without_endings):
        if token in _SENTENCE_END:
            sentences.append([])
        else:
            sentences[-1].append(token if token[0].isalpha() else ",")
    return [sentence for sentence in sentences if sentence]


def _is_content(word: str) -> bool:
    return len(word) > 1 and word not in _GRAMMAR  # a comma is one character


def _verbs(sentence: Sequence[str]) -> list[int]:
    """Places of the verbs that tell what to do."""
    verbs: list[int] = []
    for k, word in enumerate(sentence):
        if not _is_content(word) or word.endswith("ly") or _lemma(word) != word:
            continue
        before = sentence[k - 1] if k else ""
        after = sentence[k + 1] if k + 1 < len(sentence) else ""
        begins = k == 0 and after not in _AUXILIARY | {"of", "to", ","}
        goes_on = bool(verbs) and before in {"and", "or", ","} and after in _GRAMMAR - _AUXILIARY - {"of", "and", "or"}
        if begins or goes_on or before in _BEFORE_VERB:
            verbs.append(k)
    return verbs


def _runs(sentence: Sequence[str], verbs: Sequence[int]) -> list[list[int]]:
    """Places of the words of each noun phrase: content words side by side that are no verbs."""
    runs: list[list[int]] = []
    for k, word in enumerate(sentence):
        passive = k > 0 and sentence[k - 1] in _AUXILIARY and _lemma(word) != word
        if not _is_content(word) or k in verbs or passive or word.endswith("ly"):
            continue
        if runs and runs[-1][-1] == k - 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    return runs


# --- asked of a chat model ----------------------------------------------------------------------------------

_PROMPT = """\
You label instructions that are given to an assistant. Name the intentions of the instruction below by short, general \
tags in English, such as "sentiment analysis", "date conversion" or "polite reply". Give one tag to eight.

Instruction:
<<<
{instruction}
>>>

Answer with a JSON list and nothing else, each item of the form {{"tag": "...", "explanation": "..."}}."""
_REMINDERS = (
    "",
    '\n\nThe list must be valid JSON, for example [{"tag": "summary", "explanation": "asks for a summary"}].',
    '\n\nOnly the list: it starts with [ and ends with ], with at least one {"tag": "..."} in it.',
)


class LLMTagger:
    """Tags by a chat model that is asked for a JSON list of them, in the manner of InsTag.

    An answer without such a list is asked for again, twice, each time in other words (the same words would bring the
    same answer, from the cache or from a model that does not sample).

    Args:
        chat: answers the prompts.
        unusable: what to do with an instruction whose answers all were of no use: ``"error"``, or ``"offline"`` to take
            the tags of an :class:`OfflineTagger`; ``replaced`` tells how many there were.
    """

    def __init__(self, chat: Chat, unusable: Literal["error", "offline"] = "error") -> None:
        if unusable not in {"error", "offline"}:
            raise ConfigError(f"unusable: {unusable!r} is neither 'error' nor 'offline'")
        self.chat, self.unusable = chat, unusable
        self.replaced = 0

    def tags(self, instructions: Sequence[str]) -> list[list[str]]:
        """The tags as the model gave them.

        Raises:
            DataError: answers without tags, even when asked again. The others' are kept.
            RunError: the model did not answer.
        """
        distinct = list(dict.fromkeys(instructions))
        found, missing = ask_until_usable(
            self.chat,
            {each: _PROMPT.format(instruction=each) for each in distinct},
            _REMINDERS,
            lambda _, answer: read_tags(answer),
            forget=self.unusable == "error",
        )
        if missing and self.unusable == "error":
            instruction, answer = next(iter(missing.items()))
            raise DataError(
                f"tagger: {len(missing)} of {len(distinct)} instructions got no tags from the chat model in "
                f"{len(_REMINDERS)} attempts; {cut(instruction)!r} was answered with {cut(answer)!r}. "
                "Name a model that answers in JSON, or set unusable: offline"
            )
        self.replaced = len(missing)
        found |= dict(zip(missing, OfflineTagger().tags(list(missing)), strict=True))
        return [found[each] for each in instructions]


def read_tags(answer: str) -> list[str]:
    """The tags of the first JSON list in ``answer`` that has any; empty where there is none.

    Items may be texts, or objects with a text under ``tag``; what else the model says around the list is left alone.

    >>> read_tags('Sure! [{"tag": "news", "explanation": "..."}, "summary"]')
    ['news', 'summary']
    """

    def read(items: list[Any]) -> list[str]:
        texts = [item.get("tag") if isinstance(item, dict) else item for item in items]
        return [text.strip() for text in texts if isinstance(text, str) and normalise(text)]

    return first_list(answer, read)
