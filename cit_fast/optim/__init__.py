"""Optimizers that keep an average of the parameters which forgets less than the parameters themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cit_fast.optim.adamw import AdamWBalanceEMA
from cit_fast.optim.averaging import AveragingOptimizer
from cit_fast.optim.balance_ema import BalanceEMA, find_balance_ema
from cit_fast.optim.reporting import BalanceSummary

if TYPE_CHECKING:
    from cit_fast.optim.callback import BalanceEMACallback

__all__ = [
    "AdamWBalanceEMA",
    "AveragingOptimizer",
    "BalanceEMA",
    "BalanceEMACallback",
    "BalanceSummary",
    "find_balance_ema",
]


def __getattr__(name: str) -> Any:
    if name == "BalanceEMACallback":  # needs transformers, which takes seconds to import
        from cit_fast.optim.callback import BalanceEMACallback

        return BalanceEMACallback
    raise AttributeError(f"module 'cit_fast.optim' has no attribute {name!r}")
