"""The CUDA backend of ``wasserstein_matrix``: teams for, and launches of, the kernels in csrc/cuda/wasserstein.cu.

The kernels are compiled for sm_80 and sm_90a and run on the host in the tests, but have not run on a GPU yet, so they
serve only where the backend is forced. ``method="exact"`` runs on the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from cit_fast.errors import BackendError
from cit_fast.ops.backends import Backend, register
from cit_fast.ops.wasserstein import device
from cit_fast.ops.wasserstein.device import Batch


@register("wasserstein_matrix", Backend.CUDA, only_when_forced=True)
def _wasserstein_matrix(
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    pairs: Tensor,
    metric: str,
    p: float,
    method: str,
    epsilon: float | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device(points.device) if points.device.type == "cuda" else nullcontext():
        return device.wasserstein_matrix(
            _solve, points, offsets, weights, pairs, metric, p, method, epsilon, tolerance, max_iterations
        )


def _solve(batch: Batch) -> Tensor:
    """The pairs of a batch, those whose teams are alike in one launch."""
    from cit_fast import _native_cuda

    where = batch.costs.device
    stream = torch.cuda.current_stream(where)
    sizes = [(n, m) for _, _, n, m, _, _ in batch.table.tolist()]
    teams = {size: _native_cuda.transport_team(*size, stream.device_index) for size in set(sizes)}
    alike: dict[tuple[int, int], list[int]] = {}
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index][0] * sizes[index][1]):
        blocks, shared_bytes, _ = teams[sizes[index]]
        alike.setdefault((blocks, shared_bytes), []).append(index)
    if (0, 0) in alike:
        most = max(sizes[index][1] for index in alike[0, 0])
        raise BackendError(
            f"wasserstein_matrix: the cuda backend has no room for {most} points in the second cloud of a pair; "
            f"use backend 'reference'"
        )
    resident = all(stays for _, _, stays in teams.values())
    kernels = batch.costs[:0] if resident else torch.empty_like(batch.costs)
    table, epsilons = batch.table.to(where), batch.epsilons.contiguous()
    results = torch.empty(len(sizes), 6, dtype=torch.float64, device=where)
    for (blocks, shared_bytes), members in alike.items():
        rows = max(-(-sizes[index][0] // blocks) for index in members)
        columns = max(sizes[index][1] for index in members)
        at_once = min(len(members), _native_cuda.transport_teams_at_once(blocks, shared_bytes, stream.device_index))
        scratch = results.new_empty(at_once * blocks * _native_cuda.transport_scratch(rows, columns))
        order = torch.tensor(members, dtype=torch.int32, device=where)
        following = torch.zeros(1, dtype=torch.int32, device=where)
        _native_cuda.transport(
            table=table.data_ptr(),
            order=order.data_ptr(),
            count=len(members),
            next=following.data_ptr(),
            costs=batch.costs.data_ptr(),
            kernels=kernels.data_ptr(),
            weights=batch.weights.data_ptr(),
            epsilons=epsilons.data_ptr(),
            results=results.data_ptr(),
            scratch=scratch.data_ptr(),
            rows=rows,
            columns=columns,
            shared_bytes=shared_bytes,
            tolerance=batch.tolerance,
            max_iterations=batch.max_iterations,
            blocks=blocks,
            teams=at_once,
            device=stream.device_index,
            stream=stream.cuda_stream,
        )
    return results
