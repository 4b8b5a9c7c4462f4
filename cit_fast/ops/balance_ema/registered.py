"""The balance-weight EMA as torch.library ops: one per public function; the backend is chosen when the op runs.

What a backend registers is called by position:

    balance_norms_(params, averages, grads, previous_grads, granularity, store_grads) -> norms
    balance_ema_(params, averages, grads, previous_grads, rule, decay, fallback, granularity, store_grads, seed)
        -> BalanceWeights
    adamw_balance_ema_(params, grads, exp_avgs, exp_avg_sqs, averages, previous_grads, alphas, step, lr, beta1, beta2,
        eps, weight_decay, rule, decay, fallback, granularity, store_grads, seed) -> BalanceWeights
    flush_balance_ema_(params, averages, alphas, granularity, seed) -> None

All lists are of one device and at least one tensor long; ``previous_grads`` may be empty for ``rule="fixed"``; ``seed``
is in [0, 2**32). ``alphas`` of ``adamw_balance_ema_`` is written in place and returned; ``flush_balance_ema_`` leaves
its ``alphas`` alone: who calls it sets them to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cit_fast.ops.backends import Backend, register, resolve
from cit_fast.ops.balance_ema import cuda as _balance_ema_cuda  # noqa: F401  (they register themselves)
from cit_fast.ops.balance_ema import reference
from cit_fast.ops.balance_ema.native import kernels_cannot
from cit_fast.ops.balance_ema.reference import row_count

register("balance_ema_", Backend.REFERENCE)(reference.balance_ema_)
register("balance_norms_", Backend.REFERENCE)(reference.balance_norms_)
register("adamw_balance_ema_", Backend.REFERENCE)(reference.adamw_balance_ema_)
register("flush_balance_ema_", Backend.REFERENCE)(reference.flush_balance_ema_)

Result = TypeVar("Result")
_PLAIN = {Tensor, torch.nn.Parameter}


class ListOp(Generic[Result]):
    """A torch.library op on lists of tensors, called past torch's dispatcher where nothing listens there.

    For 224 small tensors in six lists the way through the dispatcher takes longer than the kernel. Tracing, dispatch
    modes and subclasses of Tensor see the op as any other.
    """

    def __init__(self, run: Callable[..., Result], schema: str, mutated: Sequence[int]) -> None:
        self.op = torch.library.custom_op(
            f"cit_fast::{run.__name__}",
            run,
            mutates_args=[name for i, name in enumerate(run.__annotations__) if i in mutated],
            schema=schema,
        )
        self.run = run
        self.mutated = mutated

    def __call__(self, *args: Any) -> Result:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not _are_plain(args):
            result: Result = self.op(*args)
            return result
        result = self.run(*args)
        for i in self.mutated:
            torch.autograd.graph.increment_version(args[i])
        return result


def _are_plain(args: tuple[Any, ...]) -> bool:
    return all({type(tensor) for tensor in arg} <= _PLAIN for arg in args if isinstance(arg, list))


def list_op(schema: str, mutated: Sequence[int]) -> Callable[[Callable[..., Result]], ListOp[Result]]:
    """Decorate the implementation of an op; ``mutated`` are the positions of the arguments that it writes."""
    return lambda run: ListOp(run, schema, mutated)


@list_op(
    "(Tensor[] params, Tensor[] averages, Tensor[] grads, Tensor(a3!)[] previous_grads, str granularity, "
    "bool store_grads) -> Tensor",
    mutated=[3],
)
def balance_norms_(
    params: list[Tensor],
    averages: list[Tensor],
    grads: list[Tensor],
    previous_grads: list[Tensor],
    granularity: str,
    store_grads: bool,
) -> Tensor:
    """See :func:`cit_fast.ops.balance_norms_`."""
    lists = (params, averages, grads, previous_grads)
    cannot = kernels_cannot(averages, *lists, granularity=granularity)
    norms: Tensor = resolve("balance_norms_", params[0].device, cannot=cannot)(*lists, granularity, store_grads)
    return norms


@balance_norms_.op.register_fake
def _(params: list[Tensor], averages: Any, grads: Any, previous_grads: Any, granularity: str, *_: Any) -> Tensor:
    return _fake_norms(params, granularity)


@list_op(
    "(Tensor[] params, Tensor(a1!)[] averages, Tensor[] grads, Tensor(a3!)[] previous_grads, str rule, "
    "float decay, float fallback, str granularity, bool store_grads, SymInt seed) -> (Tensor, Tensor, Tensor)",
    mutated=[1, 3],
)
def balance_ema_(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`cit_fast.ops.balance_ema_`."""
    lists = (params, averages, grads, previous_grads)
    cannot = kernels_cannot(averages, *lists, granularity=granularity)
    run = resolve("balance_ema_", params[0].device, cannot=cannot)
    weights = run(*lists, rule, decay, fallback, granularity, store_grads, seed)
    return weights.alphas.float(), weights.fallbacks, weights.norms


@balance_ema_.op.register_fake
def _(
    params: list[Tensor],
    averages: Any,
    grads: Any,
    previous_grads: Any,
    rule: str,
    decay: float,
    fallback: float,
    granularity: str,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    norms = _fake_norms(params, granularity)
    return norms.new_empty(len(norms), dtype=torch.float32), norms.new_empty(len(norms), dtype=torch.bool), norms


@list_op(
    "(Tensor(a0!)[] params, Tensor[] grads, Tensor(a2!)[] exp_avgs, Tensor(a3!)[] exp_avg_sqs, "
    "Tensor(a4!)[] averages, Tensor(a5!)[] previous_grads, Tensor(a6!) alphas, SymInt step, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, str rule, float decay, float fallback, str granularity, "
    "bool store_grads, SymInt seed) -> (Tensor, Tensor)",
    mutated=[0, 2, 3, 4, 5, 6],
)
def adamw_balance_ema_(
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
) -> tuple[Tensor, Tensor]:
    """See :func:`cit_fast.ops.adamw_balance_ema_`; returns (fallbacks, norms)."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, averages, previous_grads)
    cannot = kernels_cannot([*averages, *exp_avgs, *exp_avg_sqs], *lists, granularity=granularity)
    run = resolve("adamw_balance_ema_", params[0].device, cannot=cannot)
    adamw = (step, lr, beta1, beta2, eps, weight_decay)
    weights = run(*lists, alphas, *adamw, rule, decay, fallback, granularity, store_grads, seed)
    return weights.fallbacks, weights.norms


@adamw_balance_ema_.op.register_fake
def _(
    params: list[Tensor],
    grads: Any,
    exp_avgs: Any,
    exp_avg_sqs: Any,
    averages: Any,
    previous_grads: Any,
    alphas: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    rows = alphas.shape[0]
    return alphas.new_empty(rows, dtype=torch.bool), alphas.new_empty(rows, 3, dtype=torch.float64)


@list_op(
    "(Tensor[] params, Tensor(a1!)[] averages, Tensor alphas, str granularity, SymInt seed) -> ()",
    mutated=[1],
)
def flush_balance_ema_(
    params: list[Tensor], averages: list[Tensor], alphas: Tensor, granularity: str, seed: int
) -> None:
    """See :func:`cit_fast.ops.flush_balance_ema_`; ``alphas`` stays."""
    cannot = kernels_cannot(averages, params, averages, granularity=granularity)
    resolve("flush_balance_ema_", params[0].device, cannot=cannot)(params, averages, alphas, granularity, seed)


@flush_balance_ema_.op.register_fake
def _(*_: Any) -> None:
    return None


def _fake_norms(params: list[Tensor], granularity: str) -> Tensor:
    rows = sum(row_count(param, granularity) for param in params)
    return torch.empty(rows, 3, dtype=torch.float64, device=params[0].device)
