"""AdamWBalanceEMA: AdamW and the balance-weight average of its parameters in one sweep over memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from cit_fast.errors import CitFastError
from cit_fast.ops.balance_ema import (
    AdamWLists,
    AdamWOptions,
    BalanceOptions,
    BalanceRule,
    Rounding,
    adamw_balance_ema_,
    balance_weights,
    flush_balance_ema_,
    resolve_for,
)
from cit_fast.ops.balance_ema.checks import check_adamw
from cit_fast.optim.average_options import AverageOptions, check_dtype
from cit_fast.optim.averaging import AveragingOptimizer
from cit_fast.optim.partitions import Partition
from cit_fast.optim.saving import StateLoading
from cit_fast.optim.sharding import Reduction, local
from cit_fast.optim.sweeps import AVERAGE, PREVIOUS_GRAD, REMAINING, Sweep, zeros_like_parameter

_GOLDEN = 0x9E3779B1  # odd, so that seeds of different steps differ in all bits
STEP, EXP_AVG, EXP_AVG_SQ = "step", "exp_avg", "exp_avg_sq"

GroupOptions = tuple[float, tuple[float, float], float, float]
"""lr, betas, eps, weight_decay of a parameter group."""


@dataclass(eq=False)
class AdamWSweep(Sweep):
    """A sweep with the moments of AdamW and the pending weights.

    Attributes:
        alphas: [tensors], float32: weights of the last step, to be applied when the parameters are read next.
        steps: [n], float32: ``state[p]["step"]`` are its elements.
        step: their common value.
        version: of ``steps``, which tells whether somebody else wrote to it.
        group: the first parameter group with the options of these parameters.
    """

    STATE = (AVERAGE, EXP_AVG, EXP_AVG_SQ)
    COUNTERS = (STEP,)

    alphas: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    steps: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    step: int = 0
    version: int = 0
    group: int = 0

    def is_current(self) -> bool:
        """Whether the entries still hold what the plan was made for."""
        return self.steps._version == self.version and super().is_current()

    def count(self) -> None:
        """One step more."""
        self.step += 1
        self.steps.add_(1)
        self.version = self.steps._version


class AdamWBalanceEMA(AveragingOptimizer):
    """AdamW that keeps an average of its parameters which forgets less, at hardly more than the cost of AdamW alone.

    The numbers are those of ``BalanceEMA(torch.optim.AdamW(...))`` to float32 rounding, but parameters, gradients and
    moments are read once a step: the average of a step is brought up to date when its parameter is read at the next
    one. ``state_dict()``, :meth:`averaged` and :meth:`copy_averaged_to_parameters` do that first; before you read
    ``state[p]["average"]`` or overwrite parameters yourself, call :meth:`flush`.

    State names and group options are those of ``torch.optim.AdamW``, whose state dicts load here and the other way
    round; ``average`` and ``previous_grad`` come on top. An element whose gradient is not finite keeps its value, and
    its tensor's average stays as it is for the step; :attr:`skipped_updates` counts it.

    Source: Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101; Qiao et al., ICML 2025 (LCIA), arXiv 2410.10868.

    Args:
        params: Parameters, named parameters or parameter groups, as for ``torch.optim.AdamW``.
        lr: Learning rate, not negative; a number or a tensor of one element.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the root of the second moment, not negative.
        weight_decay: Not negative.
        rule, decay, fallback, scale, scope, average_dtype, rounding, start, keep_gradients: As in
            :class:`cit_fast.optim.BalanceEMA`.
        state_dtype: Dtype of the moments, ``torch.float32`` or ``torch.bfloat16`` (with stochastic rounding),
            whatever that of the parameters (float64 for float64 parameters).

    Raises:
        CitFastError: An option is out of range.

    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = AdamWBalanceEMA(layer.parameters(), lr=2e-4)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> with optimizer.averaged():
    ...     prediction = layer(torch.ones(1, 2))
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rule: BalanceRule = "released",
        decay: float = 0.99,
        fallback: float = 0.01,
        scope: Literal["task", "stream"] = "task",
        average_dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        keep_gradients: Literal["reference", "copy"] = "reference",
        scale: float = 2.0,
        rounding: Rounding = "stochastic",
        start: Literal["before", "after"] = "before",
    ) -> None:
        options = AverageOptions(rule, decay, fallback, scope, average_dtype, keep_gradients, scale, rounding, start)
        options.check("AdamWBalanceEMA")
        check_dtype("AdamWBalanceEMA", "state_dtype", state_dtype)
        self._begin(options, state_dtype)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._watch_loading()

    def _begin(self, options: AverageOptions, state_dtype: torch.dtype) -> None:
        self._start(options)
        self.state_dtype = state_dtype
        self._pending: dict[Tensor, Tensor] = {}  # of parameters that are in no sweep
        self._behind = False  # whether a step is pending
        self._fresh: list[Tensor] = []  # parameters whose average was made for the step in hand

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        own = {"options": self._options(), "state_dtype": self.state_dtype, "starting": self._starting}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "options" in state:  # unpickled; Optimizer.load_state_dict calls this too
            self._begin(state.pop("options"), state.pop("state_dtype"))
            self._starting = state.pop("starting", {})
            super().__setstate__(state)
            self._given.add(self.param_groups)
            self._watch_loading()
        else:
            super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their state and average start at their first step.

        Raises:
            CitFastError: An option of the group is out of range.
        """
        super().add_param_group(param_group)
        try:
            self._group_options()
        except CitFastError:
            self.param_groups.pop()
            raise
        self._given.add(self.param_groups[-1:])

    # Stepping

    @_disable_dynamo  # which would lose some of what a step notes down
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """AdamW's step, and the weights with which the averages will follow.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returns.

        Raises:
            CitFastError: Called inside :meth:`averaged`, an option is out of range, or a parameter has a sparse
                gradient, is complex, or belongs to an engine whose parameters cannot be averaged. Nothing has been
                written then.
        """
        self._refuse_inside_averaged("step()")
        self._check_options()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        options = self._group_options()
        by_group = [[param for param in group["params"] if param.grad is not None] for group in self.param_groups]
        present = list(chain.from_iterable(by_group))
        self._check_parameters(present)
        # Groups with equal options go through the op together; a scheduler may part them, or a parameter move.
        sizes = map(len, by_group)
        same_as = tuple(_first_equal(options))
        self._begin_report(present)
        spread: dict[Reduction | Partition, list[tuple[AdamWSweep, Tensor]]] = {}
        sweeps = self._sweeps_of(present, also=(same_as, *sizes))
        self._behind = True  # also where a later one of them fails
        for i, sweep in enumerate(sweeps):
            norms = self._run(sweep, options[sweep.group], i)
            if sweep.over is not None:
                spread.setdefault(sweep.over, []).append((sweep, norms))
        for over, parts in spread.items():
            for (sweep, _), norms in zip(parts, over.sum_norms([norms for _, norms in parts]), strict=True):
                weights = balance_weights(
                    norms,
                    rule=self.rule,
                    decay=self.decay,
                    fallback=self.fallback,
                    scale=self.scale,
                    remaining=sweep.remaining,
                )
                sweep.alphas.copy_(sweep.own(weights.alphas))
                self._report(sweep, weights)
        if self.start == "after":
            self._start_averages_here()
        self._fresh = []
        return loss

    def _start_averages_here(self) -> None:
        """The averages that are new start at the parameters after their first step; what is pending moves nothing."""
        for param in self._fresh:
            entry = self.state[param]
            local(entry[AVERAGE]).copy_(local(param))
            if REMAINING in entry:
                entry[REMAINING].zero_()

    def _run(self, sweep: AdamWSweep, group: GroupOptions, index: int) -> Tensor:
        params, grads, previous = self._gradients_of(sweep)
        lr, betas, eps, weight_decay = group
        step = sweep.step + 1
        averages, exp_avgs, exp_avg_sqs = map(sweep.state, sweep.STATE)
        lists = AdamWLists(params, grads, exp_avgs, exp_avg_sqs, averages, previous)
        seed = step * _GOLDEN + index
        # The usual case goes past the public op: its checks hold for these lists since the sweep was filled.
        if sweep.takes(params, grads, averages, exp_avgs, exp_avg_sqs):
            run = resolve_for("adamw_balance_ema_", *lists)
            adamw = AdamWOptions(step, lr, *betas, eps, weight_decay)
            options = BalanceOptions(
                self.rule, self.decay, self.fallback, self.scale, self.rounding, sweep.copies, seed & 0xFFFFFFFF
            )
            weights = run(lists, sweep.alphas, sweep.own_remaining(), adamw, options)
            increment_version(params)
        else:
            weights = adamw_balance_ema_(
                *lists,
                sweep.alphas,
                step=step,
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                rule=self.rule,
                decay=self.decay,
                fallback=self.fallback,
                scale=self.scale,
                remaining=sweep.own_remaining(),
                rounding=self.rounding,
                store_grads=sweep.copies,
                seed=seed,
            )
        sweep.count()
        sweep.keep(grads)
        if sweep.over is None:
            self._report(sweep, weights)
        norms: Tensor = weights.norms
        return norms

    def _group_options(self) -> list[GroupOptions]:
        found: list[GroupOptions] = []
        for group in self.param_groups:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise CitFastError(f"AdamWBalanceEMA: a parameter group has {name}=True, which it cannot do")
            beta1, beta2 = group["betas"]
            lr, eps, weight_decay = (float(group[name]) for name in ("lr", "eps", "weight_decay"))
            options = lr, (float(beta1), float(beta2)), eps, weight_decay
            check_adamw("AdamWBalanceEMA", 1, *options)
            found.append(options)
        return found

    # Sweeps

    def _make_sweeps(self, params: list[Tensor]) -> list[AdamWSweep]:
        self._set_aside_pending()
        options = self._group_options()
        first_like: dict[int, int] = {}
        for group, first in zip(self.param_groups, _first_equal(options), strict=True):
            first_like.update((id(param), first) for param in group["params"])
        by_key: dict[Any, list[Tensor]] = {}
        for param in params:
            self._initialise(param)
            key = (first_like[id(param)], int(self.state[param][STEP]), *self._sweep_key(param))
            by_key.setdefault(key, []).append(param)
        sweeps = [self._make_sweep(each, *key[:2]) for key, each in by_key.items()]
        for param in params:
            self._pending.pop(param, None)
        return sweeps

    def _make_sweep(self, params: list[Tensor], group: int, step: int) -> AdamWSweep:
        steps = torch.full((len(params),), float(step), dtype=torch.float32)  # on the host, as torch's AdamW has them
        for param, each in zip(params, steps.unbind(), strict=True):
            self.state[param][STEP] = each
        alphas = [
            self._pending[param].to(param.device)
            if param in self._pending
            else torch.zeros(self._weights_of(param), dtype=torch.float32, device=param.device)
            for param in params
        ]
        return self._fill_sweep(
            AdamWSweep,
            params,
            alphas=torch.cat(alphas),
            steps=steps,
            step=step,
            version=steps._version,
            group=group,
        )

    def _initialise(self, param: Tensor) -> None:
        entry = self.state[param]
        if EXP_AVG not in entry:
            dtype = torch.float64 if param.dtype == torch.float64 else self.state_dtype
            entry[STEP] = torch.tensor(0.0, dtype=torch.float32)
            entry[EXP_AVG] = zeros_like_parameter(param, dtype)
            entry[EXP_AVG_SQ] = zeros_like_parameter(param, dtype)
        if AVERAGE not in entry:
            if param not in self._starting:
                self._fresh.append(param)
            entry[AVERAGE] = self._new_average(param)
            self._starting.pop(param, None)
            self._pending.pop(param, None)  # that was of an average that somebody took away

    # Pending weights

    def flush(self) -> None:
        """Bring the averages up to date with the last step: 12 bytes a parameter, once."""
        if not self._behind:
            return
        self._last = [
            step._replace(weights=step.weights._replace(alphas=step.weights.alphas.clone())) for step in self._last
        ]
        by_device: dict[torch.device, list[Tensor]] = {}
        pending = self._all_pending()
        for param in pending:
            by_device.setdefault(param.device, []).append(param)
        for i, params in enumerate(by_device.values()):
            alphas = torch.cat([pending[param].to(param.device) for param in params])
            self._flush(params, alphas, i)
        for sweep in self._sweeps:
            sweep.alphas.zero_()
        self._pending = {}
        self._behind = False

    def _flush(self, params: list[Tensor], alphas: Tensor, index: int) -> None:
        step = self._sweeps[0].step if self._sweeps else int(self.state[params[0]][STEP])
        seed = step * _GOLDEN + index + 0x55555555
        parts = [part for param in params for part in self._parts(param, param)]
        averages = self._local_state(params, AVERAGE)
        near = [e if e.device == p.device else e.to(p.device) for e, p in zip(averages, parts, strict=True)]
        flush_balance_ema_(parts, near, alphas, rounding=self.rounding, seed=seed)
        for average, moved in zip(averages, near, strict=True):
            if moved is not average:  # the state is elsewhere between two steps
                average.copy_(moved)

    def _set_aside_pending(self) -> None:
        """Keep what is pending by parameter, while sweeps are made anew."""
        if self._behind:
            self._pending = self._all_pending()
        self._sweeps, self._planned = [], None

    def _all_pending(self) -> dict[Tensor, Tensor]:
        """The pending weights of each parameter that has an average."""
        pending = dict(self._pending)
        for sweep in self._sweeps:
            pending.update(zip(sweep.params, torch.split(sweep.alphas, sweep.weights), strict=True))
        return {param: each for param, each in pending.items() if AVERAGE in self.state.get(param, {})}

    def _follow_groups(self) -> None:
        super()._follow_groups()
        known = {*self._parameters(), *self.state}
        self._pending = {param: each for param, each in self._pending.items() if param in known}

    def _forget_sweeps(self) -> None:
        super()._forget_sweeps()
        self._pending, self._behind = {}, False

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """As of ``torch.optim.AdamW``, with ``average`` and ``previous_grad`` in each parameter's entry."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` or that of ``torch.optim.AdamW`` gave.

        Averages and moments get the dtypes of this optimizer's options, not that of the parameters. Without averages
        in it, they start at the next step.

        Raises:
            CitFastError: A tensor does not have its parameter's shape (the checkpoint is that of another model), or a
                group wants ``amsgrad``, ``maximize`` or L2 regularisation. Nothing has changed then.
        """
        self._refuse_inside_averaged("load_state_dict()")
        # Last of the hooks: those of others may rename or add entries.
        self._optimizer_load_state_dict_pre_hooks.move_to_end(self._take.id)
        super().load_state_dict(state_dict)

    @property
    def _loading(self) -> StateLoading:
        dtypes = {AVERAGE: self.average_dtype, PREVIOUS_GRAD: None, REMAINING: torch.float32}
        moments = {EXP_AVG: self.state_dtype, EXP_AVG_SQ: self.state_dtype}
        return StateLoading(type(self).__name__, {**dtypes, **moments})

    def _watch_loading(self) -> None:
        # torch casts state to the parameter's dtype while it loads: ours is taken out before and put back after.
        loaded: dict[int, Any] = {}

        def take(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            for group in state_dict["param_groups"]:
                for name in ("amsgrad", "maximize"):
                    if group.get(name):
                        raise CitFastError(
                            f"AdamWBalanceEMA.load_state_dict: a parameter group has {name}=True, which it cannot do"
                        )
                if group.get("decoupled_weight_decay") is False and group.get("weight_decay"):
                    raise CitFastError(
                        "AdamWBalanceEMA.load_state_dict: this is the state of an Adam with L2 regularisation "
                        f"(weight_decay={group['weight_decay']}), not of an AdamW; set its weight_decay to 0 first"
                    )
            state_dict, ours = self._loading.take(state_dict, self._parameters())
            loaded.clear()
            loaded.update(ours)
            return state_dict

        def put(_: Optimizer) -> None:
            params = self._parameters()
            self._loading.put(loaded, params, self.state)
            for param in params:
                step = self.state[param].get(STEP) if param in self.state else None
                if step is not None:
                    self.state[param][STEP] = torch.tensor(float(step), dtype=torch.float32)
            loaded.clear()
            self._forget_sweeps()
            self._last = []

        self._take = self.register_load_state_dict_pre_hook(take)
        self.register_load_state_dict_post_hook(put)


def _first_equal(options: list[GroupOptions]) -> list[int]:
    """For each group the first one with the same options."""
    first: dict[GroupOptions, int] = {}
    return [first.setdefault(each, i) for i, each in enumerate(options)]
