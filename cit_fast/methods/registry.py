"""The four parts of a method, by name or by dotted path."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

from cit_fast.errors import CitFastError, ConfigError
from cit_fast.methods.config import MethodConfig, Part
from cit_fast.text import first_line
from cit_fast.values import checked_value, choices, imported

PARTS: dict[str, dict[str, str]] = {
    "router": {
        "shared": "cit_fast.methods.routing.SharedRouter",
        "stacked": "cit_fast.methods.routing.StackedRouter",
        "oracle": "cit_fast.methods.routing.OracleRouter",
        "per-task": "cit_fast.methods.routing.PerTaskRouter",
        "lcia": "cit_fast.methods.routing.LCIARouter",
        "grouping": "cit_fast.methods.routing.GroupingRouter",
        "switch": "cit_fast.methods.routing.SwitchRouter",
        "switch-tokens": "cit_fast.methods.routing.SwitchTokensRouter",
    },
    "replay": {
        "none": "cit_fast.methods.replay.NoReplay",
        "random": "cit_fast.methods.replay.RandomReplay",
        "inscl": "cit_fast.methods.replay.InsCLReplay",
        "prototype-data": "cit_fast.methods.replay.PrototypeDataReplay",
        "prototype-instruction": "cit_fast.methods.replay.PrototypeInstructionReplay",
        "diverse-instruction": "cit_fast.methods.replay.DiverseInstructionReplay",
        "kpig": "cit_fast.methods.replay.KPIGReplay",
        "surprise": "cit_fast.methods.replay.SurpriseReplay",
        "on-policy": "cit_fast.methods.replay.OnPolicyReplay",
    },
    "objective": {
        "cross-entropy": "cit_fast.methods.objectives.CrossEntropy",
        "kpig": "cit_fast.methods.objectives.KPIG",
        "ewc": "cit_fast.methods.objectives.EWC",
        "o-lora": "cit_fast.methods.objectives.OLoRA",
        "sdft": "cit_fast.methods.objectives.SDFT",
        "distillation": "cit_fast.methods.objectives.Distillation",
    },
    "update": {
        "plain": "cit_fast.methods.updates.PlainUpdate",
        "balance-ema": "cit_fast.methods.updates.BalanceEMAUpdate",
        "merge": "cit_fast.methods.updates.MergeUpdate",
    },
}
"""Kind of part -> its built-in names -> the class of each."""


def parts_of(method: MethodConfig, training: Mapping[str, Any]) -> dict[str, Part]:
    """The four parts of a method by kind, with what the TrainingArguments mean for them.

    Raises:
        ConfigError: label smoothing for an objective that does not smooth.
    """
    parts: dict[str, Part] = {kind: getattr(method, kind) for kind in PARTS}
    smoothing, objective = training.get("label_smoothing_factor", 0.0), parts["objective"]
    if smoothing:
        if objective.name != "cross-entropy":
            raise ConfigError(
                f"training.label_smoothing_factor: method {method.name!r} has the objective {objective.name!r}, which "
                "does not smooth labels; leave it out"
            )
        parts["objective"] = Part(name=objective.name, options={"label_smoothing": smoothing, **objective.options})
    return parts


def part_name(kind: str, configured: str, part: Any) -> str:
    """The configured name if the part is of that class; else, of an object given from Python, its dotted path."""
    built_in = PARTS[kind].get(configured, configured)
    own = type(part)
    return configured if built_in.rpartition(".")[2] == own.__qualname__ else f"{own.__module__}.{own.__qualname__}"


def build_parts(
    method: MethodConfig, training: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The four parts of a method by kind, those of ``given`` as they are.

    Raises:
        ConfigError: as :func:`parts_of` and :func:`build_part`, or an object of ``given`` that is no part.
    """
    given = given or {}
    for kind, part in given.items():
        _check_methods(kind, part, f"{kind}: a {type(part).__name__} is no {kind}:")
    return {
        kind: given[kind] if kind in given else build_part(kind, part, method.name)
        for kind, part in parts_of(method, training).items()
    }


METHODS = {
    "router": ("assign", "learn", "answer", "save"),
    "replay": ("select",),
    "objective": ("prepare", "__call__"),
    "update": ("begin", "wrap", "finish", "summary"),
}
"""What an object must be able to do to be a part of each kind."""


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
    if "." not in dotted.replace(":", "."):
        raise ConfigError(
            f"{where}: unknown name {part.name!r}; {choices(part.name, PARTS[kind])} "
            "(your own class: package.module.Class)"
        )
    factory = imported(dotted, f"{where}: {part.name!r}", "class")
    try:
        signature = inspect.signature(factory)
        hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError, ValueError):
        signature, hints = inspect.Signature(), {}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    options = {name: hints.get(name, Any) for name in signature.parameters}
    try:
        values = {
            key: value if takes_any and key not in options else checked_value(key, value, options)
            for key, value in part.options.items()
        }
        made = factory(**values)
    except (ValueError, TypeError, CitFastError) as error:
        raise ConfigError(f"{where}.{first_line(error)}") from error
    except Exception as error:  # of a class of the user's own
        raise ConfigError(f"{where}: {part.name!r}: {type(error).__name__}: {first_line(error)}") from error
    _check_methods(kind, made, f"{where}: {part.name!r} makes a {type(made).__name__}, which is no {kind}:")
    return made


def _check_methods(kind: str, part: Any, where: str) -> None:
    for name in METHODS[kind]:
        if not callable(getattr(part, name, None)):
            raise ConfigError(f"{where} it has no {name}()")
