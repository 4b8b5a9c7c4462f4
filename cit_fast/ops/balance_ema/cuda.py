"""The balance-weight EMA by the CUDA kernels of csrc/cuda, which serve a GPU where they have proved themselves.

Nothing here waits for the GPU. A call uploads a table of addresses, once for each list and again when an address has
changed (new gradient tensors), and launches one kernel (norms with weights, or AdamW with everything) or two (the
averages are moved as well). See :class:`_Plan`.

CUDA graphs. Every op can be captured. During a capture the table is part of the graph: it is uploaded from the graph's
own memory at each replay, so nothing has to outlive the capture but the tensors themselves, and calls outside the graph
do not disturb it. What a replay needs:

* one call outside the capture first (``cit_fast.available_backends()`` is enough): it loads the kernels;
* every tensor stays at its address: parameters, averages, moments, previous gradients and ``alphas`` are made before
  the capture; gradients either too, kept by ``zero_grad(set_to_none=False)``, or made by a backward pass in the graph;
* ``adamw_balance_ema_`` counts steps on the host, which a graph would freeze: capture
  :func:`adamw_balance_ema_capturable_` instead, with step and learning rate in device memory;
* bfloat16 averages are rounded with random bits that follow from ``seed``, which a graph would freeze as well: only
  :func:`adamw_balance_ema_capturable_` takes them, its bits follow from the step.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cit_fast.errors import BackendError, CitFastError
from cit_fast.ops.backends import Backend, available_backends, register
from cit_fast.ops.balance_ema.checks import (
    BalanceRule,
    Rounding,
    adamw_writes,
    check_adamw,
    check_alphas,
    check_lists,
    check_remaining,
    check_rule,
)
from cit_fast.ops.balance_ema.native import DTYPES, empty_weights, kernels_cannot, outcome
from cit_fast.ops.balance_ema.reference import AdamWLists, AdamWOptions, BalanceOptions, BalanceWeights

_dtype = attrgetter("dtype")
_shape = attrgetter("shape")


@register("balance_norms_", Backend.CUDA)
def _balance_norms(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    store_grads: bool,
) -> Tensor:
    from cit_fast import _native_cuda

    norms = empty_weights(params).norms
    with _prepared(params, averages, grads, previous_grads) as plan:
        _native_cuda.balance_norms(**plan.launch, norms=norms.data_ptr(), store_grads=store_grads)
    return norms


@register("balance_ema_", Backend.CUDA)
def _balance_ema(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    remaining: Tensor | None,
    options: BalanceOptions,
) -> BalanceWeights:
    from cit_fast import _native_cuda

    _check_seed_may_be_frozen("balance_ema_", averages, options.rounding)
    weights = empty_weights(params)
    with _prepared(params, averages, grads, previous_grads) as plan:
        _native_cuda.balance_ema(**plan.launch, **outcome(weights, remaining, options), **_rounding(options))
    return weights


@register("adamw_balance_ema_", Backend.CUDA)
def _adamw_balance_ema(
    lists: AdamWLists, alphas: Tensor, remaining: Tensor | None, adamw: AdamWOptions, options: BalanceOptions
) -> BalanceWeights:
    from cit_fast import _native_cuda

    if torch.cuda.is_current_stream_capturing():
        raise CitFastError(
            "adamw_balance_ema_: a CUDA graph would repeat this very step count and learning rate at each replay; "
            "capture adamw_balance_ema_capturable_, which reads both from device memory"
        )
    weights = empty_weights(lists.params)._replace(alphas=alphas)
    how = {**outcome(weights, remaining, options), **adamw._asdict(), **_rounding(options)}
    with _prepared(*lists.columns) as plan:
        _native_cuda.adamw_balance_ema(**plan.launch, **how)
    return weights


@register("flush_balance_ema_", Backend.CUDA)
def _flush_balance_ema(params: list[Tensor], averages: list[Tensor], alphas: Tensor, rounding: str, seed: int) -> None:
    from cit_fast import _native_cuda

    _check_seed_may_be_frozen("flush_balance_ema_", averages, rounding)
    with _prepared(params, averages) as plan:
        _native_cuda.flush_balance_ema(
            **plan.launch, alphas=alphas.data_ptr(), nearest=rounding == "nearest", seed=seed
        )


def _rounding(options: BalanceOptions) -> dict[str, Any]:
    return {"nearest": options.rounding == "nearest", "seed": options.seed}


@torch.no_grad()
def adamw_balance_ema_capturable_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    alphas: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    rule: BalanceRule = "released",
    decay: float = 0.99,
    fallback: float = 0.01,
    scale: float = 2.0,
    remaining: Tensor | None = None,
    rounding: Rounding = "stochastic",
    store_grads: bool = True,
    seed: int = 0,
) -> BalanceWeights:
    """:func:`cit_fast.ops.adamw_balance_ema_` for a CUDA graph: step count and learning rate from device memory.

    At step ``k`` the result is that of ``adamw_balance_ema_(..., step=k, seed=seed + k)``. The returned tensors, but
    for ``alphas``, belong to the graph when captured. What a replay needs is at the top of this file. No check at first
    use reaches it, so no optimizer of ours uses it.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, averages, previous_grads: As in
            :func:`cit_fast.ops.adamw_balance_ema_`; CUDA tensors. So are ``alphas`` and ``remaining``.
        betas, eps, weight_decay, rule, decay, fallback, scale, rounding, store_grads: As there.
        step: One element, float32 or int64, on the same device: 1 for the first step; counted up by the caller,
            ``step += 1`` in the graph.
        lr: One element, float32 or float64, on the same device. Read as it is: not checked.
        seed: Any integer, of which the lowest 32 bits count.

    Raises:
        CitFastError: As in :func:`cit_fast.ops.adamw_balance_ema_`.
        BackendError: The CUDA kernels are not available or do not take these tensors.
    """
    op = "adamw_balance_ema_capturable_"
    check_rule(op, rule, decay, fallback, scale, rounding)
    check_adamw(op, 1, 0.0, betas, eps, weight_decay)
    every = AdamWLists(params, grads, exp_avgs, exp_avg_sqs, averages, previous_grads)
    lists: dict[str, Sequence[Tensor]] = every._asdict()
    if not params:
        raise CitFastError(f"{op}: params is empty")
    written = adamw_writes(store_grads)
    check_lists(op, lists, written=written, previous_optional=rule == "fixed")
    check_alphas(op, alphas, params)
    check_remaining(op, remaining, params, rule)
    _check_scalar(op, "step", step, params[0], (torch.float32, torch.int64))
    _check_scalar(op, "lr", lr, params[0], (torch.float32, torch.float64))
    _check_kernels(op, lists)
    from cit_fast import _native_cuda

    # The seed of a step follows from the step count in device memory, so a replayed graph draws other bits each time.
    options = BalanceOptions(rule, decay, fallback, scale, rounding, store_grads, seed & 0xFFFFFFFF)
    weights = empty_weights(params)._replace(alphas=alphas)
    prepared = torch.empty(_native_cuda.STEP_BYTES, dtype=torch.uint8, device=params[0].device)
    with _prepared(*every.columns) as plan:
        _native_cuda.step_on_device(
            prepared.data_ptr(),
            step=step.data_ptr(),
            step_is_float=step.dtype == torch.float32,
            lr=lr.data_ptr(),
            lr_is_float=lr.dtype == torch.float32,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
            **_rounding(options),
            device=plan.launch["device"],
            stream=plan.launch["stream"],
        )
        how = outcome(weights, remaining, options)
        _native_cuda.adamw_balance_ema(**plan.launch, **how, step_on_device=prepared.data_ptr())
    for tensors in (*(lists[name] for name in written), [alphas, *([] if remaining is None else [remaining])]):
        torch.autograd.graph.increment_version(tensors)
    return weights


# Plans: what a list needs in device memory.


class _Place(NamedTuple):
    """What tells plans apart in the cache: a list by its first address and which of its streams there are."""

    device: int
    stream: int  # a plan serves one stream, whose order keeps an upload away from the kernels before it
    tensors: int
    first: int
    streams: tuple[bool, ...]


class _Plan:
    """The table of one list in device memory, and the slots for its sums.

    Args:
        place: Where it runs.
        params: The parameters, for their shapes.
        dtypes: Of all tensors, list after list.
    """

    def __init__(self, place: _Place, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
        from cit_fast import _native_cuda

        codes = [0] * place.tensors
        present = [stream for stream, there in enumerate(place.streams) if there]
        for at, dtype in enumerate(dtypes):
            codes[at % place.tensors] |= DTYPES[dtype] << 8 * present[at // place.tensors]
        self.shapes, slots, blocks = _native_cuda.layout([param.numel() for param in params], codes)
        self.addresses: list[int] = []
        device = params[0].device
        self.table = torch.empty(
            _native_cuda.STREAMS * place.tensors + len(self.shapes), dtype=torch.int64, device=device
        )
        self.slots = torch.zeros(slots, _native_cuda.SLOT_BYTES, dtype=torch.uint8, device=device)
        self.launch: dict[str, Any] = {
            "table": self.table.data_ptr(),
            "count": place.tensors,
            "blocks": blocks,
            "slots": self.slots.data_ptr(),
            "device": place.device,
            "stream": place.stream,
        }

    def upload(self, addresses: list[int]) -> None:
        """Make the table hold these addresses, list after list, 0 for a list that is not there."""
        from cit_fast import _native_cuda

        if addresses == self.addresses:
            return
        words = addresses if self.addresses else addresses + self.shapes
        target = {name: self.launch[name] for name in ("device", "stream")}
        _native_cuda.upload(self.launch["table"], words, **target)
        self.addresses = addresses


_PLANS = 32  # lists in use at a time: parameter groups, each with a table for steps and one for flushes
_plans: OrderedDict[_Place, tuple[tuple[object, ...], _Plan]] = OrderedDict()
_lock = threading.Lock()  # from the upload to the launch


@contextmanager
def _prepared(*lists: Sequence[Tensor]) -> Iterator[_Plan]:
    """A plan whose table holds these tensors in the order of csrc/cuda/balance_ema/layout.h; launch inside."""
    device = lists[0][0].device
    with torch.cuda.device(device), _lock:
        yield _plan(lists, torch.cuda.current_stream(device))


def _plan(lists: tuple[Sequence[Tensor], ...], stream: torch.cuda.Stream) -> _Plan:
    from cit_fast import _native_cuda

    params, n = lists[0], len(lists[0])
    addresses: list[int] = []
    for tensors in lists:
        addresses += map(Tensor.data_ptr, tensors) if tensors else [0] * n
    addresses += [0] * (_native_cuda.STREAMS * n - len(addresses))
    there = tuple(map(bool, lists))
    place = _Place(stream.device_index, stream.cuda_stream, n, addresses[0], there)
    dtypes = tuple(map(_dtype, chain(*lists)))
    if torch.cuda.is_current_stream_capturing():
        plan = _Plan(place, params, dtypes)  # in the memory of the graph, which uploads at each replay
        plan.upload(addresses)
        return plan
    # An address may have come to belong to a tensor of another kind.
    signature = (dtypes, tuple(map(_shape, params)))
    known = _plans.pop(place, None)
    plan = known[1] if known and known[0] == signature else _Plan(place, params, dtypes)
    plan.upload(addresses)
    _plans[place] = (signature, plan)
    if len(_plans) > _PLANS:
        _plans.popitem(last=False)
    return plan


# Checks


def _check_seed_may_be_frozen(op: str, averages: Sequence[Tensor], rounding: str) -> None:
    if rounding == "nearest" or not torch.cuda.is_current_stream_capturing():
        return
    if any(each.dtype == torch.bfloat16 for each in averages):
        raise CitFastError(
            f"{op}: a CUDA graph would round bfloat16 averages with the same random bits at each replay, and they "
            "would stall; keep them in float32, or capture adamw_balance_ema_capturable_"
        )


def _check_scalar(op: str, name: str, scalar: Tensor, param: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if scalar.numel() != 1 or scalar.dtype not in dtypes or scalar.device != param.device:
        accepted = " or ".join(str(each).removeprefix("torch.") for each in dtypes)
        raise CitFastError(
            f"{op}: {name} must be one {accepted} on {param.device}, not {scalar.dtype} of shape "
            f"{tuple(scalar.shape)} on {scalar.device}"
        )


def _check_kernels(op: str, lists: dict[str, Sequence[Tensor]]) -> None:
    status = available_backends()["cuda"]
    reason = None if status.available else status.reason
    if lists["params"][0].device.type != "cuda":
        reason = f"it does not run on {lists['params'][0].device.type} tensors"
    state = [*lists["averages"], *lists["exp_avgs"], *lists["exp_avg_sqs"]]
    reason = reason or kernels_cannot(state, *lists.values()).get(Backend.CUDA)
    if reason:
        raise BackendError(f"{op}: the CUDA kernels cannot serve: {reason}")
