"""Work split over the processes of a distributed run; with one process, these are plain calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def rank_and_count() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def split_over_ranks(items: Sequence[_Item], work: Callable[[Sequence[_Item]], Sequence[_Found]]) -> list[_Found]:
    """Run ``work`` on this rank's share of the items and gather the results of all ranks.

    Args:
        items: the same on all ranks; rank r of n takes items r, r + n, ...
        work: gives any number of plain results for some items, maybe none; not called without items.

    Returns:
        The results of rank 0, then of rank 1, ...: the same list on all ranks.
    """
    rank, count = rank_and_count()
    mine = items[rank::count]
    found = list(work(mine)) if mine else []
    if count == 1:
        return found
    gathered: list[list[_Found]] = [[] for _ in range(count)]
    torch.distributed.all_gather_object(gathered, found)
    return [one for part in gathered for one in part]


def from_rank_zero(value: Callable[[], _Found]) -> _Found:
    """Broadcast ``value()`` of rank 0 to all ranks, where another rank might get another value by rounding."""
    rank, count = rank_and_count()
    if count == 1:
        return value()
    box = [value() if rank == 0 else None]
    torch.distributed.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def wait_for_all() -> None:
    """A barrier: return when every process has called this."""
    if rank_and_count()[1] > 1:
        torch.distributed.barrier()
