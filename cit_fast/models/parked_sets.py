"""Adapter sets that lie beside a PEFT model instead of in it.

PEFT walks through every module for almost everything it does, and a hundred sets are a hundred modules in each layer: a
stage would cost the more the more sets came before it. So the model has the set at work, and the others are parked:
their matrices, by layer, ready for :class:`~cit_fast.models.adapter_bank.AdapterBank` to answer with. Plain LoRA alone
can be parked; sets of any other kind stay in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from cit_fast.models.adapter_bank import AdapterBank, LowRank, NotPlainLoraError, read_adapter_config

_ATTRIBUTE = "_cit_fast_parked"


@dataclass
class Parked:
    """The parked sets of a model.

    Args:
        configs: set -> its PEFT configuration.
        updates: layer -> set -> its matrices, as :meth:`AdapterBank.of_model` names the layers.
    """

    configs: dict[str, Any] = field(default_factory=dict)
    updates: dict[str, dict[str, LowRank]] = field(default_factory=dict)

    def add(self, name: str, config: Any, updates: Mapping[str, LowRank]) -> None:
        """Park a set."""
        self.configs[name] = config
        for path, update in updates.items():
            self.updates.setdefault(path, {})[name] = update

    def to(self, device: torch.device) -> None:
        """Move the matrices to the device of the model, which takes along only what is its own."""
        for sets in self.updates.values():
            for name, update in sets.items():
                bias = None if update.bias is None else update.bias.to(device)
                sets[name] = replace(update, a=update.a.to(device), b=update.b.to(device), bias=bias)

    def pop(self, name: str) -> tuple[Any, dict[str, LowRank]]:
        """Take a set out."""
        own = {path: sets.pop(name) for path, sets in self.updates.items() if name in sets}
        return self.configs.pop(name), own


def parked(model: Any) -> Parked:
    """Those of a model; none of a model without adapters."""
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, Parked) else Parked()


def set_parked(model: PeftModel, sets: Parked) -> None:
    """Give a model other parked sets, those of the model that it follows."""
    object.__setattr__(model, _ATTRIBUTE, sets)


def set_names(model: Any) -> set[str]:
    """Of the sets in a model and beside it."""
    return {*getattr(model, "peft_config", ()), *parked(model).configs}


def park_others(model: PeftModel, name: str) -> None:
    """Park every set but ``name``, which is active, if all are plain LoRA."""
    others = [each for each in model.peft_config if each != name]
    bank = AdapterBank.of_model(model) if others else None
    if bank is None:
        return
    sets = parked(model)
    for other in others:
        sets.add(other, model.peft_config[other], bank.updates_of(other))
        model.delete_adapter(other)
    set_parked(model, sets)


def take_in(model: PeftModel, name: str) -> None:
    """Put a parked set back into the model."""
    from peft import set_peft_model_state_dict

    config, updates = parked(model).pop(name)
    with torch.random.fork_rng():  # its weights are drawn, and replaced
        model.add_adapter(name, config)
    set_peft_model_state_dict(model, _state_dict(updates), adapter_name=name)


def weights_of(model: PeftModel, name: str) -> dict[str, Tensor]:
    """A set's weights as PEFT's state dict has them, in the model or beside it."""
    from peft import get_peft_model_state_dict

    if name in model.peft_config:
        found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name)
        return found
    return _state_dict({path: sets[name] for path, sets in parked(model).updates.items() if name in sets})


def read_parked(base: Any, folders: Mapping[str, Path]) -> Parked | None:
    """Sets from their folders, for the PEFT model that will be made of the bare model ``base``; ``None`` where one of
    them cannot be parked.

    Raises:
        RunError: as :meth:`AdapterBank.read`.
    """
    configs = {name: read_adapter_config(folder) for name, folder in folders.items()}
    bank, sets = AdapterBank(), Parked()
    try:
        for name, folder in folders.items():
            bank.read(base, name, folder)
    except NotPlainLoraError:
        return None
    for name, config in configs.items():
        own = bank.updates_of(name)
        sets.add(name, config, {f"base_model.model.{path}": update for path, update in own.items()})
    return sets


def bank_of(model: Any) -> AdapterBank | None:
    """The sets in a PEFT model and beside it; ``None`` where one of them is no plain LoRA."""
    bank = AdapterBank.of_model(model)
    if bank is not None:
        bank.extend(model, parked(model).updates, parked(model).configs)
    return bank


def _state_dict(updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
    found = {}
    for path, update in updates.items():
        parts = {"lora_A.weight": update.a, "lora_B.weight": update.b, "lora_B.bias": update.bias}
        found.update({f"{path}.{kind}": value for kind, value in parts.items() if value is not None})
    return found
