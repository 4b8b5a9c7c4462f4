"""The losses of the information-gain family and their gradients, on Triton kernels and library products.

Rows go in chunks: library products make float32 logits in one workspace of ``_workspace_bytes``, a kernel puts
their gradients in their place, and library products take those to the hidden states and, where it is trained, to the
head. Whether products of float32 use TF32 is torch's setting (``torch.set_float32_matmul_precision``); scoring keeps
float32's accuracy whatever that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from cit_fast.kernels.information_gain import FUSED, device_of, slices
from cit_fast.kernels.information_gain_rows import bias_kernel, cross_entropy_kernel, jsd_kernel, kl_kernel
from torch import Tensor

from cit_fast.ops.information_gain.reference import LogitOptions, Needed

# Of the kernels that sweep rows of logits: all threads of a processor on one row, 32 KB on their way.
_CROSS_ENTROPY = {"BLOCK": 8192, "num_warps": 32, **FUSED}
_DIVERGENCE = {"BLOCK": 4096, "num_warps": 32, **FUSED}
_BIAS = {"BLOCK": 128, "num_warps": 4, **FUSED}
_LEAST_WORKSPACE = 512 << 20
_WORKSPACE_SHARE = 64
_ALIGNED = 64  # elements; where each row of logits starts
_WIDENED = 1 << 24  # elements of a half-precision head widened at a time, for hidden states in another dtype


def masked_jsd(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    options: LogitOptions,
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`cit_fast.ops.masked_jsd`."""

    def launch(rows: slice, *logits_and_gradient: Tensor, **common: Any) -> None:
        jsd_kernel[(len(logits_and_gradient[0]),)](*logits_and_gradient, **common, **_DIVERGENCE)

    sides = (hidden_live, weight_live, bias_live), (hidden_frozen, weight_frozen, bias_frozen)
    return _two_sides(launch, *sides, temperature, row_weight, 2 * math.log(2), options, needed)


def linear_kl_divergence(
    hidden_live: Tensor,
    hidden_frozen: Tensor,
    weight_live: Tensor,
    weight_frozen: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    targets: Tensor | None,
    bias_live: Tensor | None,
    bias_frozen: Tensor | None,
    options: LogitOptions,
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`cit_fast.ops.linear_kl_divergence`."""
    taken = None if targets is None else targets.contiguous()

    def launch(rows: slice, *logits_and_gradient: Tensor, **common: Any) -> None:
        out = common["row_weight"] if taken is None else taken[rows]
        more = {"targets": out, "WITHOUT": taken is not None}
        kl_kernel[(len(logits_and_gradient[0]),)](*logits_and_gradient, **common, **more, **_DIVERGENCE)

    sides = (hidden_live, weight_live, bias_live), (hidden_frozen, weight_frozen, bias_frozen)
    return _two_sides(launch, *sides, temperature, row_weight, 1.0, options, needed)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    options: LogitOptions,
    entropy_gate: float,
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`cit_fast.ops.linear_cross_entropy`."""
    tokens = hidden.shape[0]
    targets, row_weight = targets.contiguous(), row_weight.float().contiguous()
    gradients = _Gradients(hidden, weight, bias, row_weight, row_weight * options.scale, needed)
    losses = torch.empty_like(row_weight)
    head = _Head(weight, bias)
    with device_of(hidden):
        size, (space,) = _workspace(tokens, head.entries, 1, hidden.device)
        for rows in slices(tokens, size):
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
                options.scale,
                float(options.softcap or 0),
                entropy_gate,
                gradients.lift,
                BIAS=head.bias is not None,
                CAP=options.softcap is not None,
                GATE=entropy_gate > 0,
                GRADIENT=any(needed),
                **_CROSS_ENTROPY,
            )
            gradients.add(rows, gradient)
    return losses.sum(), *gradients.result()


_Side = tuple[Tensor, Tensor, "Tensor | None"]
"""Hidden states, the head's weight and its bias."""


def _two_sides(
    launch: Callable[..., None],
    live_side: _Side,
    frozen_side: _Side,
    temperature: Tensor,
    row_weight: Tensor,
    unit: float,
    options: LogitOptions,
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of a divergence's rows and its gradients, which are what the kernel stores over ``unit``.

    Products of a library make the logits of some rows, a kernel their gradients in the same memory.
    """
    (hidden_live, weight_live, bias_live), (hidden_frozen, *frozen_head) = live_side, frozen_side
    tokens = hidden_live.shape[0]
    temperature, row_weight = temperature.float().contiguous(), row_weight.float().contiguous()
    factors = (row_weight * (options.scale / unit) / temperature).masked_fill(row_weight == 0, 0)
    gradients = _Gradients(hidden_live, weight_live, bias_live, row_weight, factors, needed)
    losses = torch.empty_like(row_weight)
    live, frozen = _Head(weight_live, bias_live), _Head(*frozen_head)
    with device_of(hidden_live):
        size, (live_space, frozen_space) = _workspace(tokens, live.entries, 2, hidden_live.device)
        for rows in slices(tokens, size):
            live_logits = live.logits(hidden_live[rows], live_space)
            frozen_logits = frozen.logits(hidden_frozen[rows], frozen_space)
            gradient = gradients.instead_of(live_logits, live_space)
            launch(
                rows,
                live_logits,
                frozen_logits,
                gradient,
                bias_live=losses if live.bias is None else live.bias,
                bias_frozen=losses if frozen.bias is None else frozen.bias,
                temperature=temperature[rows],
                row_weight=row_weight[rows],
                losses=losses[rows],
                entries=live.entries,
                stride=live_logits.stride(0),
                gradient_stride=gradient.stride(0),
                scale=options.scale,
                softcap=float(options.softcap or 0),
                lift=gradients.lift,
                BIAS_LIVE=live.bias is not None,
                BIAS_FROZEN=frozen.bias is not None,
                CAP=options.softcap is not None,
                GRADIENT=any(needed),
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
        needed: Needed,
    ) -> None:
        self.weight, self.needed = weight, needed
        self.dtype = _product_dtype(hidden, weight)
        self.lift = 1024.0 if self.dtype == torch.float16 else 1.0  # float16 has no small numbers
        self.factors = factors / self.lift
        self.bias_dtype = weight.dtype if bias is None else bias.dtype
        self.grad_hidden = torch.empty_like(hidden) if needed.hidden else hidden.new_empty(0)
        self.grad_weight = torch.zeros_like(weight if needed.weight else weight.new_empty(0), dtype=torch.float32)
        self.grad_bias = weight.new_zeros(weight.shape[0] if needed.bias else 0, dtype=torch.float32)
        if needed.weight and len(factors):
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
        """What the gradient of the logits of ``rows`` adds to each."""
        needed = self.needed
        if needed.hidden:
            product = gradient.new_empty((len(gradient), self.weight.shape[1]), dtype=torch.float32)
            for entries, weight in _blocks(self.weight, self.dtype):
                _product(gradient[:, entries], weight, product, add=entries.start > 0)
            self.grad_hidden[rows] = product * self.factors[rows, None]
        if needed.weight:
            _product(gradient.T, self.weighted[rows], self.grad_weight, add=True)
        if needed.bias:
            count, columns = gradient.shape
            bias_kernel[(-(-columns // _BIAS["BLOCK"]),)](
                gradient, self.factors[rows], self.grad_bias, count, columns, gradient.stride(0), **_BIAS
            )

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden states, weight and bias, in their dtypes."""
        if self.needed.weight and len(self.factors):
            self.grad_weight *= self.unit
        return self.grad_hidden, self.grad_weight.to(self.weight.dtype), self.grad_bias.to(self.bias_dtype)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return weight.dtype if hidden.dtype == weight.dtype else torch.float32


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a head in ``dtype``: all at once, or widened a block at a time."""
    size = weight.shape[0] if weight.dtype == dtype else max(1, _WIDENED // weight.shape[1])
    for block in slices(weight.shape[0], size):
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
    most = max(1, _workspace_bytes(device) // (4 * stride * sides))
    most = most // 128 * 128 or most
    chunks = max(1, -(-tokens // most))
    size = min(most, -(-tokens // chunks // 128) * 128) if tokens else 1
    return size, tuple(torch.empty(min(size, tokens), stride, dtype=torch.float32, device=device) for _ in range(sides))


@cache
def _workspace_bytes(device: torch.device) -> int:
    """A 64th of a GPU's memory: with few rows a chunk has too few tiles for all processors, and a trained head's
    gradient is read and written once a chunk."""
    if device.type != "cuda":
        return _LEAST_WORKSPACE
    return max(_LEAST_WORKSPACE, torch.cuda.get_device_properties(device).total_memory // _WORKSPACE_SHARE)
