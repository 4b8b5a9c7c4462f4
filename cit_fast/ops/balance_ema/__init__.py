"""Exponential moving average of parameters whose weight follows from the gradients, for whole lists of tensors at once.

Source: Qiao et al., ICML 2025 (LCIA), arXiv 2410.10868; the equations are at the top of
:mod:`cit_fast.ops.balance_ema.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cit_fast.ops.balance_ema import reference, registered
from cit_fast.ops.balance_ema.checks import (
    BALANCE_GRANULARITIES,
    BALANCE_RULES,
    BalanceGranularity,
    BalanceRule,
    adamw_writes,
    check_adamw,
    check_alphas,
    check_granularity,
    check_lists,
    check_norms,
    check_rule,
)
from cit_fast.ops.balance_ema.reference import BalanceWeights

__all__ = [
    "BALANCE_GRANULARITIES",
    "BALANCE_RULES",
    "BalanceGranularity",
    "BalanceRule",
    "BalanceWeights",
    "adamw_balance_ema_",
    "balance_ema_",
    "balance_norms_",
    "balance_weights",
    "check_granularity",
    "check_rule",
    "flush_balance_ema_",
]

_UINT32 = 0xFFFFFFFF


def balance_ema_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    *,
    rule: BalanceRule = "released",
    decay: float = 0.99,
    fallback: float = 0.01,
    granularity: BalanceGranularity = "tensor",
    store_grads: bool = True,
    seed: int = 0,
) -> BalanceWeights:
    """Move each average towards its parameter by a weight that the gradients decide, in place.

    Per tensor: ``a = |p - e|_1``, ``b = |g|_1``, ``c = |g - g_prev|_1`` with the average before its update;
    ``alpha`` from the rule; then ``e += alpha (p - e)`` and ``g_prev = g``. To be called after the optimizer step,
    gradients still there. It is :func:`balance_norms_`, :func:`balance_weights` and :func:`flush_balance_ema_` in one
    call; where tensors are sharded over processes, call the three and sum the norms over the processes in between.

    Args:
        params: n tensors of any shape; float32, bfloat16 or float16 (float64: reference backend only). All lists
            live on one device.
        averages: n tensors of the same shapes, **changed**. float32 is meant. bfloat16 is written with stochastic
            rounding, so that it follows in the mean however small the update. float64 and float16 go to the reference
            backend; a float16 average stops following when the update is below half of its last place.
        grads: n tensors of the same shapes, any of the four dtypes.
        previous_grads: n tensors of the same shapes, any of the four dtypes, **overwritten** by the gradients. A
            first step is expressed by a copy of the gradients: ``c`` is then 0 and the rule falls back. May be
            ``[]`` for ``rule="fixed"``, which needs none.
        rule: ``"released"`` (the authors' code): ``alpha = 2 (1 + b) / (a c)``; ``"paper"``:
            ``alpha = 1 - (1 + b) / (a c)``; ``"fixed"``: ``alpha = 1 - decay``.
        decay: Share of the old average, in [0, 1), for ``fixed`` and where ``paper``'s fraction is not in (0, 1).
        fallback: ``alpha``, in (0, 1], where ``released``'s fraction is not in (0, 1).
        granularity: ``"tensor"``: a weight for each tensor. ``"row"``: a weight for each of the ``shape[0]`` rows of a
            tensor of two or more dimensions, and one for a tensor of fewer; the kernels want contiguous tensors then.
        store_grads: False reads ``previous_grads`` only. The caller then keeps the gradient tensors themselves for
            the next call, and 4 bytes a parameter are not written.
        seed: Any integer, of which the lowest 32 bits count, for the stochastic rounding of bfloat16 averages:
            another one at each step, or the same elements round the same way again and again.

    Returns:
        ``BalanceWeights(alphas [rows] float32, fallbacks [rows] bool, norms [rows, 3] float64)`` on the tensors'
        device, rows of all tensors in order (``"tensor"``: rows = n); nothing is synchronised with the host. A row
        whose parameter or gradient holds NaN or infinity (or whose absolute values sum beyond float32 within 16 Ki
        elements) is left out: its alpha is 0 and its average stays, so an average never becomes NaN. A row without
        elements falls back.

    Raises:
        CitFastError: Lists of different length, tensors that do not fit each other, a tensor that is written but
            listed twice or expanded, an option out of range. Nothing has been written then.
        BackendError: A backend was forced that cannot serve these tensors.

    >>> p, e, g = [torch.ones(3)], [torch.zeros(3)], [torch.full((3,), 0.5)]
    >>> balance_ema_(p, e, g, [torch.full((3,), 9.0)]).alphas  # 2 (1 + 1.5) / (3 * 25.5)
    tensor([0.0654])
    """
    op = "balance_ema_"
    check_rule(op, rule, decay, fallback)
    check_granularity(op, granularity)
    lists = {"params": params, "averages": averages, "grads": grads, "previous_grads": previous_grads}
    if not any(lists.values()):
        return _nothing()
    written = ("averages", "previous_grads") if store_grads else ("averages",)
    check_lists(op, lists, written=written, previous_optional=rule == "fixed")
    with torch.no_grad():
        options = (rule, float(decay), float(fallback), granularity, store_grads, seed & _UINT32)
        return BalanceWeights(*registered.balance_ema_(*(list(each) for each in lists.values()), *options))


def balance_norms_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    *,
    granularity: BalanceGranularity = "tensor",
    store_grads: bool = True,
) -> Tensor:
    """The three L1 norms that decide the weights; then the gradients become the previous ones.

    Args:
        params, averages, grads, granularity, store_grads: As in :func:`balance_ema_`; nothing of them is changed.
        previous_grads: As in :func:`balance_ema_`, **overwritten** if ``store_grads``. ``[]``: the third norm is 0.

    Returns:
        [rows, 3], float64, on the tensors' device: ``|p - e|_1``, ``|g|_1`` and ``|g - g_prev|_1``. Norms of shards
        add up to those of the whole tensor.

    Raises:
        CitFastError, BackendError: As in :func:`balance_ema_`.

    >>> p, e, g = [torch.ones(3)], [torch.zeros(3)], [torch.full((3,), 0.5)]
    >>> balance_norms_(p, e, g, [torch.full((3,), 9.0)]).tolist()
    [[3.0, 1.5, 25.5]]
    """
    op = "balance_norms_"
    check_granularity(op, granularity)
    lists = {"params": params, "averages": averages, "grads": grads, "previous_grads": previous_grads}
    if not any(lists.values()):
        return _nothing().norms
    check_lists(op, lists, written=("previous_grads",) if store_grads else (), previous_optional=True)
    with torch.no_grad():
        norms: Tensor = registered.balance_norms_(*(list(each) for each in lists.values()), granularity, store_grads)
    return norms


def balance_weights(
    norms: Tensor, *, rule: BalanceRule = "released", decay: float = 0.99, fallback: float = 0.01
) -> BalanceWeights:
    """The weights that follow from the norms, by torch operations where the norms are; no host synchronisation.

    Args:
        norms: [rows, 3], float64, as :func:`balance_norms_` returns them.
        rule, decay, fallback: As in :func:`balance_ema_`.

    Returns:
        ``BalanceWeights(alphas, fallbacks, norms)``, with the ``norms`` that were passed in.

    Raises:
        CitFastError: ``norms`` of another shape or dtype, an option out of range.

    >>> balance_weights(torch.tensor([[3.0, 1.5, 25.5]], dtype=torch.float64)).alphas
    tensor([0.0654])
    """
    check_rule("balance_weights", rule, decay, fallback)
    check_norms("balance_weights", norms)
    alphas, fallbacks = reference.balance_weight(norms, rule, decay, fallback)
    return BalanceWeights(alphas.float(), fallbacks, norms)


def adamw_balance_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    alphas: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    rule: BalanceRule = "released",
    decay: float = 0.99,
    fallback: float = 0.01,
    granularity: BalanceGranularity = "tensor",
    store_grads: bool = True,
    seed: int = 0,
) -> BalanceWeights:
    """AdamW and the balance-weight EMA in one sweep over memory.

    The average update of a step is done at the start of the next one, when the parameter is read anyway: first the
    pending ``e += alphas (p - e)``, then AdamW as ``torch.optim.AdamW`` does it, then the norms with the new
    parameter give the new ``alphas``. With :func:`flush_balance_ema_` before the averages are used, the result is
    that of :func:`balance_ema_` after each AdamW step.

    An element whose gradient is NaN or infinite keeps its parameter and its moments; its row is left out (alpha 0).
    Where tensors are sharded over processes, sum ``norms`` over them and copy the ``alphas`` of
    :func:`balance_weights` into ``alphas``: they are applied at the next call only.

    Args:
        params, grads, averages, previous_grads, rule, decay, fallback, granularity, store_grads: As in
            :func:`balance_ema_`; ``params`` are **changed**.
        exp_avgs, exp_avg_sqs: n tensors each, dtypes as for ``averages``, **changed**: the moments of AdamW. The
            parameter is updated with their values before rounding.
        alphas: [rows], float32, **changed**: on entry the pending weights (0 = none, as before the first step), on
            return the new ones.
        step: 1 for the first step.
        lr, betas, eps, weight_decay: As in ``torch.optim.AdamW``. ``torch.compile`` compiles anew for each ``lr``, as
            it does there for one that is no tensor.
        seed: As in :func:`balance_ema_`, for averages and moments.

    Returns:
        ``BalanceWeights(alphas, fallbacks, norms)``, with the tensor ``alphas`` that was passed in.

    Raises:
        CitFastError, BackendError: As in :func:`balance_ema_`.
    """
    op = "adamw_balance_ema_"
    check_rule(op, rule, decay, fallback)
    check_granularity(op, granularity)
    check_adamw(op, step, lr, betas, eps, weight_decay)
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "averages": averages,
        "previous_grads": previous_grads,
    }
    if not any(lists.values()):
        return _nothing()
    check_lists(op, lists, written=adamw_writes(store_grads), previous_optional=rule == "fixed")
    check_alphas(op, alphas, params, granularity)
    with torch.no_grad():
        fallbacks, norms = registered.adamw_balance_ema_(
            *(list(each) for each in lists.values()),
            alphas,
            int(step),
            float(lr),
            *(float(beta) for beta in betas),
            float(eps),
            float(weight_decay),
            rule,
            float(decay),
            float(fallback),
            granularity,
            store_grads,
            seed & _UINT32,
        )
    return BalanceWeights(alphas, fallbacks, norms)


def flush_balance_ema_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    alphas: Tensor,
    *,
    granularity: BalanceGranularity = "tensor",
    seed: int = 0,
) -> None:
    """Apply pending average updates, ``averages += alphas (params - averages)``, and set ``alphas`` to 0.

    Args:
        params: n tensors, as in :func:`balance_ema_`.
        averages: n tensors of the same shapes, **changed**.
        alphas: [rows], float32, **changed**: the pending weights that :func:`adamw_balance_ema_` left; 0 = nothing
            pending.
        granularity, seed: As in :func:`balance_ema_`.

    Raises:
        CitFastError, BackendError: As in :func:`balance_ema_`.
    """
    op = "flush_balance_ema_"
    check_granularity(op, granularity)
    lists = {"params": params, "averages": averages}
    if not any(lists.values()):
        return
    check_lists(op, lists, written=("averages",))
    check_alphas(op, alphas, params, granularity)
    with torch.no_grad():
        registered.flush_balance_ema_(list(params), list(averages), alphas, granularity, seed & _UINT32)
        alphas.zero_()


def _nothing() -> BalanceWeights:
    return BalanceWeights(torch.empty(0), torch.empty(0, dtype=torch.bool), torch.empty(0, 3, dtype=torch.float64))
