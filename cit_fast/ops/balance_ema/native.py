"""The balance-weight EMA in C++ on the CPU (``native``), and the table of addresses it shares with the CUDA kernels.

A table has one row of integers per tensor; csrc/bindings.cpp names the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from cit_fast.ops.backends import Backend, register
from cit_fast.ops.balance_ema.checks import BALANCE_RULES
from cit_fast.ops.balance_ema.reference import BalanceWeights, row_count

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/dtype.h
RULES: dict[str, int] = {rule: number for number, rule in enumerate(BALANCE_RULES)}  # csrc/cpu/balance_ema.h
_STATE_DTYPES = {torch.float32, torch.bfloat16}
_KERNELS = {"cpu": (Backend.NATIVE, Backend.TRITON), "cuda": (Backend.CUDA, Backend.TRITON)}


@register("balance_norms_", Backend.NATIVE)
def _balance_norms(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    granularity: str,
    store_grads: bool,
) -> Tensor:
    from cit_fast import _native

    norms = empty_weights(params, granularity).norms
    _native.balance_norms(
        ema_table(params, averages, grads, previous_grads, granularity),
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
    rule: str,
    decay: float,
    fallback: float,
    granularity: str,
    store_grads: bool,
    seed: int,
) -> BalanceWeights:
    from cit_fast import _native

    weights = empty_weights(params, granularity)
    _native.balance_ema(
        ema_table(params, averages, grads, previous_grads, granularity),
        rule=RULES[rule],
        decay=decay,
        fallback=fallback,
        store_grads=store_grads,
        seed=seed,
        threads=torch.get_num_threads(),
        alphas=weights.alphas.data_ptr(),
        fallbacks=weights.fallbacks.data_ptr(),
        norms=weights.norms.data_ptr(),
    )
    return weights


@register("adamw_balance_ema_", Backend.NATIVE)
def _adamw_balance_ema(
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
    from cit_fast import _native

    weights = empty_weights(params, granularity)._replace(alphas=alphas)
    _native.adamw_balance_ema(
        ema_table(params, averages, grads, previous_grads, granularity, exp_avgs, exp_avg_sqs),
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        rule=RULES[rule],
        decay=decay,
        fallback=fallback,
        store_grads=store_grads,
        seed=seed,
        threads=torch.get_num_threads(),
        alphas=alphas.data_ptr(),
        fallbacks=weights.fallbacks.data_ptr(),
        norms=weights.norms.data_ptr(),
    )
    return weights


@register("flush_balance_ema_", Backend.NATIVE)
def _flush_balance_ema(
    params: list[Tensor], averages: list[Tensor], alphas: Tensor, granularity: str, seed: int
) -> None:
    from cit_fast import _native

    _native.flush_balance_ema(
        ema_table(params, averages, params, [], granularity),
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
    granularity: str,
    *moments: Sequence[Tensor],
) -> list[int]:
    """Per tensor: elements, rows, then address and dtype from each list; 0, 0 for previous gradients not there."""
    lists = (params, averages, grads, previous_grads, *moments)
    columns = [[param.numel() for param in params], [row_count(param, granularity) for param in params]]
    for tensors in lists:
        columns.append([tensor.data_ptr() for tensor in tensors] or [0] * len(params))
        columns.append([DTYPES[tensor.dtype] for tensor in tensors] or [0] * len(params))
    return list(chain.from_iterable(zip(*columns, strict=True)))


def empty_weights(params: Sequence[Tensor], granularity: str) -> BalanceWeights:
    """Memory for the results of one call."""
    rows, device = sum(row_count(param, granularity) for param in params), params[0].device
    return BalanceWeights(
        torch.empty(rows, device=device),
        torch.empty(rows, device=device, dtype=torch.bool),
        torch.empty(rows, 3, device=device, dtype=torch.float64),
    )


def kernels_cannot(state: Sequence[Tensor], *lists: Sequence[Tensor], granularity: str) -> dict[Backend, str]:
    """Why no kernel can take these tensors; empty when all can.

    Kernels walk flat memory. With state in bfloat16 or a weight for each row the order of the elements matters, so
    the tensors must be contiguous then.

    Args:
        state: Averages and moments.
        lists: All tensors, the parameters first.
        granularity: As in :func:`cit_fast.ops.balance_ema_`.
    """
    kernels = _KERNELS.get(lists[0][0].device.type, ())
    reason = _why_not(state, lists, granularity)
    return dict.fromkeys(kernels, reason) if reason else {}


def _why_not(state: Sequence[Tensor], lists: tuple[Sequence[Tensor], ...], granularity: str) -> str | None:
    state_dtypes = {tensor.dtype for tensor in state}
    for dtype in state_dtypes - _STATE_DTYPES:
        return f"it keeps averages and moments in float32 or bfloat16, not {dtype}"
    for dtype in {tensor.dtype for tensors in lists for tensor in tensors} - DTYPES.keys():
        return f"it takes no {dtype}"
    if all(map(Tensor.is_contiguous, chain(*lists))):
        return None
    if granularity == "row" or torch.bfloat16 in state_dtypes:
        return "a tensor is not contiguous, which weights for rows and bfloat16 state need"
    for tensors in lists:
        for param, tensor in zip(lists[0], tensors, strict=False):
            if tensor.stride() != param.stride() or not _is_dense(tensor):
                return "a tensor is not dense or its strides differ from its parameter's"
    return None


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlap, in whatever order of dimensions."""
    order = sorted(range(tensor.dim()), key=lambda i: (tensor.stride(i), tensor.size(i)), reverse=True)
    return tensor.permute(order).is_contiguous()
