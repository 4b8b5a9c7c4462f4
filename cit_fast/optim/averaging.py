"""What BalanceEMA and AdamWBalanceEMA share: options, averages in ``state``, swapping, reporting, gradients."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from cit_fast.errors import CitFastError
from cit_fast.ops.balance_ema import BalanceRule, Rounding
from cit_fast.optim.average_options import AverageOptions
from cit_fast.optim.engines import GivenParameters, refuse_partitions, refuse_swap
from cit_fast.optim.partitions import Partition, can_publish, find_partition, publish
from cit_fast.optim.reporting import LastStep, ReportingOptimizer
from cit_fast.optim.sharding import Reduction, is_sharded, local, reduction, reshard
from cit_fast.optim.sweeps import AVERAGE, PREVIOUS_GRAD, REMAINING, Sweep, owns_its_memory, unique

_is_meta = attrgetter("is_meta")
AnySweep = TypeVar("AnySweep", bound=Sweep)


class AveragingOptimizer(ReportingOptimizer):
    """Base of the optimizers that keep an average of their parameters in ``state[p]["average"]``."""

    rule: BalanceRule
    decay: float
    fallback: float
    scope: Literal["task", "stream"]
    average_dtype: torch.dtype
    keep_gradients: Literal["reference", "copy"]
    scale: float
    rounding: Rounding
    start: Literal["before", "after"]

    def _start(self, options: AverageOptions) -> None:
        """Set the options and what does not outlive this object; call it before anything else of this class."""
        self.__dict__.update(options._asdict())
        self._checked = options
        self._last: list[LastStep] = []
        self._skipped: dict[torch.device, Tensor] = {}
        self._live: dict[Tensor, Tensor] | None = None
        self._copied: set[Tensor] = set()
        self._starting: dict[Tensor, Tensor] = {}  # see start_averages_at
        self._warned = False
        self._sweeps: list[Any] = []
        self._given = GivenParameters()
        self._partitions: dict[Tensor, Partition | None] = {}
        self._planned: tuple[list[Tensor], Hashable] | None = None
        self._entries: list[Any] = []

    def _options(self) -> AverageOptions:
        return AverageOptions(*(self.__dict__[name] for name in AverageOptions._fields))

    def _check_options(self) -> None:
        """A schedule may set ``decay``, ``fallback``, ``scale`` between steps; state depends on some other options."""
        options, known = self._options(), self._checked
        if options == known:
            return
        name = type(self).__name__
        options.check(name)
        for field in ("rule", "average_dtype", "keep_gradients"):
            if getattr(options, field) != getattr(known, field):
                raise CitFastError(
                    f"{name}: {field} was {getattr(known, field)!r} and is {getattr(options, field)!r} now; "
                    "it cannot change after the optimizer was made"
                )
        self._checked = options

    # The averages in the model

    @contextmanager
    def averaged(self, model: nn.Module | None = None) -> Iterator[None]:
        """The parameters hold the averages inside the ``with`` block, and exactly their own values again after it.

        Costs one copy of the averaged parameters while it lasts. Blocks may nest. Parameters without an average stay
        as they are. Under FSDP2 and DeepSpeed ZeRO every process has to enter and leave it; with ZeRO, whose model
        parameters are gathered one by one, both the model and the float32 partitions are swapped.

        Args:
            model: Only for FSDP2: the module given to ``fully_shard``, whose gathered parameters (its root keeps
                them after a forward without backward) are freed on the way in and out, or they would outlive the swap.

        Raises:
            CitFastError: An engine other than DeepSpeed ZeRO put partitions in place of the parameters.
        """
        if self._live is not None:
            yield
            return
        self._refuse_partitions("averaged()")
        self.flush()
        self._live = {param: local(param).detach().clone() for param, _ in self._averages()}
        try:
            self._write_averages()
            self._publish(model)
            yield
        finally:
            with torch.no_grad():
                for param, live in self._live.items():
                    local(param).copy_(live)
            self._publish(model)
            self._live = None

    def copy_averaged_to_parameters(self) -> None:
        """Replace the parameters by their averages for good: the end of a task.

        Raises:
            CitFastError: Called inside :meth:`averaged`, or as there.
        """
        self._refuse_inside_averaged("copy_averaged_to_parameters()")
        self._refuse_partitions("copy_averaged_to_parameters()")
        self.flush()
        self._write_averages()
        self._publish(None)
        for param, _ in self._averages():
            if REMAINING in self.state[param]:
                self.state[param][REMAINING].zero_()

    def flush(self) -> None:
        """Bring the averages in ``state`` up to date with the last step.

        Call it before you read ``state[p]["average"]`` or overwrite parameters yourself; everything in this class
        and ``state_dict()`` do. :class:`BalanceEMA` is always up to date.
        """

    def start_task(self) -> None:
        """A new task begins: ``scope="task"`` starts a new average, ``scope="stream"`` goes on with the old one."""
        if self.scope == "task":
            self.reset_average()

    def reset_average(self) -> None:
        """Forget averages and previous gradients; the next step starts a new average from the parameters of then."""
        self._refuse_inside_averaged("reset_average()")
        for param, _ in self._averages():
            for name in (AVERAGE, PREVIOUS_GRAD, REMAINING):
                self.state[param].pop(name, None)
        self._starting = {}
        self._forget_sweeps()
        self._last = []

    def start_averages_at(self, values: Mapping[Tensor, Tensor]) -> None:
        """Averages of parameters that have none yet start at these values instead of those of their parameters.

        So an average of an earlier optimizer is continued, ``scope="stream"``, while training goes on from the live
        weights.

        Args:
            values: for parameters of this optimizer, tensors of their shape.

        Raises:
            CitFastError: Called inside :meth:`averaged`, a parameter is another's, sharded, or a partition of an
                engine, or a value does not have its parameter's shape.
        """
        self._refuse_inside_averaged("start_averages_at()")
        self._follow_groups()
        name, known = f"{type(self).__name__}.start_averages_at", set(self._parameters())
        for param, value in values.items():
            if param not in known or is_sharded(param) or self._given.is_partition(param):
                raise CitFastError(f"{name}: takes whole parameters of this optimizer, not shards or others'")
            if value.shape != param.shape:
                raise CitFastError(
                    f"{name}: a value has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}"
                )
        self._starting.update(values)

    def has_averages(self) -> bool:
        """Whether any parameter has an average yet."""
        return next(self._averages(), None) is not None

    def in_partitions(self) -> bool:
        """Whether the averages are those of an engine's partitions: all processes have to call :meth:`averaged`."""
        return any(map(self._given.is_partition, self.state))

    # Gradients

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in every optimizer; previous gradients that are kept by reference are copied before they become 0."""
        if not set_to_none:
            self._copy_kept_gradients()
        self._zero_grad(set_to_none)

    def _zero_grad(self, set_to_none: bool) -> None:
        super().zero_grad(set_to_none=set_to_none)

    def _copy_kept_gradients(self) -> None:
        copied: set[Tensor] = set()
        for param in self._parameters():
            entry, grad = self.state.get(param, {}), param.grad
            if grad is not None and entry.get(PREVIOUS_GRAD) is grad:
                entry[PREVIOUS_GRAD] = grad.detach().clone()
                copied.add(param)
        if copied:
            self._copied |= copied
            self._planned = None  # new sweeps at the next step

    # The parameters and their state

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        # ZeRO-3 leaves its partitions in the groups only while they step.
        partitions = filter(self._given.is_partition, self.state)
        for param in unique(chain(self._parameters(), partitions)):
            if param in self.state and AVERAGE in self.state[param]:
                yield param, self.state[param][AVERAGE]

    def _write_averages(self) -> None:
        with torch.no_grad():
            for param, average in self._averages():
                local(param).copy_(local(average))

    def _new_average(self, param: Tensor) -> Tensor:
        dtype = torch.float64 if param.dtype == torch.float64 else self.average_dtype
        value = self._starting.get(param, param)  # until the average is in ``state``, lest a failed step lose it
        return value.detach().to(param.device, dtype, copy=True)

    def _check_parameters(self, params: Sequence[Tensor]) -> None:
        # All at once, for hundreds of small tensors; only if that fails, each.
        layouts = {grad.layout for param in params if (grad := param.grad) is not None}
        if layouts <= {torch.strided} and all(map(Tensor.is_floating_point, params)) and not any(map(_is_meta, params)):
            return
        for param in params:
            grad = param.grad
            if (grad is None or grad.layout == torch.strided) and param.is_floating_point() and not param.is_meta:
                continue
            name, shape = type(self).__name__, tuple(param.shape)
            if param.is_meta:
                raise CitFastError(f"{name}: a parameter of shape {shape} is on the meta device and has no values")
            if not param.is_floating_point():
                raise CitFastError(
                    f"{name}: a parameter of shape {shape} is {param.dtype}; only real floats are averaged"
                )
            assert grad is not None  # noqa: S101 - the first condition
            raise CitFastError(
                f"{name}: the gradient of a parameter of shape {shape} is {grad.layout}; "
                "only dense gradients are accepted (an embedding: sparse=False)"
            )

    def _refuse_inside_averaged(self, call: str) -> None:
        if self._live is not None:
            raise CitFastError(f"{type(self).__name__}.{call} inside averaged(): leave the with block first")

    # Partitions

    def _refuse_partitions(self, call: str) -> None:
        if self.in_partitions() and not can_publish(self._given.all()):
            raise refuse_swap(f"{type(self).__name__}.{call}")

    def _publish(self, model: nn.Module | None) -> None:
        """What the parameters hold goes to where the next forward reads it, if that is elsewhere."""
        reshard(model)
        if self.in_partitions():
            with torch.no_grad():
                publish(self._given.all())

    def _partition_of(self, param: Tensor) -> Partition | None:
        """Whose pieces ``param`` holds, if it is a flat partition.

        A fixed weight is right without that knowledge too, unless the padding holds values that are not finite.
        """
        if not self._given.is_partition(param):
            return None
        if param not in self._partitions:
            found = find_partition(self._given.all(), param)
            if found is None and self.rule != "fixed":
                raise refuse_partitions(type(self).__name__, self.rule)
            self._partitions[param] = found
        return self._partitions[param]

    def _parts(self, param: Tensor, tensor: Tensor) -> list[Tensor]:
        """What this process holds of ``tensor``, which is ``param`` or of its state, as the ops take it."""
        partition = self._partition_of(param)
        return [local(tensor)] if partition is None else partition.views(tensor)

    def _local_state(self, params: Iterable[Tensor], name: str) -> list[Tensor]:
        return [part for param in params for part in self._parts(param, self.state[param][name])]

    def _weights_of(self, param: Tensor) -> int:
        """How many weights this process keeps for ``param``."""
        partition = self._partition_of(param)
        return 1 if partition is None else len(partition.pieces)

    # Sweeps

    def _follow_groups(self) -> None:
        """Others may have added parameters to the groups, or taken some away, without a word."""
        self._given.follow(self.param_groups, self.state)
        self._copied &= {*self._parameters(), *self.state}

    def _forget_sweeps(self) -> None:
        """``state`` no longer is what the sweeps hold."""
        self._sweeps, self._planned = [], None

    def _present(self) -> list[Tensor]:
        """The parameters that step now."""
        return [param for param in self._parameters() if param.grad is not None]

    def _sweeps_of(self, present: list[Tensor], also: Hashable) -> list[Any]:
        """The sweeps of these parameters: those of the last step, if nothing changed in them nor in ``also``."""
        for sweep in self._sweeps:
            changed, written = sweep.changed()
            if changed:
                self._start_gradients_again(changed, warn=written)
        planned = self._planned
        if (
            planned is None
            or planned[1] != also
            or len(planned[0]) != len(present)
            or not all(map(is_, planned[0], present))
            or not self._is_current()
            or any(sweep.partition is not None for sweep in self._sweeps)  # their memory may have moved
        ):
            params = unique(present)
            self._follow_groups()
            for param in params:
                self._partition_of(param)  # which is refused here, before anything is written
            staying = set(params)
            for sweep in self._sweeps:
                sweep.release(staying)
            self._planned = None  # if making them fails, the next step must not take the rest for all
            self._sweeps = self._make_sweeps(params)
            self._planned = (present, also)
            self._entries = list(self.state.values())
        return self._sweeps

    def _is_current(self) -> bool:
        """Whether the sweeps are still those of ``state``, where others may have put other entries or tensors."""
        entries = self.state.values()
        return (
            len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and all(sweep.is_current() for sweep in self._sweeps)
        )

    def _start_gradients_again(self, params: Sequence[Tensor], *, warn: bool) -> None:
        if warn and not self._warned:
            warnings.warn(
                f"{type(self).__name__}: {len(params)} gradients of the last step were written to, or their memory "
                "used again, before this step (zero_grad(set_to_none=False) by someone else, or a buffer of "
                "gradients). Their change counts as 0 in this step, and from now on they are copied; "
                'keep_gradients="copy" does so from the start.',
                stacklevel=4,
            )
            self._warned = True
        for param in params:
            self.state[param].pop(PREVIOUS_GRAD, None)
        self._copied.update(params)
        self._planned = None

    def _make_sweeps(self, params: list[Tensor]) -> list[Any]:
        raise NotImplementedError

    def _sweep_key(self, param: Tensor) -> tuple[Hashable, ...]:
        """Parameters with the same key go through the op in one call."""
        return param.device, self._copies(param), self._over(param)

    def _over(self, param: Tensor) -> Reduction | Partition | None:
        """Over which processes norms are summed."""
        return self._partition_of(param) or reduction(param)

    def _copies(self, param: Tensor) -> bool:
        return (
            self.rule == "fixed"
            or self.keep_gradients == "copy"
            or param in self._copied
            or self._given.is_partition(param)  # the engine may use its buffers again
            or not owns_its_memory(cast("Tensor", param.grad))
        )

    def _fill_sweep(self, kind: type[AnySweep], params: list[Tensor], **more: Any) -> AnySweep:
        entries = [self.state[param] for param in params]
        for param, entry in zip(params, entries, strict=True):
            if entry[AVERAGE].device != param.device:
                raise CitFastError(
                    f"{type(self).__name__}: a parameter of shape {tuple(param.shape)} is on {param.device}, its "
                    f"average on {entry[AVERAGE].device}; a step needs them on one device: bring the state to the "
                    "parameters, or the parameters to the state"
                )
        sweep = kind(
            params=params,
            entries=entries,
            weights=[self._weights_of(param) for param in params],
            over=self._over(params[0]),
            copies=self._copies(params[0]),
            sharded=any(map(is_sharded, params)),
            partition=self._partition_of(params[0]),
            **more,
        )
        if self.rule == "paper":
            sweep.remaining = self._remaining_of(sweep)
        if self.rule == "fixed":
            sweep.watch()
            return sweep
        for param, entry in zip(params, entries, strict=True):
            grad = cast("Tensor", param.grad)
            kept = entry.get(PREVIOUS_GRAD)
            if kept is not None and kept.device != grad.device:  # only the parameter has moved
                kept = entry[PREVIOUS_GRAD] = kept.detach().to(grad.device)
            # A gradient that somebody else holds may be overwritten before the next step: it is copied first.
            if sweep.copies and (kept is None or kept is grad):
                entry[PREVIOUS_GRAD] = grad.detach().clone()
            elif sweep.copies and not self._owned(kept):
                entry[PREVIOUS_GRAD] = kept.detach().clone()
        sweep.watch()
        return sweep

    def _remaining_of(self, sweep: Sweep) -> Tensor:
        """The distances that the last update left, which ``state`` has from then on as views of one tensor."""
        known = [entry.get(REMAINING) for entry in sweep.entries]
        if any(each is None for each in known):  # a new average, or one of a state without distances
            lists = sweep.local_params(), sweep.state(AVERAGE)
            distances = [(p.double() - e.double()).abs().sum() for p, e in zip(*lists, strict=True)]
            found = torch.stack(distances)[:, None] if distances else torch.zeros(0, 1, dtype=torch.float64)
            if sweep.over is not None:
                found = sweep.over.sum_norms([found.to(sweep.params[0].device)])[0]
            measured = found.flatten().float()
            counts = [len(measured)] if sweep.partition is not None else [1] * len(known)
            parts = torch.split(measured, counts)
            known = [part if each is None else each for each, part in zip(known, parts, strict=True)]
        device = sweep.params[0].device
        remaining = torch.cat([torch.as_tensor(each, device=device).reshape(-1).float() for each in known])
        views = [remaining] if sweep.partition is not None else remaining.unbind()
        for entry, view in zip(sweep.entries, views, strict=True):
            entry[REMAINING] = view
        return remaining

    def _owned(self, kept: Tensor) -> bool:
        return is_sharded(kept) or owns_its_memory(kept)

    def _gradients_of(self, sweep: Sweep) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(local parameters, local gradients, previous gradients) for the op; [] for ``fixed``."""
        params, grads = sweep.local_params(), sweep.local_grads()
        if self.rule == "fixed":
            return params, grads, []
        # Where there is no previous gradient yet, c is 0.
        return params, grads, [g if k is None else k for g, k in zip(grads, sweep.kept_gradients(), strict=True)]
