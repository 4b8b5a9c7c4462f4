"""The balance-weight EMA by PyTorch operations on tensors laid end to end (``torch``), for where no kernel serves.

The equations are those of :mod:`cit_fast.ops.balance_ema.reference`, on vectors of up to ``CHUNK`` elements that hold
many tensors: for 224 LoRA tensors some 100 launches a step of AdamW where the reference, one tensor after the other,
has thousands. Nothing waits for the device. State in bfloat16 is rounded by the bits that every other backend draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from cit_fast.errors import CitFastError
from cit_fast.ops.backends import Backend, register
from cit_fast.ops.balance_ema.reference import (
    AdamWLists,
    AdamWOptions,
    BalanceOptions,
    BalanceWeights,
    adamw_step,
    balance_weight,
    compute_dtype,
    moved_average,
    round_by_key,
    rounding_key,
)

CHUNK = 1 << 24
"""Elements worked on at a time: 64 MiB in float32, some ten times that with what is made of them, and as much again
where state in bfloat16 is rounded by chance."""


@register("balance_ema_", Backend.TORCH)
def balance_ema_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    remaining: Tensor | None,
    options: BalanceOptions,
) -> BalanceWeights:
    """See :func:`cit_fast.ops.balance_ema_`."""
    norms = balance_norms_(params, averages, grads, previous_grads, options.store_grads)
    alphas, fallbacks = balance_weight(norms, remaining, options)
    alphas = alphas.to(compute_dtype(averages[0]))
    flush_balance_ema_(params, averages, alphas, options.rounding, options.seed)
    return BalanceWeights(alphas, fallbacks, norms)


@register("balance_norms_", Backend.TORCH)
def balance_norms_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    store_grads: bool = True,
) -> Tensor:
    """See :func:`cit_fast.ops.balance_norms_`."""
    norms = torch.zeros(len(params), 3, dtype=torch.float64, device=params[0].device)
    for chunk in _chunks(averages, params, averages, grads, previous_grads):
        _add_norms(chunk, norms, store_grads, *chunk.read(0, 1, 2, 3))
    return norms


@register("flush_balance_ema_", Backend.TORCH)
def flush_balance_ema_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    alphas: Tensor,
    rounding: str = "stochastic",
    seed: int = 0,
) -> None:
    """See :func:`cit_fast.ops.flush_balance_ema_`."""
    by_chance = rounding != "nearest" and any(each.dtype == torch.bfloat16 for each in averages)
    _check_capture("flush_balance_ema_", params[0].device, by_chance=by_chance)
    for chunk in _chunks(averages, params, averages):
        p, e = chunk.read(0, 1)
        moved = moved_average(p, e, chunk.each(alphas))
        chunk.write(1, moved, seed=None if rounding == "nearest" else seed, stream=0)


@register("adamw_balance_ema_", Backend.TORCH)
def adamw_balance_ema_(
    lists: AdamWLists, alphas: Tensor, remaining: Tensor | None, adamw: AdamWOptions, options: BalanceOptions
) -> BalanceWeights:
    """See :func:`cit_fast.ops.adamw_balance_ema_`."""
    _check_capture("adamw_balance_ema_", alphas.device, steps=True)
    norms = torch.zeros(len(lists.params), 3, dtype=torch.float64, device=alphas.device)
    for chunk in _chunks(lists.exp_avgs, *lists.columns):
        p, e, g, previous, m, v = chunk.read(0, 1, 2, 3, 4, 5)
        moved = moved_average(p, e, chunk.each(alphas))
        chunk.write(1, moved, seed=None if options.rounding == "nearest" else options.seed, stream=0)
        new_p, new_m, new_v = adamw_step(p, g, m, v, adamw)
        chunk.write(0, new_p)
        chunk.write(4, new_m, seed=options.seed, stream=1)
        chunk.write(5, new_v, seed=options.seed, stream=2)
        p, e = chunk.read(0, 1)  # as they were rounded
        _add_norms(chunk, norms, options.store_grads, p, e, g, previous)
    weights, fallbacks = balance_weight(norms, remaining, options)
    alphas.copy_(weights)
    return BalanceWeights(alphas, fallbacks, norms)


def _check_capture(op: str, device: torch.device, *, steps: bool = False, by_chance: bool = False) -> None:
    """Raise CitFastError where a CUDA graph would freeze what must change from step to step."""
    if (steps or by_chance) and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        frozen = "the step count" if steps else "the random bits that round bfloat16 averages"
        raise CitFastError(
            f"{op}: a CUDA graph would freeze {frozen}; capture adamw_balance_ema_capturable_ instead (CUDA kernels), "
            "or nothing"
        )


def _add_norms(
    chunk: _Chunk, norms: Tensor, store_grads: bool, p: Tensor, e: Tensor, g: Tensor, previous: Tensor
) -> None:
    """Equation (1) of a chunk's tensors, added to ``norms`` [tensors, 3]; then ``g_prev <- g`` if ``store_grads``."""
    chunk.add_l1(norms[:, 0], p - e)
    chunk.add_l1(norms[:, 1], g)
    if chunk.lists[3]:
        chunk.add_l1(norms[:, 2], g - previous)
        if store_grads:
            torch._foreach_copy_(chunk.lists[3], chunk.lists[2])


class _Piece(NamedTuple):
    """A tensor in every list, or neighbouring elements of a long one."""

    tensor: int
    start: int
    views: list[Tensor]


class _Place(NamedTuple):
    """Where the elements of a chunk are from, on its device."""

    tensors: Tensor
    """[pieces] int64, of the whole list."""
    starts: Tensor
    """[pieces] int64: the first element of the tensor that is in the piece."""
    sizes: Tensor
    """[pieces] int64."""


class _Chunk:
    """Pieces that are worked on together: of one dtype in each list, and ``CHUNK`` elements at most where they can.

    ``lists`` has the views of each list, none of a list that is not there.
    """

    def __init__(self, pieces: list[_Piece], lists: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
        """``lists``: the whole ones; ``dtype``: what is computed in."""
        self.dtype = dtype
        columns = zip(*(piece.views for piece in pieces), strict=True)  # of the lists that are there
        self.lists = [list(next(columns)) if tensors else [] for tensors in lists]
        sizes = tuple(view.numel() for view in self.lists[0])
        self.elements = sum(sizes)
        where = tuple(piece.tensor for piece in pieces), tuple(piece.start for piece in pieces), sizes
        self.place = _place(*where, self.lists[0][0].device)

    def read(self, *columns: int) -> list[Tensor]:
        """Vectors of those lists; of one that is not there an empty one."""
        return [
            _flatten_dense_tensors(self.lists[column]).to(self.dtype)  # type: ignore[no-untyped-call]
            if self.lists[column]
            else torch.empty(0, dtype=self.dtype)
            for column in columns
        ]

    def write(self, column: int, values: Tensor, *, seed: int | None = None, stream: int = 0) -> None:
        """Round a vector to a list's dtype and write it there.

        State in bfloat16 is rounded by chance where a ``seed`` is given.
        """
        tensors = self.lists[column]
        if seed is not None and tensors[0].dtype == torch.bfloat16:
            tensor, start, sizes = self.place
            begin = torch.cumsum(sizes, 0) - sizes  # in this chunk
            index = torch.arange(self.elements, device=values.device) + self._spread(start - begin)
            values = round_by_key(values, self._spread(rounding_key(seed, tensor, stream)), index)
        torch._foreach_copy_(tensors, self._views(values))

    def each(self, of_tensors: Tensor) -> Tensor:
        """[tensors of the whole list] to [elements] in the dtype of the computation."""
        return self._spread(of_tensors[self.place.tensors].to(self.dtype))

    def add_l1(self, sums: Tensor, values: Tensor) -> None:
        """Add the L1 norm of each piece to that of its tensor in ``sums`` [tensors], in float64."""
        norms = torch._foreach_norm(self._views(values), 1, dtype=torch.float64)
        sums.index_add_(0, self.place.tensors, torch.stack(norms))  # a tensor is in a chunk once, so in a fixed order

    def _spread(self, of_pieces: Tensor) -> Tensor:
        return torch.repeat_interleave(of_pieces, self.place.sizes, output_size=self.elements)

    def _views(self, values: Tensor) -> list[Tensor]:
        return list(_unflatten_dense_tensors(values, self.lists[0]))  # type: ignore[no-untyped-call]


def _chunks(state: Sequence[Tensor], *lists: Sequence[Tensor]) -> Iterator[_Chunk]:
    """The lists cut into chunks; what is computed in follows from the dtype of ``state``."""
    alike: dict[tuple[torch.dtype, ...], list[_Piece]] = {}
    for number, tensors in enumerate(zip(*filter(None, lists), strict=True)):
        pieces = alike.setdefault((compute_dtype(state[number]), *(each.dtype for each in tensors)), [])
        pieces.extend(_pieces(number, list(tensors)))
    for (dtype, *_), pieces in alike.items():
        taken: list[_Piece] = []
        elements = 0
        for piece in pieces:
            size = piece.views[0].numel()
            if taken and (elements + size > CHUNK or piece.tensor == taken[-1].tensor):
                yield _Chunk(taken, lists, dtype)
                taken, elements = [], 0
            taken.append(piece)
            elements += size
        if taken:
            yield _Chunk(taken, lists, dtype)


def _pieces(number: int, tensors: list[Tensor]) -> Iterator[_Piece]:
    size = tensors[0].numel()
    if size <= CHUNK or not all(map(Tensor.is_contiguous, tensors)):
        yield _Piece(number, 0, tensors)
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, size, CHUNK):
        yield _Piece(number, start, [each[start : start + CHUNK] for each in flat])


def _place(tensors: tuple[int, ...], starts: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> _Place:
    rows = (tensors, starts, sizes)
    if device.type != "cuda":
        return _Place(*torch.tensor(rows, device="cpu").to(device).unbind(0))
    if torch.cuda.is_current_stream_capturing():  # a graph has tables of its own, made by its own launches
        return _Place(*(torch.cat([torch.full((1,), number, device=device) for number in row]) for row in rows))
    return _uploaded(rows, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=1024)
def _uploaded(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> _Place:
    """On the device's current ``stream``, once; pinned, so that the copy waits for nothing."""
    return _Place(*torch.tensor(rows, device="cpu").pin_memory().to(device, non_blocking=True).unbind(0))
