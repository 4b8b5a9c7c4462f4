"""Work shared by the processes of a distributed run; with one process, plain calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def rank_and_count() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def shared_out(items: Sequence[_Item], work: Callable[[Sequence[_Item]], Sequence[_Found]]) -> list[_Found]:
    """What ``work`` finds for the items, each process doing its part; the same list on all of them.

    Args:
        items: the same on all processes; process r of n takes items r, r + n, ...
        work: gives any number of plain results for some items, maybe none; not called without items.
    """
    rank, count = rank_and_count()
    mine = items[rank::count]
    found = list(work(mine)) if mine else []
    if count == 1:
        return found
    gathered: list[list[_Found]] = [[] for _ in range(count)]
    torch.distributed.all_gather_object(gathered, found)
    return [one for part in gathered for one in part]


def decided_by_first(value: Callable[[], _Found]) -> _Found:
    """``value()`` of the first process, on all of them: where others might find something else by rounding."""
    rank, count = rank_and_count()
    if count == 1:
        return value()
    box = [value() if rank == 0 else None]
    torch.distributed.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def wait_for_all() -> None:
    """Until every process is here."""
    if rank_and_count()[1] > 1:
        torch.distributed.barrier()
