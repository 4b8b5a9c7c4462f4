"""Memory given back between stages, so that a long run needs no more of it than its largest stage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator

import torch


def release_memory() -> None:
    """Collect what only refers to itself (trainers do), and give freed memory back to the system.

    The C library keeps what is freed for its next allocations; where those have other sizes, as in the next stage or
    method, it takes new memory instead: a run of three methods grew to twice what it needed.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if _TRIM is not None:
        _TRIM(0)


def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; other C libraries have none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return trim


_TRIM = _malloc_trim()


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Inside, collections leave out what is there now: modules, a million objects that every stage would look through.

    What the caller has made before, and lets go of inside, is given back afterwards.
    """
    if gc.get_freeze_count():  # the caller has done so already
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
