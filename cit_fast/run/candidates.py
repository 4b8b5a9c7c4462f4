"""A stage that broke a limit of the gate: kept as a candidate until it is accepted or trained again.

<run>/candidates/NN    the stage as it would have been committed
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from cit_fast.errors import GateError, RunError
from cit_fast.evaluation.records import StageRecord
from cit_fast.evaluation.run_files import read_run, read_stage
from cit_fast.run.gate import said
from cit_fast.run.run_folder import CANDIDATES, RunFolder
from cit_fast.run.trackers import another_course

_NAMED = 2
"""Broken limits that an error names."""


def has_candidate(run: Path) -> bool:
    """Whether a stage waits to be accepted or trained again."""
    return any((run / CANDIDATES).glob("[0-9]*/stage.json"))


def refuse_candidate(run: Path) -> None:
    """Refuse to go on over a stage that broke a limit.

    Raises:
        GateError: there is one.
    """
    for path in sorted((run / CANDIDATES).glob("[0-9]*/stage.json")):
        raise refused(run, read_stage(path.parent))


def refused(run: Path, stage: StageRecord) -> GateError:
    """The error that says what a candidate broke, and what can be done."""
    assert stage.gate is not None  # noqa: S101  # only such stages are candidates
    words = [said(one) for one in stage.gate.broken]
    others = f" (and {len(words) - _NAMED} more)" if len(words) > _NAMED else ""
    return GateError(
        f"{run}: stage {stage.index} ({', '.join(stage.trained)}) is kept as a candidate, for it breaks the gate: "
        f"{'; '.join(words[:_NAMED])}{others}. cit-fast learn {run} --accept takes it, --retry KEY=VALUE trains "
        "it again",
        stage.gate,
    )


def accept(run: str | Path) -> int:
    """Make the candidate the current stage; returns its number.

    Raises:
        RunError: no run there, another process works in it, or no candidate.
    """
    with _candidate(run) as (folder, path, index):
        if len(folder.stages()) != index:
            raise RunError(f"{path}: stage {index} cannot be accepted after stage {len(folder.stages()) - 1}")
        path.rename(folder.stage_path(index))
        return index


def discard(run: str | Path) -> int:
    """Delete the candidate, so that its stage is trained again; returns its number.

    Raises:
        RunError: as :func:`accept`.
    """
    with _candidate(run) as (folder, _, index):
        another_course(folder.path)
        return index


@contextlib.contextmanager
def _candidate(run: str | Path) -> Iterator[tuple[RunFolder, Path, int]]:
    """The run's folder, locked, with the candidate's and its number; what is left of it goes when the block is left."""
    folder = RunFolder(Path(run))
    read_run(folder.path)
    with folder.locked():
        found = sorted((folder.path / CANDIDATES).glob("[0-9]*"))
        if not found:
            raise RunError(f"{folder.path}: no stage is a candidate")
        index = int(found[0].name)
        yield folder, found[0], index
        shutil.rmtree(folder.checkpoints(index), ignore_errors=True)
        shutil.rmtree(folder.path / CANDIDATES)
