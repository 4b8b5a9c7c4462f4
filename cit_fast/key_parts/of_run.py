"""The key parts of a run's examples: found once in a run, and the same for replay and loss, on every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cit_fast.data.example import Example
from cit_fast.errors import ConfigError
from cit_fast.key_parts.sources import check_source, find_key_parts
from cit_fast.models.prompts import PromptEncoder
from cit_fast.processes import decided_by_first

if TYPE_CHECKING:
    from cit_fast.models.chat import Chat


def check_key_parts(source: str | Mapping[str, Any]) -> None:
    """``"auto"``, or what :func:`~cit_fast.key_parts.sources.check_source` takes.

    Raises:
        ConfigError: anything else.
    """
    if source == "auto":
        return
    try:
        name, options = check_source(source)
    except ConfigError as error:
        raise ConfigError(f"{error}; or auto: data where it gives key parts, else discover") from None
    if name == "llm" and "local" not in options:
        chat_of({key: value for key, value in options.items() if key != "unusable"}, None)


def key_parts_for_run(
    examples: Sequence[Example],
    source: str | Mapping[str, Any],
    model: nn.Module,
    encoder: PromptEncoder,
    *,
    alpha: float = 0.3,
    run: Path | None = None,
    cache: Path | None = None,
) -> list[Example]:
    """The examples with key parts, where there are any.

    Args:
        examples: of any tasks.
        source: ``"auto"``: those of the data, and for instructions without any what ``"discover"`` finds; or a source
            of :func:`~cit_fast.key_parts.sources.find_key_parts`.
        model: as it is now, for what is discovered; an instruction is searched once in a run.
        encoder: turns examples into the model's tokens.
        alpha: of the information gain that discovery ranks clauses by.
        run: folder of the run, where what was discovered is kept.
        cache: shared by all runs, where a chat model's answers are kept.

    Raises:
        DataError, RunError: as :func:`~cit_fast.key_parts.sources.find_key_parts`.
    """
    if source == "data":
        return list(examples)
    open_ones = [example for example in examples if source != "auto" or not example.key_parts]
    if not open_ones:
        return list(examples)
    asked = "discover" if source == "auto" else source
    discovers = check_source(asked)[0] == "discover"

    def find() -> dict[str, tuple[tuple[int, int], ...]]:
        found = find_key_parts(
            open_ones,
            asked,
            model=model,
            encoder=encoder,
            identity="the model of this run when it met the instruction",
            alpha=alpha,
            cache=run if discovers else cache,
        )
        return {example.instruction: example.key_parts for example in found.examples}

    spans = decided_by_first(find)
    chosen = {id(example) for example in open_ones}
    return [
        replace(example, key_parts=spans[example.instruction]) if id(example) in chosen else example
        for example in examples
    ]


def chat_of(spec: Mapping[str, Any], cache: Path | None) -> Chat:
    """The chat model of a configuration, with its answers kept in the cache shared by all runs."""
    from cit_fast.models.chat import build_chat

    return build_chat(spec, None if cache is None else cache / "chat")
