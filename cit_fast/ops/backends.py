"""Which implementation of an op runs: the registry, the order of preference and the switch that forces one.

An op has up to five implementations. :func:`resolve` picks one by the device of the tensors. For CPU tensors that is
``native``, else ``reference``. For CUDA tensors it is the faster of ``cuda`` and ``triton`` that has proved itself on
the device (``cit_fast.ops.self_check``), else ``torch``, else ``native`` where an op may go by way of the CPU, else
``reference``. ``with cit_fast.backend("reference"):`` or the environment variable ``CIT_FAST_BACKEND`` forces one; a
forced backend that cannot serve raises :class:`~cit_fast.errors.BackendError` instead of falling through.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
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
    TORCH = "torch"
    NATIVE = "native"
    TRITON = "triton"
    CUDA = "cuda"


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, and one line that says why or why not."""

    available: bool
    reason: str


PREFERENCE: dict[str, tuple[Backend, ...]] = {
    "cuda": (Backend.CUDA, Backend.TRITON, Backend.TORCH, Backend.NATIVE, Backend.REFERENCE),
    "cpu": (Backend.NATIVE, Backend.REFERENCE, Backend.TORCH),
}
"""Device type -> backends in the order they are tried. Any other has ``torch`` and the reference."""

KERNELS = (Backend.CUDA, Backend.TRITON)
"""What runs on a GPU only where it has proved itself there, or is forced."""


@dataclass(frozen=True)
class Work:
    """What a call has to do: a kernel proves itself for a dtype, and is timed on little and on much."""

    dtype: torch.dtype = torch.float32
    """Of the tensors; where they have several, the narrowest."""
    elements: int = 0
    """As the op's battery counts them."""


Proof = Callable[[str, torch.device, list[Backend], Work], list[Backend]]
"""Of op, device, usable backends and work: those that may serve, best first."""

_proofs: list[Proof] = []
_implementations: dict[str, dict[Backend, Callable[..., Any] | str]] = {}
_by_way_of_cpu: set[str] = set()
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


def register(op: str, backend: Backend, *, by_way_of_cpu: bool = False) -> Callable[[Implementation], Implementation]:
    """Register the decorated function as the implementation of ``op`` by ``backend``.

    Args:
        op: Name of the public op, for example ``"wasserstein_matrix"``.
        backend: The backend it belongs to.
        by_way_of_cpu: Of ``native``: it takes tensors of a GPU as well, and brings its results back there.
    """

    def decorate(implementation: Implementation) -> Implementation:
        _implementations.setdefault(op, {})[backend] = implementation
        if by_way_of_cpu:
            _by_way_of_cpu.add(op)
        return implementation

    return decorate


def register_lazily(op: str, backend: Backend, address: str) -> None:
    """Register an implementation by its address, ``"package.module:function"``, which is imported when it is chosen.

    So nobody imports triton who does not run its kernels. The other arguments are those of :func:`register`.
    """
    _implementations.setdefault(op, {})[backend] = address


def resolve(
    op: str,
    device: torch.device,
    *,
    cannot: Mapping[Backend, str] | None = None,
    work: Callable[[], Work] | None = None,
) -> Callable[..., Any]:
    """Return the implementation of ``op`` to run for tensors on ``device``.

    Args:
        op: Name of the public op, as given to :func:`register`.
        device: Where the tensors are.
        cannot: Backends that cannot serve these very arguments, each with the reason (``"it takes no float64"``).
        work: Says what there is to do, where that decides between kernels; without it, little in float32.

    Raises:
        BackendError: No implementation serves the device, or the forced backend does not serve this op or device.
    """
    cannot = cannot or {}
    usable = [each for each in serving(op, device) if each not in cannot]
    forced = forced_backend()
    if forced is not None:
        if forced in usable:
            return implementation(op, forced)
        raise BackendError(_cannot_serve(op, forced, device, cannot.get(forced), usable))
    if any(each in KERNELS for each in usable):
        without = [each for each in usable if each not in KERNELS]
        usable = _proofs[-1](op, device, usable, work() if work else Work()) if _proofs else without
    if not usable:
        raise BackendError(f"op {op!r} has no backend for device {device.type!r}")
    return implementation(op, usable[0])


def narrowest(dtypes: Collection[torch.dtype]) -> torch.dtype:
    """Of the dtypes that kernels take."""
    return next((each for each in (torch.bfloat16, torch.float16) if each in dtypes), torch.float32)


def prove_kernels_by(proof: Proof) -> None:
    """Ask ``proof`` which kernels may serve a GPU; before, none do."""
    _proofs.append(proof)


def serving(op: str, device: torch.device) -> list[Backend]:
    """The backends that have this op and run on this device, in the order they are tried."""
    there = _implementations.get(op, {})
    return [each for each in _order(op, device) if each in there and _status(each, device).available]


def implementation(op: str, which: Backend) -> Callable[..., Any]:
    """That of an op by a backend that has one."""
    found = _implementations[op][which]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = _implementations[op][which] = getattr(importlib.import_module(module), name)
    return cast("Callable[..., Any]", found)


def _cannot_serve(op: str, forced: Backend, device: torch.device, reason: str | None, usable: list[Backend]) -> str:
    if not _status(forced, device).available:
        why = _status(forced, device).reason
    elif forced not in _order(op, device):
        why = f"it does not run on {device.type} tensors"
    else:
        why = reason or f"it has no implementation of {op!r}"
    others = ", ".join(each.value for each in usable) or "none"
    return (
        f"backend {forced.value!r} cannot serve op {op!r} on device {device.type!r}: {why}; "
        f"backends that would serve: {others}"
    )


def _order(op: str, device: torch.device) -> list[Backend]:
    order = list(PREFERENCE.get(device.type, (Backend.TORCH, Backend.REFERENCE)))
    if device.type != "cpu" and op not in _by_way_of_cpu and Backend.NATIVE in order:
        order.remove(Backend.NATIVE)
    if triton_interprets():
        # The interpreter reads addresses as the CPU sees them.
        if device.type != "cpu":
            order = [each for each in order if each is not Backend.TRITON]
        elif Backend.TRITON not in order:
            order.append(Backend.TRITON)
    return order


def _parse(name: str | Backend, where: str) -> Backend:
    try:
        return Backend(name)
    except ValueError:
        accepted = ", ".join(each.value for each in Backend)
        raise BackendError(f"{where}: unknown backend {name!r}; accepted: {accepted}") from None


def _available_names() -> str:
    return ", ".join(each.value for each in Backend if _status(each).available)


def _status(which: Backend, device: torch.device | None = None) -> BackendStatus:
    """On a device; ``None``: on the current one."""
    if which in (Backend.REFERENCE, Backend.TORCH):
        return BackendStatus(True, f"PyTorch {torch.__version__}, any device")
    if which is Backend.NATIVE:
        return _native_status()
    if device is None or device.type != "cuda" or device.index is None:
        return _kernel_status(which, None)
    return _kept_kernel_status(which, device.index)


def _kernel_status(which: Backend, index: int | None) -> BackendStatus:
    return _triton_status(index) if which is Backend.TRITON else _cuda_status(index)


_kept_kernel_status = cache(_kernel_status)


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


_ONCE_VERIFIED = "checked at first use on each kind of device"


def _triton_status(index: int | None) -> BackendStatus:
    found = version("triton")
    if found is None:
        return BackendStatus(False, "triton is not installed")
    if triton_interprets():
        return BackendStatus(True, "interpreter, CPU tensors, only when forced: TRITON_INTERPRET is set")
    if not torch.cuda.is_available():
        return BackendStatus(False, "no CUDA device")
    name = torch.cuda.get_device_name(index)
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < LEAST_TRITON:
        return BackendStatus(False, f"triton {found} is too old; at least {'.'.join(map(str, LEAST_TRITON))}")
    if problem := _unfit(index):
        return BackendStatus(False, f"{name}: {problem}")
    return BackendStatus(True, f"{name}; {_ONCE_VERIFIED}")


LEAST_TRITON = (3, 6)
LEAST_CAPABILITY = (8, 0)
"""Of a GPU: what the kernels are compiled and laid out for."""


def _unfit(index: int | None) -> str | None:
    """Why no kernel of ours runs on this GPU."""
    if torch.version.hip is not None:
        return "the kernels were never tried on ROCm"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        needed = ".".join(map(str, LEAST_CAPABILITY))
        return f"its compute capability is {'.'.join(map(str, capability))}; the kernels need {needed}"
    return None


@cache
def version(package: str) -> str | None:
    """Of what is installed; asked once per process."""
    if find_spec(package) is None:
        return None
    for name in (package, f"pytorch-{package}"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def triton_interprets() -> bool:
    """Whether Triton's kernels are interpreted on the CPU, as ``TRITON_INTERPRET`` asks for."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _cuda_status(index: int | None) -> BackendStatus:
    if find_spec("cit_fast._native_cuda") is None:
        return BackendStatus(False, "not built: this installation has no CUDA kernels")
    problem = _import_error("cit_fast._native_cuda")
    if problem is not None:
        return BackendStatus(False, f"cit_fast._native_cuda cannot be loaded: {problem}")
    from cit_fast import _native_cuda

    built = f"built for {_native_cuda.architectures()}; {_ONCE_VERIFIED}"
    if not torch.cuda.is_available():
        return BackendStatus(False, f"no CUDA device ({built})")
    name = torch.cuda.get_device_name(index)
    problem = _unfit(index) or _native_cuda.why_not(torch.cuda.current_device() if index is None else index)
    if problem:
        return BackendStatus(False, f"{name}: {problem} ({built})")
    return BackendStatus(True, f"{name}, {built}")
