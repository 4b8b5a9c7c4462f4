"""Similarity of instructions: the three ways in which LCIA's grouping may compare two texts.

All pairs at once: rows are new texts, columns stored ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import regex
from numpy.typing import NDArray
from torch.nn import functional as F

from cit_fast.embeddings.embedder import Embedder

if TYPE_CHECKING:
    from scipy import sparse

SIMILARITIES = ("tfidf", "tfidf-pairwise", "embedding")

Matrix = NDArray[np.float64]

# scikit-learn's own tokens (two word characters or more), in which vowel signs and accents do not end a word.
_TOKEN = regex.compile(r"\w[\w\p{M}\u200c\u200d]+")


def tfidf(texts: Sequence[str], stored: Sequence[str]) -> Matrix:
    """Cosines of TF-IDF vectors, the document frequencies counted once, over ``stored``.

    A word that ``stored`` lacks counts as one found in none of its texts, so a text about something else is far from
    all of them. English stop words are left out.

    Args:
        texts: N texts; ``stored``: M distinct texts, M >= 1.

    Returns:
        [N, M] float64 in [0, 1]; 0 for a text of stop words only, unless it is the stored one.
    """
    a, b = _counts(texts, stored)
    found_in = np.asarray((b > 0).sum(axis=0)).ravel()
    frequency = np.log((1 + b.shape[0]) / (1 + found_in)) + 1  # sklearn's smooth_idf
    a, b = a.multiply(frequency).tocsr(), b.multiply(frequency).tocsr()
    norms = np.sqrt(np.outer(a.power(2).sum(axis=1), b.power(2).sum(axis=1)))
    return _cosines(a @ b.T, norms, texts, stored)


def tfidf_pairwise(texts: Sequence[str], stored: Sequence[str]) -> Matrix:
    """Cosines of TF-IDF vectors that are fitted on each pair of texts, as the authors of LCIA do.

    Of two texts, a word in both has the weight 1 and a word in one of them ``k = 1 + ln(3/2)``; so the norm of a text
    in a pair follows from the sum of its squared counts, over all words and over those that both have, and no pair is
    fitted on its own.

    Args:
        texts: N texts; ``stored``: M texts, M >= 1.

    Returns:
        [N, M] float64 in [0, 1]; 0 for a text of stop words only, unless it is the stored one.
    """
    a, b = _counts(texts, stored)
    alone = (1 + np.log(3 / 2)) ** 2
    a2, b2 = a.power(2), b.power(2)
    shared_a = (a2 @ (b > 0).astype(np.float64).T).toarray()
    shared_b = ((a > 0).astype(np.float64) @ b2.T).toarray()
    squares_a = alone * a2.sum(axis=1).reshape(-1, 1) - (alone - 1) * shared_a
    squares_b = alone * b2.sum(axis=1).reshape(1, -1) - (alone - 1) * shared_b
    return _cosines(a @ b.T, np.sqrt(np.asarray(squares_a) * np.asarray(squares_b)), texts, stored)


def embedding(texts: Sequence[str], stored: Sequence[str], embedder: Embedder) -> Matrix:
    """Cosines of embeddings.

    Returns:
        [N, M] float64 in [-1, 1].
    """
    a, b = (F.normalize(embedder.embed(list(each)).double(), dim=1) for each in (texts, stored))
    cosines: Matrix = (a @ b.T).clamp(-1, 1).numpy()
    return cosines


def _counts(texts: Sequence[str], stored: Sequence[str]) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Words of each text, [N, V] and [M, V]."""
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer  # here, because it takes a second to load

    vectorizer = CountVectorizer(tokenizer=_TOKEN.findall, token_pattern=None, stop_words="english", dtype=np.float64)
    try:
        counts = vectorizer.fit_transform([*texts, *stored])
    except ValueError:  # nothing but stop words
        counts = sparse.csr_matrix((len(texts) + len(stored), 1))
    return counts[: len(texts)].tocsr(), counts[len(texts) :].tocsr()


def _cosines(products: sparse.csr_matrix, norms: Matrix, texts: Sequence[str], stored: Sequence[str]) -> Matrix:
    cosines = np.divide(products.toarray(), norms, out=np.zeros_like(norms), where=norms > 0)
    for column, text in enumerate(stored):  # a text is like itself, whatever words it has
        cosines[[row for row, other in enumerate(texts) if other == text], column] = 1.0
    result: Matrix = np.minimum(cosines, 1.0)
    return result
