"""The four parts of a method, by name or by dotted path."""

from __future__ import annotations

import importlib
import inspect
import typing
from typing import Any

from cit_fast.errors import CitFastError, ConfigError
from cit_fast.training.config import Part, _choices, checked_value

PARTS: dict[str, dict[str, str]] = {
    "router": {
        "shared": "cit_fast.routing.SharedRouter",
        "oracle": "cit_fast.routing.OracleRouter",
        "per-task": "cit_fast.routing.PerTaskRouter",
        "lcia": "cit_fast.routing.LCIARouter",
        "switch": "cit_fast.routing.SwitchRouter",
    },
    "replay": {
        "none": "cit_fast.replay.NoReplay",
        "random": "cit_fast.replay.RandomReplay",
        "inscl": "cit_fast.replay.InsCLReplay",
        "prototype-data": "cit_fast.replay.PrototypeDataReplay",
        "prototype-instruction": "cit_fast.replay.PrototypeInstructionReplay",
        "diverse-instruction": "cit_fast.replay.DiverseInstructionReplay",
    },
    "objective": {"cross-entropy": "cit_fast.objectives.CrossEntropy"},
    "update": {
        "plain": "cit_fast.training.update.PlainUpdate",
        "balance-ema": "cit_fast.training.update.BalanceEMAUpdate",
    },
}


def build_part(kind: str, part: Part, method: str) -> Any:
    """Make one part of a method.

    Args:
        kind: router, replay, objective or update.
        part: its name (one of :data:`PARTS`, or ``package.module.Class``) and options.
        method: the method's name, for messages.

    Raises:
        ConfigError: an unknown name, a path that cannot be imported, or an option the part does not take.
    """
    where = f"method {method!r}: {kind}"
    dotted = PARTS[kind].get(part.name, part.name)
    module_name, _, class_name = dotted.replace(":", ".").rpartition(".")
    if not module_name:
        raise ConfigError(
            f"{where}: unknown name {part.name!r}; {_choices(part.name, PARTS[kind])} "
            "(your own class: package.module.Class)"
        )
    try:
        factory = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where}: {part.name!r} cannot be imported: {error}") from None
    signature = inspect.signature(factory)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    try:
        hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError):
        hints = {}
    options = {name: hints.get(name, Any) for name in signature.parameters}
    try:
        values = {
            key: value if takes_any and key not in options else checked_value(key, value, options)
            for key, value in part.options.items()
        }
        return factory(**values)
    except (ValueError, TypeError, CitFastError) as error:
        raise ConfigError(f"{where}.{error}") from None
