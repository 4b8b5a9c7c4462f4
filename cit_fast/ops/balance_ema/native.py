"""The balance-weight EMA in C++ on the CPU (``native``), and the table of addresses it shares with the CUDA kernels.

A table has one integer per tensor in each column; csrc/bindings.cpp names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register
from cit_fast.ops.balance_ema.checks import BALANCE_RULES
from cit_fast.ops.balance_ema.reference import AdamWLists, AdamWOptions, BalanceOptions, BalanceWeights

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/dtype.h
RULES: dict[str, int] = {rule: number for number, rule in enumerate(BALANCE_RULES)}  # csrc/cpu/balance_ema/
_dtype = attrgetter("dtype")
STATE_DTYPES = {torch.float32, torch.bfloat16}  # of averages and moments
_KERNELS = {"cpu": (Backend.NATIVE, Backend.TRITON), "cuda": (Backend.CUDA, Backend.TRITON)}


@register("balance_norms_", Backend.NATIVE)
def _balance_norms(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    store_grads: bool,
) -> Tensor:
    from cit_fast import _native

    norms = empty_weights(params).norms
    _native.balance_norms(
        ema_table(params, averages, grads, previous_grads),
        store_grads=store_grads,
        threads=torch.get_num_threads(),
        norms=norms.data_ptr(),
    )
    return norms


@register("balance_ema_", Backend.NATIVE)
def _balance_ema(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    remaining: Tensor | None,
    options: BalanceOptions,
) -> BalanceWeights:
    from cit_fast import _native

    weights = empty_weights(params)
    table = ema_table(params, averages, grads, previous_grads)
    _native.balance_ema(
        table,
        **outcome(weights, remaining, options),
        nearest=options.rounding == "nearest",
        seed=options.seed,
        threads=torch.get_num_threads(),
    )
    return weights


@register("adamw_balance_ema_", Backend.NATIVE)
def _adamw_balance_ema(
    lists: AdamWLists, alphas: Tensor, remaining: Tensor | None, adamw: AdamWOptions, options: BalanceOptions
) -> BalanceWeights:
    from cit_fast import _native

    weights = empty_weights(lists.params)._replace(alphas=alphas)
    _native.adamw_balance_ema(
        ema_table(*lists.columns),
        **adamw._asdict(),
        **outcome(weights, remaining, options),
        nearest=options.rounding == "nearest",
        seed=options.seed,
        threads=torch.get_num_threads(),
    )
    return weights


@register("flush_balance_ema_", Backend.NATIVE)
def _flush_balance_ema(params: list[Tensor], averages: list[Tensor], alphas: Tensor, rounding: str, seed: int) -> None:
    from cit_fast import _native

    _native.flush_balance_ema(
        ema_table(params, averages, params, []),
        nearest=rounding == "nearest",
        seed=seed,
        threads=torch.get_num_threads(),
        alphas=alphas.data_ptr(),
    )


# What the kernels of CPU and GPU have in common.


def ema_table(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    *moments: Sequence[Tensor],
) -> list[list[int]]:
    """Columns: elements, then address and dtype from each list; 0, 0 for previous gradients not there."""
    lists = (params, averages, grads, previous_grads, *moments)
    columns = [list(map(Tensor.numel, params))]
    for tensors in lists:
        columns.append(list(map(Tensor.data_ptr, tensors)) or [0] * len(params))
        dtypes = list(map(_dtype, tensors))
        if len(set(dtypes)) > 1:
            columns.append([DTYPES[dtype] for dtype in dtypes])
        else:
            columns.append([DTYPES[dtypes[0]] if dtypes else 0] * len(params))
    return columns


def empty_weights(params: Sequence[Tensor]) -> BalanceWeights:
    """Memory for the results of one call."""
    count, device = len(params), params[0].device
    return BalanceWeights(
        torch.empty(count, device=device, dtype=torch.float32),
        torch.empty(count, device=device, dtype=torch.bool),
        torch.empty(count, 3, device=device, dtype=torch.float64),
    )


def outcome(weights: BalanceWeights, remaining: Tensor | None, options: BalanceOptions) -> dict[str, Any]:
    """How a compiled kernel decides the weights, and the addresses to write them to."""
    return {
        "norms": weights.norms.data_ptr(),
        "alphas": weights.alphas.data_ptr(),
        "fallbacks": weights.fallbacks.data_ptr(),
        "remaining": 0 if remaining is None else remaining.data_ptr(),
        "rule": RULES[options.rule],
        "decay": options.decay,
        "fallback": options.fallback,
        "scale": options.scale,
        "store_grads": options.store_grads,
    }


def kernels_cannot(state: Sequence[Tensor], *lists: Sequence[Tensor]) -> dict[Backend, str]:
    """Why no kernel can take these tensors; empty when all can.

    Kernels walk flat memory. With state in bfloat16 the order of the elements matters, so the tensors must be
    contiguous then.

    Args:
        state: Averages and moments.
        lists: All tensors, the parameters first.
    """
    kernels = _KERNELS.get(lists[0][0].device.type, ())
    reason = _why_not(state, lists)
    return dict.fromkeys(kernels, reason) if reason else {}


def _why_not(state: Sequence[Tensor], lists: tuple[Sequence[Tensor], ...]) -> str | None:
    state_dtypes = set(map(_dtype, state))
    for dtype in state_dtypes - STATE_DTYPES:
        return f"it keeps averages and moments in float32 or bfloat16, not {dtype}"
    for dtype in set(map(_dtype, chain(*lists))) - DTYPES.keys():
        return f"it takes no {dtype}"
    if all(map(Tensor.is_contiguous, chain(*lists))):
        return None
    if torch.bfloat16 in state_dtypes:
        return "a tensor is not contiguous, which bfloat16 state needs"
    for tensors in lists:
        for param, tensor in zip(lists[0], tensors, strict=False):
            if tensor.stride() != param.stride() or not _is_dense(tensor):
                return "a tensor is not dense or its strides differ from its parameter's"
    return None


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlap, in whatever order of dimensions."""
    order = sorted(range(tensor.dim()), key=lambda i: (tensor.stride(i), tensor.size(i)), reverse=True)
    return tensor.permute(order).is_contiguous()
