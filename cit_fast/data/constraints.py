"""What a task may declare of its answers, for the V-score of KPIG (He et al. 2025, arXiv 2403.10056)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cit_fast.errors import DataError

KINDS = {"WFR": "wrong format", "OOS": "out of scope", "WR": "wordy"}
"""The kinds of violation."""

ANSWER_FORMATS = ("json", "json_object", "json_list", "number", "list")
"""What ``answer_format`` may name; ``cit_fast.evaluation.violations`` says what each asks of an answer."""


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """The constraints on a task's answers; what a task does not declare is not held against its answers.

    Args:
        labels: the closed set of answers, if there is one.
        answer_pattern: regular expression that a well-formed answer matches as a whole, if there is one.
        answer_format: one of :data:`ANSWER_FORMATS`, if a well-formed answer is that.
        extractive: whether an answer is a span of the example's input, which is then never empty.
        wordy_above: an answer of more words than this multiple (>= 1) of the longest reference's is too long.

    Raises:
        DataError: a pattern that is no regular expression, a format that is unknown, or a multiple out of range.
    """

    labels: tuple[str, ...] = ()
    answer_pattern: str | None = None
    answer_format: str | None = None
    extractive: bool = False
    wordy_above: float | None = None

    def __post_init__(self) -> None:
        self.check_constraints("")

    def check_constraints(self, where: str) -> None:
        """Refuse constraints that no answer could be held to.

        Args:
            where: beginning of the message.

        Raises:
            DataError: see the class.
        """
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise DataError(f"{where}answer_pattern is no regular expression: {error}") from None
        if self.answer_format is not None and self.answer_format not in ANSWER_FORMATS:
            known = ", ".join(ANSWER_FORMATS)
            raise DataError(f"{where}answer_format {self.answer_format!r} is unknown; known: {known}")
        if self.wordy_above is not None and not 1.0 <= self.wordy_above < math.inf:
            raise DataError(
                f"{where}wordy_above is {self.wordy_above}; it is a multiple of the longest reference's words and at "
                "least 1"
            )

    def declared(self) -> dict[str, Any]:
        """The constraints that are declared, by field."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(Constraints)}
        return {name: value for name, value in values.items() if value}

    @classmethod
    def of(cls, task: Constraints) -> Constraints:
        """The constraints of a task (or of anything else that has them), alone."""
        return cls(**task.declared())

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Constraints:
        """What :meth:`to_record` gave.

        Raises:
            DataError: keys or values that it does not give.
        """
        kinds = {"answer_pattern": str, "answer_format": str, "labels": list, "extractive": bool}
        for key, value in record.items():
            if not isinstance(value, kinds.get(key, (int, float) if key == "wordy_above" else ())):
                raise DataError(f"{key} of value {value!r} is no constraint that a task declares")
        return cls(**{**record, "labels": tuple(map(str, record.get("labels", ())))})

    def to_record(self) -> dict[str, Any]:
        """The declared constraints as plain JSON values; empty if the task declares none."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.declared().items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of violation that apply."""
        applies = {
            "WFR": bool(self.answer_pattern or self.answer_format),
            "OOS": bool(self.labels) or self.extractive,
            "WR": self.wordy_above is not None,
        }
        return tuple(kind for kind in KINDS if applies[kind])
