"""The protocol of a router, what every router shares, and the two that need no model."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from cit_fast.data.example import Example, Task
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.evaluation.run_files import stages_until
from cit_fast.files import read_checked_json, write_checked_json
from cit_fast.methods.routing.changes import changed, changes
from cit_fast.methods.stage import Assignment, Learned, Stage
from cit_fast.models.adapter_bank import BASE

FORMAT_VERSION = 3
_NAMES = ("set_of", "set", "latest")  # of what routers remember: names of tasks and sets alone
Reads = Literal["prompt", "instruction"]
SetStart = Literal["random", "previous", "nearest"]
"""How a new set starts: as ``adapter`` configures it, from the set trained last, or from the most similar task's."""
_Self = TypeVar("_Self", bound="SavedRouter")


class Router(Protocol):
    """Decides which adapter set a new task trains (reuse or expand), and which one answers a prompt.

    What it remembers is saved with each stage. A resumed run, and serving, load it from there: ``assign`` and
    ``learn`` see every task once, however often the run was interrupted before the stage was committed.
    """

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the adapter sets that ``assign`` has given so far, in order."""

    def assign(self, stage: Stage) -> Assignment:
        """The adapter set that the new task trains; a name not given before means a new set.

        Letters, digits, ``_`` and ``-``; a new set starts from the base model.
        """

    def learn(self, stage: Stage) -> Learned:
        """Called once the new task has trained its set, before anything is answered with it."""

    def answer(self, examples: Sequence[Example], stage: Stage) -> list[str]:
        """For each example the name of the set that answers it: one of ``sets``, or :data:`BASE` for none of them."""

    def save(self, folder: Path) -> None:
        """Write everything that :meth:`load` needs into ``folder``, made as needed; safetensors and JSON only.

        A router that takes ``earlier``, too, is given its folder of the stage before (:meth:`SavedRouter.save`).
        """

    # A router may begin in a later stage if it has ``adopt(stage, adapter)``, which tells it of an earlier task,
    # ``stage.task``, and of the set that this has trained, and says in ``adopts`` what it needs of that
    # (:attr:`SavedRouter.adopts`).

    @classmethod
    def load(cls, folder: Path) -> Router:
        """The router that :meth:`save` left there, options and all.

        Raises:
            RunError: a missing or damaged file.
        """


class SavedRouter:
    """Saving and loading for a router whose options are its constructor's arguments, kept under the same names.

    Subclasses say what they remember by :meth:`state` and take it back by :meth:`restore`.
    """

    name: ClassVar[str] = ""
    adopts: ClassVar[Literal["nothing", "names", "examples"]] = "nothing"
    """What :meth:`adopt` needs of a task; with ``"nothing"`` the router cannot begin in a later stage."""
    _written: tuple[bytes, dict[str, Any]] | None = None
    """The file that was written or read last, and the whole state as it was then."""

    def learn(self, stage: Stage) -> Learned:
        """Nothing to learn."""
        return Learned()

    def adopt(self, stage: Stage, adapter: str) -> None:
        """Get to know a task that was trained before this router began, with the set that it has trained."""

    def state(self) -> dict[str, Any]:
        """What is remembered, as plain JSON values."""
        return {}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take back what :meth:`state` gave; a ``KeyError``, ``TypeError`` or ``ValueError`` means a damaged file."""

    def save(self, folder: Path, earlier: Path | None = None) -> None:
        """Write ``router.json``.

        Args:
            earlier: the router's folder of the stage before in the same run; what is there, or in the stages before
                that, need not be written again.
        """
        options = {key: getattr(self, key) for key in inspect.signature(type(self)).parameters}
        state = json.loads(json.dumps(self.state()))
        known = None if earlier is None else self._state_in(earlier)
        what = {"state": state} if known is None else {"changes": list(changes(known, state))}
        path = Path(folder) / "router.json"
        write_checked_json(path, {"format_version": FORMAT_VERSION, "router": self.name, "options": options, **what})
        self._written = path.read_bytes(), state

    def _state_in(self, earlier: Path) -> dict[str, Any]:
        """The whole state that was saved there; from memory, if this router has written or read it last."""
        if self._written is None or (earlier / "router.json").read_bytes() != self._written[0]:
            return dict(read_router(earlier)["state"])
        return self._written[1]

    @classmethod
    def load(cls: type[_Self], folder: Path) -> _Self:
        """Read ``router.json``.

        Raises:
            RunError: a missing or damaged file, another kind of router, or another format version.
        """
        path = Path(folder) / "router.json"
        saved = read_router(folder)
        if saved["router"] != cls.name:
            raise RunError(f"{path}: holds the router {saved['router']!r}, not {cls.name!r}")
        try:
            router = cls(**saved["options"])
            router.restore(copy.deepcopy(saved["state"]), Path(folder))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path}: damaged ({error!r})") from None
        router._written = path.read_bytes(), saved["state"]
        return router


def read_router(folder: Path) -> dict[str, Any]:
    """The content of a ``router.json``, checked for its shape; its state is whole, with what earlier stages have of it.

    Raises:
        RunError: a missing or damaged file, here or in an earlier stage that it builds on, or another format version.
    """
    latest = read_router_file(folder / "router.json")
    since = []  # what has changed, of each stage back to one that wrote its state whole
    for place in reversed(stages_until(folder)):
        found = latest if place == folder else read_router_file(place / "router.json")
        if "state" in found:
            break
        since.append(found["changes"])
    else:
        raise RunError(f"{folder / 'router.json'}: damaged (it tells changes, and there is no stage before it)")
    state = found["state"]
    for each in reversed(since):
        try:
            state = changed(state, each)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RunError(f"{folder / 'router.json'}: damaged ({error!r})") from None
    return {**latest, "state": state}


def without_texts(content: dict[str, Any], replaced: Callable[[Any], Any]) -> dict[str, Any]:
    """The content of a ``router.json`` with its texts replaced: its own words, and names of tasks and sets, are none,
    even if an answer of a task is the same word.
    """

    def in_state(state: dict[str, Any]) -> dict[str, Any]:
        return {name: value if name in _NAMES else replaced(value) for name, value in state.items()}

    def in_change(change: dict[str, Any]) -> dict[str, Any]:
        if not change["at"]:
            return {**change, "is": in_state(change["is"])}
        first, *rest = change["at"]
        if first in _NAMES:
            return change
        return {**{what: replaced(value) for what, value in change.items()}, "at": [first, *replaced(rest)]}

    if "changes" in content:
        return {**content, "changes": list(map(in_change, content["changes"]))}
    return {**content, "state": in_state(content["state"])}


def read_router_file(path: Path) -> dict[str, Any]:
    """The content of a ``router.json``, checked for its shape: a whole state, or changes.

    Raises:
        RunError: a missing or damaged file, or another format version.
    """
    try:
        saved = read_checked_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path}: not there; it says which adapter set answers what, and belongs to a stage") from None
    what = ("changes", list) if "changes" in saved else ("state", dict)
    for key, kind in (("format_version", int), ("router", str), ("options", dict), what):
        if not isinstance(saved.get(key), kind):
            raise RunError(f"{path}: damaged ({key} is missing or no {kind.__name__})")
    if saved["format_version"] not in (2, FORMAT_VERSION):
        raise RunError(
            f"{path}: written in format version {saved['format_version']}; this cit-fast reads {FORMAT_VERSION}"
        )
    return saved


def routing_text(example: Example, reads: Reads = "prompt") -> str:
    """What a router reads of an example.

    Args:
        example: of a conversation, the user's turns count.
        reads: ``"prompt"``: instruction and input, which is all there is where a prompt is plain text;
            ``"instruction"``: the instruction alone.

    Raises:
        DataError: there is nothing to read.
    """
    if reads == "instruction" and example.instruction_span is not None:
        text = example.task_instruction
    elif example.messages:
        text = "\n\n".join(content for role, content in example.messages[:-1] if role == "user")
    elif reads == "prompt" and example.input.strip():
        text = f"{example.instruction}\n\n{example.input}"
    else:
        text = example.instruction
    if not text.strip():
        raise DataError(f"{example.source or f'task {example.task!r}'}: an empty prompt cannot be routed")
    return text


def check_start(start: str) -> None:
    """Refuse what is no :data:`SetStart`.

    Raises:
        ConfigError: another word.
    """
    if start not in ("random", "previous", "nearest"):
        raise ConfigError(f"start: {start!r} is unknown; expected random, previous or nearest")


def check_reads(reads: str) -> None:
    """Refuse what :func:`routing_text` does not know.

    Raises:
        ConfigError: neither ``"prompt"`` nor ``"instruction"``.
    """
    if reads not in ("prompt", "instruction"):
        raise ConfigError(f"reads: {reads!r} is unknown; expected 'prompt' or 'instruction'")


def set_name(task: Task, taken: Sequence[str]) -> str:
    """A name for the adapter set of ``task``, unlike any in ``taken``.

    PEFT tells the parameters of adapters apart by ``.name.`` in their keys; with its prefix, no name can be that of a
    module.
    """
    plain = f"task-{re.sub(r'[^A-Za-z0-9_-]+', '-', task.name)}"
    name, count = plain, 1
    # Folders carry the names, and not every file system tells upper from lower case.
    while name.lower() in {each.lower() for each in taken}:
        count += 1
        name = f"{plain}-{count}"
    return name


class SharedRouter(SavedRouter):
    """One adapter set for all tasks; after another router, the one that was trained last."""

    name = "shared"
    adopts: ClassVar[Literal["nothing", "names", "examples"]] = "names"

    def __init__(self) -> None:
        self._set = "shared"

    @property
    def sets(self) -> tuple[str, ...]:
        """The one."""
        return (self._set,)

    def assign(self, stage: Stage) -> Assignment:
        """Always the same set."""
        return Assignment(self._set)

    def adopt(self, stage: Stage, adapter: str) -> None:
        """Go on with this set."""
        self._set = adapter

    def answer(self, examples: Sequence[Example], stage: Stage) -> list[str]:
        """Always the same set."""
        return [self._set] * len(examples)

    def state(self) -> dict[str, Any]:
        """The set, if it is another router's."""
        return {} if self._set == "shared" else {"set": self._set}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take it back."""
        self._set = str(state.get("set", "shared"))


class StackedRouter(SharedRouter):
    """One adapter set for all tasks, which grows by a part with every task; the earlier parts stay as they are.

    All parts are active, in training and afterwards (O-LoRA). Every task adds ``adapter.r`` to the set's rank.
    """

    name = "stacked"
    adopts = "nothing"  # the parts of another router's set were trained together

    def assign(self, stage: Stage) -> Assignment:
        """Always the same set, with a new part."""
        return Assignment("shared", grows=True)


class OracleRouter(SavedRouter):
    """A set per task, and each example tells its task: the upper bound of what any router can reach."""

    name = "oracle"
    adopts = "names"

    def __init__(self) -> None:
        self._set_of: dict[str, str] = {}

    @property
    def sets(self) -> tuple[str, ...]:
        """One per task."""
        return tuple(self._set_of.values())

    def assign(self, stage: Stage) -> Assignment:
        """A new set."""
        self._set_of[stage.task.name] = set_name(stage.task, self.sets)
        return Assignment(self._set_of[stage.task.name])

    def adopt(self, stage: Stage, adapter: str) -> None:
        """Take the task and its set as they are."""
        self._set_of[stage.task.name] = adapter

    def answer(self, examples: Sequence[Example], stage: Stage) -> list[str]:
        """The set of each example's task; the base model for a task that has trained none.

        Raises:
            DataError: an example that does not name its task.
        """
        for index, example in enumerate(examples):
            if not example.task:
                raise DataError(
                    f"prompt {index}: the oracle router must be told the task; give Example(..., task=...), one of "
                    f"{', '.join(self._set_of)}"
                )
        return [self._set_of.get(example.task, BASE) for example in examples]

    def state(self) -> dict[str, Any]:
        """Which set belongs to which task."""
        return {"set_of": self._set_of}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take it back."""
        self._set_of = {str(task): str(name) for task, name in state["set_of"].items()}
