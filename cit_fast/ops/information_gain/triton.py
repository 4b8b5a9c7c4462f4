"""The Triton backend of the information-gain family: launches of kernels/information_gain.py and its rows.

Scoring is one kernel that never writes logits, and a merge. The losses take rows in chunks: library GEMMs make float32
logits in one workspace of at most ``_WORKSPACE`` bytes, a kernel puts their gradients in their place, and library GEMMs
take those to the hidden states and, where it is trained, to the head. Whether products of float32 use TF32 is torch's
setting (``torch.set_float32_matmul_precision``); scoring keeps float32's accuracy whatever that is.

The kernels are compiled for sm_80 and sm_90 and interpreted on the CPU in the tests, but have not run on a GPU yet: the
tables here were chosen by counting, not by timing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register
from cit_fast.ops.information_gain.native import rows_of
from cit_fast.ops.information_gain.reference import GAIN_STATISTICS


class _Tiling(NamedTuple):
    """Of gain_kernel: rows of each context, entries and columns of a tile; warps; tiles on their way at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# By GPU and by the bits of the operands, such that nothing spills. "any" fits 99 KB of shared memory; "unaligned" is
# for rows that do not start at multiples of 16 bytes, which no asynchronous copy can take.
_TILINGS = {
    ("any", 16): _Tiling(64, 128, 32, 8, 3),
    ("any", 32): _Tiling(32, 64, 32, 4, 3),
    ("sm_80", 16): _Tiling(128, 128, 32, 8, 4),
    ("sm_80", 32): _Tiling(64, 64, 16, 4, 4),
    ("sm_90", 16): _Tiling(128, 128, 64, 8, 4),
    ("sm_90", 32): _Tiling(128, 64, 32, 8, 3),
    ("unaligned", 16): _Tiling(32, 64, 32, 4, 2),
    ("unaligned", 32): _Tiling(32, 32, 32, 4, 2),
}
_ARCHITECTURES = {(8, 0): "sm_80", (9, 0): "sm_90"}
_GROUP_BYTES = 24 << 20  # hidden states of a group of programs, about half of the second-level cache
_MOST_ROWS = 1 << 14  # of one launch, which bounds the partial results
_LEAST_TILES, _MOST_TILES = 4, 64
_MERGE = {"BLOCK": 128, "num_warps": 4}

# Of the kernels that sweep rows of logits: all threads of a processor on one row, 32 KB on their way.
_CROSS_ENTROPY = {"BLOCK": 8192, "num_warps": 32}
_JSD = {"BLOCK": 4096, "num_warps": 32}
_BIAS = {"BLOCK": 128, "num_warps": 4}
_WORKSPACE = 512 << 20
_ALIGNED = 64  # elements; where each row of logits starts
_WIDENED = 1 << 24  # elements of a half-precision head widened at a time, for hidden states in another dtype


@register("token_gain", Backend.TRITON)
def _token_gain(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, ...]:
    from cit_fast.kernels.information_gain import gains_kernel

    tokens = targets.shape[0]
    gains = tuple(hidden_full.new_empty(tokens, dtype=torch.float32) for _ in range(7))
    with _device_of(hidden_full):
        for rows in _slices(tokens, _MOST_ROWS):
            partials = _partials(
                hidden_full[rows], hidden_masked[rows], lm_head_weight, targets[rows], 0, bias, softcap, scale
            )
            splits, _, count = partials.shape
            gains_kernel[(-(-count // _MERGE["BLOCK"]),)](
                partials, *(gain[rows] for gain in gains), count, splits, **_MERGE
            )
    return gains


@register("token_gain_statistics", Backend.TRITON)
def _statistics(
    hidden_full: Tensor,
    hidden_masked: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    first_entry: int,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    from cit_fast.kernels.information_gain import statistics_kernel

    tokens = targets.shape[0]
    pieces = [hidden_full.new_empty((len(GAIN_STATISTICS), 0), dtype=torch.float64)]
    with _device_of(hidden_full):
        for rows in _slices(tokens, _MOST_ROWS):
            partials = _partials(
                hidden_full[rows], hidden_masked[rows], lm_head_weight, targets[rows], first_entry, bias, softcap, scale
            )
            splits, _, count = partials.shape
            pieces.append(partials.new_empty((len(GAIN_STATISTICS), count), dtype=torch.float64))
            statistics_kernel[(-(-count // _MERGE["BLOCK"]),)](partials, pieces[-1], count, splits, **_MERGE)
    return torch.cat(pieces, dim=1)


def _partials(
    full: Tensor,
    masked: Tensor,
    weight: Tensor,
    targets: Tensor,
    first_entry: int,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Statistics of each piece of the vocabulary, [pieces, 10, T] float32; logits in units of log 2."""
    from cit_fast.kernels.information_gain import gain_kernel

    (tokens, width), entries = full.shape, weight.shape[0]
    precise = not full.dtype == masked.dtype == weight.dtype != torch.float32
    if precise:
        full, masked = full.float(), masked.float()
    full, masked = rows_of(full), rows_of(masked)
    aligned = all(_is_aligned(each) for each in (full, masked, weight))
    tiling = _TILINGS[_architecture(full.device) if aligned else "unaligned", 32 if precise else 16]
    blocks = -(-tokens // tiling.BLOCK_M)
    tiles = _tiles(blocks, -(-entries // tiling.BLOCK_N), _processors(full.device))
    splits = -(-entries // (tiles * tiling.BLOCK_N))
    partials = torch.empty(splits, len(GAIN_STATISTICS), tokens, device=full.device)
    gain_kernel[(blocks * splits,)](
        full,
        masked,
        weight,
        partials if bias is None else bias.float().contiguous(),
        targets.contiguous(),
        partials,
        tokens,
        entries,
        width,
        full.stride(0),
        masked.stride(0),
        weight.stride(0),
        first_entry,
        splits,
        tiles,
        min(blocks, max(1, _GROUP_BYTES // (2 * tiling.BLOCK_M * width * full.element_size()))),
        scale,
        float(softcap or 0),
        BIAS=bias is not None,
        CAP=softcap is not None,
        EVEN=width % tiling.BLOCK_K == 0,
        PRECISE=precise,
        **tiling._asdict(),
    )
    return partials


def _is_aligned(matrix: Tensor) -> bool:
    """As Triton sees it, which compiles for it: strides and widths count in multiples of 16 elements."""
    return matrix.stride(0) % 16 == matrix.shape[1] % 16 == matrix.data_ptr() % 16 == 0


def _tiles(blocks: int, tiles: int, processors: int) -> int:
    """Tiles of a program, so that few processors wait for the last ones."""

    def time(each: int) -> float:
        waves = -(-blocks * -(-tiles // each) // processors)
        return waves * (each + 0.5)  # half a tile to start and to end a program

    return min(range(min(tiles, _LEAST_TILES), min(tiles, _MOST_TILES) + 1), key=time)


@register("masked_jsd", Backend.TRITON)
def _masked_jsd(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    softcap: float | None,
    scale: float,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cit_fast.kernels.information_gain_rows import jsd_kernel

    tokens = hidden_live.shape[0]
    temperature, row_weight = temperature.float().contiguous(), row_weight.float().contiguous()
    factors = (row_weight * (scale / (2 * math.log(2))) / temperature).masked_fill(row_weight == 0, 0)
    gradients = _Gradients(hidden_live, weight_live, bias_live, row_weight, factors, needs_grad)
    losses = torch.empty_like(row_weight)
    live = _Head(weight_live, bias_live)
    frozen = _Head(weight_frozen, bias_frozen)
    with _device_of(hidden_live):
        size, (live_space, frozen_space) = _workspace(tokens, live.entries, 2, hidden_live.device)
        for rows in _slices(tokens, size):
            live_logits = live.logits(hidden_live[rows], live_space)
            frozen_logits = frozen.logits(hidden_frozen[rows], frozen_space)
            gradient = gradients.instead_of(live_logits, live_space)
            jsd_kernel[(len(live_logits),)](
                live_logits,
                frozen_logits,
                gradient,
                losses if live.bias is None else live.bias,
                losses if frozen.bias is None else frozen.bias,
                temperature[rows],
                row_weight[rows],
                losses[rows],
                live.entries,
                live_logits.stride(0),
                gradient.stride(0),
                scale,
                float(softcap or 0),
                gradients.lift,
                BIAS_LIVE=live.bias is not None,
                BIAS_FROZEN=frozen.bias is not None,
                CAP=softcap is not None,
                GRADIENT=any(needs_grad),
                **_JSD,
            )
            gradients.add(rows, gradient)
    return losses.sum(), *gradients.result()


@register("linear_cross_entropy", Backend.TRITON)
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cit_fast.kernels.information_gain_rows import cross_entropy_kernel

    tokens = hidden.shape[0]
    targets, row_weight = targets.contiguous(), row_weight.float().contiguous()
    gradients = _Gradients(hidden, weight, bias, row_weight, row_weight * scale, needs_grad)
    losses = torch.empty_like(row_weight)
    head = _Head(weight, bias)
    with _device_of(hidden):
        size, (space,) = _workspace(tokens, head.entries, 1, hidden.device)
        for rows in _slices(tokens, size):
            logits = head.logits(hidden[rows], space)
            gradient = gradients.instead_of(logits, space)
            cross_entropy_kernel[(len(logits),)](
                logits,
                gradient,
                losses if head.bias is None else head.bias,
                targets[rows],
                row_weight[rows],
                losses[rows],
                head.entries,
                logits.stride(0),
                gradient.stride(0),
                scale,
                float(softcap or 0),
                gradients.lift,
                BIAS=head.bias is not None,
                CAP=softcap is not None,
                GRADIENT=any(needs_grad),
                **_CROSS_ENTROPY,
            )
            gradients.add(rows, gradient)
    return losses.sum(), *gradients.result()


class _Head:
    """A head and its products with chunks of hidden states; bias, scale and cap are left to the kernels."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.entries = weight, weight.shape[0]
        self.bias = None if bias is None else bias.float().contiguous()

    def logits(self, hidden: Tensor, space: Tensor) -> Tensor:
        """[rows, V] float32 in ``space``."""
        out = space[: len(hidden), : self.entries]
        for entries, weight in _blocks(self.weight, _product_dtype(hidden, self.weight)):
            _product(hidden.to(weight.dtype), weight.T, out[:, entries])
        return out


class _Gradients:
    """From gradients of logits to those of hidden states, head and bias: row r times ``factors[r]``."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weight: Tensor,
        factors: Tensor,
        needs_grad: tuple[bool, bool, bool],
    ) -> None:
        self.weight, self.needed = weight, needs_grad
        self.dtype = _product_dtype(hidden, weight)
        self.lift = 1024.0 if self.dtype == torch.float16 else 1.0  # float16 has no small numbers
        self.factors = factors / self.lift
        self.bias_dtype = weight.dtype if bias is None else bias.dtype
        needs_hidden, needs_weight, needs_bias = needs_grad
        self.grad_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
        self.grad_weight = torch.zeros_like(weight if needs_weight else weight.new_empty(0), dtype=torch.float32)
        self.grad_bias = weight.new_zeros(weight.shape[0] if needs_bias else 0, dtype=torch.float32)
        if needs_weight and len(factors):
            # A row of weight 0 may hold NaN. The largest factor is 1 here, for the sake of half precision.
            self.unit = self.factors.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            shares = (self.factors / self.unit)[:, None]
            self.weighted = (hidden.float() * shares).masked_fill(row_weight[:, None] == 0, 0).to(self.dtype)

    def instead_of(self, logits: Tensor, space: Tensor) -> Tensor:
        """Where the gradient of logits in ``space`` goes: the same memory, in the dtype of the products to come."""
        if self.dtype == torch.float32 or not any(self.needed):
            return logits
        return space.view(self.dtype)[: len(logits), : logits.shape[1]]

    def add(self, rows: slice, gradient: Tensor) -> None:
        from cit_fast.kernels.information_gain_rows import bias_kernel

        needs_hidden, needs_weight, needs_bias = self.needed
        if needs_hidden:
            product = gradient.new_empty((len(gradient), self.weight.shape[1]), dtype=torch.float32)
            for entries, weight in _blocks(self.weight, self.dtype):
                _product(gradient[:, entries], weight, product, add=entries.start > 0)
            self.grad_hidden[rows] = product * self.factors[rows, None]
        if needs_weight:
            _product(gradient.T, self.weighted[rows], self.grad_weight, add=True)
        if needs_bias:
            count, columns = gradient.shape
            bias_kernel[(-(-columns // _BIAS["BLOCK"]),)](
                gradient, self.factors[rows], self.grad_bias, count, columns, gradient.stride(0), **_BIAS
            )

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.needed[1] and len(self.factors):
            self.grad_weight *= self.unit
        return self.grad_hidden, self.grad_weight.to(self.weight.dtype), self.grad_bias.to(self.bias_dtype)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return weight.dtype if hidden.dtype == weight.dtype else torch.float32


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a head in ``dtype``: all at once, or widened a block at a time."""
    size = weight.shape[0] if weight.dtype == dtype else max(1, _WIDENED // weight.shape[1])
    for block in _slices(weight.shape[0], size):
        yield block, weight[block].to(dtype)


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out`` = (or +=) a b, in float32 from what the tensor cores took in half precision."""
    if a.dtype == torch.float32 or a.device.type != "cuda":  # on the CPU, by the interpreter, for tests
        torch.addmm(out, a.float(), b.float(), beta=float(add), out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def _workspace(tokens: int, entries: int, sides: int, device: torch.device) -> tuple[int, tuple[Tensor, ...]]:
    """Rows of a chunk, and memory for the logits of each side; chunks are as equal as tiles of 128 rows let them be."""
    stride = -(-entries // _ALIGNED) * _ALIGNED
    most = max(1, _WORKSPACE // (4 * stride * sides))
    most = most // 128 * 128 or most
    chunks = max(1, -(-tokens // most))
    size = min(most, -(-tokens // chunks // 128) * 128) if tokens else 1
    return size, tuple(torch.empty(min(size, tokens), stride, device=device) for _ in range(sides))


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


@cache
def _architecture(device: torch.device) -> str:
    return _ARCHITECTURES.get(torch.cuda.get_device_capability(device), "any") if device.type == "cuda" else "any"


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
