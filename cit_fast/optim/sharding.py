"""Parameters that are shards (DTensor: FSDP2, tensor parallelism): the local part, and norms summed over the mesh.

The ops work on the part of a tensor that a process holds. Averages and moments are DTensors with the placement of
their parameter, so that distributed checkpoints reshard them like the parameter itself. Where a weight's tensor (or
row) is spread over several processes, its three norms are the sums of those of the parts: 24 bytes for each weight
and step, in one all-reduce for each mesh dimension that shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Reduction(NamedTuple):
    """The process groups over which the norms of a tensor are summed, one for each mesh dimension that shards it."""

    mesh: Any
    dims: tuple[int, ...]

    def sum_norms(self, norms: Sequence[Tensor]) -> list[Tensor]:
        """The norms [tensors, 3] of several calls, each summed over the processes, in one all-reduce a dimension."""
        import torch.distributed as dist

        together = torch.cat(list(norms))
        for dim in self.dims:
            dist.all_reduce(together, group=self.mesh.get_group(dim))
        return list(torch.split(together, [len(each) for each in norms]))


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return type(tensor) not in (Tensor, Parameter) and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, sharing its memory; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def local_gradient(param: Tensor) -> Tensor:
    """The part of ``param.grad`` that belongs to :func:`local` of the parameter."""
    grad = param.grad
    assert grad is not None  # noqa: S101 - callers pass parameters with gradients
    if not is_sharded(grad):
        return grad
    if grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(grad)


def reduction(param: Tensor) -> Reduction | None:
    """Over which processes the norms of ``param`` are to be summed; None where this one holds all of them."""
    if not is_sharded(param):
        return None
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    dims = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(i) > 1)
    return Reduction(mesh, dims) if dims else None


def reshard(model: torch.nn.Module | None) -> None:
    """Free the gathered parameters of an FSDP2 model, so that its next forward gathers what the shards hold then."""
    for module in () if model is None else model.modules():
        if hasattr(module, "unshard"):  # an FSDPModule
            module.reshard()  # type: ignore[operator]
