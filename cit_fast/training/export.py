"""A run's weights in the formats of PEFT and transformers, for use without this package."""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

from cit_fast.errors import ConfigError, LeftOutWarning, RunError
from cit_fast.evaluation.mixed_batches import read_adapter_config, read_adapter_weights
from cit_fast.files import commit_folder, write_json
from cit_fast.text import first_line
from cit_fast.training.model import load_adapter, load_weights
from cit_fast.training.pretrained import load_model, load_tokenizer, resolve_model
from cit_fast.training.serving import adapter_folders, read_trained


def export_adapters(run: str | Path, out: str | Path) -> list[str]:
    """Write each adapter set of a run's last stage as the PEFT folder ``out/<set>``.

    ``PeftModel.from_pretrained(base, "out/<set>")`` loads it. A set that cannot be read is left out with a warning.

    Args:
        run: a run folder.
        out: a folder that does not exist yet, or is empty; it appears whole or not at all.

    Returns:
        Names of the sets written.

    Raises:
        RunError: no trained stage, not one readable set, a run that trained the whole model, or ``out`` is in use.
    """
    run, out = Path(run), Path(out)
    _, config, stage = read_trained(run)
    weights = run / "stages" / f"{stage.index:02d}"
    if (weights / "model").is_dir():
        raise RunError(f"{run}: trained the whole model, so it has no adapters; {weights / 'model'} is the model")
    folders, gone = adapter_folders(weights), dict[str, str]()
    for name, folder in folders.items():
        try:
            read_adapter_config(folder)
            read_adapter_weights(folder)
        except RunError as error:
            gone[name] = str(error)
    names = [name for name in folders if name not in gone]
    if not names:
        raise RunError(f"{run}: no adapter set can be exported: {next(iter(gone.values()))}")

    def fill(target: Path) -> None:
        for name in names:
            shutil.copytree(folders[name], target / name)
            path = target / name / "adapter_config.json"
            # A folder's name must find it from anywhere; a hub's name does already.
            base = str(Path(config.model.name).resolve()) if Path(config.model.name).is_dir() else config.model.name
            settings = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {**settings, "base_model_name_or_path": base, "revision": config.model.revision})

    _write(out, fill)
    for reason in gone.values():
        warnings.warn(f"left out: {reason}", LeftOutWarning, stacklevel=2)
    return names


def export_merged(run: str | Path, out: str | Path, name: str, trust_remote_code: bool = False) -> None:
    """Write the base model with adapter set ``name`` merged into its weights, and the tokenizer, as ``out``.

    ``AutoModelForCausalLM.from_pretrained("out")`` loads it. The weights keep the base model's dtype, so in bfloat16 an
    answer may differ from the adapter's by rounding.

    Args:
        run, out: as in :func:`export_adapters`.
        name: one of the run's sets; of a run that trained the whole model, anything.
        trust_remote_code: run code that comes with the base model.

    Raises:
        RunError: as :func:`export_adapters`, no such set, a damaged one, or a kind that cannot be merged.
    """
    run, out = Path(run), Path(out)
    _check_free(out)
    _, config, stage = read_trained(run)
    weights = run / "stages" / f"{stage.index:02d}"
    base = config.model.model_copy(update={"trust_remote_code": trust_remote_code})
    whole = (weights / "model").is_dir()
    if not whole:
        folders = adapter_folders(weights)
        if name not in folders:
            raise RunError(f"{run}: has no adapter set {name!r}; there are {', '.join(folders)}")
        read_adapter_config(folders[name])
    folder = resolve_model(base)
    tokenizer, model = load_tokenizer(folder, trust_remote_code), load_model(folder, base)
    if whole:
        model = load_weights(model, weights)
    else:
        adapted = load_adapter(model, folders[name])
        if not hasattr(adapted, "merge_and_unload"):  # prompt and prefix tuning: tokens, not weights
            kind = adapted.peft_config[name].peft_type.value
            raise RunError(f"{folders[name]}: cannot be merged: {kind} has no weights to merge")
        try:
            model = adapted.merge_and_unload(safe_merge=True)
        except (NotImplementedError, ValueError) as error:  # a layer that PEFT cannot merge, or not without NaN
            raise RunError(f"{folders[name]}: cannot be merged: {first_line(error)}") from error

    def fill(target: Path) -> None:
        try:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
        except ValueError as error:  # a generation configuration that transformers itself refuses to write
            raise ConfigError(f"{folder}: cannot be saved again: {first_line(error)}") from None

    _write(out, fill)


def _check_free(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RunError(f"{out}: there is something already; choose another folder")


def _write(out: Path, fill: Callable[[Path], None]) -> None:
    _check_free(out)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        commit_folder(temporary, out)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
