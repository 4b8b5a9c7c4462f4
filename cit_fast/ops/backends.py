"""Which implementation of an op runs: the registry, the order of preference and the switch that forces one.

An op has up to four implementations. :func:`resolve` picks one by the device of the tensors: ``cuda`` then
``triton`` then ``reference`` for CUDA tensors, ``native`` then ``reference`` for CPU tensors. ``with
cit_fast.backend("reference"):`` or the environment variable ``CIT_FAST_BACKEND`` forces one; a forced backend that
cannot serve raises :class:`~cit_fast.errors.BackendError` instead of falling through.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch

from cit_fast.errors import BackendError

ENVIRONMENT_VARIABLE = "CIT_FAST_BACKEND"

Implementation = TypeVar("Implementation", bound=Callable[..., Any])


class Backend(str, Enum):
    """The kinds of implementation an op can have."""

    REFERENCE = "reference"
    NATIVE = "native"
    TRITON = "triton"
    CUDA = "cuda"


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, and one line that says why or why not."""

    available: bool
    reason: str


PREFERENCE: dict[str, tuple[Backend, ...]] = {
    "cuda": (Backend.CUDA, Backend.TRITON, Backend.REFERENCE),
    "cpu": (Backend.NATIVE, Backend.REFERENCE),
}
"""Device type -> backends in the order they are tried. Any other device type is served by the reference alone."""

_implementations: dict[str, dict[Backend, Callable[..., Any] | str]] = {}
_only_when_forced: set[tuple[str, Backend]] = set()
_forced: ContextVar[Backend | None] = ContextVar("cit_fast_backend", default=None)


def available_backends() -> dict[str, BackendStatus]:
    """Say for each backend, by name, whether it can run on this machine and why.

    >>> available_backends()["reference"].available
    True
    """
    return {each.value: _status(each) for each in Backend}


@contextmanager
def backend(name: str | Backend) -> Iterator[None]:
    """Force one backend for every op called inside the ``with`` block, in this thread or task only.

    Args:
        name: ``"reference"``, ``"native"``, ``"triton"`` or ``"cuda"``. Blocks nest; the innermost wins, and any of
            them wins over the environment variable ``CIT_FAST_BACKEND``.

    Raises:
        BackendError: ``name`` is not a backend, or that backend is not available on this machine.
    """
    chosen = _parse(name, "cit_fast.backend()")
    status = _status(chosen)
    if not status.available:
        raise BackendError(
            f"backend {chosen.value!r} is not available: {status.reason}; available: {_available_names()}"
        )
    token = _forced.set(chosen)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> Backend | None:
    """The backend forced by the innermost ``with backend(...)`` or by ``CIT_FAST_BACKEND``; None when none is."""
    forced = _forced.get()
    if forced is None and (value := os.environ.get(ENVIRONMENT_VARIABLE)):
        return _parse(value, f"environment variable {ENVIRONMENT_VARIABLE}")
    return forced


def register(
    op: str, backend: Backend, *, only_when_forced: bool = False
) -> Callable[[Implementation], Implementation]:
    """Register the decorated function as the implementation of ``op`` by ``backend``.

    Args:
        op: Name of the public op, for example ``"wasserstein_matrix"``.
        backend: The backend it belongs to.
        only_when_forced: Keep it out of the automatic choice, for an implementation not yet proven on real hardware.
    """

    def decorate(implementation: Implementation) -> Implementation:
        _implementations.setdefault(op, {})[backend] = implementation
        if only_when_forced:
            _only_when_forced.add((op, backend))
        return implementation

    return decorate


def register_lazily(op: str, backend: Backend, address: str, *, only_when_forced: bool = False) -> None:
    """Register an implementation by its address, ``"package.module:function"``, which is imported when it is chosen.

    So nobody imports triton who does not run its kernels. The other arguments are those of :func:`register`.
    """
    _implementations.setdefault(op, {})[backend] = address
    if only_when_forced:
        _only_when_forced.add((op, backend))


def resolve(op: str, device: torch.device, *, cannot: Mapping[Backend, str] | None = None) -> Callable[..., Any]:
    """Return the implementation of ``op`` to run for tensors on ``device``.

    Args:
        op: Name of the public op, as given to :func:`register`.
        device: Where the tensors are.
        cannot: Backends that cannot serve these very arguments, each with the reason (``"it takes no float64"``).

    Raises:
        BackendError: No implementation serves the device, or the forced backend does not serve this op or device.
    """
    order = _order(device)
    implementations = _implementations.get(op, {})
    cannot = cannot or {}
    usable = [each for each in order if each in implementations and each not in cannot and _status(each).available]
    forced = forced_backend()
    if forced is not None:
        if forced in usable:
            return _load(op, forced)
        raise BackendError(_cannot_serve(op, forced, device, cannot.get(forced), usable))
    for candidate in usable:
        if (op, candidate) not in _only_when_forced:
            return _load(op, candidate)
    raise BackendError(f"op {op!r} has no backend for device {device.type!r}")


def _load(op: str, which: Backend) -> Callable[..., Any]:
    implementation = _implementations[op][which]
    if isinstance(implementation, str):
        module, _, name = implementation.partition(":")
        implementation = _implementations[op][which] = getattr(importlib.import_module(module), name)
    return cast("Callable[..., Any]", implementation)


def _cannot_serve(op: str, forced: Backend, device: torch.device, reason: str | None, usable: list[Backend]) -> str:
    if not _status(forced).available:
        why = _status(forced).reason
    elif forced not in _order(device):
        why = f"it does not run on {device.type} tensors"
    else:
        why = reason or f"it has no implementation of {op!r}"
    serving = ", ".join(each.value for each in usable) or "none"
    return (
        f"backend {forced.value!r} cannot serve op {op!r} on device {device.type!r}: {why}; "
        f"backends that would serve: {serving}"
    )


def _order(device: torch.device) -> tuple[Backend, ...]:
    order = PREFERENCE.get(device.type, (Backend.REFERENCE,))
    if not _triton_interprets():
        return order
    # The interpreter reads addresses as the CPU sees them. Last, and registered as only_when_forced: for tests.
    return (*order, Backend.TRITON) if device.type == "cpu" else tuple(x for x in order if x is not Backend.TRITON)


def _parse(name: str | Backend, where: str) -> Backend:
    try:
        return Backend(name)
    except ValueError:
        accepted = ", ".join(each.value for each in Backend)
        raise BackendError(f"{where}: unknown backend {name!r}; accepted: {accepted}") from None


def _available_names() -> str:
    return ", ".join(each.value for each in Backend if _status(each).available)


def _status(which: Backend) -> BackendStatus:
    if which is Backend.REFERENCE:
        return BackendStatus(True, f"PyTorch {torch.__version__}, any device")
    if which is Backend.NATIVE:
        return _native_status()
    if which is Backend.TRITON:
        return _triton_status()
    return _cuda_status()


@cache
def _import_error(module: str) -> str | None:
    """None when ``module`` can be imported, else one line that says why not; tried once per process."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return " ".join(str(error).split())
    return None


def _native_status() -> BackendStatus:
    problem = _import_error("cit_fast._native")
    if problem is not None:
        return BackendStatus(False, f"cit_fast._native is not built: {problem}")
    from cit_fast import _native

    try:
        simd = _native.simd_name()
    except ValueError as error:  # CIT_FAST_SIMD names a level that is unknown or not there
        return BackendStatus(False, str(error))
    return BackendStatus(True, f"{simd}, {torch.get_num_threads()} threads")


def _triton_status() -> BackendStatus:
    if find_spec("triton") is None:
        return BackendStatus(False, "triton is not installed")
    if _triton_interprets():
        return BackendStatus(True, "interpreter, CPU tensors, only when forced: TRITON_INTERPRET is set")
    if not torch.cuda.is_available():
        return BackendStatus(False, "no CUDA device")
    never = "its kernels never ran on a GPU yet: used for key-part information gain, else only when forced"
    return BackendStatus(True, f"{torch.cuda.get_device_name()}; {never}")


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _cuda_status() -> BackendStatus:
    if find_spec("cit_fast._native_cuda") is None:
        return BackendStatus(False, "not built: this installation has no CUDA kernels")
    problem = _import_error("cit_fast._native_cuda")
    if problem is not None:
        return BackendStatus(False, f"cit_fast._native_cuda cannot be loaded: {problem}")
    from cit_fast import _native_cuda

    built = f"built for {_native_cuda.architectures()}; never run on a GPU yet: used only when forced"
    if not torch.cuda.is_available():
        return BackendStatus(False, f"no CUDA device ({built})")
    name = torch.cuda.get_device_name()
    if problem := _native_cuda.why_not(torch.cuda.current_device()):
        return BackendStatus(False, f"{name}: {problem} ({built})")
    return BackendStatus(True, f"{name}, {built}")
