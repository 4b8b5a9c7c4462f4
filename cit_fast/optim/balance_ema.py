"""BalanceEMA: wrap or watch any optimizer and keep an average of the parameters with gradient-derived weights."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from cit_fast.errors import CitFastError, ConfigError
from cit_fast.ops.balance_ema import (
    BalanceOptions,
    BalanceRule,
    BalanceWeights,
    Rounding,
    balance_ema_,
    balance_norms_,
    balance_weights,
    flush_balance_ema_,
    resolve_for,
)
from cit_fast.optim.average_options import AverageOptions
from cit_fast.optim.averaging import AveragingOptimizer
from cit_fast.optim.engines import hides_steps, is_engine, refuse_partitions, steps_in_backward
from cit_fast.optim.partitions import Partition
from cit_fast.optim.reporting import BalanceSummary
from cit_fast.optim.saving import StateLoading, decoded, encode
from cit_fast.optim.sharding import Reduction
from cit_fast.optim.sweeps import AVERAGE, PREVIOUS_GRAD, REMAINING, Sweep, unique

__all__ = ["BalanceEMA", "BalanceSummary", "find_balance_ema"]

_HANDLE = "_cit_fast_balance_ema"  # where an optimizer that is watched keeps who watches it
_WRAPPER = "_cit_fast_balance_ema_around"  # where one that is wrapped has a weak reference to the wrapper
_STEPS = "balance_ema_steps"  # in param_groups[0], the only place that every way of saving a state keeps


class BalanceEMA(AveragingOptimizer):
    """Keeps, beside the parameters that ``optimizer`` trains, an average of them that forgets less.

    After each step of ``optimizer`` the average moves towards the parameters by a weight per tensor that follows
    from the gradients (:func:`cit_fast.ops.balance_ema_`). The average starts as a copy of the parameters before
    the first step (``start``; the authors' code copies after it, the same where a warm-up begins at 0). It is a
    ``torch.optim.Optimizer`` that shares ``param_groups``, ``state`` and ``defaults`` with the wrapped one, so
    learning-rate schedulers, Accelerate, transformers' Trainer, hooks and checkpoints work as before. The average
    and the previous gradient live in ``state[p]["average"]`` and ``state[p]["previous_grad"]``. Only parameters
    with gradients are averaged. Where a gradient or parameter is not finite, that tensor's average stays as it is
    for the step and :attr:`skipped_updates` counts it. Works under DDP as it is, and on FSDP2 and other DTensor
    shards with one small all-reduce a step. DeepSpeed ZeRO-1, 2 and 3 (no NVMe): make it before
    ``deepspeed.initialize`` and pass it there; one small all-reduce for each parameter group, or sub-group of
    ZeRO-3.

    Source: Qiao et al., ICML 2025 (LCIA), arXiv 2410.10868.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        rule: ``"released"`` (the authors' code), ``"paper"`` (its equation (45)), or ``"fixed"`` (classical EMA with
            ``decay``, stores no gradient).
        decay: Share of the old average, in [0, 1), for ``fixed``.
        fallback: Share of the new parameters, in (0, 1], where the other rules have no usable weight.
        scope: ``"task"``: :meth:`start_task` begins a new average; ``"stream"``: one average lives across tasks.
        average_dtype: ``torch.float32``, or ``torch.bfloat16`` (half the memory; stochastic rounding keeps it from
            standing still). Averages of float64 parameters are float64.
        keep_gradients: How the previous gradients are kept. ``"reference"``: the gradient tensors themselves, which
            saves writing 4 bytes a parameter and step and the second copy that a step otherwise has; gradients that
            live in buckets or flat buffers, or that somebody writes to between two steps, are noticed and copied.
            ``"copy"``: always in tensors of their own; for programs that write to old gradients through
            ``grad.data``, which leaves no trace.
        scale: The constant of ``released``, above 0: 2 in the authors' code, 0.01 in their later toolbox.
        rounding: How bfloat16 averages are rounded: ``"stochastic"``, or ``"nearest"`` as in the authors' runs, whose
            averages hardly move for it.
        start: ``"before"`` the first step, as the paper writes it, or ``"after"`` it, as the authors' code does.

    Raises:
        CitFastError: ``optimizer`` is not an optimizer or already averages, or an option is out of range.

    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = BalanceEMA(torch.optim.AdamW(layer.parameters(), lr=2e-4))
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> with optimizer.averaged():
    ...     prediction = layer(torch.ones(1, 2))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: BalanceRule = "released",
        decay: float = 0.99,
        fallback: float = 0.01,
        scope: Literal["task", "stream"] = "task",
        average_dtype: torch.dtype = torch.float32,
        keep_gradients: Literal["reference", "copy"] = "reference",
        scale: float = 2.0,
        rounding: Rounding = "stochastic",
        start: Literal["before", "after"] = "before",
    ) -> None:
        options = AverageOptions(rule, decay, fallback, scope, average_dtype, keep_gradients, scale, rounding, start)
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, AveragingOptimizer):
            raise CitFastError(
                f"BalanceEMA: optimizer is a {type(optimizer).__name__}; "
                "give a torch.optim.Optimizer that does not itself keep an average"
            )
        if find_balance_ema(optimizer) is not None:
            raise CitFastError("BalanceEMA: this optimizer has an average already; find_balance_ema(optimizer) has it")
        wrapper = getattr(innermost(optimizer), _WRAPPER, None)
        if wrapper is not None and wrapper() is not None:
            raise CitFastError("BalanceEMA: this optimizer has an average already, that of the BalanceEMA around it")
        if reason := hides_steps(optimizer):
            raise CitFastError(f"BalanceEMA: {reason}")
        options.check("BalanceEMA")
        if rule != "fixed" and is_engine(optimizer):
            raise refuse_partitions("BalanceEMA", rule)
        if steps_in_backward(optimizer):
            raise ConfigError(
                f"{type(self).__name__}: a layer-wise optimizer steps inside backward, where nothing can be averaged; "
                "choose one that steps all layers at once (without _layerwise)"
            )
        self.__setstate__({"optimizer": optimizer, "options": options, "attached": False})

    @classmethod
    def attach(cls, optimizer: Optimizer, **options: Any) -> BalanceEMA:
        """Watch an optimizer that somebody else steps: its step hooks do what :meth:`step` does here.

        Args:
            optimizer: Any ``torch.optim.Optimizer``; of an ``AcceleratedOptimizer`` the one inside is watched.
            options: As for :class:`BalanceEMA`.

        Returns:
            A ``BalanceEMA`` for :meth:`averaged` and the rest; :meth:`detach` ends it. The averages are in the state
            dict of ``optimizer`` too, where those of 16-bit parameters stand as ``"average_bits"``: a checkpoint
            that is loaded before ``attach`` keeps every bit of them.

        Raises:
            CitFastError: As for :class:`BalanceEMA`.
        """
        rule = options.get("rule", "released")
        if rule != "fixed" and is_engine(optimizer):
            raise refuse_partitions("BalanceEMA.attach", rule)
        handle = cls(innermost(optimizer) if isinstance(optimizer, Optimizer) else optimizer, **options)
        handle._watch()
        return handle

    @classmethod
    def factory(cls, optimizer_cls: type[Optimizer], **options: Any) -> type[BalanceEMA]:
        """A class that takes what ``optimizer_cls`` takes and makes it inside a :class:`BalanceEMA`.

        For everything that wants the class of an optimizer, as
        ``Trainer(optimizer_cls_and_kwargs=(BalanceEMA.factory(AdamW, rule="paper"), {"lr": 2e-4}))`` does, which is
        the only way under FSDP.

        Args:
            optimizer_cls: The class of the optimizer to wrap.
            options: As for :class:`BalanceEMA`.
        """
        AverageOptions(**options).check("BalanceEMA.factory")

        def make(_: type, params: Any, **arguments: Any) -> BalanceEMA:
            return BalanceEMA(optimizer_cls(params, **arguments), **options)

        # What it makes are plain BalanceEMA objects, which can be pickled.
        return type(f"BalanceEMA{optimizer_cls.__name__}", (cls,), {"__new__": make, "__doc__": cls.__doc__})

    # Optimizer.__init__ would regroup the parameters and start a state of its own; its __setstate__ makes what
    # remains: hooks.

    def __getstate__(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "options": self._options(),
            "attached": self._attached,
            "starting": self._starting,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer: Optimizer = state["optimizer"]
        self._start(state["options"])
        self._starting = state.get("starting", {})
        self._attached = False
        self._unscaled_inside = False
        self._handles: list[RemovableHandle] = []
        self._starts: dict[Tensor, Tensor] = {}
        super().__setstate__({})
        self._given.add(self.param_groups)
        setattr(innermost(self.optimizer), _WRAPPER, weakref.ref(self))
        self._watch_loading()
        if state["attached"]:
            self._watch()

    # Shared with the wrapped optimizer, whose load_state_dict replaces its own: hence properties.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the wrapped optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The per-parameter state of the wrapped optimizer, with the averages in it."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The default options of the wrapped optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their average starts at their first step."""
        self.optimizer.add_param_group(param_group)
        self._given.add(self.param_groups)

    def _zero_grad(self, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def __getattr__(self, name: str) -> Any:
        # The train/eval switch of schedule-free optimizers, which Accelerate and Trainer look for. Nothing else
        # passes through: a fused optimizer's mark that it unscales gradients itself, for one, would make GradScaler
        # hand us scaled ones.
        if name in ("train", "eval") and "optimizer" in self.__dict__:
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # Stepping

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped optimizer, then move the averages; the gradients are read, not changed.

        Args:
            closure: As for the wrapped optimizer.

        Returns:
            What the wrapped optimizer's step returns.

        Raises:
            CitFastError: Called inside :meth:`averaged`, or a parameter has a sparse gradient, is complex, or belongs
                to an engine whose parameters cannot be averaged.
        """
        if self._attached:
            return self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self._before_step(closure)
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self._after_step()
        return loss

    @_disable_dynamo  # which would lose some of what a step notes down
    def _before_step(self, closure: Any) -> None:
        self._refuse_inside_averaged("step()")
        self._check_options()
        self._keep_gradients_whole()
        # Which parameters step with a closure is known only afterwards.
        stepping = self._present() if closure is None else [p for p in self._parameters() if p.requires_grad]
        self._check_parameters(stepping)
        # Averages enter ``state`` after the wrapped optimizer's step: many take an empty state as the sign to
        # initialise.
        starting = [param for param in stepping if param not in self.state or AVERAGE not in self.state[param]]
        if starting:
            self._follow_groups()
        for param in starting:
            self._partition_of(param)  # which is refused here, before anything is written
        self._starts = {} if self.start == "after" else {param: self._new_average(param) for param in starting}

    def _keep_gradients_whole(self) -> None:
        """SGD of torch with Nesterov's momentum writes to the gradients where it steps them all at once."""
        if not isinstance(innermost(self.optimizer), SGD):
            return
        for group in self.param_groups:
            if group.get("nesterov") and group.get("foreach") is not False and not group.get("fused"):
                if group.get("foreach"):
                    warnings.warn(
                        f"{type(self).__name__}: SGD(nesterov=True, foreach=True) writes to the gradients in its step, "
                        "which the average needs after it; foreach is False from now on",
                        stacklevel=4,
                    )
                group["foreach"] = False

    @_disable_dynamo
    @torch.no_grad()
    def _after_step(self) -> None:
        present = self._present()
        for param in present:
            if AVERAGE not in self.state[param]:
                start = self._starts.pop(param, None)
                self.state[param][AVERAGE] = self._new_average(param) if start is None else start
                self._starting.pop(param, None)
        self._starts = {}
        self._begin_report(present)
        seed = self._next_seed()
        options: dict[str, Any] = {name: getattr(self, name) for name in ("rule", "decay", "fallback", "scale")}
        spread: dict[Reduction | Partition, list[tuple[Sweep, list[Tensor], Tensor, int]]] = {}
        for i, sweep in enumerate(self._sweeps_of(present, also=None)):
            params, grads, previous = self._gradients_of(sweep)
            lists = (params, sweep.state(AVERAGE), grads, previous)
            if sweep.over is None:
                self._report(sweep, self._run(sweep, lists, seed + i))
            else:
                norms = balance_norms_(*lists, store_grads=sweep.copies)
                spread.setdefault(sweep.over, []).append((sweep, params, norms, seed + i))
            sweep.keep(grads)
        for over, parts in spread.items():
            summed = over.sum_norms([norms for _, _, norms, _ in parts])
            for (sweep, params, _, sweep_seed), norms in zip(parts, summed, strict=True):
                weights = balance_weights(norms, **options, remaining=sweep.remaining)
                alphas = sweep.own(weights.alphas.clone())
                flush_balance_ema_(params, sweep.state(AVERAGE), alphas, rounding=self.rounding, seed=sweep_seed)
                self._report(sweep, weights)

    def _run(self, sweep: Sweep, lists: tuple[list[Tensor], ...], seed: int) -> BalanceWeights:
        params, averages, grads, previous = lists
        if sweep.takes(params, grads, averages):
            run = resolve_for("balance_ema_", *lists)
            options = BalanceOptions(
                self.rule, self.decay, self.fallback, self.scale, self.rounding, sweep.copies, seed & 0xFFFFFFFF
            )
            weights: BalanceWeights = run(*lists, sweep.remaining, options)
            return weights
        return balance_ema_(
            params,
            averages,
            grads,
            previous,
            rule=self.rule,
            decay=self.decay,
            fallback=self.fallback,
            scale=self.scale,
            remaining=sweep.remaining,
            rounding=self.rounding,
            store_grads=sweep.copies,
            seed=seed,
        )

    def _next_seed(self) -> int:
        if self.average_dtype != torch.bfloat16:
            return 0
        group = self.param_groups[0]
        group[_STEPS] = group.get(_STEPS, 0) + 1
        return int(group[_STEPS]) * 0x9E3779B1

    def _make_sweeps(self, params: list[Tensor]) -> list[Sweep]:
        by_key: dict[Any, list[Tensor]] = {}
        for param in params:
            by_key.setdefault(self._sweep_key(param), []).append(param)
        return [self._fill_sweep(Sweep, each) for each in by_key.values()]

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, with ``average`` and ``previous_grad`` in each parameter's entry."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, the averages in ``average_dtype``, not that of the parameters.

        A checkpoint of the plain optimizer is accepted: the averages then start at the next step.

        Raises:
            CitFastError: An average, or a moment of an optimizer of ``torch.optim``, does not have its parameter's
                shape, so the checkpoint is that of another model. Nothing has changed then.
        """
        self._refuse_inside_averaged("load_state_dict()")
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self.optimizer.load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _watch_loading(self) -> None:
        """Hooks on the wrapped optimizer itself, which somebody may load directly."""
        loaded: dict[int, Any] = {}
        me: Any = weakref.proxy(self)  # the wrapped optimizer must not keep its wrapper alive

        def take(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            state_dict, ours = loading.take(state_dict, me._parameters())
            loaded.clear()
            loaded.update(ours)
            return state_dict

        def put(_: Optimizer) -> None:
            loading.put(loaded, me._parameters(), me.state)
            loaded.clear()
            me._forget_sweeps()
            me._last = []

        inner = innermost(self.optimizer)
        # Other people's optimizers may keep moments of another shape under these names (low-rank, 8-bit).
        torchs = type(inner).__module__.startswith("torch.optim.")
        loading = StateLoading(
            type(self).__name__,
            {AVERAGE: self.average_dtype, PREVIOUS_GRAD: None, REMAINING: torch.float32},
            like_parameter=("exp_avg", "exp_avg_sq", "momentum_buffer") if torchs else (),
        )
        handles = [inner.register_load_state_dict_pre_hook(take), inner.register_load_state_dict_post_hook(put)]
        for handle in handles:
            weakref.finalize(self, handle.remove).atexit = False
        self._handles += handles

    # Watching

    def _watch(self) -> None:
        inner = self.optimizer
        self._attached = True
        for param in unique(self._parameters()):
            if param not in inner.state:
                continue
            entry = inner.state[param] = decoded(inner.state[param], param)
            if AVERAGE in entry and param.dtype != torch.float64:
                entry[AVERAGE] = entry[AVERAGE].to(self.average_dtype)
            if REMAINING in entry:
                entry[REMAINING] = entry[REMAINING].float()

        def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args[1] if len(args) > 1 else kwargs.get("closure")

        self._handles += [
            inner.register_step_pre_hook(lambda _, args, kwargs: self._before_step(closure_of(args, kwargs))),
            inner.register_step_post_hook(lambda *_: self._after_step()),
            inner.register_state_dict_post_hook(lambda _, state_dict: encode(state_dict, self._parameters())),
        ]
        setattr(inner, _HANDLE, self)
        # A fused optimizer unscales gradients inside its step, so its hooks would see scaled ones.
        self._unscaled_inside = getattr(inner, "_step_supports_amp_scaling", False)
        if self._unscaled_inside:
            inner._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def detach(self) -> None:
        """Stop watching an optimizer given to :meth:`attach`; averages stay in its state as they are."""
        if not self._attached:
            raise CitFastError("BalanceEMA.detach: this one wraps its optimizer; only what attach() made can detach")
        if not self._handles:
            raise CitFastError("BalanceEMA.detach: this one is detached already")
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for mark in (_HANDLE, _WRAPPER):
            delattr(self.optimizer, mark)
        if self._unscaled_inside:
            self.optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside wrappers that keep it as ``.optimizer``, as Accelerate's does."""
    while isinstance(optimizer.__dict__.get("optimizer"), Optimizer):
        optimizer = optimizer.__dict__["optimizer"]
    return optimizer


def find_balance_ema(optimizer: Any) -> AveragingOptimizer | None:
    """The ``BalanceEMA`` or ``AdamWBalanceEMA`` that an optimizer is, has inside, or is watched by; else None.

    Args:
        optimizer: An optimizer, or a wrapper with ``.optimizer`` such as ``accelerate``'s.
    """
    while optimizer is not None:
        if isinstance(optimizer, AveragingOptimizer):
            return optimizer
        watcher = getattr(optimizer, "__dict__", {}).get(_HANDLE)
        if watcher is not None:
            return watcher  # type: ignore[no-any-return]
        optimizer = getattr(optimizer, "__dict__", {}).get("optimizer")
    return None
