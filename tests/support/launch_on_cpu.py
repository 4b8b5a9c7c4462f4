"""The command line under torchrun, for tests of FSDP and DeepSpeed on machines without a GPU.

Accelerate knows both only for accelerators; torch's FSDP2 and DeepSpeed's engine themselves run on CPUs over gloo. So
this tells Accelerate that the processes have accelerators, and that their device is the CPU; all else is real.
Several configurations run one after another in the same processes, which take long to start. DIE_AT_STEP: end both,
without any clean-up, before that step of the last one's first stage.
"""

from __future__ import annotations

import os
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
from accelerate.state import DistributedType, PartialState

from cit_fast import cli
from cit_fast.run.stage_trainer import StageTrainer


def _backend(self, cpu, *_):
    return "gloo", DistributedType.MULTI_CPU if cpu else DistributedType.MULTI_GPU


def _step(self, *args, **kwargs):
    if self.state.global_step == int(os.environ["DIE_AT_STEP"]):
        os._exit(9)
    return _training_step(self, *args, **kwargs)


PartialState._prepare_backend = _backend
_training_step = StageTrainer.training_step
command, configurations = sys.argv[1], sys.argv[2:]
for configuration in configurations:
    if "DIE_AT_STEP" in os.environ and configuration == configurations[-1]:
        StageTrainer.training_step = _step
    sys.argv = ["cit-fast", command, configuration]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise
