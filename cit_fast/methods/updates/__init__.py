"""Updates: what happens to the weights at each optimizer step, and at the end of a stage."""

from cit_fast.methods.updates.balance_ema import BalanceEMAUpdate, stream_wide
from cit_fast.methods.updates.merge import MergeUpdate
from cit_fast.methods.updates.update import PlainUpdate, Update, When

__all__ = ["BalanceEMAUpdate", "MergeUpdate", "PlainUpdate", "Update", "When", "stream_wide"]
