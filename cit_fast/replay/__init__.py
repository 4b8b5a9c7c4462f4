"""Replay: which earlier examples come back when a new task is trained."""

from cit_fast.replay.baselines import DiverseInstructionReplay, PrototypeDataReplay, PrototypeInstructionReplay
from cit_fast.replay.inscl import InsCLReplay
from cit_fast.replay.policy import NoReplay, RandomReplay, ReplayContext, ReplayPolicy

__all__ = [
    "DiverseInstructionReplay",
    "InsCLReplay",
    "NoReplay",
    "PrototypeDataReplay",
    "PrototypeInstructionReplay",
    "RandomReplay",
    "ReplayContext",
    "ReplayPolicy",
]
