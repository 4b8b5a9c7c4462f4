"""cit-fast: continual instruction tuning that forgets less and costs almost nothing extra.

Three doors, each works alone: an optimizer wrapper (:mod:`cit_fast.optim`), the continual run
(:class:`ContinualTrainer`, ``cit-fast run``), and the kernels (:mod:`cit_fast.ops`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cit_fast.backends import available_backends, backend

if TYPE_CHECKING:
    from cit_fast.training.config import RunConfig
    from cit_fast.training.loop import ContinualTrainer
    from cit_fast.training.serving import ContinualModel

__version__ = "0.1.0"
__all__ = [
    "ContinualModel",
    "ContinualTrainer",
    "RunConfig",
    "__version__",
    "available_backends",
    "backend",
]

# transformers and peft take seconds to import; a user of the ops or the optimizer should not wait for them.
_LAZY = {
    "ContinualModel": "cit_fast.training.serving",
    "ContinualTrainer": "cit_fast.training.loop",
    "RunConfig": "cit_fast.training.config",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'cit_fast' has no attribute {name!r}")
