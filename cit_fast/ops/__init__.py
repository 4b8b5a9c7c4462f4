"""Fused operations on plain tensors: checks, documentation, autograd and the choice of a backend."""

from __future__ import annotations

from cit_fast.ops import self_check  # noqa: F401 - kernels prove themselves by it
from cit_fast.ops.balance_ema import (
    BALANCE_RULES,
    BalanceRule,
    BalanceWeights,
    adamw_balance_ema_,
    balance_ema_,
    balance_norms_,
    balance_weights,
    flush_balance_ema_,
)
from cit_fast.ops.balance_ema.cuda import adamw_balance_ema_capturable_
from cit_fast.ops.information_gain import (
    TokenGain,
    key_part_information_gain,
    linear_cross_entropy,
    linear_kl_divergence,
    masked_jsd,
    token_gain,
    token_gain_from_statistics,
    token_gain_statistics,
)
from cit_fast.ops.lora import lora_linear, lora_linears
from cit_fast.ops.rms_norm import rms_norm
from cit_fast.ops.wasserstein import Wasserstein, wasserstein_matrix

__all__ = [
    "BALANCE_RULES",
    "BalanceRule",
    "BalanceWeights",
    "TokenGain",
    "Wasserstein",
    "adamw_balance_ema_",
    "adamw_balance_ema_capturable_",
    "balance_ema_",
    "balance_norms_",
    "balance_weights",
    "flush_balance_ema_",
    "key_part_information_gain",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "lora_linear",
    "lora_linears",
    "masked_jsd",
    "rms_norm",
    "token_gain",
    "token_gain_from_statistics",
    "token_gain_statistics",
    "wasserstein_matrix",
]
