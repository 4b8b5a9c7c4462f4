"""Kernels prove themselves on the user's own GPU, at first use: what serves there, and why another does not.

Of each op and dtype a kernel is run on small hard inputs and compared with the reference in float64 (:mod:`.battery`),
twice, for the same bits; then it is timed beside what serves without it, on little and on much. It serves where it is
right and faster. The outcome is kept in the user's cache, by device, driver, versions and the kernels' sources, so a
machine is checked once. The check runs in a process of its own (:mod:`.trial`), because an illegal address would take
the process with it, and a kernel that hangs could not be ended.

``CIT_FAST_SELFCHECK=always`` checks in every process anew, ``off`` lets kernels serve unchecked, ``cuda`` before
``triton``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

import cit_fast
from cit_fast.cache import JsonCache, cache_folder
from cit_fast.errors import BackendError, RunError
from cit_fast.ops import backends
from cit_fast.ops.backends import KERNELS, Backend, Work
from cit_fast.ops.self_check import trial
from cit_fast.ops.self_check.battery import BATTERIES, FAMILIES, SIZES, dtype_name, family_of, size_of

__all__ = ["ENVIRONMENT_VARIABLE", "SIZES", "Verdict", "every_verdict", "proven", "verdicts"]

_log = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "CIT_FAST_SELFCHECK"
_SETTINGS = ("", "off", "always")

NEARLY = 1.1
"""A kernel that is slower than another by less than this factor serves where the order of preference has it first, for
times vary."""


class Verdict(NamedTuple):
    """What is known of one op of one kernel backend with one dtype on one kind of device."""

    problem: str | None
    """Why it may not serve; None: it is right."""
    postponed: bool
    """The problem is of the moment, such as a GPU without free memory: another process will check again."""
    seconds: Mapping[str, tuple[float, float]]
    """Of a call on ``little`` and, where there was memory for it, on ``much``: by the kernel, and by what serves
    without it, measured in turns."""

    def gain(self, size: str) -> float:
        """How many times faster than what serves without it; 1 where that could not be measured, 0 where it may not
        serve."""
        kernel, without = self.seconds.get(size) or self.seconds.get(SIZES[0], (1.0, 1.0))
        return 0.0 if self.problem is not None else without / kernel


_Key = tuple[str, str]  # op, dtype
_lock = threading.RLock()
_known: dict[tuple[str, Backend, torch.device], dict[_Key, Verdict]] = {}
_chosen: dict[tuple[Any, ...], list[Backend]] = {}


def proven(op: str, device: torch.device, usable: list[Backend], work: Work) -> list[Backend]:
    """The usable backends but those kernels that have not proved themselves here; the fastest kernel comes first.

    Args:
        op: Name of the public op.
        device: Where the tensors are.
        usable: What could serve, in the order of preference.
        work: What there is to do.
    """
    setting = _setting()
    if setting == "off":
        return list(usable)
    others = [each for each in usable if each not in KERNELS]
    if device.type not in CHECKED:
        return others
    size = size_of(op, work.elements)
    key = (op, device, work.dtype, size, *usable)
    if (known := _chosen.get(key)) is not None:
        return known
    family = family_of(op)
    kernels = [each for each in usable if each in KERNELS]
    unknown = any((family, each, device) not in _known for each in kernels)
    if unknown and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return others  # a check waits for the device, which a capture forbids
    gains = {
        each: verdicts(family, each, device).get((op, dtype_name(work.dtype)), _UNTRIED).gain(size) for each in kernels
    }
    best = max(gains.values(), default=0.0)
    fast = [each for each, gain in gains.items() if gain >= max(best / NEARLY, 1.0)]
    _chosen[key] = [*fast[:1], *others]
    return _chosen[key]


CHECKED = {"cuda"}
"""The types of device that kernels prove themselves on."""

_UNTRIED = Verdict("it is not checked with this dtype", False, {})


def verdicts(family: str, backend: Backend, device: torch.device) -> dict[_Key, Verdict]:
    """Of every op and dtype of a family of ops by one kernel backend on one device, checked now if never before.

    Args:
        family: ``"balance_ema"``, ``"information_gain"`` or ``"wasserstein"``.
    """
    place = (family, backend, device)
    with _lock:
        if place not in _known:
            _known[place] = _look_up(family, backend, device)
        return _known[place]


backends.prove_kernels_by(proven)


def every_verdict(device: torch.device) -> Iterator[tuple[str, str, Backend, Verdict]]:
    """Op, dtype, backend and what is known of it, of all that could run on a device; what never was is checked now."""
    for family in FAMILIES:
        there = {op: backends.serving(op, device) for op in BATTERIES[family].OPS}
        for backend in KERNELS:
            if any(backend in each for each in there.values()):
                for (op, dtype), verdict in verdicts(family, backend, device).items():
                    if backend in there[op]:
                        yield op, dtype, backend, verdict


def _look_up(family: str, backend: Backend, device: torch.device) -> dict[_Key, Verdict]:
    units = [(op, name) for op in BATTERIES[family].OPS for name in BATTERIES[family].DTYPES]
    kept, key = _cache(backend, device), f"{family} by {backend.value}"
    found = _read(kept.get(key))
    if _setting() == "always" or any(unit not in found for unit in units):
        with ExitStack() as stack:
            try:
                stack.enter_context(kept.locked())  # of several processes that need it, one checks
            except RunError as error:
                _log.info("the check of GPU kernels is not kept: %s", error)
            found = {} if _setting() == "always" else _read(kept.get(key))
            if missing := [unit for unit in units if unit not in found]:
                found |= _try(family, backend, device, missing)
                lasting = [_written(unit, verdict) for unit, verdict in found.items() if not verdict.postponed]
                try:
                    kept.put(key, {"verdicts": lasting})
                except RunError as error:
                    _log.info("the check of GPU kernels is not kept: %s", error)
    _tell(family, backend, device, found)
    return found


def _try(family: str, backend: Backend, device: torch.device, units: list[_Key]) -> dict[_Key, Verdict]:
    _log.warning("%s: checking the %s kernels of %s, once for this device", _name(device), backend.value, family)
    if device.type == "cuda":  # the check is another process, which needs memory and a device that is not at work
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return {unit: Verdict(*outcome) for unit, outcome in trial.outcomes(family, backend, device, units).items()}


def _tell(family: str, backend: Backend, device: torch.device, found: Mapping[_Key, Verdict]) -> None:
    problems: dict[str, list[str]] = {}
    for (op, dtype), verdict in found.items():
        if verdict.problem is not None:
            when = "not checked for now" if verdict.postponed else "refused on this device"
            problems.setdefault(f"{when}: {verdict.problem}", []).append(f"{op} ({dtype})")
    for problem, ops in problems.items():
        _log.warning(
            "%s: the %s kernels of %s are %s [%s]. Slower code serves, nothing is computed wrongly. `cit-fast doctor` "
            "shows more; please report it.",
            _name(device), backend.value, ", ".join(ops), problem, _identity(backend, device)["driver"],
        )  # fmt: skip


def _setting() -> str:
    value = os.environ.get(ENVIRONMENT_VARIABLE, "").lower()
    if value not in _SETTINGS:
        raise BackendError(
            f"environment variable {ENVIRONMENT_VARIABLE}: unknown value {value!r}; accepted: off, always"
        )
    return value


# What is kept


def _written(unit: _Key, verdict: Verdict) -> dict[str, Any]:
    op, dtype = unit
    return {"op": op, "dtype": dtype, "problem": verdict.problem, "seconds": dict(verdict.seconds)}


def _read(value: Mapping[str, Any] | None) -> dict[_Key, Verdict]:
    rows = [] if value is None else value["verdicts"]
    return {
        (row["op"], row["dtype"]): Verdict(
            row["problem"], False, {size: (kernel, without) for size, (kernel, without) in row["seconds"].items()}
        )
        for row in rows
    }


def _cache(backend: Backend, device: torch.device) -> JsonCache:
    try:
        folder = cache_folder() / "kernels"
    except RuntimeError:  # a user without a home
        folder = None
    return JsonCache(folder, _identity(backend, device))


def _identity(backend: Backend, device: torch.device) -> dict[str, Any]:
    """All that an outcome depends on."""
    versions = {
        "cit-fast": cit_fast.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": backends.version("triton") if backend is Backend.TRITON else None,
        "sources": _sources(),
    }
    if device.type != "cuda":
        return {"device": f"{device.type}, interpreted", "driver": None, **versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,  # of a MIG slice its profile
        "capability": [properties.major, properties.minor],
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": _driver(),
        **versions,
    }


@cache
def _sources() -> str:
    """A digest of the kernels, of what launches them and of what checks them."""
    digest = hashlib.blake2b(digest_size=16)
    files = list(Path(__file__).parents[1].rglob("*.py"))
    for folder in import_module("cit_fast.kernels").__path__:
        files += Path(folder).glob("*.py")
    built = find_spec("cit_fast._native_cuda")
    if built is not None and built.origin is not None:
        files.append(Path(built.origin))
    for path in sorted(files, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def _driver() -> str | None:
    """The version of the GPU's driver, as Linux tells it."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
