"""Runs that are killed (-9) at a chosen moment, each in a forked child."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any


def die(*_args: object, **_kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, owner: Any, name: str) -> Callable[[], None]:
    """What makes the ``number``-th call of ``owner.name`` the last act of the process that calls it."""

    def arm() -> None:
        original, calls = getattr(owner, name), []

        def counted(*args, **kwargs):
            calls.append(1)
            return die() if len(calls) == number else original(*args, **kwargs)

        setattr(owner, name, counted)

    return arm


def killed(work: Callable[[], object], arm: Callable[[], None]) -> bool:
    """Whether ``work``, in a child that ``arm`` was called in first, ended by SIGKILL. The parent stays as it is."""
    child = os.fork()
    if child == 0:
        try:
            arm()
            work()
        except BaseException:  # noqa: BLE001  # a child must never return into pytest
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
