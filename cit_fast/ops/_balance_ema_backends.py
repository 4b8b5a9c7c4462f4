"""The compiled backends of the balance-weight EMA: C++ on the CPU (``native``) and CUDA kernels (``cuda``).

Both take a table of addresses with one row per tensor; the columns are those of csrc/bindings.cpp. The CUDA kernels are
compiled but have not run on a GPU yet, so they serve only where the backend is forced; there is no
``adamw_balance_ema_`` among them.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from cit_fast.backends import Backend, register
from cit_fast.reference.balance_ema import BalanceWeights

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/dtype.h
_RULES = {"released": 0, "paper": 1, "fixed": 2}  # csrc/cpu/balance_ema.h
_BACKENDS = {"cpu": Backend.NATIVE, "cuda": Backend.CUDA}


@register("balance_ema_", Backend.NATIVE)
def _native_balance_ema(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    rule: str,
    decay: float,
    fallback: float,
) -> BalanceWeights:
    from cit_fast import _native

    weights = _empty_weights(params)
    _native.balance_ema(
        _ema_table(params, averages, grads, previous_grads),
        rule=_RULES[rule],
        decay=decay,
        fallback=fallback,
        threads=torch.get_num_threads(),
        alphas=weights.alphas.data_ptr(),
        fallbacks=weights.fallbacks.data_ptr(),
    )
    return weights


@register("adamw_balance_ema_", Backend.NATIVE)
def _native_adamw_balance_ema(
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
) -> BalanceWeights:
    from cit_fast import _native

    ema = _ema_table(params, averages, grads, previous_grads)
    table: list[int] = []
    for i, (exp_avg, exp_avg_sq) in enumerate(zip(exp_avgs, exp_avg_sqs, strict=True)):
        table += (*ema[8 * i : 8 * i + 8], exp_avg.data_ptr(), exp_avg_sq.data_ptr())
    weights = BalanceWeights(alphas, torch.empty(len(params), dtype=torch.bool))
    _native.adamw_balance_ema(
        table,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        rule=_RULES[rule],
        decay=decay,
        fallback=fallback,
        threads=torch.get_num_threads(),
        alphas=alphas.data_ptr(),
        fallbacks=weights.fallbacks.data_ptr(),
    )
    return weights


@register("flush_balance_ema_", Backend.NATIVE)
def _native_flush_balance_ema(params: list[Tensor], averages: list[Tensor], alphas: Tensor) -> None:
    from cit_fast import _native

    _native.flush_balance_ema(
        _ema_table(params, averages, params, []), threads=torch.get_num_threads(), alphas=alphas.data_ptr()
    )


@register("balance_ema_", Backend.CUDA, only_when_forced=True)
def _cuda_balance_ema(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    rule: str,
    decay: float,
    fallback: float,
) -> BalanceWeights:
    """Built, never run on a GPU yet: used only when forced. Three launches on the current stream; no waiting."""
    from cit_fast import _native_cuda

    device = params[0].device
    rows = _ema_table(params, averages, grads, previous_grads)
    first_chunk = _first_chunks(params, _native_cuda.CHUNK)
    weights = _empty_weights(params)
    with torch.cuda.device(device):
        table = _to_device([*rows, *first_chunk], device)
        partials = torch.empty(first_chunk[-1], 3, device=device)
        _native_cuda.balance_ema(
            table.data_ptr(),
            count=len(params),
            chunks=first_chunk[-1],
            rule=_RULES[rule],
            decay=decay,
            fallback=fallback,
            partials=partials.data_ptr(),
            alphas=weights.alphas.data_ptr(),
            fallbacks=weights.fallbacks.data_ptr(),
            device=table.device.index,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return weights


@register("flush_balance_ema_", Backend.CUDA, only_when_forced=True)
def _cuda_flush_balance_ema(params: list[Tensor], averages: list[Tensor], alphas: Tensor) -> None:
    """Built, never run on a GPU yet: used only when forced. One launch on the current stream; no waiting."""
    from cit_fast import _native_cuda

    device = params[0].device
    first_chunk = _first_chunks(params, _native_cuda.CHUNK)
    with torch.cuda.device(device):
        table = _to_device([*_ema_table(params, averages, params, []), *first_chunk], device)
        _native_cuda.flush_balance_ema(
            table.data_ptr(),
            count=len(params),
            chunks=first_chunk[-1],
            alphas=alphas.data_ptr(),
            device=table.device.index,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )


def _first_chunks(params: list[Tensor], chunk: int) -> list[int]:
    """The number of chunks before each tensor, and at the end the number of all; the last of a tensor may be short."""
    return [0, *accumulate(-(-param.numel() // chunk) for param in params)]


def _to_device(integers: list[int], device: torch.device) -> Tensor:
    # Pinned, so that the copy waits for nothing; torch keeps both sides alive until the stream is done with them.
    return torch.tensor(integers, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def _ema_table(
    params: list[Tensor], averages: list[Tensor], grads: list[Tensor], previous_grads: list[Tensor]
) -> list[int]:
    table: list[int] = []
    for i, (p, e, g) in enumerate(zip(params, averages, grads, strict=True)):
        table += (p.numel(), p.data_ptr(), _DTYPES[p.dtype], e.data_ptr())
        table += (g.data_ptr(), _DTYPES[g.dtype])
        if previous_grads:
            table += (previous_grads[i].data_ptr(), _DTYPES[previous_grads[i].dtype])
        else:
            table += (0, 0)
    return table


def kernels_cannot(float32_only: list[Tensor], *lists: list[Tensor]) -> dict[Backend, str]:
    """Why the compiled kernels cannot take these tensors: they walk flat memory, with float32 averages and moments."""
    kernels = _BACKENDS.get(lists[0][0].device.type)
    if kernels is None:
        return {}
    for tensor in float32_only:
        if tensor.dtype != torch.float32:
            return {kernels: f"it keeps averages and moments in float32, not {tensor.dtype}"}
    for tensors in lists:
        for param, tensor in zip(lists[0], tensors, strict=False):
            if tensor.dtype not in _DTYPES:
                return {kernels: f"it takes no {tensor.dtype}"}
            flat = tensor.is_contiguous() and param.is_contiguous()
            if not flat and (tensor.stride() != param.stride() or not _is_dense(tensor)):
                return {kernels: "a tensor is not dense or its strides differ from its parameter's"}
    return {}


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlap, in whatever order of dimensions."""
    order = sorted(range(tensor.dim()), key=lambda i: (tensor.stride(i), tensor.size(i)), reverse=True)
    return tensor.permute(order).is_contiguous()


def _empty_weights(params: list[Tensor]) -> BalanceWeights:
    n, device = len(params), params[0].device
    return BalanceWeights(torch.empty(n, device=device), torch.empty(n, device=device, dtype=torch.bool))
