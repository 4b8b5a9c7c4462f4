"""Replay: which earlier examples come back when a new task is trained."""

from cit_fast.replay.policy import NoReplay, RandomReplay, ReplayContext, ReplayPolicy

__all__ = ["NoReplay", "RandomReplay", "ReplayContext", "ReplayPolicy"]
