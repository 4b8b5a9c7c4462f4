"""OSFT: the model itself is trained, in those directions of its weights that matter least.

PEFT's OSF splits every weight by its singular values, freezes the largest, trains the rest, and keeps their gradients
orthogonal to what is frozen. Between tasks the trained weights are split anew.

Source: Nayak et al., arXiv 2504.07097; the ranks of a stream are those of PEFT's guide: of n tasks, the k-th freezes
(k - 1) / n of each weight's directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cit_fast.errors import ConfigError


def is_osf(adapter: Mapping[str, Any] | None) -> bool:
    """Whether an adapter configuration describes it."""
    return str((adapter or {}).get("peft_type", "")).upper() == "OSF"


def of_stage(adapter: dict[str, Any] | None, index: int, count: int) -> dict[str, Any] | None:
    """The adapter configuration of stage ``index`` of ``count``.

    An OSF without a rank of its own freezes more in every stage; PEFT wants one direction at least.
    """
    if adapter is None or not is_osf(adapter) or "effective_rank" in adapter:
        return adapter
    return {**adapter, "effective_rank": (index - 1) / count if index > 1 else 1}


class MergedModel:
    """What an OSF adapter leaves behind: the model with changed weights, and no adapter."""

    def undo(self, model: Any, name: str) -> Any:
        """The model with what was trained in its own weights, all of which may be trained again."""
        merged = model.merge_and_unload()
        return merged.requires_grad_(True)


def refuse_sharded_osf() -> ConfigError:
    """The error for it where the processes hold shards of the weights."""
    return ConfigError("adapter.peft_type: OSF splits whole weights, and DeepSpeed and FSDP hold shards; use DDP")
