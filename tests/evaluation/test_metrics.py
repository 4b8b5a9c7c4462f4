from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, sentence_bleu

from cit_fast.errors import ConfigError, DataError
from cit_fast.evaluation import metrics
from cit_fast.evaluation.metrics import METRICS, Score, resolve_metric, score
from cit_fast.text import normalise_label


def first_half_right(predictions, references, labels):
    return [100.0 if k < len(predictions) / 2 else 0.0 for k in range(len(predictions))]


def fixed_score(predictions, references, labels):
    return Score(25.0, [25.0] * len(predictions))


def too_few(predictions, references, labels):
    return []


def beyond_hundred(predictions, references, labels):
    return [101.0 for _ in predictions]


def no_numbers(predictions, references, labels):
    return None


NOT_A_FUNCTION = 7


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [
        ("exact_match", " 2024-05-01\n", ["2024-05-01"], 100.0),
        ("exact_match", "a\t b", ["x", "a b"], 100.0),
        ("exact_match", "Paris", ["paris"], 0.0),
        ("exact_match", "", ["paris"], 0.0),
        ("accuracy", ' "Positive". ', ["positive"], 100.0),
        ("accuracy", "positive because", ["positive"], 0.0),
        ("token_f1", "The  cat, sat!", ["a cat sat"], 100.0),
        ("token_f1", "cat dog", ["cat"], 100 * 2 / 3),
        ("token_f1", "cat cat", ["cat"], 100 * 2 / 3),  # a word counts as often as it is there
        ("token_f1", "fish", ["cat", "big fish"], 100 * 2 / 3),
        ("token_f1", "the", ["an"], 100.0),  # nothing is left of either
        ("token_f1", "the", ["cat"], 0.0),
        ("rouge_l", "the cat sat", ["the dog sat"], 100 * 2 / 3),
        ("rouge_l", "police killed the gunman", ["police kill the gunman"], 100.0),  # stems
        ("rouge_l", "Ångström ist groß", ["ångström IST groß"], 100.0),
        ("rouge_l", "我爱你", ["我恨你"], 100 * 2 / 3),
        ("rouge_l", "वह खाता है", ["वह खोता है"], 100 * 2 / 3),  # vowel signs belong to their word
        ("rouge_l", "பூ", ["பா"], 0.0),
        ("rouge_l", "كَتَبَ", ["كُتِبَ"], 0.0),
        ("rouge_l", "ကျောင်း", ["ကျင်း"], 50.0),  # no spaces between words: each letter with its marks is one
        ("rouge_l", "ไทย", ["ไทง"], 100 * 2 / 3),
        ("exact_match", "caf\u00e9", ["cafe\u0301"], 100.0),
        ("accuracy", "Caf\u00e9", ["cafe\u0301"], 100.0),
        ("accuracy", "\u662f\u3002", ["\u662f"], 100.0),
        ("token_f1", "caf\u00e9", ["cafe\u0301"], 100.0),
        ("set_match", "caf\u00e9, a", ["a, cafe\u0301"], 100.0),
        ("bleu", "un caf\u00e9 au lait", ["un cafe\u0301 au lait"], 100.0),
        ("rouge_l", "+", ["-", " + "], 100.0),
        ("rouge_l", "+", ["-"], 0.0),
        ("rouge_l", "", ["word"], 0.0),
        ("set_match", "b | A,  a\n", ["a, b"], 100.0),
        ("set_match", "a, b, c", ["a, b"], 0.0),
        ("set_match", "new\nYork  city", ["york city|NEW"], 100.0),
        ("bleu", "a b c d e", ["x y", "a b c d e"], 100.0),
        ("bleu", "", ["a b c d e"], 0.0),
        ("edit_similarity", "return x", ["  return x\n"], 100.0),
        ("edit_similarity", "x =", ["x = <STR_LIT>\n"], 100.0),
        ("edit_similarity", "ab", ["ax"], 50.0),
    ],
)
def test_one_answer(metric, prediction, references, expected):
    result = score(metric, [prediction], [references])
    assert result.per_example == pytest.approx([expected])
    assert result.value == pytest.approx(expected, abs=1e-9)


def test_value_is_the_mean_of_the_examples_in_points():
    result = score("exact_match", ["a", "b", "c"], [["a"], ["x"], ["c"]])
    assert result.per_example == [100.0, 0.0, 100.0]
    assert result.value == pytest.approx(200 / 3)


def test_rouge_l_equals_the_package_on_ascii_text():
    prediction, reference = (
        "It's 3 quick, brown foxes -- jumping!",
        "The 3 quickly jumping (brown) foxes jumped",
    )
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(reference, prediction)["rougeL"].fmeasure
    assert 0 < expected < 1
    assert score("rouge_l", [prediction], [[reference]]).value == pytest.approx(100 * expected)


def test_bleu_is_that_of_the_corpus_with_uneven_numbers_of_references():
    predictions = ["the cat is on the mat", "there is a dog here now"]
    references = [["the cat sat on the mat", "a cat is on the mat"], ["there is a dog here"]]
    result = score("bleu", predictions, references)
    streams = [[references[0][0], references[1][0]], [references[0][1], None]]
    assert result.value == pytest.approx(corpus_bleu(predictions, streams).score)
    assert result.value != pytest.approx(sum(result.per_example) / 2)
    assert result.per_example[1] == pytest.approx(sentence_bleu(predictions[1], references[1]).score)


def test_accuracy_over_a_closed_set():
    labels = ("Yes", "No")
    result = score("accuracy", ["yes.", "maybe", "No"], [["Yes"], ["Yes"], ["Yes", "No"]], labels)
    assert result.per_example == [100.0, 0.0, 100.0]
    with pytest.raises(DataError, match=r"example 0 has a reference outside the labels \(Yes, No\): maybe"):
        score("accuracy", ["yes"], [["maybe"]], labels)
    with pytest.raises(DataError, match=r"'Yes' and 'yes\.' differ only"):
        score("accuracy", ["yes"], [["Yes"]], ("Yes", "yes."))


def test_labels_that_are_all_quotes_or_stops_stay_themselves():
    assert normalise_label('"') == '"'
    assert normalise_label(" ... ") == "..."
    assert normalise_label("'New  York'.") == "new york"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(METRICS.keys() - {"bertscore", "iou"})),
    st.lists(
        st.tuples(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    ),
)
def test_any_text_scores_within_0_and_100(metric, examples):
    predictions, references = zip(*examples, strict=True)
    result = score(metric, list(predictions), list(references), inputs=list(predictions)[::-1])
    assert len(result.per_example) == len(examples)
    assert all(0.0 <= value <= 100.0 for value in [result.value, *result.per_example])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(
        sorted(METRICS.keys() - {"bertscore", "sari", "iou"})
    ),  # SARI wants all references followed at once
    st.lists(st.text(string.ascii_letters + " ", min_size=1).filter(str.strip), min_size=1, max_size=4),
)
def test_a_reference_repeated_word_for_word_is_right(metric, answers):
    if metric == "bleu":  # no 4-gram, no BLEU: long enough answers
        answers = [f"one two three four {answer}" for answer in answers]
    result = score(metric, answers, [["something else", answer] for answer in answers])
    assert result.per_example == pytest.approx([100.0] * len(answers))
    assert result.value == pytest.approx(100.0)


@pytest.mark.parametrize("separator", [":", "."])
def test_a_callable_of_the_users(separator, tmp_path, monkeypatch):
    (tmp_path / "users_own_metric.py").write_text("def half(p, r, labels): return [50.0] * len(p)\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = score(f"users_own_metric{separator}half", ["a", "b"], [["a"], ["b"]])
    assert result == Score(50.0, [50.0, 50.0])


def test_a_callable_may_return_a_score(monkeypatch):
    monkeypatch.setitem(METRICS, "fixed", fixed_score)
    assert score("fixed", ["a"], [["a"]]) == Score(25.0, [25.0])
    monkeypatch.setitem(METRICS, "half", first_half_right)
    assert score("half", ["a", "b"], [["a"], ["b"]]).value == 50.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (too_few, "returned 0 values for 1 examples"),
        (beyond_hundred, r"returned 101\.0; values lie in \[0, 100\]"),
        (no_numbers, "returned NoneType; it must return a Score or one number per example"),
    ],
)
def test_what_a_callable_returns_is_checked(function, message, monkeypatch):
    monkeypatch.setitem(METRICS, "bad", function)
    with pytest.raises(ConfigError, match=message):
        score("bad", ["a"], [["a"]])


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("rougel", "unknown metric 'rougel'; did you mean 'rouge_l'.*your own function: package.module:function"),
        ("zzz", "unknown metric 'zzz'; known: accuracy, bertscore, bleu, "),
        ("", "unknown metric ''"),
        ("no_such_package.module:f", "cannot be imported: No module named"),
        ("string:no_such_function", "cannot be imported"),
        ("string.digits", "is a str, not a function"),
        ("..x", "is no dotted path"),
        (":x", "is no dotted path"),
    ],
)
def test_unknown_metrics(metric, message):
    with pytest.raises(ConfigError, match=message):
        resolve_metric(metric)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no predictions to score"),
        (["a", "b"], [["a"]], "2 predictions but 1 lists of references"),
        (["a"], [[]], r"example 0 needs a non-empty list of reference answers, not \[\]"),
        (["a"], ["a"], "example 0 needs a non-empty list of reference answers, not 'a'"),
    ],
)
def test_bad_input(predictions, references, message):
    with pytest.raises(DataError, match=message):
        score("exact_match", predictions, references)


# SARI, ROUGE-1, BERTScore


def test_sari_of_published_examples():
    """The three sentences of the authors' own script, and what it prints for them."""
    source = "About 95 species are currently accepted ."
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    for answer, expected in (
        ("About 95 you now get in .", 0.2682782411698074),
        ("About 95 species are now agreed .", 0.5889995423074248),
        ("About 95 species are currently agreed .", 0.5071608864657479),
    ):
        assert score("sari", [answer], [references], inputs=[source]).value == pytest.approx(100 * expected)
    # 0/0 is 1 here, so that the only reference itself is wholly right.
    assert score("sari", [references[0]], [references[:1]], inputs=[source]).value == pytest.approx(100.0)


def test_sari_of_an_answer_that_changes_nothing_or_everything():
    source, reference = "the big dog", ["the dog"]
    for answer in ("the big dog", "", "cats", "the dog"):
        assert 0.0 <= score("sari", [answer], [reference], inputs=[source]).value <= 100.0
    assert score("sari", ["the dog"], [reference], inputs=[source]).value == 100.0
    with pytest.raises(DataError, match="metric sari: 1 predictions but 0 inputs"):
        score("sari", ["a"], [["b"]])


def test_rouge_1_counts_words_in_any_order():
    assert score("rouge_1", ["sat the cat"], [["the cat sat"]]).value == 100.0
    assert score("rouge_l", ["sat the cat"], [["the cat sat"]]).value == pytest.approx(100 * 2 / 3)
    assert score("rouge_1", ["the cat"], [["a dog", "the cat sat"]]).value == pytest.approx(80.0)


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{each}" for each in letters), "the", "cat"]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokens), **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bertscore_is_that_of_the_package(tiny_bert, monkeypatch):
    import bert_score

    options = {"model_type": str(tiny_bert), "num_layers": 2}
    monkeypatch.setattr(metrics, "BERTSCORE_MODEL", options)
    answers, references = ["the cat", "a dog"], [["the cat", "cats"], ["the dog"]]
    found = score("bertscore", answers, references)
    expected = bert_score.score(answers, references, **options)[2]
    assert found.per_example == pytest.approx((100 * expected).tolist())
    assert found.per_example[0] == pytest.approx(100.0, abs=1e-3)  # the best reference counts
    monkeypatch.setattr(metrics, "BERTSCORE_MODEL", {"model_type": str(tiny_bert / "nowhere"), "num_layers": 2})
    with pytest.raises(ConfigError, match="metric bertscore: ") as caught:
        score("bertscore", answers, references)
    assert "\n" not in str(caught.value)


def test_a_judge_has_to_be_configured():
    with pytest.raises(ConfigError, match=r"metric judge asks a chat model, in a run with evaluation\.judge"):
        score("judge", ["a"], [["b"]])
