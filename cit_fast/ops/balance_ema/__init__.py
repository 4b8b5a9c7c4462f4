"""Exponential moving average of parameters whose weight follows from the gradients, for whole lists of tensors at once.

Source: Qiao et al., ICML 2025 (LCIA), arXiv 2410.10868; the equations are at the top of
:mod:`cit_fast.ops.balance_ema.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cit_fast.ops.backends import Backend, Work, narrowest, register_lazily, resolve
from cit_fast.ops.balance_ema import cuda, flat, reference  # noqa: F401 - cuda and flat register themselves
from cit_fast.ops.balance_ema.checks import (
    BALANCE_RULES,
    BalanceRule,
    Rounding,
    adamw_writes,
    check_adamw,
    check_alphas,
    check_lists,
    check_norms,
    check_remaining,
    check_rounding,
    check_rule,
)
from cit_fast.ops.balance_ema.native import kernels_cannot
from cit_fast.ops.balance_ema.reference import AdamWLists, AdamWOptions, BalanceOptions, BalanceWeights

__all__ = [
    "BALANCE_RULES",
    "AdamWLists",
    "AdamWOptions",
    "BalanceOptions",
    "BalanceRule",
    "BalanceWeights",
    "Rounding",
    "adamw_balance_ema_",
    "balance_ema_",
    "balance_norms_",
    "balance_weights",
    "check_rule",
    "flush_balance_ema_",
    "resolve_for",
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
    scale: float = 2.0,
    remaining: Tensor | None = None,
    rounding: Rounding = "stochastic",
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
            rounding (``rounding``), so that it follows in the mean however small the update. float64 and float16 go to
            the reference backend; a float16 average stops following when the update is below half of its last place.
        grads: n tensors of the same shapes, any of the four dtypes.
        previous_grads: n tensors of the same shapes, any of the four dtypes, **overwritten** by the gradients. A
            first step is expressed by a copy of the gradients: ``c`` is then 0 and the rule falls back. May be
            ``[]`` for ``rule="fixed"``, which needs none.
        rule: ``"paper"``: ``alpha = a' (1 + b) / (a c)``, equation (45), with ``a'`` from ``remaining``;
            ``"released"`` (the authors' code): ``alpha = scale (1 + b) / (a c)``; ``"fixed"``: ``alpha = 1 - decay``.
        decay: Share of the old average, in [0, 1), for ``fixed``.
        fallback: ``alpha``, in (0, 1], where the fraction of ``paper`` or ``released`` is not in (0, 1).
        scale: The constant of ``released``, above 0: 2 in the authors' code, 0.01 in their later toolbox (which has
            ``fallback=0.001``).
        remaining: [n], float32, **changed**: ``a'``, the distance between each parameter and its average after the
            last update, 0 before the first; on return that after this one, ``(1 - alpha) a``. ``paper`` needs it.
        rounding: Of bfloat16 averages: ``"stochastic"``, or ``"nearest"`` as in the authors' runs, with which an
            average does not move by less than half of its last place.
        store_grads: False reads ``previous_grads`` only. The caller then keeps the gradient tensors themselves for
            the next call, and 4 bytes a parameter are not written.
        seed: Any integer, of which the lowest 32 bits count, for the stochastic rounding of bfloat16 averages:
            another one at each step, or the same elements round the same way again and again.

    Returns:
        ``BalanceWeights(alphas [n] float32, fallbacks [n] bool, norms [n, 3] float64)`` on the tensors' device;
        nothing is synchronised with the host. A tensor whose parameter or gradient holds NaN or infinity (or whose
        absolute values sum beyond float32 within 16 Ki elements) is left out: its alpha is 0 and its average stays,
        so an average never becomes NaN. A tensor without elements falls back.

    Raises:
        CitFastError: Lists of different length, tensors that do not fit each other, a tensor that is written but
            listed twice or expanded, an option out of range. Nothing has been written then.
        BackendError: A backend was forced that cannot serve these tensors.

    >>> p, e, g = [torch.ones(3)], [torch.zeros(3)], [torch.full((3,), 0.5)]
    >>> balance_ema_(p, e, g, [torch.full((3,), 9.0)]).alphas  # 2 (1 + 1.5) / (3 * 25.5)
    tensor([0.0654])
    """
    op = "balance_ema_"
    check_rule(op, rule, decay, fallback, scale, rounding)
    lists = {"params": params, "averages": averages, "grads": grads, "previous_grads": previous_grads}
    if not any(lists.values()):
        return _nothing()
    written = ("averages", "previous_grads") if store_grads else ("averages",)
    check_lists(op, lists, written=written, previous_optional=rule == "fixed")
    check_remaining(op, remaining, params, rule)
    options = BalanceOptions(rule, float(decay), float(fallback), float(scale), rounding, store_grads, seed & _UINT32)
    with torch.no_grad():
        return BalanceWeights(*_balance_ema(*(list(each) for each in lists.values()), remaining, *options))


def balance_norms_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous_grads: Sequence[Tensor],
    *,
    store_grads: bool = True,
) -> Tensor:
    """The three L1 norms that decide the weights; then the gradients become the previous ones.

    Args:
        params, averages, grads, store_grads: As in :func:`balance_ema_`; nothing of them is changed.
        previous_grads: As in :func:`balance_ema_`, **overwritten** if ``store_grads``. ``[]``: the third norm is 0.

    Returns:
        [n, 3], float64, on the tensors' device: ``|p - e|_1``, ``|g|_1`` and ``|g - g_prev|_1``. Norms of shards
        add up to those of the whole tensor.

    Raises:
        CitFastError, BackendError: As in :func:`balance_ema_`.

    >>> p, e, g = [torch.ones(3)], [torch.zeros(3)], [torch.full((3,), 0.5)]
    >>> balance_norms_(p, e, g, [torch.full((3,), 9.0)]).tolist()
    [[3.0, 1.5, 25.5]]
    """
    op = "balance_norms_"
    lists = {"params": params, "averages": averages, "grads": grads, "previous_grads": previous_grads}
    if not any(lists.values()):
        return _nothing().norms
    check_lists(op, lists, written=("previous_grads",) if store_grads else (), previous_optional=True)
    with torch.no_grad():
        return _balance_norms(*(list(each) for each in lists.values()), store_grads)


def balance_weights(
    norms: Tensor,
    *,
    rule: BalanceRule = "released",
    decay: float = 0.99,
    fallback: float = 0.01,
    scale: float = 2.0,
    remaining: Tensor | None = None,
) -> BalanceWeights:
    """The weights that follow from the norms, by torch operations where the norms are; no host synchronisation.

    Args:
        norms: [n, 3], float64, as :func:`balance_norms_` returns them.
        rule, decay, fallback, scale: As in :func:`balance_ema_`.
        remaining: As in :func:`balance_ema_`, [n], **changed**.

    Returns:
        ``BalanceWeights(alphas, fallbacks, norms)``, with the ``norms`` that were passed in.

    Raises:
        CitFastError: ``norms`` or ``remaining`` of another shape or dtype, an option out of range.

    >>> balance_weights(torch.tensor([[3.0, 1.5, 25.5]], dtype=torch.float64)).alphas
    tensor([0.0654])
    """
    op = "balance_weights"
    check_rule(op, rule, decay, fallback, scale)
    check_norms(op, norms)
    check_remaining(op, remaining, norms, rule)
    with torch.no_grad():
        alphas, fallbacks = reference.balance_weight(norms, remaining, BalanceOptions(rule, decay, fallback, scale))
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
    scale: float = 2.0,
    remaining: Tensor | None = None,
    rounding: Rounding = "stochastic",
    store_grads: bool = True,
    seed: int = 0,
) -> BalanceWeights:
    """AdamW and the balance-weight EMA in one sweep over memory.

    The average update of a step is done at the start of the next one, when the parameter is read anyway: first the
    pending ``e += alphas (p - e)``, then AdamW as ``torch.optim.AdamW`` does it, then the norms with the new
    parameter give the new ``alphas``. With :func:`flush_balance_ema_` before the averages are used, the result is
    that of :func:`balance_ema_` after each AdamW step.

    An element whose gradient is NaN or infinite keeps its parameter and its moments; its tensor is left out (alpha 0).
    Where tensors are sharded over processes, sum ``norms`` over them and copy the ``alphas`` of
    :func:`balance_weights` into ``alphas``: they are applied at the next call only.

    Args:
        params, grads, averages, previous_grads, rule, decay, fallback, scale, remaining, rounding, store_grads: As in
            :func:`balance_ema_`; ``params`` are **changed**.
        exp_avgs, exp_avg_sqs: n tensors each, dtypes as for ``averages``, **changed**: the moments of AdamW. The
            parameter is updated with their values before rounding.
        alphas: [n], float32, **changed**: on entry the pending weights (0 = none, as before the first step), on
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
    check_rule(op, rule, decay, fallback, scale, rounding)
    check_adamw(op, step, lr, betas, eps, weight_decay)
    lists = AdamWLists(params, grads, exp_avgs, exp_avg_sqs, averages, previous_grads)
    if not any(lists):
        return _nothing()
    check_lists(op, lists._asdict(), written=adamw_writes(store_grads), previous_optional=rule == "fixed")
    check_alphas(op, alphas, params)
    check_remaining(op, remaining, params, rule)
    beta1, beta2 = (float(beta) for beta in betas)
    adamw = AdamWOptions(int(step), float(lr), beta1, beta2, float(eps), float(weight_decay))
    options = BalanceOptions(rule, float(decay), float(fallback), float(scale), rounding, store_grads, seed & _UINT32)
    with torch.no_grad():
        fallbacks, norms = _adamw_balance_ema(*(list(each) for each in lists), alphas, remaining, *adamw, *options)
    return BalanceWeights(alphas, fallbacks, norms)


def flush_balance_ema_(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    alphas: Tensor,
    *,
    rounding: Rounding = "stochastic",
    seed: int = 0,
) -> None:
    """Apply pending average updates, ``averages += alphas (params - averages)``, and set ``alphas`` to 0.

    Args:
        params: n tensors, as in :func:`balance_ema_`.
        averages: n tensors of the same shapes, **changed**.
        alphas: [n], float32, **changed**: the pending weights that :func:`adamw_balance_ema_` left; 0 = nothing
            pending.
        rounding, seed: As in :func:`balance_ema_`.

    Raises:
        CitFastError, BackendError: As in :func:`balance_ema_`.
    """
    op = "flush_balance_ema_"
    check_rounding(op, rounding)
    lists = {"params": params, "averages": averages}
    if not any(lists.values()):
        return
    check_lists(op, lists, written=("averages",))
    check_alphas(op, alphas, params)
    with torch.no_grad():
        _flush_balance_ema(list(params), list(averages), alphas, rounding, seed & _UINT32)
        alphas.zero_()


def _nothing() -> BalanceWeights:
    norms = torch.empty(0, 3, dtype=torch.float64)
    return BalanceWeights(norms.new_empty(0, dtype=torch.float32), norms.new_empty(0, dtype=torch.bool), norms)


# The ops as torch knows them; the backend is chosen when one runs. An option is spelt in the function above, in
# BalanceOptions or AdamWOptions, and in these schemas.

Result = TypeVar("Result")
_PLAIN = {Tensor, torch.nn.Parameter}


class _ListOp(Generic[Result]):
    """A torch.library op on lists of tensors, called past torch's dispatcher where nothing listens there.

    For 224 small tensors in six lists the way through the dispatcher takes longer than the kernel. Tracing, dispatch
    modes and subclasses of Tensor see the op as any other.
    """

    def __init__(self, name: str, run: Callable[..., Result], schema: str, mutated: Sequence[int]) -> None:
        """``mutated``: the positions of the arguments that the op writes."""
        self.op = torch.library.custom_op(
            f"cit_fast::{name}",
            run,
            mutates_args=[name for i, name in enumerate(run.__annotations__) if i in mutated],
            schema=schema,
        )
        self.run = run
        self.mutated = mutated

    def __call__(self, *args: Any) -> Result:
        """Run the op."""
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not _are_plain(args):
            result: Result = self.op(*args)
            return result
        result = self.run(*args)
        for i in self.mutated:
            if args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        return result


def _are_plain(args: tuple[Any, ...]) -> bool:
    return all({type(tensor) for tensor in arg} <= _PLAIN for arg in args if isinstance(arg, list))


def _list_op(name: str, schema: str, mutated: Sequence[int]) -> Callable[[Callable[..., Result]], _ListOp[Result]]:
    return lambda run: _ListOp(name, run, schema, mutated)


def resolve_for(op: str, *lists: Sequence[Tensor], cannot: Mapping[Backend, str] | None = None) -> Callable[..., Any]:
    """The implementation for lists of tensors, the parameters first.

    Args:
        op: Name of the public op.
        lists: All tensors.
        cannot: As in :func:`cit_fast.ops.backends.resolve`; None: every kernel takes these tensors.
    """

    def work() -> Work:
        dtypes = {tensor.dtype for tensors in lists for tensor in tensors}
        return Work(narrowest(dtypes), sum(map(Tensor.numel, lists[0])))

    device = lists[0][0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        cannot = {Backend.TRITON: "its tables are copied from memory that is gone when a graph runs", **(cannot or {})}
    return resolve(op, device, cannot=cannot, work=work)


def _resolve(op: str, state: Sequence[Tensor], *lists: Sequence[Tensor]) -> Callable[..., Any]:
    """``state``: averages and moments."""
    return resolve_for(op, *lists, cannot=kernels_cannot(state, *lists))


_RULE = "str rule, float decay, float fallback, float scale, str rounding, bool store_grads, SymInt seed"


@_list_op(
    "balance_norms_",
    "(Tensor[] params, Tensor[] averages, Tensor[] grads, Tensor(a3!)[] previous_grads, bool store_grads) -> Tensor",
    mutated=[3],
)
def _balance_norms(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    store_grads: bool,
) -> Tensor:
    lists = (params, averages, grads, previous_grads)
    run = _resolve("balance_norms_", averages, *lists)
    norms: Tensor = run(*lists, store_grads)
    return norms


@_balance_norms.op.register_fake
def _(params: list[Tensor], *_: Any) -> Tensor:
    return torch.empty(len(params), 3, dtype=torch.float64, device=params[0].device)


@_list_op(
    "balance_ema_",
    "(Tensor[] params, Tensor(a1!)[] averages, Tensor[] grads, Tensor(a3!)[] previous_grads, "
    f"Tensor(a4!)? remaining, {_RULE}) -> (Tensor, Tensor, Tensor)",
    mutated=[1, 3, 4],
)
def _balance_ema(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    remaining: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = (params, averages, grads, previous_grads)
    run = _resolve("balance_ema_", averages, *lists)
    weights = run(*lists, remaining, BalanceOptions(*options))
    return weights.alphas.float(), weights.fallbacks, weights.norms


@_balance_ema.op.register_fake
def _(params: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    norms = torch.empty(len(params), 3, dtype=torch.float64, device=params[0].device)
    return norms.new_empty(len(norms), dtype=torch.float32), norms.new_empty(len(norms), dtype=torch.bool), norms


@_list_op(
    "adamw_balance_ema_",
    "(Tensor(a0!)[] params, Tensor[] grads, Tensor(a2!)[] exp_avgs, Tensor(a3!)[] exp_avg_sqs, "
    "Tensor(a4!)[] averages, Tensor(a5!)[] previous_grads, Tensor(a6!) alphas, Tensor(a7!)? remaining, SymInt step, "
    f"float lr, float beta1, float beta2, float eps, float weight_decay, {_RULE}) -> (Tensor, Tensor)",
    mutated=[0, 2, 3, 4, 5, 6, 7],
)
def _adamw_balance_ema(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    previous_grads: list[Tensor],
    alphas: Tensor,
    remaining: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    lists = AdamWLists(params, grads, exp_avgs, exp_avg_sqs, averages, previous_grads)
    run = _resolve("adamw_balance_ema_", [*averages, *exp_avgs, *exp_avg_sqs], *lists)
    count = len(AdamWOptions._fields)
    weights = run(lists, alphas, remaining, AdamWOptions(*options[:count]), BalanceOptions(*options[count:]))
    return weights.fallbacks, weights.norms


@_adamw_balance_ema.op.register_fake
def _(params: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor]:
    alphas = arguments[5]
    return alphas.new_empty(len(params), dtype=torch.bool), alphas.new_empty(len(params), 3, dtype=torch.float64)


@_list_op(
    "flush_balance_ema_",
    "(Tensor[] params, Tensor(a1!)[] averages, Tensor alphas, str rounding, SymInt seed) -> ()",
    mutated=[1],
)
def _flush_balance_ema(params: list[Tensor], averages: list[Tensor], alphas: Tensor, rounding: str, seed: int) -> None:
    run = _resolve("flush_balance_ema_", averages, params, averages)
    run(params, averages, alphas, rounding, seed)


@_flush_balance_ema.op.register_fake
def _(*_: Any) -> None:
    return None


for _name in ("balance_norms_", "balance_ema_", "adamw_balance_ema_", "flush_balance_ema_"):
    register_lazily(_name, Backend.TRITON, f"cit_fast.kernels.balance_ema:{_name}")
