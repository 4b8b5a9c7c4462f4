"""Replay: which earlier examples come back when a new task is trained."""

from cit_fast.replay.baselines import DiverseInstructionReplay, PrototypeDataReplay, PrototypeInstructionReplay
from cit_fast.replay.inscl import InsCLReplay
from cit_fast.replay.kpig import KPIGReplay
from cit_fast.replay.llm import Chat, ChatEndpoint, LocalChat
from cit_fast.replay.policy import NoReplay, RandomReplay, ReplayContext, ReplayPolicy
from cit_fast.replay.tags import LLMTagger, OfflineTagger, Tagger

__all__ = [
    "Chat",
    "ChatEndpoint",
    "DiverseInstructionReplay",
    "InsCLReplay",
    "KPIGReplay",
    "LLMTagger",
    "LocalChat",
    "NoReplay",
    "OfflineTagger",
    "PrototypeDataReplay",
    "PrototypeInstructionReplay",
    "RandomReplay",
    "ReplayContext",
    "ReplayPolicy",
    "Tagger",
]
