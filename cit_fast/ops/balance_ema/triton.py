"""The Triton backend of the balance-weight EMA: tables for, and launches of, the kernels in kernels/balance_ema.py.

The kernels are compiled for sm_80 and sm_90 and interpreted on the CPU in the tests, but have not run on a GPU yet, so
they serve only where the backend is forced.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cit_fast.errors import BackendError
from cit_fast.ops.backends import Backend, register
from cit_fast.ops.balance_ema.native import DTYPES, RULES, empty_weights
from cit_fast.ops.balance_ema.reference import BalanceWeights, row_count

# As in kernels/elements.py, which can be imported only where triton is installed.
_MIXED, _ABSENT = 3, 4
_GROUP = 8

_LOG_GROUPS = 7
_TILE = _GROUP << _LOG_GROUPS
_CHUNK = 16 * _TILE
_LOG_ROWS = 10  # of a program of weights_kernel
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_CACHED = 16


@register("balance_norms_", Backend.TRITON, only_when_forced=True)
def _triton_balance_norms(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    granularity: str,
    store_grads: bool,
) -> Tensor:
    with _device_of(params):
        call = _Call([params, averages, grads, previous_grads, [], []], granularity)
        return call.weights(call.sweep(store_grads), None, 0.0, 0.0, None).norms


@register("balance_ema_", Backend.TRITON, only_when_forced=True)
def _triton_balance_ema(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    rule: str,
    decay: float,
    fallback: float,
    granularity: str,
    store_grads: bool,
    seed: int,
) -> BalanceWeights:
    with _device_of(params):
        call = _Call([params, averages, grads, previous_grads, [], []], granularity)
        weights = call.weights(call.sweep(store_grads), rule, decay, fallback, None)
        call.apply(weights.alphas, seed)
    return weights


@register("adamw_balance_ema_", Backend.TRITON, only_when_forced=True)
def _triton_adamw_balance_ema(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    previous_grads: list[Tensor],
    alphas: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rule: str,
    decay: float,
    fallback: float,
    granularity: str,
    store_grads: bool,
    seed: int,
) -> BalanceWeights:
    adamw = _AdamW(
        beta1_rest=1 - beta1,
        beta2=beta2,
        beta2_rest=1 - beta2,
        decayed=1 - lr * weight_decay,
        step_size=lr / (1 - beta1**step),
        root_scale=1 / math.sqrt(1 - beta2**step),
        eps=eps,
    )
    with _device_of(params):
        call = _Call([params, averages, grads, previous_grads, exp_avgs, exp_avg_sqs], granularity)
        return call.weights(call.sweep(store_grads, adamw, alphas, seed), rule, decay, fallback, alphas)


@register("flush_balance_ema_", Backend.TRITON, only_when_forced=True)
def _triton_flush_balance_ema(
    params: list[Tensor], averages: list[Tensor], alphas: Tensor, granularity: str, seed: int
) -> None:
    with _device_of(params):
        _Call([params, averages, [], [], [], []], granularity).apply(alphas, seed)


@dataclass(frozen=True)
class _AdamW:
    """What :func:`sweep_kernel` takes of AdamW; computed in float64, rounded to float32 at the launch."""

    beta1_rest: float = 0.0
    beta2: float = 0.0
    beta2_rest: float = 0.0
    decayed: float = 0.0
    step_size: float = 0.0
    root_scale: float = 0.0
    eps: float = 0.0


class _Call:
    """The tables of one list of tensors on the device, and the launches that read them."""

    def __init__(self, streams: list[list[Tensor]], granularity: str) -> None:
        """``streams`` in the order of the columns; an empty list is a stream that is not there."""
        self.params, self.granularity = streams[0], granularity
        self.device = self.params[0].device
        shapes = tuple((row_count(param, granularity), param.numel()) for param in self.params)
        stream = _current_stream(self.device)
        self.layout = _layout(shapes, self.device, stream)
        self.streams = _streams(_stream_table(streams, shapes).tobytes(), self.device, stream)
        self.dtypes = tuple(_common_dtype(tensors) for tensors in streams)

    def sweep(
        self, store_grads: bool, adamw: _AdamW | None = None, alphas: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        """Launch sweep_kernel; returns the slots."""
        from cit_fast.kernels.balance_ema import sweep_kernel

        slots = torch.empty(self.layout.slots, 3, device=self.device)
        if len(self.layout.chunks):
            sweep_kernel[(len(self.layout.chunks),)](
                self.layout.shapes,
                self.streams,
                self.layout.chunks,
                slots,
                slots if alphas is None else alphas,
                _as_int32(seed),
                **vars(adamw or _AdamW()),
                DTYPES=self.dtypes,
                ADAMW=adamw is not None,
                STORE_GRADS=store_grads,
                **self._tiling(),
            )
        return slots

    def weights(
        self, slots: Tensor, rule: str | None, decay: float, fallback: float, alphas: Tensor | None
    ) -> BalanceWeights:
        """Launch weights_kernel, which writes to ``alphas`` where given; ``rule=None``: the norms and nothing else."""
        from cit_fast.kernels.balance_ema import weights_kernel

        weights = empty_weights(self.params, self.granularity)
        if alphas is not None:
            weights = weights._replace(alphas=alphas)
        if len(self.layout.groups):
            weights_kernel[(len(self.layout.groups),)](
                self.layout.groups,
                slots,
                weights.norms,
                weights.alphas,
                weights.fallbacks.view(torch.uint8),
                fallback if rule == "released" else 1 - decay,
                RULE=_ABSENT if rule is None else RULES[rule],
                LOG_TILE=_LOG_ROWS,
                **_OPTIONS,
            )
        return weights

    def apply(self, alphas: Tensor, seed: int) -> None:
        """Launch apply_kernel."""
        from cit_fast.kernels.balance_ema import apply_kernel

        if len(self.layout.chunks):
            apply_kernel[(len(self.layout.chunks),)](
                self.layout.shapes,
                self.streams,
                self.layout.chunks,
                alphas,
                _as_int32(seed),
                DTYPES=self.dtypes,
                **self._tiling(),
            )

    def _tiling(self) -> dict[str, Any]:
        return {"BY_ROW": self.granularity == "row", "LOG_GROUPS": _LOG_GROUPS, "CHUNK": _CHUNK, **_OPTIONS}


def _device_of(params: list[Tensor]) -> AbstractContextManager[Any]:
    device = params[0].device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _current_stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "the triton backend of the balance-weight EMA cannot be captured in a CUDA graph: its tables are copied "
            "from host memory that is gone when the graph runs"
        )
    return torch.cuda.current_stream(device).cuda_stream


def _as_int32(seed: int) -> int:
    """The same 32 bits; a value that would not fit makes Triton compile the kernel again for 64 bits."""
    return seed - (1 << 32) if seed >= 1 << 31 else seed


def _common_dtype(tensors: list[Tensor]) -> int:
    dtypes = {tensor.dtype for tensor in tensors}
    if not dtypes:
        return _ABSENT
    return DTYPES[dtypes.pop()] if len(dtypes) == 1 else _MIXED


# Tables. Cached on the device by what they are built from, so that a list that stays the same costs no copy. A copy is
# in order with its own stream only, which is why the stream is part of the key.


class _Layout(NamedTuple):
    """How a list of shapes is cut into chunks, rows and slots; the columns are in kernels/balance_ema.py."""

    shapes: Tensor
    chunks: Tensor
    groups: Tensor
    slots: int


@lru_cache(maxsize=_CACHED)
def _layout(shapes: tuple[tuple[int, int], ...], device: torch.device, stream: int) -> _Layout:
    """Cut tensors, each given as (rows, elements), into work."""
    columns = np.zeros((len(shapes), 8), np.int64)
    groups: list[np.ndarray] = []
    first_chunk = first_slot = first_row = 0
    for i, (rows, numel) in enumerate(shapes):
        row_size = numel // rows if rows else 0
        # A tensor of one row has the same tiles whatever the granularity.
        row_groups = -(-row_size // _GROUP)
        span_log = min(_LOG_GROUPS, max(row_groups - 1, 0).bit_length()) if rows > 1 else _LOG_GROUPS
        rows_per_tile = 1 << _LOG_GROUPS - span_log
        row_tiles = max(1, -(-row_size // _TILE))
        row_chunks = max(1, -(-row_size // _CHUNK))  # an empty row has one too: it must get its zeros from somewhere
        rows_per_chunk = rows_per_tile * max(1, _CHUNK // _TILE // row_tiles)
        columns[i] = (row_size, rows, span_log, rows_per_chunk, row_chunks, first_chunk, first_slot, first_row)
        group_rows = 1 << _LOG_ROWS if row_chunks == 1 else 1
        begins = np.arange(0, rows, group_rows)
        group = (first_row + begins, first_slot + begins * row_chunks, np.minimum(rows - begins, group_rows))
        groups.append(np.stack([*group, np.full_like(begins, row_chunks)], axis=1))
        first_chunk += -(-rows // rows_per_chunk) * row_chunks
        first_slot += rows * row_chunks
        first_row += rows
    counts = np.diff(np.append(columns[:, 5], first_chunk))
    chunks = np.repeat(np.arange(len(shapes), dtype=np.int32), counts)
    return _Layout(
        shapes=_to_device(columns, device),
        chunks=_to_device(chunks, device),
        groups=_to_device(np.concatenate(groups), device),
        slots=first_slot,
    )


def _stream_table(streams: list[list[Tensor]], shapes: tuple[tuple[int, int], ...]) -> np.ndarray:
    table = np.zeros((len(shapes), 8), np.int64)
    for column, tensors in enumerate(streams):
        if tensors:
            table[:, column] = [tensor.data_ptr() for tensor in tensors]
            table[:, 6] |= np.array([DTYPES[tensor.dtype] for tensor in tensors]) << 4 * column
    aligned = (table[:, :6] % 16 == 0).all(axis=1)
    aligned &= [rows <= 1 or numel // rows % _GROUP == 0 for rows, numel in shapes]
    table[:, 6] |= aligned.astype(np.int64) << 24
    return table


@lru_cache(maxsize=_CACHED)
def _streams(table: bytes, device: torch.device, stream: int) -> Tensor:
    return _to_device(np.frombuffer(table, np.int64).reshape(-1, 8).copy(), device)


def _to_device(table: np.ndarray, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.from_numpy(table)
    # Pinned, so that the copy waits for nothing; torch keeps both sides alive until the stream is done with them.
    return torch.from_numpy(table).pin_memory().to(device, non_blocking=True)
