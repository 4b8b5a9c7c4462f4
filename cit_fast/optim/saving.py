"""State tensors keep their own dtype through ``load_state_dict``, and their bits through a plain optimizer's.

``torch.optim.Optimizer.load_state_dict`` casts every floating-point state tensor to its parameter's dtype, which
would round a float32 average of bfloat16 parameters at every resume.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cit_fast.errors import CitFastError
from cit_fast.optim.sharding import is_sharded
from cit_fast.optim.sweeps import AVERAGE, REMAINING

AVERAGE_BITS, REMAINING_BITS = "average_bits", "remaining_bits"
"""State entries of an attached average in saved states: bits as numbers of the parameter's 16-bit dtype, flat."""


class StateLoading:
    """Takes named tensors out of a state dict before the optimizer loads it, and puts them into its state after.

    Args:
        owner: the class that loads, for messages.
        dtypes: name of each state tensor that is loaded here -> its dtype; None keeps the one it was saved in.
        like_parameter: names of other state tensors that have their parameter's shape, which is checked.
    """

    def __init__(
        self, owner: str, dtypes: Mapping[str, torch.dtype | None], like_parameter: Container[str] = ()
    ) -> None:
        self.owner, self.dtypes, self.like_parameter = owner, dtypes, like_parameter

    def take(self, state_dict: dict[str, Any], params: Sequence[Tensor]) -> tuple[dict[str, Any], dict[int, Any]]:
        """(the state dict without what is ours, {position of a parameter: {name: tensor}}); checks before anything.

        Raises:
            CitFastError: a tensor does not have its parameter's shape, so the checkpoint is that of another model.
        """
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        place = {key: i for i, key in enumerate(keys) if i < len(params)}
        ours: dict[int, Any] = {}
        others: dict[Any, Any] = {}
        for key, saved in state_dict["state"].items():
            if key not in place or not isinstance(saved, dict):
                others[key] = saved
                continue
            param = params[place[key]]
            entry = {name: value for name, value in decoded(saved, param).items() if not self._is_empty(name, value)}
            ours[place[key]] = {name: entry[name] for name in self.dtypes if entry.get(name) is not None}
            others[key] = {name: value for name, value in entry.items() if name not in self.dtypes}
            for name, value in entry.items():
                expected = name in ours[place[key]] or (name in self.like_parameter and isinstance(value, Tensor))
                if expected and name != REMAINING and value.shape != param.shape:
                    raise CitFastError(
                        f"{self.owner}.load_state_dict: {name} of parameter {key} has shape {tuple(value.shape)}, "
                        f"the parameter has {tuple(param.shape)}: this state belongs to another model"
                    )
        return {**state_dict, "state": others}, ours

    def _is_empty(self, name: str, value: Any) -> bool:
        """What torch.distributed.checkpoint puts where a flattened state has no such entry."""
        empty = name in self.dtypes and isinstance(value, dict) and not value
        if empty and name == AVERAGE:
            warnings.warn(
                f"{self.owner}.load_state_dict: the flattened state has no average of a parameter, so it starts anew "
                "(those of 16-bit parameters that BalanceEMA.attach keeps are bits in a state, which only "
                "flatten_optimizer_state_dict=False can load)",
                stacklevel=2,
            )
        return empty

    def put(self, ours: Mapping[int, Any], params: Sequence[Tensor], state: Any) -> None:
        """Copies of the tensors into ``state``, on their parameters' devices."""
        for i, entry in ours.items():
            for name, value in entry.items():
                dtype = self.dtypes[name] or value.dtype
                if name == AVERAGE and params[i].dtype == torch.float64:
                    dtype = torch.float64
                state[params[i]][name] = value.detach().to(params[i].device, dtype, copy=True)


def encode(state_dict: dict[str, Any], params: Iterable[Tensor]) -> dict[str, Any]:
    """The state dict with what belongs to averages of 16-bit parameters as bits, which a cast to that dtype leaves."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    encoded = dict(state_dict["state"])
    for key, param in zip(keys, params, strict=True):
        entry = dict(encoded.get(key, {}))
        average = entry.get(AVERAGE)
        if average is None or param.dtype.itemsize != 2 or is_sharded(average):
            continue
        if average.dtype != param.dtype:
            entry[AVERAGE_BITS] = entry.pop(AVERAGE).detach().reshape(-1).view(param.dtype)
        if REMAINING in entry:
            entry[REMAINING_BITS] = entry.pop(REMAINING).reshape(1).view(param.dtype)
        encoded[key] = entry
    return {**state_dict, "state": encoded}


def decoded(entry: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """An entry of a saved state with what :func:`encode` wrote as bits as it was before."""
    entry = dict(entry)
    if AVERAGE_BITS in entry:
        entry[AVERAGE] = decode(entry.pop(AVERAGE_BITS), param)
    if REMAINING_BITS in entry:
        entry[REMAINING] = entry.pop(REMAINING_BITS).view(torch.float32).reshape(())
    return entry


def decode(bits: Tensor, param: Tensor) -> Tensor:
    """The average whose bits :func:`encode` wrote: float32 from two numbers an element, bfloat16 from one."""
    dtype = torch.bfloat16 if bits.numel() == param.numel() else torch.float32
    if bits.dtype.itemsize != 2 or bits.numel() * 2 != param.numel() * dtype.itemsize:
        raise CitFastError(
            f"the average of a parameter of shape {tuple(param.shape)} was saved beside 16-bit values of another shape "
            f"or loaded as {bits.dtype}: this state belongs to another model"
        )
    return bits.view(dtype).view(param.shape)
