"""Comparisons paired by seed: runs in processes that an interruption does not lose, and differences with intervals."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from traceback import format_exception
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.stats import bootstrap


def difference(ours: Sequence[float], theirs: Sequence[float], better: int) -> dict[str, float]:
    """Mean of the paired differences, its 95 % bootstrap interval, and the share of pairs in which ours is better.

    A tie counts half. Of one pair the interval is the difference itself.
    """
    pairs = np.asarray(ours) - np.asarray(theirs)
    low = high = float(pairs.mean())
    if len(pairs) > 1 and np.ptp(pairs) > 0:
        found = bootstrap((pairs,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
        low, high = map(float, found.confidence_interval)
    wins = float(np.mean((better * pairs > 0) + 0.5 * (pairs == 0)))
    return {"mean": float(pairs.mean()), "low": low, "high": high, "wins": wins}


def in_processes(run: Callable[..., None], jobs: Sequence[Any], workers: int, console: Console, *more: Any) -> None:
    """``run(job, *more)`` for every job, in processes of one thread each.

    A job that fails is printed and the others go on; whoever calls looks at what there is in the end.
    """
    if not jobs:
        return
    os.environ["TQDM_DISABLE"] = "1"  # read by the workers
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin) as pool:
        futures = {pool.submit(run, job, *more): job for job in jobs}
        for future in track(as_completed(futures), "runs", len(futures), console=console):
            if (error := future.exception()) is not None:
                console.print(f"{futures[future]}:", "".join(format_exception(error)), markup=False)


def _begin() -> None:
    import torch

    torch.set_num_threads(1)
