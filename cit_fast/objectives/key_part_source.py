"""Where the key parts of a run's examples come from, for the parts of a method that need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cit_fast.data.example import Example
from cit_fast.data.prompts import PromptEncoder
from cit_fast.errors import ConfigError

if TYPE_CHECKING:
    from cit_fast.replay.llm import Chat

Spans = tuple[tuple[int, int], ...]


class KeyPartSource:
    """Fills in the key parts of examples.

    Args:
        spec: ``"data"``, those that the data gives, and no others; ``"auto"``, those that the data gives, and for an
            instruction without any what ``"discover"`` finds; ``"discover"``, clauses of the instruction ranked by the
            information gain that they carry under the model; or a chat model, ``{base_url, model, ...}`` or
            ``{local: folder or hub name}``, for instructions whose data gives none.

    Raises:
        ConfigError: an unknown source, or a chat model's option out of range.
    """

    def __init__(self, spec: str | Mapping[str, Any] = "auto") -> None:
        if isinstance(spec, Mapping):
            if "local" not in spec:
                chat_of(spec, None)
        elif spec not in {"auto", "data", "discover"}:
            raise ConfigError(
                f"key_parts: {spec!r} is unknown; expected 'auto', 'data', 'discover' or a chat model like "
                "{base_url: ...}"
            )
        self.spec = spec

    def fill(
        self,
        examples: Sequence[Example],
        model: nn.Module,
        encoder: PromptEncoder,
        *,
        folder: Path | None = None,
        cache: Path | None = None,
    ) -> list[Example]:
        """The examples with key parts; conversations, and instructions in which none are found, stay without.

        Args:
            examples: of any tasks.
            model: which ``discover`` asks; as it is now.
            encoder: turns examples into its tokens.
            folder: of the run, where it is kept what was discovered: an instruction is asked about once in a run.
            cache: where a chat model's answers are kept.
        """
        if self.spec == "data":
            return list(examples)
        given = self.spec != "discover"
        asked: dict[str, list[Example]] = {}
        for example in examples:
            if not example.messages and not (given and example.key_parts):
                asked.setdefault(example.instruction, []).append(example)
        found = self._found(asked, model, encoder, folder, cache) if asked else {}
        return [
            replace(example, key_parts=found.get(example.instruction, ()))
            if example.instruction in asked and not example.messages and not (given and example.key_parts)
            else example
            for example in examples
        ]

    def _found(
        self,
        asked: Mapping[str, Sequence[Example]],
        model: nn.Module,
        encoder: PromptEncoder,
        folder: Path | None,
        cache: Path | None,
    ) -> dict[str, Spans]:
        raise NotImplementedError


def chat_of(spec: Mapping[str, Any], cache: Path | None) -> Chat:
    """The chat model of a configuration, with its answers kept in the cache shared by all runs."""
    from cit_fast.replay.llm import build_chat

    return build_chat(spec, None if cache is None else cache / "chat")
