"""DeepSpeed ZeRO's flat partitions: whose pieces they hold, norms of whole parameters, and the way into the model.

ZeRO-1 and 2 cut the parameters of a group, laid end to end, into one partition for each process, so that a parameter
may be spread over two of them or more; each process keeps in ``param._hp_mapping`` where its piece lies. ZeRO-3 cuts
every parameter into equal pieces, the last ones padded, and lays a sub-group's pieces end to end;
``param._z3_optimizer.grad_position`` has the places. The ops get views of the pieces, padding stays out, and the three
norms of a parameter are summed over the data-parallel processes: 24 bytes for each parameter, in one all-reduce for
each step that the engine takes (one for each parameter group, or sub-group of ZeRO-3). State stays flat, one tensor
for each partition, so that the engine saves and loads it like any other optimizer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cit_fast.errors import CitFastError


class Piece(NamedTuple):
    """Where in a flat tensor the part of a parameter lies that this process holds."""

    param: int
    start: int
    numel: int


@dataclass(eq=False)
class Partition:
    """One flat tensor of an engine.

    Attributes:
        params: those of which some process has a piece in its partition, the same on all processes.
        pieces: of this process; ``param`` counts in ``params``.
        group: the processes among which the parameters are divided.
    """

    params: list[Tensor]
    pieces: list[Piece]
    group: Any

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of the partition, of its gradient or its state."""
        flat = flat.detach()
        return [flat.narrow(0, piece.start, piece.numel) for piece in self.pieces]

    def sum_norms(self, norms: Sequence[Tensor]) -> list[Tensor]:
        """The norms [pieces, 3] as those of whole parameters, [params, 3]."""
        return [self._sum(each).to(each.device) for each in norms]

    def own(self, alphas: Tensor) -> Tensor:
        """The weight of each piece: that of the parameter it belongs to."""
        return alphas[torch.tensor([piece.param for piece in self.pieces], dtype=torch.long, device=alphas.device)]

    def _sum(self, values: Tensor) -> Tensor:
        return _sum_over(self.group, self.params, [piece.param for piece in self.pieces], values)


def find_partition(given: Sequence[Tensor], flat: Tensor) -> Partition | None:
    """Whose pieces ``flat`` holds, or None where the engine left no marks of that. Every process has to call it.

    Args:
        given: the parameters that the optimizer was given, in the same order on all processes.
        flat: a partition.

    Raises:
        CitFastError: the pieces of all processes do not make up whole parameters.
    """
    marked = [param for param in given if _is_marked(param)]
    if not marked:
        return None
    found = {i: piece for i, param in enumerate(marked) if (piece := _piece(param, flat)) is not None}
    groups = [_group(marked[i]) for i in found] or [_group(param) for param in marked]
    if any(group is not groups[0] for group in groups):
        raise CitFastError("a flat partition of DeepSpeed belongs to several process groups (experts): not supported")
    sizes = torch.tensor([[float(numel)] for _, numel in found.values()], dtype=torch.float64).view(-1, 1)
    counts = _sum_over(groups[0], marked, list(found), sizes).flatten().tolist()
    members = [i for i, count in enumerate(counts) if count > 0]
    if any(counts[i] != _numel(marked[i]) for i in members):
        raise CitFastError("the pieces in DeepSpeed's flat partitions do not make up whole parameters: not supported")
    place = {i: k for k, i in enumerate(members)}
    pieces = [Piece(place[i], *piece) for i, piece in found.items() if piece[1] > 0]
    return Partition([marked[i] for i in members], pieces, groups[0])


def can_publish(given: Sequence[Tensor]) -> bool:
    """Whether :func:`publish` can put what the partitions hold into the model."""
    return any(map(_is_marked, given))


def publish(given: Sequence[Tensor]) -> None:
    """Give the model's parameters the values of the flat partitions. Every process has to call it."""
    import deepspeed

    for param in filter(_is_marked, given):
        values = deepspeed.utils.safe_get_full_fp32_param(param)
        if hasattr(param, "_hp_mapping"):
            param.data.copy_(values)
        else:
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                param.data.copy_(values)


def gather_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict of a model under ZeRO in memory of its own on the CPU. Every process has to call it."""
    import deepspeed

    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            weights[name] = tensor.detach().to("cpu", copy=True)
    return weights


def _is_marked(param: Tensor) -> bool:
    if not param.requires_grad:
        return False
    engine = getattr(param, "_z3_optimizer", None)
    if engine is None:
        return hasattr(param, "_hp_mapping") and hasattr(param, "_dp_group")
    kept = all(hasattr(engine, name) for name in ("grad_position", "get_param_id", "fp32_partitioned_groups_flat"))
    return kept and not getattr(engine, "swap_optimizer", False)


def _piece(param: Any, flat: Tensor) -> tuple[int, int] | None:
    """(start, number of elements) of the parameter in the flat tensor."""
    engine = getattr(param, "_z3_optimizer", None)
    if engine is not None:
        index, start, numel = engine.grad_position[engine.get_param_id(param)]
        if engine.fp32_partitioned_groups_flat[index] is not flat:
            return None
        before = torch.distributed.get_rank(group=_group(param)) * numel
        return start, max(0, min(numel, param.ds_numel - before))
    mapping = param._hp_mapping
    if mapping is None or mapping.hp_fragment.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
        return None
    address = mapping.get_hp_fragment_address()
    return address.start, address.numel


def _group(param: Any) -> Any:
    engine = getattr(param, "_z3_optimizer", None)
    if engine is None:
        return param._dp_group
    return getattr(param, "ds_process_group", engine.dp_process_group)


def _numel(param: Any) -> int:
    return int(getattr(param, "ds_numel", param.numel()))


def _sum_over(group: Any, params: Sequence[Tensor], rows: Sequence[int], values: Tensor) -> Tensor:
    """[params, columns]: the values [rows, columns] at their rows, summed over the processes."""
    device = params[0].device  # where the processes talk, which is not where offloaded partitions are
    total = torch.zeros(len(params), values.shape[1], dtype=torch.float64, device=device)
    total[torch.tensor(rows, dtype=torch.long, device=device)] = values.to(device)
    torch.distributed.all_reduce(total, group=group)
    return total
