"""Scores of generated answers against references: one name per metric, every value in [0, 100].

===================  ===========================================================================================
``exact_match``      100 if the answers are equal after runs of white space become one space; **case counts**
``accuracy``         closed label set: 100 if prediction and reference are the same label; case, white space,
                     quotes around the answer and a final full stop do not count; an answer outside is wrong
``token_f1``         F1 of the bags of words after SQuAD's normalisation: lower case, no ASCII punctuation, no
                     articles (Rajpurkar et al. 2016, arXiv 1606.05250; empty answers as in SQuAD 2.0)
``rouge_1``          ROUGE-1 F-measure: as ``rouge_l``, but single words instead of their longest common order
``rouge_l``          ROUGE-L F-measure, lower case, Porter stems (package ``rouge-score``); ASCII text scores as
                     there; words of other scripts count as words too (:func:`cit_fast.text.words`)
``bleu``             value: corpus BLEU; per example: sentence BLEU with effective order (package ``sacrebleu``,
                     13a); **case counts**, white space does not
``sari``             SARI of simplifications against the input and the references (Xu et al. 2016, TACL; 13a tokens,
                     lower case, 0/0 = 1 as in its revised form); needs the inputs
``bertscore``        F1 of contextual embeddings (Zhang et al. 2020, arXiv 1904.09675; package ``bert-score``, extra
                     ``bertscore``, with its model for English, which is fetched where it is not cached)
``judge``            a chat model's mark, see ``evaluation.judge`` of a configuration; never a default
``edit_similarity``  ratio of matching characters (difflib's, as TRACE scores code), literals of Py150 put in plainly;
                     white space around the code does not count
``first_letter``     100 if the first character that is no space is the same (TRACE's ScienceQA: letter, then reasons)
``set_match``        100 if the answers, split at commas, new lines and ``|``, are equal as sets; case and white
                     space around elements do not count, nor do empty elements and repetitions
``truth_alignment``  100 if the texts are the same but for case and white space around them: CoIN's and LCIA's strict
                     equality (Chen et al. 2024, arXiv 2403.08350)
``iou``              100 if the answer is a box (``[x1, y1, x2, y2]``, brackets or not) and overlaps the wanted one by
                     more than half of their union (CoIN's grounding); another answer is wrong
``vqa_accuracy``     an answer that at least three of the other persons gave is right, fewer count in thirds (Antol et
                     al. 2015, arXiv 1505.00468); see :func:`cit_fast.evaluation.visual_metrics.vqa_accuracy`
===================  ===========================================================================================

With several references the best one counts (for corpus BLEU: sacrebleu's own multi-reference rule; for VQA accuracy
they are votes). Texts are compared in Unicode's form NFC: a letter with its accent is the same text in one character or
in two.
"""

from __future__ import annotations

import difflib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cit_fast.errors import ConfigError, DataError
from cit_fast.evaluation.visual_metrics import iou_accuracy, truth_alignment, vqa_accuracy
from cit_fast.text import composed, first_line, normalise_label, words
from cit_fast.values import choices, imported


@dataclass(frozen=True)
class Score:
    """What a metric says: ``value`` of the whole set and ``per_example`` of each answer, all in [0, 100]."""

    value: float
    per_example: list[float]


JUDGE = "judge"
Metric = Callable[[Sequence[str], Sequence[Sequence[str]], Sequence[str]], "Score | Sequence[float]"]
"""``metric(predictions, references, labels)``: a :class:`Score`, or one value in [0, 100] per example."""


def score(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    labels: Sequence[str] = (),
    inputs: Sequence[str] = (),
) -> Score:
    """Score predictions against their references.

    Args:
        metric: a name in :data:`METRICS`, or the dotted path of a callable (see :func:`resolve_metric`).
        predictions: N generated answers, N >= 1.
        references: for each prediction its acceptable answers, at least one.
        labels: the closed set of answers; used by ``accuracy`` and handed to a callable of the user's.
        inputs: what each prediction was made from; used by ``sari``.

    Returns:
        Value and per-example values in [0, 100]; the value is the mean of the examples except for ``bleu``.

    Raises:
        ConfigError: the metric is not known, or a user's metric returns something else than it should.
        DataError: no prediction, lengths that differ, an example without references, a reference outside
            ``labels``.

    >>> score("exact_match", ["42 km"], [["42  km", "42 kilometres"]]).value
    100.0
    """
    function = _sari(inputs) if metric == "sari" else resolve_metric(metric)
    if not predictions:
        raise DataError(f"metric {metric}: no predictions to score; at least one is needed")
    if len(predictions) != len(references):
        raise DataError(f"metric {metric}: {len(predictions)} predictions but {len(references)} lists of references")
    for index, answers in enumerate(references):
        if isinstance(answers, str) or not answers:
            raise DataError(
                f"metric {metric}: example {index} needs a non-empty list of reference answers, not {answers!r}"
            )
    if metric == "sari" and len(inputs) != len(predictions):
        raise DataError(f"metric sari: {len(predictions)} predictions but {len(inputs)} inputs, which it compares with")
    if metric in METRICS:
        predictions, labels = list(map(composed, predictions)), list(map(composed, labels))
        references = [list(map(composed, answers)) for answers in references]
    return _checked(metric, function(predictions, references, labels), len(predictions))


def resolve_metric(metric: str) -> Metric:
    """The metric of that name, or the callable at that dotted path (``package.module:function`` or with a
    dot).

    A callable of the user's is called as ``function(predictions, references, labels)`` and returns a
    :class:`Score` or one value in [0, 100] per example.

    Raises:
        ConfigError: no such metric, module or function.
    """
    if metric == JUDGE:
        raise ConfigError("metric judge asks a chat model, in a run with evaluation.judge; nothing else can use it")
    if metric in METRICS:
        return METRICS[metric]
    if ":" not in metric and "." not in metric:
        raise ConfigError(
            f"unknown metric {metric!r}; {choices(metric, METRICS)} (your own function: package.module:function)"
        )
    return imported(metric, f"metric {metric!r}", "function")


def _checked(metric: str, result: Score | Sequence[float], count: int) -> Score:
    """The result as a Score, or a ConfigError that says what a metric must return."""
    if not isinstance(result, Score):
        try:
            values = [float(value) for value in result]
        except (TypeError, ValueError):
            raise ConfigError(
                f"metric {metric} returned {type(result).__name__}; it must return a Score or one number per example"
            ) from None
        result = Score(_mean(values), values)
    if len(result.per_example) != count:
        raise ConfigError(f"metric {metric} returned {len(result.per_example)} values for {count} examples")
    for value in [result.value, *result.per_example]:
        if not (math.isfinite(value) and 0.0 <= value <= 100.0):
            raise ConfigError(f"metric {metric} returned {value}; values lie in [0, 100]")
    return result


def _mean(values: Sequence[float]) -> float:
    # fsum and the clamp keep a mean of hundreds at exactly 100, whatever the order of the examples.
    return min(100.0, math.fsum(values) / len(values)) if values else math.nan


def _best_of(compare: Callable[[str, str], float]) -> Metric:
    """A metric from a comparison of a prediction with one reference (in [0, 100]): the best one counts."""

    def metric(predictions: Sequence[str], references: Sequence[Sequence[str]], labels: Sequence[str]) -> Score:
        per_example = [
            max(compare(prediction, answer) for answer in answers)
            for prediction, answers in zip(predictions, references, strict=True)
        ]
        return Score(_mean(per_example), per_example)

    return metric


def _exact_match(prediction: str, reference: str) -> float:
    return 100.0 * (" ".join(prediction.split()) == " ".join(reference.split()))


def _accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]], labels: Sequence[str]) -> Score:
    known: dict[str, str] = {}
    for label in labels:
        other = known.setdefault(normalise_label(label), label)
        if other != label:
            raise DataError(f"metric accuracy: labels {other!r} and {label!r} differ only in case, quotes or spaces")
    per_example = []
    for index, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        accepted = {normalise_label(answer) for answer in answers}
        if known and not accepted <= known.keys():
            raise DataError(
                f"metric accuracy: example {index} has a reference outside the labels ({', '.join(labels)}): "
                f"{', '.join(answers)}"
            )
        # Equality with a reference implies membership in the closed set, which the check above has
        # established.
        per_example.append(100.0 * (normalise_label(prediction) in accepted))
    return Score(_mean(per_example), per_example)


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _token_f1(prediction: str, reference: str) -> float:
    predicted, expected = _squad_words(prediction), _squad_words(reference)
    if not predicted or not expected:
        return 100.0 * (predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 100.0 * 2 * common / (len(predicted) + len(expected))


class _Tokenizer:
    """rouge-score's own tokenisation, extended from ``[a-z0-9]`` to the words of any script."""

    def __init__(self, stem: Callable[[str], str]) -> None:
        self._stem = stem

    def tokenize(self, text: str) -> list[str]:
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words(text)]


def _rouge(kind: str) -> Metric:
    def metric(predictions: Sequence[str], references: Sequence[Sequence[str]], labels: Sequence[str]) -> Score:
        # Imported here: rouge-score pulls nltk and scipy, more than a second that only this metric should cost.
        from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], tokenizer=_Tokenizer(PorterStemmer().stem))
        per_example = []
        for prediction, answers in zip(predictions, references, strict=True):
            best = 100.0 * scorer.score_multi(answers, prediction)[kind].fmeasure
            # An answer without a single word (such as "+") has no subsequence to share: equality decides.
            wordless = not words(prediction) and prediction.strip() in {a.strip() for a in answers}
            per_example.append(100.0 if wordless else best)
        return Score(_mean(per_example), per_example)

    return metric


def _sari(inputs: Sequence[str]) -> Metric:
    def metric(predictions: Sequence[str], references: Sequence[Sequence[str]], labels: Sequence[str]) -> Score:
        from sacrebleu.metrics.bleu import _get_tokenizer

        tokens = _get_tokenizer("13a")()
        rows = zip(map(composed, inputs), predictions, references, strict=True)
        per_example = [
            100.0 * sentence_sari(*([tokens(text.lower()).split() for text in (source, answer, *answers)]))
            for source, answer, answers in rows
        ]
        return Score(_mean(per_example), per_example)

    return metric


def sentence_sari(source: Sequence[str], prediction: Sequence[str], *references: Sequence[str]) -> float:
    """SARI of one simplification, in [0, 1]: mean over n = 1..4 of what was rightly kept, added and deleted.

    Args:
        source, prediction, references: tokens; of references at least one.
    """
    kept, added, deleted = [], [], []
    for n in range(1, 5):
        # Counts are as if there were as many sources and predictions as references.
        before = Counter({gram: count * len(references) for gram, count in _ngrams(source, n).items()})
        after = Counter({gram: count * len(references) for gram, count in _ngrams(prediction, n).items()})
        wanted = sum((_ngrams(reference, n) for reference in references), Counter())
        stay, stay_wanted = before & after, before & wanted
        right = stay & wanted
        kept.append(
            _f1(
                _ratio(sum(right[gram] / stay[gram] for gram in right), len(stay)),
                _ratio(sum(right[gram] / stay_wanted[gram] for gram in right), len(stay_wanted)),
            )
        )
        gone = before - after
        deleted.append(_ratio(sum((gone - wanted)[gram] / gone[gram] for gram in gone - wanted), len(gone)))
        new, new_wanted = after.keys() - before.keys(), wanted.keys() - before.keys()
        good = new & wanted.keys()
        added.append(_f1(_ratio(len(good), len(new)), _ratio(len(good), len(new_wanted))))
    return sum(map(sum, (kept, added, deleted))) / 12


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[k:] for k in range(n)), strict=False))


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


BERTSCORE_MODEL: dict[str, object] = {"lang": "en"}
"""What ``bert_score.score`` is told of its model."""


def _bertscore(predictions: Sequence[str], references: Sequence[Sequence[str]], labels: Sequence[str]) -> Score:
    try:
        import bert_score
    except ImportError:
        raise ConfigError("metric bertscore: the package bert-score is missing; install cit-fast[bertscore]") from None
    try:
        found = bert_score.score(list(predictions), [list(answers) for answers in references], **BERTSCORE_MODEL)
    except (OSError, ValueError) as error:  # a model that is neither cached nor reachable
        raise ConfigError(f"metric bertscore: {first_line(error)}") from None
    per_example = [100.0 * min(1.0, max(0.0, value)) for value in found[2].tolist()]
    return Score(_mean(per_example), per_example)


def _bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], labels: Sequence[str]) -> Score:
    from sacrebleu.metrics import BLEU

    most = max(len(answers) for answers in references)
    # sacrebleu wants streams: the k-th reference of every example, None where an example has fewer.
    streams = [[answers[k] if k < len(answers) else None for answers in references] for k in range(most)]
    value = BLEU(force=True).corpus_score(list(predictions), streams).score
    sentence = BLEU(effective_order=True)
    per_example = [
        sentence.sentence_score(prediction, list(answers)).score
        for prediction, answers in zip(predictions, references, strict=True)
    ]
    return Score(min(100.0, value), [min(100.0, each) for each in per_example])


_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT(?::(.*?))?>", re.DOTALL)


def _plain_literals(code: str) -> str:
    return _LITERAL.sub(lambda match: match[2] or ("0" if match[1] == "NUM" else ""), code)


def _edit_similarity(prediction: str, reference: str) -> float:
    texts = _plain_literals(prediction).strip(), _plain_literals(reference).strip()
    return 100.0 * difflib.SequenceMatcher(None, *texts, autojunk=False).ratio()


def _first_letter(prediction: str, reference: str) -> float:
    return 100.0 * (prediction.strip()[:1].casefold() == reference.strip()[:1].casefold())


def _answer_set(text: str) -> set[str]:
    return {" ".join(item.casefold().split()) for item in re.split(r"[,|\n]", text)} - {""}


def _set_match(prediction: str, reference: str) -> float:
    return 100.0 * (_answer_set(prediction) == _answer_set(reference))


METRICS: dict[str, Metric] = {
    "exact_match": _best_of(_exact_match),
    "accuracy": _accuracy,
    "token_f1": _best_of(_token_f1),
    "rouge_1": _rouge("rouge1"),
    "rouge_l": _rouge("rougeL"),
    "bleu": _bleu,
    "set_match": _best_of(_set_match),
    "edit_similarity": _best_of(_edit_similarity),
    "first_letter": _best_of(_first_letter),
    "sari": _sari(()),  # score() gives it the inputs
    "bertscore": _bertscore,
    "truth_alignment": _best_of(truth_alignment),
    "iou": iou_accuracy,
    "vqa_accuracy": vqa_accuracy,
}
"""The metrics by name; the top of this module says what each is."""
