"""BalanceEMA: wrap any optimizer and keep an average of the parameters with gradient-derived weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from cit_fast.errors import CitFastError
from cit_fast.ops.balance_ema import BalanceRule, BalanceWeights, balance_ema_, check_rule

AVERAGE, PREVIOUS_GRAD = "average", "previous_grad"
_OWN_STATE = (AVERAGE, PREVIOUS_GRAD)


class BalanceSummary(NamedTuple):
    """The last step's balance weights in four numbers, over the tensors that were averaged (0 where none was)."""

    mean: float
    minimum: float
    maximum: float
    fallback_fraction: float


class BalanceEMA(Optimizer):
    """Keeps, beside the parameters that ``optimizer`` trains, an average of them that forgets less.

    After each step of ``optimizer`` the average moves towards the parameters by a weight per tensor that follows
    from the gradients (:func:`cit_fast.ops.balance_ema_`). The average starts as a copy of the parameters before the
    first step. It is a ``torch.optim.Optimizer`` that shares ``param_groups``, ``state`` and ``defaults`` with the
    wrapped one, so learning-rate schedulers, Accelerate, transformers' Trainer, hooks and checkpoints work as
    before. The average (float32) and the previous gradient live in ``state[p]["average"]`` and
    ``state[p]["previous_grad"]``. Only parameters with gradients are averaged. Where a gradient or parameter is not
    finite, that tensor's average stays as it is for the step and :attr:`skipped_updates` counts it.

    Source: Qiao et al., ICML 2025 (LCIA), arXiv 2410.10868.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        rule: ``"released"`` (the authors' code), ``"paper"``, or ``"fixed"`` (classical EMA with ``decay``, stores
            no gradient).
        decay: Share of the old average, in [0, 1), for ``fixed`` and where ``paper`` has no usable weight.
        fallback: Share of the new parameters, in (0, 1], where ``released`` has no usable weight.
        scope: ``"task"``: :meth:`start_task` begins a new average; ``"stream"``: one average lives across tasks.

    Raises:
        CitFastError: ``optimizer`` is not an optimizer or already a ``BalanceEMA``, or an option is out of range.

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
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, BalanceEMA):
            raise CitFastError(
                f"BalanceEMA: optimizer is a {type(optimizer).__name__}; "
                "give a torch.optim.Optimizer that is not itself a BalanceEMA"
            )
        check_rule("BalanceEMA", rule, decay, fallback)
        if scope not in ("task", "stream"):
            raise CitFastError(f"BalanceEMA: scope={scope!r} is unknown; accepted: task, stream")
        self.__setstate__({"optimizer": optimizer, "rule": rule, "decay": decay, "fallback": fallback, "scope": scope})

    # Optimizer.__init__ would regroup the parameters and start a state of its own; its __setstate__ makes what
    # remains: hooks.

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", "rule", "decay", "fallback", "scope")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer: Optimizer = state["optimizer"]
        self.rule: BalanceRule = state["rule"]
        self.decay: float = state["decay"]
        self.fallback: float = state["fallback"]
        self.scope: Literal["task", "stream"] = state["scope"]
        self._last: list[tuple[list[Tensor], BalanceWeights]] = []
        self._skipped: dict[torch.device, Tensor] = {}
        self._live: dict[Tensor, Tensor] | None = None
        super().__setstate__({})

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in the wrapped optimizer."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def __getattr__(self, name: str) -> Any:
        # The train/eval switch of schedule-free optimizers, which Accelerate and Trainer look for. Nothing else
        # passes through: a fused optimizer's mark that it unscales gradients itself, for one, would make GradScaler
        # hand us scaled ones.
        if name in ("train", "eval") and "optimizer" in self.__dict__:
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped optimizer, then move the averages; the gradients are read, not changed.

        Args:
            closure: As for the wrapped optimizer.

        Returns:
            What the wrapped optimizer's step returns.

        Raises:
            CitFastError: Called inside :meth:`averaged`, or a parameter is sharded (DTensor) or has a sparse or
                complex gradient.
        """
        self._refuse_inside_averaged("step()")
        starts = self._first_averages(all_of_them=closure is not None)
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self._move_averages(starts)
        return loss

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
        """Load what :meth:`state_dict` gave, the averages in their own dtype.

        ``torch.optim.Optimizer.load_state_dict`` casts all state to the parameter's dtype, which would ruin a
        float32 average of bfloat16 parameters. A checkpoint of the plain optimizer is accepted: the averages then
        start at the next step.

        Raises:
            CitFastError: An average does not have its parameter's shape, so the checkpoint is that of another model.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        saved, others = {}, {}
        for key, entry in state_dict["state"].items():
            mine = isinstance(entry, dict) and AVERAGE in entry
            saved[key] = {name: entry[name] for name in _OWN_STATE if name in entry} if mine else {}
            others[key] = {name: value for name, value in entry.items() if name not in _OWN_STATE} if mine else entry
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = self._parameters()
        for key, param in zip(
            keys, params, strict=False
        ):  # the wrapped optimizer reports a different number of parameters
            for name, value in saved.get(key, {}).items():
                if value.shape != param.shape:
                    raise CitFastError(
                        f"BalanceEMA.load_state_dict: {name} of parameter {key} has shape {tuple(value.shape)}, "
                        f"the parameter has {tuple(param.shape)}: this state belongs to another model"
                    )
        self.optimizer.load_state_dict({**state_dict, "state": others})
        for key, param in zip(keys, params, strict=True):
            for name, value in saved.get(key, {}).items():
                self.state[param][name] = value.to(param.device, copy=True)
        self._last = []
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters hold the averages inside the ``with`` block, and exactly their own values again after it.

        Costs one copy of the averaged parameters while it lasts. Blocks may nest. Parameters without an average stay
        as they are.
        """
        if self._live is not None:
            yield
            return
        self._live = {param: param.detach().clone() for param, _ in self._averages()}
        try:
            self._write_averages()
            yield
        finally:
            with torch.no_grad():
                for param, live in self._live.items():
                    param.copy_(live)
            self._live = None

    def copy_averaged_to_parameters(self) -> None:
        """Replace the parameters by their averages for good: the end of a task.

        Raises:
            CitFastError: Called inside :meth:`averaged`.
        """
        self._refuse_inside_averaged("copy_averaged_to_parameters()")
        self._write_averages()

    def start_task(self) -> None:
        """A new task begins: ``scope="task"`` starts a new average, ``scope="stream"`` goes on with the old one."""
        if self.scope == "task":
            self.reset_average()

    def reset_average(self) -> None:
        """Forget averages and previous gradients; the next step starts a new average from the parameters of then."""
        self._refuse_inside_averaged("reset_average()")
        for param, _ in self._averages():
            for name in _OWN_STATE:
                self.state[param].pop(name, None)
        self._last = []

    def balance_weights(self) -> dict[str | int, float]:
        """The last step's weight alpha, the share of the new values, of each parameter that had a gradient.

        0 means that the parameter was left out. Keys are the names, where the wrapped optimizer was given
        ``named_parameters()``, else the positions over all groups. Waits for the device; empty before the first step.
        """
        keys: dict[int, str | int] = {id(param): i for i, param in enumerate(self._parameters())}
        for group in self.param_groups:
            keys.update(
                {id(param): name for param, name in zip(group["params"], group.get("param_names", ()), strict=False)}
            )
        return {
            keys[id(param)]: alpha
            for params, weights in self._last
            for param, alpha in zip(params, weights.alphas.tolist(), strict=True)
        }

    def balance_summary(self) -> BalanceSummary | None:
        """Mean, minimum and maximum of the last step's weights and the fraction that fell back.

        None before the first step. Tensors that were left out do not count. Waits for the device, so call it when
        you log, not in every step.
        """
        if not self._last:
            return None
        alphas = torch.cat([weights.alphas.cpu() for _, weights in self._last])
        fallbacks = torch.cat([weights.fallbacks.cpu() for _, weights in self._last])
        used = alphas > 0
        if not used.any():
            return BalanceSummary(0.0, 0.0, 0.0, 0.0)
        alphas, fell_back = alphas[used].double(), fallbacks[used].double()
        return BalanceSummary(alphas.mean().item(), alphas.min().item(), alphas.max().item(), fell_back.mean().item())

    @property
    def skipped_updates(self) -> int:
        """How often a tensor's average was left out for values that were not finite, since this object was made."""
        return sum(int(count) for count in self._skipped.values())

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        for param in self._parameters():
            if param in self.state and AVERAGE in self.state[param]:
                yield param, self.state[param][AVERAGE]

    def _write_averages(self) -> None:
        with torch.no_grad():
            for param, average in self._averages():
                param.copy_(average)

    def _first_averages(self, *, all_of_them: bool) -> dict[Tensor, Tensor]:
        """Copies of the parameters that have no average yet and will step; all when only a closure will tell which.

        They enter ``state`` after the wrapped optimizer's step: many optimizers take an empty state as the sign to
        initialise.
        """
        starts: dict[Tensor, Tensor] = {}
        for param in self._parameters():
            if (param.grad is None and not all_of_them) or not param.requires_grad:
                continue
            if param not in self.state or AVERAGE not in self.state[param]:
                self._check_parameter(param)
                dtype = torch.promote_types(param.dtype, torch.float32)
                starts[param] = param.detach().to(dtype, copy=True)
        return starts

    def _move_averages(self, starts: dict[Tensor, Tensor]) -> None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for param in self._parameters():
            if param.grad is None:
                continue
            entry = self.state[param]
            if AVERAGE not in entry:
                entry[AVERAGE] = starts.pop(param)
            if PREVIOUS_GRAD not in entry and self.rule != "fixed":
                entry[PREVIOUS_GRAD] = param.grad.detach().clone()
            by_device.setdefault(param.device, []).append(param)
        self._last = []
        for device, params in by_device.items():
            entries = [self.state[param] for param in params]
            weights = balance_ema_(
                [param.detach() for param in params],
                [entry[AVERAGE] for entry in entries],
                [cast("Tensor", param.grad).detach() for param in params],
                [] if self.rule == "fixed" else [entry[PREVIOUS_GRAD] for entry in entries],
                rule=self.rule,
                decay=self.decay,
                fallback=self.fallback,
            )
            self._last.append((params, weights))
            skipped = (weights.alphas == 0).sum()
            self._skipped[device] = self._skipped[device] + skipped if device in self._skipped else skipped

    def _check_parameter(self, param: Tensor) -> None:
        if hasattr(param, "to_local"):
            raise CitFastError(
                f"BalanceEMA: a parameter of shape {tuple(param.shape)} is sharded ({type(param).__name__}); "
                "use DDP or a single process"
            )
        if param.grad is not None and param.grad.layout != torch.strided:
            raise CitFastError(
                f"BalanceEMA: the gradient of a parameter of shape {tuple(param.shape)} is {param.grad.layout}; "
                "only dense gradients are accepted (an embedding: sparse=False)"
            )
        if not param.is_floating_point():
            raise CitFastError(
                f"BalanceEMA: a parameter of shape {tuple(param.shape)} is {param.dtype}; only real floats are averaged"
            )

    def _refuse_inside_averaged(self, call: str) -> None:
        if self._live is not None:
            raise CitFastError(f"BalanceEMA.{call} inside averaged(): leave the with block first")
