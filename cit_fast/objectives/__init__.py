"""Objectives: how the loss of a batch is computed from the model."""

from cit_fast.objectives.cross_entropy import CrossEntropy
from cit_fast.objectives.objective import Objective

__all__ = ["CrossEntropy", "Objective"]
