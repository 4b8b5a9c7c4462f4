"""cit-fast: continual instruction tuning that forgets less and costs almost nothing extra.

Three doors, each works alone: an optimizer wrapper (:mod:`cit_fast.optim`), the continual run
(:class:`ContinualTrainer`, ``cit-fast run``), and the kernels (:mod:`cit_fast.ops`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cit_fast.ops.backends import available_backends, backend

if TYPE_CHECKING:
    from cit_fast.inference.continual_model import ContinualModel
    from cit_fast.models.fused_lora import fuse_lora, unfuse_lora
    from cit_fast.models.fused_norms import fuse_norms, unfuse_norms
    from cit_fast.run.config import RunConfig
    from cit_fast.run.learn import learn
    from cit_fast.run.loop import ContinualTrainer

__version__ = "0.1.0"
__all__ = [
    "ContinualModel",
    "ContinualTrainer",
    "RunConfig",
    "__version__",
    "available_backends",
    "backend",
    "fuse_lora",
    "fuse_norms",
    "learn",
    "unfuse_lora",
    "unfuse_norms",
]

# transformers and peft take seconds to import; a user of the ops or the optimizer should not wait for them.
_LAZY = {
    "ContinualModel": "cit_fast.inference.continual_model",
    "ContinualTrainer": "cit_fast.run.loop",
    "RunConfig": "cit_fast.run.config",
    "learn": "cit_fast.run.learn",
    "fuse_norms": "cit_fast.models.fused_norms",
    "fuse_lora": "cit_fast.models.fused_lora",
    "unfuse_norms": "cit_fast.models.fused_norms",
    "unfuse_lora": "cit_fast.models.fused_lora",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'cit_fast' has no attribute {name!r}")
