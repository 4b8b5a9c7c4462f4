"""A GPU that is not there: Triton compiles kernels for it as for any, and they run on the host (ptx_machine.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
import triton
from cit_fast.kernels import balance_ema
from ptx_machine import Kernel, Memory
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from cit_fast.ops import backends

ARCHITECTURE = 80
SHARED = 163 << 10


class Launcher:
    """Runs the kernel of one compilation."""

    def __init__(self, compiled: CompiledKernel) -> None:
        signature, metadata = compiled.src.signature, compiled.metadata
        assert metadata.shared <= SHARED
        self.arguments = [k for k, kind in enumerate(signature.values()) if kind != "constexpr"]
        self.kernel = Kernel(compiled.asm["ptx"], 32 * metadata.num_warps, metadata.shared)

    def __call__(self, x: int, y: int, z: int, stream: int, function: None, *rest: Any) -> None:
        _packed, _metadata, _enter, _exit, *given = rest
        arguments = [given[k] for k in self.arguments]
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        numbers = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        self.kernel.launch((x, y, z), numbers, Memory("memory", parts([*tensors, *Driver.others])))


def parts(tensors: list[Tensor]) -> list[tuple[int, Any]]:
    """The memory of tensors, each storage once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    as_bytes = {at: torch.empty(0, dtype=torch.uint8).set_(each) for at, each in storages.items() if at}
    return [(at, each.numpy()) for at, each in as_bytes.items()]


class Driver:
    """Of one device, on which tensors of the CPU are."""

    others: ClassVar[list[Tensor]] = []
    """Tensors that kernels find by addresses in tables."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _loaded(compiled: CompiledKernel) -> None:
    compiled.module, compiled.function, compiled._run = 0, None, Launcher(compiled)


def on_the_host(patch: pytest.MonkeyPatch) -> None:
    """From here on kernels take tensors of the CPU."""
    triton.runtime.driver.set_active(Driver())
    patch.setattr(CompiledKernel, "_init_handles", _loaded)
    patch.setattr(backends, "triton_interprets", lambda: True)
    table = balance_ema.stream_table

    def seen(streams: Sequence[Sequence[Tensor]]) -> Any:
        Driver.others[:] = [each for stream in streams for each in stream]
        return table(streams)

    patch.setattr(balance_ema, "stream_table", seen)
