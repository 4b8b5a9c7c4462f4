"""One case in a process of its own: it may run, or refuse in one line; a traceback, a hang or a crash is a fault."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cit_fast.errors import CitFastError

SECONDS = 60.0


@dataclass
class Outcome:
    """``kind`` is ran, refused, traceback, hang, crash or silent (another result without a word)."""

    kind: str
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.kind in ("ran", "refused")


def in_a_process(work: Callable[[], str | None], seconds: float = SECONDS) -> Outcome:
    """Do ``work`` in a fork, in an empty working directory; what it returns is a fault in words, or ``None``."""
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    child = os.fork()
    if child == 0:
        os.chdir(scratch)
        with (scratch / "output").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            outcome = _attempt(work)
            (scratch / "outcome.json").write_text(json.dumps(vars(outcome)))
            os._exit(0)
    deadline = time.monotonic() + seconds
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Outcome("hang", f"longer than {seconds:.0f} s")
            time.sleep(0.01)
        with contextlib.suppress(OSError, ValueError):
            return Outcome(**json.loads((scratch / "outcome.json").read_text()))
        return Outcome("crash", f"exit status {status}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _attempt(work: Callable[[], str | None]) -> Outcome:
    try:
        problem = work()
    except CitFastError as error:
        text = str(error)
        return Outcome("traceback", f"an error of several lines: {text}") if "\n" in text else Outcome("refused", text)
    except BaseException:  # noqa: BLE001  # whatever it is, it is a fault
        return Outcome("traceback", traceback.format_exc())
    return Outcome("ran") if problem is None else Outcome("silent", problem)


def run(name: str, make: Callable[[random.Random], tuple[str, Callable[[], str | None]]], cases: Any, seed: int) -> int:
    """Try cases until they are through; print each fault with what makes it again. Returns how many there were."""
    counts: Counter[str] = Counter()
    faults = 0
    for number in cases:
        description, work = make(random.Random(f"{name}/{seed}/{number}"))  # a case, not a secret
        outcome = in_a_process(work)
        counts[outcome.kind] += 1
        if not outcome.good:
            faults += 1
            print(
                f"--- {name}, seed {seed}, case {number}: {outcome.kind}\n{description}\n{outcome.detail}\n", flush=True
            )
    print(f"{name}: {sum(counts.values())} cases, {dict(counts)}", file=sys.stderr, flush=True)
    return faults


def numbers(cases: int, minutes: float | None) -> Any:
    """0, 1, ... for so many cases, or for as long as it is told."""
    started = time.monotonic()
    number = 0
    while number < cases if minutes is None else time.monotonic() - started < 60 * minutes:
        yield number
        number += 1
