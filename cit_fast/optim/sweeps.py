"""A sweep is the list of tensors of one call of the op, planned once for as long as the same parameters step.

What the lists hold is read from ``optimizer.state[p]`` anew at each step, and a plan keeps none of these tensors alive:
who offloads the state between two steps puts others there.

Previous gradients without a copy: the gradient tensors of a step are kept themselves as the previous gradients of the
next one, where ``zero_grad`` sets ``p.grad`` to None and backward then makes new tensors. That is safe for a gradient
that owns its whole storage (no view of a bucket or a flat buffer) as long as nobody writes to it. At the next step
three signs tell that somebody did: it is the same tensor again, its memory is that of the new gradient, or its version
counter moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Sequence, Set
from dataclasses import dataclass, field
from operator import attrgetter, eq, is_, itemgetter
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cit_fast.ops.balance_ema.native import DTYPES, STATE_DTYPES
from cit_fast.optim.partitions import Partition
from cit_fast.optim.sharding import local, local_gradient

AVERAGE, PREVIOUS_GRAD = "average", "previous_grad"
REMAINING = "remaining"
"""State entry of ``rule="paper"``: the distance that the last update left between parameter and average."""

_dtype, _shape, _version = attrgetter("dtype"), attrgetter("shape"), attrgetter("_version")
_PLAIN = {Tensor, Parameter}
_KERNEL_DTYPES = set(DTYPES)


@dataclass(eq=False)
class Sweep:
    """Parameters that go through the op in one call, and how their state is found.

    Attributes:
        params: on one device, each with a gradient.
        entries: ``optimizer.state[p]`` of each.
        weights: how many weights each has: one, or one for each piece of a flat partition.
        over: where the norms are summed over processes, a ``sharding.Reduction`` or a ``Partition``.
        copies: whether previous gradients have tensors of their own that the op writes (or there are none,
            ``rule="fixed"``); else they are kept by reference.
        sharded: whether any parameter is a DTensor.
        remaining: [weights of whole parameters], float32, for ``rule="paper"``: ``state[p]["remaining"]`` are its
            elements.
        partition: whose pieces the only "parameter", a flat tensor of an engine, holds.
        plain: whether the kernels take the state as it is. A backend is then called without the checks and the
            dispatcher of the public op, which over a few hundred small tensors cost more than the sweep itself.
        plain_grads, plain_kept: the same of the gradients of the step in hand, and of those kept by reference.
        seen: of each state entry, by name, the tensors that the plan was made for.
        shapes: of each local parameter at that time.
        versions, pointers: of the gradients that are kept by reference, see :meth:`changed`.
        read: pointers of the gradients of the step in hand, once they were asked for.
        moved: whether one of them has other memory now, as ``model.double()`` gives a gradient.
    """

    STATE: ClassVar[tuple[str, ...]] = (AVERAGE,)
    """What the op changes of every parameter, beside previous gradients."""
    COUNTERS: ClassVar[tuple[str, ...]] = ()
    """What else belongs to the plan."""

    params: list[Tensor]
    entries: list[dict[str, Any]]
    weights: list[int]
    over: Any
    copies: bool
    sharded: bool
    remaining: Tensor | None = None
    partition: Partition | None = None
    plain: bool = False
    plain_grads: bool = True
    plain_kept: bool = True
    seen: dict[str, list[weakref.ref[Tensor]]] = field(default_factory=dict)
    shapes: list[torch.Size] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    moved: bool = False

    def watch(self) -> None:
        """Note what the state holds, once it is complete."""
        names = (*self.STATE, *self.COUNTERS, *(() if self.remaining is None else (REMAINING,)), PREVIOUS_GRAD)
        self.seen = {}
        for name in names:
            tensors = [entry[name] for entry in self.entries if name in entry]
            if len(tensors) == len(self.entries):
                self.seen[name] = [weakref.ref(tensor) for tensor in tensors]
        kept = [entry.get(PREVIOUS_GRAD) for entry in self.entries]
        self.versions = [0 if each is None else each._version for each in kept]
        self.pointers = [0 if each is None or self.copies else each.data_ptr() for each in kept]
        params = self.local_params()
        self.shapes = list(map(_shape, params))
        previous = [p if k is None else k for p, k in zip(params, self.kept_gradients(), strict=True)]
        self.plain_kept = self._fit(previous, _KERNEL_DTYPES)
        self.plain = (
            bool(params)
            and self._fit(params, _KERNEL_DTYPES)
            and all(self._fit(self.state(name), STATE_DTYPES) for name in self.STATE)
        )

    def _fit(self, tensors: Sequence[Tensor], dtypes: Set[torch.dtype]) -> bool:
        device = self.params[0].device
        return (
            _are_plain(tensors, dtypes)
            and list(map(_shape, tensors)) == self.shapes
            and all(tensor.device == device for tensor in tensors)
        )

    def is_current(self) -> bool:
        """Whether the entries still hold what the plan was made for."""
        try:
            return not self.moved and all(
                all(map(is_, map(itemgetter(name), self.entries), [each() for each in seen]))
                for name, seen in self.seen.items()
            )
        except KeyError:
            return False

    def state(self, name: str) -> list[Tensor]:
        """What this process holds of that entry of ``optimizer.state``."""
        if self.partition is not None:
            return self.partition.views(self.entries[0][name])
        kept: list[Tensor] = [entry[name] for entry in self.entries]
        return list(map(local, kept)) if self.sharded else kept

    def kept_gradients(self) -> list[Tensor | None]:
        """What this process holds of the previous gradients; None where there is none yet."""
        if self.partition is not None and PREVIOUS_GRAD in self.entries[0]:
            return list(self.partition.views(self.entries[0][PREVIOUS_GRAD]))
        if self.partition is not None:
            return [None] * len(self.local_params())
        kept = [entry.get(PREVIOUS_GRAD) for entry in self.entries]
        return [None if each is None else local(each) for each in kept] if self.sharded else kept

    def local_params(self) -> list[Tensor]:
        """What this process holds of the parameters."""
        if self.partition is not None:
            return self.partition.views(self.params[0])
        return [local(param) for param in self.params] if self.sharded else self.params

    def local_grads(self) -> list[Tensor]:
        """The gradients of :meth:`local_params`."""
        if self.partition is not None:
            return self.partition.views(cast("Tensor", self.params[0].grad))
        if self.sharded:
            return [local_gradient(param) for param in self.params]
        return [cast("Tensor", param.grad) for param in self.params]

    def own(self, alphas: Tensor) -> Tensor:
        """This process's share of the weights that follow from the summed norms."""
        return alphas if self.partition is None else self.partition.own(alphas)

    def own_remaining(self) -> Tensor | None:
        """``remaining`` for the op, which changes it; where norms have yet to be summed, a copy that does not count."""
        if self.over is None or self.remaining is None:
            return self.remaining
        return self.own(self.remaining.clone())

    def takes(self, params: Sequence[Tensor], grads: Sequence[Tensor], *state: Sequence[Tensor]) -> bool:
        """Whether the kernels take these lists as they are; ``p.data`` may have become another tensor's."""
        self.plain_grads = _are_plain(grads)
        if not (self.plain and self.plain_grads and self.plain_kept):
            return False
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return False
        device = {params[0].get_device()}
        return (
            all(set(map(Tensor.get_device, tensors)) <= device for tensors in (params, grads, *state))
            and list(map(_shape, params)) == self.shapes
            and _are_plain(params)
        )

    def changed(self) -> tuple[list[Tensor], bool]:
        """(parameters whose kept gradient can no longer be relied on, whether somebody certainly wrote to one).

        The same tensor as in the last step with the same version is most likely untouched, but a replayed CUDA graph
        leaves no trace.
        """
        if self.copies or PREVIOUS_GRAD not in self.seen:
            return [], False
        seen = [each() for each in self.seen[PREVIOUS_GRAD]]
        if self._untouched(seen):
            return [], False
        found, written = [], False
        for param, entry, noted, version, pointer in zip(
            self.params, self.entries, seen, self.versions, self.pointers, strict=True
        ):
            kept: Tensor | None = entry.get(PREVIOUS_GRAD)
            grad = param.grad
            if kept is None or kept is not noted:  # somebody has put another there
                continue
            overwritten = kept._version != version
            moved = kept.data_ptr() != pointer
            self.moved = self.moved or moved
            if moved and kept.dtype not in _KERNEL_DTYPES and kept.dtype != param.dtype:
                entry[PREVIOUS_GRAD] = kept.to(param.dtype)  # model.double() took it along, and model.float() does not
            shared = grad is not None and not moved and pointer != 0 and grad.data_ptr() == pointer
            if grad is kept or overwritten or shared:
                found.append(param)
                written = written or overwritten or grad is not kept
        return found, written

    def _untouched(self, seen: Sequence[Tensor | None]) -> bool:
        """All at once, for lists of hundreds of small tensors. False: look at each."""
        try:
            self.read = []
            kept = [entry[PREVIOUS_GRAD] for entry in self.entries]
            self.read = list(map(Tensor.data_ptr, [cast("Tensor", param.grad) for param in self.params]))
            return (
                all(map(is_, kept, seen))
                and list(map(_version, kept)) == self.versions
                and list(map(Tensor.data_ptr, kept)) == self.pointers
                and not any(map(eq, self.read, self.pointers))
            )
        except (KeyError, TypeError):  # one is not there
            return False

    def release(self, staying: Container[Tensor]) -> None:
        """Copy the kept gradients of all parameters but these: a sweep without them watches those no more."""
        if self.copies or PREVIOUS_GRAD not in self.seen:
            return
        for param, entry, seen in zip(self.params, self.entries, self.seen[PREVIOUS_GRAD], strict=True):
            kept: Tensor | None = entry.get(PREVIOUS_GRAD)
            if param not in staying and kept is not None and kept is seen():
                entry[PREVIOUS_GRAD] = kept.clone()

    def keep(self, grads: list[Tensor]) -> None:
        """The gradients of this step become the previous ones; with ``copies`` the op has done that."""
        if self.copies:
            return
        for entry, grad in zip(self.entries, grads, strict=True):
            entry[PREVIOUS_GRAD] = grad
        self.seen[PREVIOUS_GRAD] = list(map(weakref.ref, grads))
        self.versions = list(map(_version, grads))
        self.pointers, self.read = self.read or list(map(Tensor.data_ptr, grads)), []
        self.plain_kept = self.plain_grads


def _are_plain(tensors: Sequence[Tensor], dtypes: Set[torch.dtype] = _KERNEL_DTYPES) -> bool:
    return (
        set(map(type, tensors)) <= _PLAIN
        and all(map(Tensor.is_contiguous, tensors))
        and set(map(_dtype, tensors)) <= dtypes
    )


def owns_its_memory(grad: Tensor) -> bool:
    """Whether the gradient can be kept: a plain tensor, not part of a graph, alone in its storage."""
    return (
        type(grad) in _PLAIN
        and not grad.requires_grad
        and grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
    )


def unique(params: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once, in order: a parameter that is listed twice must not be stepped twice."""
    return list({id(param): param for param in params}.values())


def zeros_like_parameter(param: Tensor, dtype: torch.dtype) -> Tensor:
    """State of a parameter in another dtype; a shard for a shard."""
    return torch.zeros_like(param, dtype=dtype, requires_grad=False)
