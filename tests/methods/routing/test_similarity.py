"""Similarities against a direct computation with scikit-learn, pair by pair and over the codebook."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from cit_fast.methods.routing.similarity import embedding, tfidf, tfidf_pairwise

STORED = [
    "Write the date in the form year, month, day.",
    "Given a review, review its sentiment: positive, negative or mixed. The sentiment counts.",
    "Extract the e-mail address from the text.",
]
TEXTS = [
    "Extract every e-mail address, and the telephone number, from the letter.",
    "Write write write the year of the review.",
    "Completely different words here",
    STORED[1],
]


def test_pairwise_is_what_sklearn_fits_on_each_pair():
    expected = np.array(
        [
            [cosine_similarity(TfidfVectorizer(stop_words="english").fit_transform([a, b]))[0, 1] for b in STORED]
            for a in TEXTS
        ]
    )
    assert np.abs(tfidf_pairwise(TEXTS, STORED) - expected).max() < 1e-12


def test_over_the_codebook_is_what_sklearn_fits_on_it():
    known = TfidfVectorizer(stop_words="english").fit(STORED)
    # A word of none of the stored texts has the frequency that sklearn's formula gives to a count of zero.
    counter = CountVectorizer(stop_words="english").fit([*TEXTS, *STORED])
    frequency = np.full(len(counter.vocabulary_), np.log(1 + len(STORED)) + 1)
    for word, place in known.vocabulary_.items():
        frequency[counter.vocabulary_[word]] = known.idf_[place]
    vectors = [counter.transform(texts).toarray() * frequency for texts in (TEXTS, STORED)]
    assert np.abs(tfidf(TEXTS, STORED) - cosine_similarity(*vectors)).max() < 1e-12


@pytest.mark.parametrize("compare", [tfidf, tfidf_pairwise])
def test_texts_without_a_word_that_counts(compare):
    found = compare(["the of and", "Extract the date", "!"], ["the of and", "date of the letter"])
    assert found[0].tolist() == [1.0, 0.0]  # a text is like itself
    assert found[2].tolist() == [0.0, 0.0]
    assert 0 < found[1, 1] < 1
    assert compare(["the"], ["of"]).tolist() == [[0.0]]


def test_a_word_that_no_stored_text_has_takes_a_text_away_from_them():
    near, far = tfidf(["extract address", "extract address volcano"], STORED)[:, 2]
    assert far < near < 1


def test_embeddings_are_compared_by_their_angle():
    class Letters:
        name = "letters"

        def embed(self, texts):
            return torch.tensor([[text.count("a"), text.count("b")] for text in texts], dtype=torch.float32)

    found = embedding(["aab", "bb"], ["a", "ab"], Letters())
    assert found == pytest.approx(np.array([[2 / 5**0.5, 3 / 10**0.5], [0, 1 / 2**0.5]]), abs=1e-6)
