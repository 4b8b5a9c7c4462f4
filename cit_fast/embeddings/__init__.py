"""Instructions as points: embedders, a cache of what they embedded, and the measure that a task becomes."""

from cit_fast.embeddings.build import build_embedder
from cit_fast.embeddings.cache import CachedEmbedder
from cit_fast.embeddings.embedder import Embedder
from cit_fast.embeddings.measure import WEIGHTS, instruction_measure, task_clouds
from cit_fast.embeddings.sentence import SentenceEmbedder
from cit_fast.embeddings.token_mean import TokenMeanEmbedder
from cit_fast.models.digests import model_digest

__all__ = [
    "WEIGHTS",
    "CachedEmbedder",
    "Embedder",
    "SentenceEmbedder",
    "TokenMeanEmbedder",
    "build_embedder",
    "instruction_measure",
    "model_digest",
    "task_clouds",
]
