"""Objectives: how the loss of a batch is computed from the model."""

from cit_fast.objectives.cross_entropy import CrossEntropy
from cit_fast.objectives.head import Head, head_of
from cit_fast.objectives.kpig import KPIG
from cit_fast.objectives.objective import Objective, StageContext, StageInputs
from cit_fast.objectives.pair_hidden import PairHidden, pair_collator, pair_hidden
from cit_fast.objectives.pairs import EncodedPair, EncodedPairs, PairCollator, encode_pair, encode_pairs
from cit_fast.objectives.scoring import ExampleGain, information_gain

__all__ = [
    "KPIG",
    "CrossEntropy",
    "EncodedPair",
    "EncodedPairs",
    "ExampleGain",
    "Head",
    "Objective",
    "PairCollator",
    "PairHidden",
    "StageContext",
    "StageInputs",
    "encode_pair",
    "encode_pairs",
    "head_of",
    "information_gain",
    "pair_collator",
    "pair_hidden",
]
