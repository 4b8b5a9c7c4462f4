"""Replay: which earlier examples come back when a new task is trained."""

from cit_fast.methods.replay.baselines import DiverseInstructionReplay, PrototypeDataReplay, PrototypeInstructionReplay
from cit_fast.methods.replay.inscl import InsCLReplay
from cit_fast.methods.replay.kpig import KPIGReplay
from cit_fast.methods.replay.on_policy import OnPolicyReplay
from cit_fast.methods.replay.policy import NoReplay, RandomReplay, ReplayPolicy
from cit_fast.methods.replay.surprise import SurpriseReplay
from cit_fast.methods.replay.tags import LLMTagger, OfflineTagger, Tagger

__all__ = [
    "DiverseInstructionReplay",
    "InsCLReplay",
    "KPIGReplay",
    "LLMTagger",
    "NoReplay",
    "OfflineTagger",
    "OnPolicyReplay",
    "PrototypeDataReplay",
    "PrototypeInstructionReplay",
    "RandomReplay",
    "ReplayPolicy",
    "SurpriseReplay",
    "Tagger",
]
