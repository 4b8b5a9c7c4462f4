"""A run as a model that answers prompts, each by the adapter set that its router chooses."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError

from cit_fast.data.example import Example
from cit_fast.errors import DataError, LeftOutWarning, RunError
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.evaluation.run_files import adapter_sets, check_files, read_run, read_stages, set_folder, stage_folder
from cit_fast.files import damaged_files
from cit_fast.methods.routing import Router, SharedRouter, load_router
from cit_fast.methods.stage import Stage
from cit_fast.models.adapter_bank import BASE, AdapterBank, NotPlainLoraError
from cit_fast.models.adapters import load_adapter, load_encoder, load_weights
from cit_fast.models.forward import undisturbed
from cit_fast.models.generation import generate
from cit_fast.models.pretrained import load_model, resolve_model
from cit_fast.models.prompts import PromptEncoder
from cit_fast.models.wrappers import learned_positions
from cit_fast.run.config import RunConfig, describe


class ContinualModel:
    """A finished (or running) run as a model that answers prompts.

    Example::

        model = ContinualModel.from_run("runs/quickstart/random-replay")
        model.generate(["Write the number in words.\\n\\n42"])

    Args:
        model: the base model with its sets in ``bank``; else a PEFT model, or one trained whole.
        sets: the adapter sets that can answer. ``unusable``: those that cannot, with the reason.
        router: which set answers a prompt; without one, whatever is active in ``model``.
    """

    def __init__(
        self,
        model: Any,
        encoder: PromptEncoder,
        bank: AdapterBank | None = None,
        router: Router | None = None,
        sets: Sequence[str] = (),
        unusable: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.encoder, self.bank, self.router = model, encoder, bank, router
        self.sets, self.unusable = tuple(sets), dict(unusable or {})
        self.run: Path | None = None
        self._again: Mapping[str, Any] = {}

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        device: str | None = None,
        trust_remote_code: bool = False,
        router: Router | None = None,
        stage: int | None = None,
        like: ContinualModel | None = None,
    ) -> ContinualModel:
        """Load the base model, once, and the adapter sets and the router of a committed stage, by default the last.

        A set that cannot be used is left out with a warning that names it; its prompts go to the best of the others, or
        to the base model where none fits.

        Args:
            run: a run folder.
            device: where to put it; the GPU where there is one.
            trust_remote_code: run code that comes with the base model; what the run's own record says does not count.
            router: instead of the run's; one of a class of your own must be given, from its ``load``.
            stage: its number, from 1.
            like: a model of another stage of this run, which is not answering meanwhile; its base model is taken over
                where that has been left as it was.

        Raises:
            RunError: no run there, no such stage or none trained yet, a damaged router, or not one set that can answer.
        """
        run = Path(run)
        again = {"device": device, "trust_remote_code": trust_remote_code, "router": router}
        record, config, stages = read_trained(run, stage)
        base = config.model.model_copy(update={"trust_remote_code": trust_remote_code})
        shared = like if like is not None and like.bank is not None and like.run == run else None
        folder = resolve_model(base)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        encoder = load_encoder(folder, base, config.data) if shared is None else shared.encoder
        weights = stage_folder(run, stages[-1])
        model = load_model(folder, base) if shared is None else shared.model
        encoder.fit_to(model)
        if (weights / "model").is_dir():
            check_files(weights, stages[-1], "model/")
            return cls(load_weights(model, weights / "model").to(device), encoder)._of(run, again)
        check_files(weights, stages[-1], "router/")
        router = router or router_of(record, weights)
        folders = adapter_folders(run, stages, router.sets)
        # A damaged set is left out by name; one base model serves the others.
        damaged = damaged_sets(run, stages)
        whole = {name: folder for name, folder in folders.items() if name not in damaged}
        bank, unusable = _read_bank(model.to(device), whole)
        if bank is None:
            if shared is not None:
                model = load_model(folder, base)  # PEFT changes the model that it is given
            model, unusable = _load_with_peft(model, whole)
            model.to(device)
        unusable = {name: reason for name in folders if (reason := (damaged | unusable).get(name))}
        sets = [name for name in folders if name not in unusable]
        if not sets:
            raise RunError(f"{run}: no adapter set can answer: {next(iter(unusable.values()))}")
        for name, reason in unusable.items():
            warnings.warn(
                f"adapter set {name!r} cannot be used: {reason}; the others answer its prompts",
                LeftOutWarning,
                stacklevel=2,
            )
        return cls(model, encoder, bank, router, sets, unusable)._of(run, again)

    def _of(self, run: Path, again: Mapping[str, Any]) -> ContinualModel:
        self.run, self._again = run, again
        return self

    def learn(self, tasks: Sequence[str | dict[str, Any]], **options: Any) -> ContinualModel:
        """Train more tasks in the run that this model is of; returns the model that has learned them.

        Args:
            tasks: as in :func:`cit_fast.learn`; ``options``: its others.

        Raises:
            RunError: this model is of no run; and as :func:`cit_fast.learn`.
        """
        from cit_fast.run.learn import learn

        if self.run is None:
            raise RunError("learn: this model was not loaded from a run (ContinualModel.from_run)")
        return self.from_run(learn(self.run, tasks, **options), **self._again)

    def route(self, prompts: Sequence[str | Example]) -> list[str]:
        """Name of the adapter set that answers each prompt, ``"__base__"`` for the base model alone.

        Raises:
            DataError: an empty prompt, one text instead of a list, or a model that was trained whole and has no sets.
        """
        if self.router is None:
            raise DataError("route: the run trained the whole model; there are no adapter sets to choose from")
        return self._route(_examples(prompts))

    def _route(self, examples: Sequence[Example]) -> list[str]:
        if self.router is None or not examples:
            return [BASE] * len(examples)
        context = Stage(self.model, self.encoder, damaged=frozenset(self.unusable))
        with self._undisturbed():
            chosen = self.router.answer(examples, context)
        # A router of the user's own may not know of sets that are unusable.
        return [BASE if name in self.unusable else name for name in chosen]

    def _undisturbed(self) -> AbstractContextManager[None]:
        """For a model that is there: one that is still to be read answers nothing."""
        return undisturbed(self.model) if isinstance(self.model, torch.nn.Module) else nullcontext()

    def generate(
        self,
        prompts: Sequence[str | Example],
        max_new_tokens: int = 64,
        batch_size: int = 16,
        adapters: Sequence[str] | None = None,
    ) -> list[str]:
        """Greedy answers; of several threads, one at a time.

        Args:
            prompts: texts (instruction and input together) or examples; cut to ``data.max_length`` tokens, of models
                with learned positions together with the longest answer.
            max_new_tokens: longest answer; ``batch_size``: prompts at a time, whatever their sets.
            adapters: the set of each prompt, as :meth:`route` gives them; routed where not given.

        Raises:
            DataError: an empty prompt, one that cannot be cut, one text instead of a list, or a set that is not there.
        """
        examples = _examples(prompts)
        if adapters is None and self.router is not None:
            adapters = self._route(examples)
        for name in adapters or ():
            if name in self.unusable:
                raise DataError(f"adapter set {name!r} cannot be used: {self.unusable[name]}")
        # Where positions are learned there is no place for an answer behind the last of them.
        reserve = max_new_tokens if learned_positions(self.model) is not None else 0
        return generate(
            self.model,
            [self.encoder.prompt(example, reserve=reserve) for example in examples],
            tokenizer=self.encoder.tokenizer,
            pad_token_id=self.encoder.pad_token_id,
            eos_token_ids=self.encoder.stop_token_ids,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            adapters=adapters,
            bank=self.bank,
        )


def read_trained(run: Path, stage: int | None = None) -> tuple[RunRecord, RunConfig, list[StageRecord]]:
    """A run's record, its configuration, and its stages up to a trained one, by default the last.

    Raises:
        RunError: no run there, a damaged record, no such stage, or none trained yet.
    """
    record, stages = read_run(run), read_stages(run)
    trained = [one.index for one in stages if one.index > 0]
    if not trained:
        raise RunError(f"{run}: no stage has been trained yet")
    if stage is not None and stage not in trained:
        raise RunError(f"{run}: has no trained stage {stage}; there are {min(trained)} to {max(trained)}")
    try:
        config = RunConfig.model_validate({k: v for k, v in record.config.items() if k in RunConfig.model_fields})
    except ValidationError as error:
        raise RunError(describe(error, f"{run / 'run.json'}: config")) from None
    return record, config, [one for one in stages if stage is None or one.index <= stage]


def adapter_folders(run: Path, stages: Sequence[StageRecord], expected: Sequence[str] = ()) -> dict[str, Path]:
    """The adapter sets after the last of these stages by name, and those that should be there.

    Raises:
        RunError: there are none.
    """
    last = stage_folder(run, stages[-1])
    found = {name: set_folder(run, stage) for name, stage in adapter_sets(stages).items()}
    if not any(folder.is_dir() for folder in found.values()):
        knows = f", and its router knows {', '.join(expected)}" if expected else ""
        raise RunError(f"{last}: holds neither adapters nor a model{knows}; the stage is damaged")
    return {name: found.get(name, last / "adapters" / name) for name in sorted({*found, *expected})}


def damaged_sets(run: Path, stages: Sequence[StageRecord]) -> dict[str, str]:
    """The adapter sets after the last of these stages whose files are not what was written, with the reason."""
    found = {}
    for set_name, stage in adapter_sets(stages).items():
        folder = stage_folder(run, stage)
        for name, reason in damaged_files(folder, stage.files, f"adapters/{set_name}/").items():
            found[set_name] = f"{folder / name}: damaged ({reason})"
    return found


def router_of(record: RunRecord, weights: Path) -> Router:
    """The router in a stage's folder.

    Raises:
        RunError: it is damaged, or of a class of the user's own.
    """
    if not (weights / "router").exists() and record.method.get("router", {}).get("name") == "shared":
        return SharedRouter()  # a run older than the folder, which for this router says nothing
    return load_router(weights / "router")


def _read_bank(base: Any, folders: Mapping[str, Path]) -> tuple[AdapterBank | None, dict[str, str]]:
    """The sets that can be read, and why the others cannot; no bank where one of them is not plain LoRA."""
    bank, unusable = AdapterBank(), dict[str, str]()
    for name, folder in folders.items():
        try:
            bank.read(base, name, folder)
        except NotPlainLoraError:
            return None, {}
        except RunError as error:
            unusable[name] = str(error)
    return bank, unusable


def _load_with_peft(model: Any, folders: Mapping[str, Path]) -> tuple[Any, dict[str, str]]:
    unusable: dict[str, str] = {}
    for name, folder in folders.items():
        try:
            model = load_adapter(model, folder)
        except RunError as error:
            unusable[name] = str(error)
    if isinstance(model, PeftModel):
        model.set_adapter(next(name for name in folders if name not in unusable))
    return model, unusable


def _examples(prompts: Sequence[str | Example]) -> list[Example]:
    if isinstance(prompts, str | Example):
        raise DataError("prompts: one prompt alone; expected a list of them, [prompt]")
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) and not prompt.strip():
            raise DataError(f"prompt {index} is empty")
    return [Example(each, references=("-",)) if isinstance(each, str) else each for each in prompts]
