"""Tables in device memory from which the kernels of the balance-weight EMA take addresses, dtypes and shapes.

Cached on the device by what they are built from, so that a list that stays the same costs no copy. A copy is in order
with its own stream only, which is why the stream is part of the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from cit_fast.kernels.elements import ABSENT, GROUP, MIXED
from torch import Tensor

from cit_fast.errors import BackendError
from cit_fast.ops.balance_ema.native import DTYPES

# Columns of `sizes` [tensors, 2], int64.
SIZE = tl.constexpr(0)  # elements
FIRST_CHUNK = tl.constexpr(1)  # an empty tensor has one too: it must get its zeros from somewhere

# Columns of `streams` [tensors, 8], int64: six addresses, 0 where there is none, then the codes: four bits of dtype for
# each, and one that says that all streams start at a multiple of 16 bytes.
PARAM = tl.constexpr(0)
AVERAGE = tl.constexpr(1)
GRAD = tl.constexpr(2)
PREVIOUS_GRAD = tl.constexpr(3)
EXP_AVG = tl.constexpr(4)
EXP_AVG_SQ = tl.constexpr(5)
CODES = tl.constexpr(6)
ALIGNED_BIT = tl.constexpr(24)

LOG_GROUPS = 7
CHUNK = 16 * (GROUP.value << LOG_GROUPS)
_CACHED = 16


def common_dtype(tensors: Sequence[Tensor]) -> int:
    """The code of the dtype of all of them; ``ABSENT`` of none, ``MIXED`` of several dtypes."""
    dtypes = {tensor.dtype for tensor in tensors}
    if not dtypes:
        return ABSENT.value
    return DTYPES[dtypes.pop()] if len(dtypes) == 1 else MIXED.value


def current_stream(device: torch.device) -> int:
    """Which stream reads the tables.

    Raises:
        BackendError: it is being captured in a CUDA graph.
    """
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "the triton backend of the balance-weight EMA cannot be captured in a CUDA graph: its tables are copied "
            "from host memory that is gone when the graph runs"
        )
    return torch.cuda.current_stream(device).cuda_stream


class Layout(NamedTuple):
    """How a list of tensors is cut into chunks."""

    sizes: Tensor
    """[tensors, 2]; the columns are :data:`SIZE` and :data:`FIRST_CHUNK`."""
    chunks: Tensor
    """[chunks]: the tensor of each."""


@lru_cache(maxsize=_CACHED)
def layout(numels: tuple[int, ...], device: torch.device, stream: int) -> Layout:
    """Of tensors with so many elements each."""
    counts = np.array([max(1, -(-numel // CHUNK)) for numel in numels])
    sizes = np.stack([np.array(numels, np.int64), np.cumsum(counts) - counts], axis=1)
    chunks = np.repeat(np.arange(len(numels), dtype=np.int32), counts)
    return Layout(_to_device(sizes, device), _to_device(chunks, device))


def stream_table(streams: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """[tensors, 8]: addresses and codes; an empty list is a stream that is not there."""
    table = np.zeros((len(streams[0]), 8), np.int64)
    for column, tensors in enumerate(streams):
        if tensors:
            table[:, column] = [tensor.data_ptr() for tensor in tensors]
            table[:, CODES.value] |= np.array([DTYPES[tensor.dtype] for tensor in tensors]) << 4 * column
    aligned = (table[:, : CODES.value] % 16 == 0).all(axis=1)
    table[:, CODES.value] |= aligned.astype(np.int64) << ALIGNED_BIT.value
    return table


@lru_cache(maxsize=_CACHED)
def table_on(table: bytes, device: torch.device, stream: int) -> Tensor:
    """The bytes of a :func:`stream_table` on a device."""
    return _to_device(np.frombuffer(table, np.int64).reshape(-1, 8).copy(), device)


def _to_device(table: np.ndarray, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.from_numpy(table)
    # Pinned, so that the copy waits for nothing; torch keeps both sides alive until the stream is done with them.
    return torch.from_numpy(table).pin_memory().to(device, non_blocking=True)
