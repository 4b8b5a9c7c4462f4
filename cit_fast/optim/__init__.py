"""Optimizers that keep an average of the parameters which forgets less than the parameters themselves."""

from __future__ import annotations

from cit_fast.optim.balance_ema import BalanceEMA, BalanceSummary

__all__ = ["BalanceEMA", "BalanceSummary"]
