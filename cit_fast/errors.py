"""Errors a user can act on. Each message names what was wrong, where, and what would be right.

The command line prints any :class:`CitFastError` as one line and exits with code 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cit_fast.evaluation.records import GateRecord


class CitFastError(Exception):
    """Base class: something the user gave cannot be used, or the machine cannot do what was asked."""

    def __str__(self) -> str:
        """One line, whatever texts of the data are quoted in it: a line break is shown as ``\\n``."""
        return "\\n".join(super().__str__().splitlines())


class ConfigError(CitFastError, ValueError):
    """A configuration file or override is wrong; the message starts with the file and the key's path."""


class DataError(CitFastError):
    """A data file or an example is wrong; the message starts with ``file:line`` or the example's name."""


class RunError(CitFastError):
    """A run folder cannot be used: locked, made by another configuration, damaged, or the disk is full."""


class GateError(RunError):
    """A stage broke a limit of the gate and is a candidate; the command line exits with code 3.

    Args:
        message: which limits, and what can be done. ``record``: what was measured.
    """

    def __init__(self, message: str, record: GateRecord) -> None:
        super().__init__(message)
        self.record = record


class BackendError(CitFastError):
    """A kernel backend was asked for by name and cannot serve."""


class LeftOutWarning(UserWarning):
    """A part of a run cannot be used and was left out; the message names it."""
