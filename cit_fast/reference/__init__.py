"""Every op in plain PyTorch, float64-capable: the definitions that the fast backends are tested against."""

from __future__ import annotations

from cit_fast.reference.balance_ema import adamw_balance_ema_, balance_ema_, balance_norms_, flush_balance_ema_
from cit_fast.reference.information_gain import (
    key_part_information_gain,
    linear_cross_entropy,
    masked_jsd,
    token_gain,
    token_gain_statistics,
)
from cit_fast.reference.wasserstein import wasserstein_matrix

__all__ = [
    "adamw_balance_ema_",
    "balance_ema_",
    "balance_norms_",
    "flush_balance_ema_",
    "key_part_information_gain",
    "linear_cross_entropy",
    "masked_jsd",
    "token_gain",
    "token_gain_statistics",
    "wasserstein_matrix",
]
