"""A sweep is the list of tensors of one call of the op, cached between steps, which then only collect gradients.

Previous gradients without a copy: the gradient tensors of a step are kept themselves as the previous gradients of the
next one, where ``zero_grad`` sets ``p.grad`` to None and backward then makes new tensors. That is safe for a gradient
that owns its whole storage (no view of a bucket or a flat buffer) as long as nobody writes to it. At the next step
three signs tell that somebody did: it is the same tensor again, its memory is that of the new gradient, or its version
counter moved.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from cit_fast.optim.partitions import Partition
from cit_fast.optim.sharding import local, local_gradient

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AVERAGE, PREVIOUS_GRAD = "average", "previous_grad"
REMAINING = "remaining"
"""State entry of ``rule="paper"``: the distance that the last update left between parameter and average."""


@dataclass(eq=False)
class Sweep:
    """Parameters that go through the op in one call, with their state.

    Attributes:
        params: on one device, each with a gradient.
        entries: ``optimizer.state[p]`` of each.
        averages: the local part of each average.
        weights: how many weights each has: one, or one for each piece of a flat partition.
        over: where the norms are summed over processes, a ``sharding.Reduction`` or a ``Partition``.
        copies: whether previous gradients have tensors of their own that the op writes (or there are none,
            ``rule="fixed"``); else they are kept by reference. ``previous`` holds them: None where there is none yet.
        sharded: whether any parameter is a DTensor.
        remaining: [weights of whole parameters], float32, for ``rule="paper"``: ``state[p]["remaining"]`` are its
            elements.
        partition: whose pieces the only "parameter", a flat tensor of an engine, holds.
        plain: whether the kernels take these tensors as they are, whatever contiguous gradients come. A backend is
            then called without the checks and the dispatcher of the public op, which over a few hundred small tensors
            cost more than the sweep itself.
    """

    params: list[Tensor]
    entries: list[dict[str, Any]]
    averages: list[Tensor]
    weights: list[int]
    over: Any
    copies: bool
    sharded: bool
    remaining: Tensor | None = None
    partition: Partition | None = None
    plain: bool = False
    previous: list[Tensor | None] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)

    def check_plain(self) -> None:
        """Set ``plain``, once the lists are complete."""
        params = self.local_params()
        device = self.params[0].device
        kept = [p if k is None else k for p, k in zip(params, self.previous, strict=False)]
        lists = [params, *self.state_lists(), kept]
        self.plain = bool(params) and all(
            tensor.is_contiguous()
            and tensor.dtype in _KERNEL_DTYPES
            and tensor.device == device
            and tensor.shape == param.shape
            for tensors in lists
            for param, tensor in zip(params, tensors, strict=False)
        )

    def state_lists(self) -> list[list[Tensor]]:
        """Averages and moments."""
        return [self.averages]

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

    def takes(self, grads: Sequence[Tensor]) -> bool:
        """Whether the kernels take the tensors with these gradients as they are."""
        return (
            self.plain
            and all(grad.is_contiguous() and grad.dtype in _KERNEL_DTYPES for grad in grads)
            and not torch.compiler.is_compiling()
        )

    def changed(self, grads: Sequence[Tensor | None]) -> tuple[list[Tensor], bool]:
        """(parameters whose kept gradient can no longer be relied on, whether somebody certainly wrote to one).

        ``grads``: what the parameters have now. The same tensor as in the last step with the same version is most
        likely untouched, but a replayed CUDA graph leaves no trace.
        """
        if self.copies:
            return [], False
        found, written = [], False
        for param, grad, kept, version, pointer in zip(
            self.params, grads, self.previous, self.versions, self.pointers, strict=True
        ):
            if kept is None or grad is None:
                overwritten = kept is not None and kept._version != version
                same = False
            else:
                same = kept is grad
                overwritten = kept._version != version or (not same and pointer != 0 and grad.data_ptr() == pointer)
            if same or overwritten:
                found.append(param)
                written = written or overwritten
        return found, written

    def keep(self, grads: list[Tensor]) -> None:
        """The gradients of this step become the previous ones; with ``copies`` the op has done that."""
        if self.copies:
            return
        for entry, grad in zip(self.entries, grads, strict=True):
            entry[PREVIOUS_GRAD] = grad
        self.previous = list(grads)
        self.remember()

    def release(self, params: Container[Tensor]) -> None:
        """Rely no longer on the kept gradients of these parameters."""
        self.previous = [
            None if param in params else kept for param, kept in zip(self.params, self.previous, strict=True)
        ]

    def remember(self) -> None:
        """Note how the kept gradients look, for :meth:`changed`."""
        self.versions = [0 if kept is None else kept._version for kept in self.previous]
        self.pointers = [0 if kept is None else kept.data_ptr() for kept in self.previous]


def owns_its_memory(grad: Tensor) -> bool:
    """Whether the gradient can be kept: a plain tensor, not part of a graph, alone in its storage."""
    return (
        type(grad) in (Tensor, Parameter)
        and not grad.requires_grad
        and grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
    )


def unique(params: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once, in order: a parameter that is listed twice must not be stepped twice."""
    return list({id(param): param for param in params}.values())


def zeros_like_parameter(param: Tensor, dtype: torch.dtype) -> Tensor:
    """State of a parameter in another dtype; a shard for a shard."""
    return torch.zeros_like(param, dtype=dtype, requires_grad=False)
