"""Objectives: how the loss of a batch is computed from the model."""

from cit_fast.methods.objectives.cross_entropy import CrossEntropy
from cit_fast.methods.objectives.distillation import Distillation
from cit_fast.methods.objectives.ewc import EWC
from cit_fast.methods.objectives.kpig import KPIG
from cit_fast.methods.objectives.o_lora import OLoRA
from cit_fast.methods.objectives.objective import Objective, plain_inputs
from cit_fast.methods.objectives.sdft import SDFT

__all__ = ["EWC", "KPIG", "SDFT", "CrossEntropy", "Distillation", "OLoRA", "Objective", "plain_inputs"]
