"""Model cards of exported weights: what they are, what they learned, how they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from cit_fast.data.builtin import is_builtin_task
from cit_fast.data.sources import TaskSource
from cit_fast.errors import ConfigError
from cit_fast.evaluation.records import RunRecord, StageRecord
from cit_fast.methods.config import descriptions
from cit_fast.models.config import ModelConfig
from cit_fast.models.encoder_decoder import is_encoder_decoder
from cit_fast.models.loading import known_loading, quantization_config
from cit_fast.models.pretrained import local_model
from cit_fast.models.wrappers import sees_images
from cit_fast.run.config import RunConfig

UNKNOWN = "unknown"
"""The licence, where none is given: the hub's word."""


def adapter_card(run: RunRecord, config: RunConfig, stages: Sequence[StageRecord], name: str, license_: str) -> str:
    """The README.md of one adapter set as a PEFT folder.

    Args:
        stages: of the run, up to the exported one. ``name``: of the set.
        license_: the hub's identifier of a licence.
    """
    others = len({stage.adapter for stage in stages if stage.index > 0}) - 1
    beside = f", one of {others + 1} sets of a run" if others else ""
    base, revision = config.model.name, config.model.revision
    pinned = f', revision="{revision}"' if revision else ""
    kind, loaded = _loaded(config.model)
    model, reader, variable = _classes(config.model)
    lines = [
        f"An adapter for {_linked(base)}{beside}, trained by cit-fast.",
        "",
        *_learned(run, config, stages, name),
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {model}, {reader}{kind}",
        "",
        f'base = {model}.from_pretrained("{base}"{pinned}{loaded})',
        f'{variable} = {reader}.from_pretrained("{base}"{pinned})',
        f'model = PeftModel.from_pretrained(base, "{name}")  # this folder',
        "```",
    ]
    return _card(base, "peft", license_, f"{name}, {run.method_name}", lines)


def _classes(model: ModelConfig) -> tuple[str, str, str]:
    """transformers' classes that load the model and what reads for it, and what the latter is called."""
    folder = local_model(model)
    try:
        config = None if folder is None else known_loading(folder, model.kwargs, trust_remote_code=False)[1]
    except ConfigError:  # with code of its own, which is not run for a card
        config = None
    if is_encoder_decoder(config):
        return "AutoModelForSeq2SeqLM", "AutoTokenizer", "tokenizer"
    if sees_images(config):
        return "AutoModelForImageTextToText", "AutoProcessor", "processor"
    return "AutoModelForCausalLM", "AutoTokenizer", "tokenizer"


def _loaded(model: ModelConfig) -> tuple[str, str]:
    """What else is imported, and said, to load the base as the run did."""
    said = [f"{key}={value!r}" for key, value in model.kwargs.items()]
    if model.quantization is None:
        return "", "".join(f", {each}" for each in said)
    kind = type(quantization_config(model.quantization)).__name__
    fields = ", ".join(f"{key}={value!r}" for key, value in model.quantization.items() if key != "quant_method")
    return f", {kind}", "".join(f", {each}" for each in (*said, f"quantization_config={kind}({fields})"))


def merged_card(run: RunRecord, config: RunConfig, stages: Sequence[StageRecord], name: str, license_: str) -> str:
    """The README.md of a base model with a set merged into it; without a ``name``, of one that was trained whole."""
    base = config.model.name
    model, reader, variable = _classes(config.model)
    what = f"with the adapter set `{name}` merged into its weights" if name else "with all its weights trained"
    lines = [
        f"{_linked(base)} {what}, by cit-fast.",
        "",
        *_learned(run, config, stages, name),
        "",
        "```python",
        f"from transformers import {model}, {reader}",
        "",
        f'model = {model}.from_pretrained("this folder", dtype="auto")',
        f'{variable} = {reader}.from_pretrained("this folder")',
        "```",
    ]
    return _card(base, "transformers", license_, f"{run.method_name} of {_short(base)}", lines)


def sets_card(run: RunRecord, config: RunConfig, names: Sequence[str], license_: str) -> str:
    """The README.md beside the folders of several sets."""
    lines = [
        f"Adapters for {_linked(config.model.name)} that learned one task after another, by the method "
        f"`{run.method_name}` of cit-fast. Each folder is a PEFT adapter with a "
        "card of its own:",
        "",
        *(f"* [`{name}`]({name})" for name in names),
        "",
        "```python",
        'model = PeftModel.from_pretrained(base, "this repository", subfolder="' + names[0] + '")',
        "```",
    ]
    return _card(config.model.name, "peft", license_, f"{run.method_name} of {_short(config.model.name)}", lines)


def _card(base: str, library: str, license_: str, title: str, lines: Sequence[str]) -> str:
    of_hub = base if not Path(base).is_dir() and base.count("/") == 1 else None
    data = ModelCardData(
        base_model=of_hub,
        library_name=library,
        license=license_,
        pipeline_tag="text-generation",
        tags=["cit-fast", "continual-learning", *(["lora"] if library == "peft" else [])],
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n" + "\n".join(lines) + "\n"


def _learned(run: RunRecord, config: RunConfig, stages: Sequence[StageRecord], name: str) -> list[str]:
    """The tasks that the set has trained, with their scores then and as last measured, and where their data is from."""
    own = [stage for stage in stages if stage.index > 0 and (not name or stage.adapter == name)]
    now = {task: score for stage in stages for task, score in stage.scores.items() if stage.index > 0}
    data = dict(zip(run.tasks, map(_source, config.data.tasks or ()), strict=False))
    says = descriptions().get(run.method_name)
    rows = [
        f"| {task} | {stage.index} | {_score(stage.scores.get(task))} | {_score(now.get(task))} | "
        f"{run.metrics.get(task, '')} | {data.get(task, 'given from Python')} |"
        for stage in own
        for task in stage.trained
    ]
    versions = run.environment.get("versions", {})
    made = ", ".join(
        f"{what} {versions[what]}" for what in ("cit-fast", "torch", "transformers", "peft") if what in versions
    )
    return [
        f"Method: `{run.method_name}`" + (f". {says}" if says else "."),
        "",
        "| task | stage | score when learned | score now | metric | data |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Scores are of the run's own test examples (out of 100; one run, seed {run.seed}). Made with {made}.",
    ]


def _source(task: str | TaskSource) -> str:
    """Where a task's data is from, without folders of this machine."""
    if isinstance(task, str):
        return f"built-in task {task}" if is_builtin_task(task) else Path(task).name
    if task.dataset is not None:
        parts = [task.dataset, task.subset, task.revision and f"revision {task.revision}"]
        return ", ".join(part for part in parts if part)
    if task.builtin is not None:
        return f"built-in task {task.builtin}"
    paths = (task.path,) if isinstance(task.path, str) else task.path or ()
    return ", ".join(Path(path).name for path in paths)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _short(base: str) -> str:
    return Path(base).name


def _linked(base: str) -> str:
    return f"`{_short(base)}`" if Path(base).is_dir() else f"[{base}](https://huggingface.co/{base})"


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload an exported folder to the model hub, as whoever ``hf auth login`` or ``HF_TOKEN`` says.

    Args:
        repository: ``owner/name``; made if it is not there.

    Returns:
        Its address.

    Raises:
        RunError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    from cit_fast.errors import RunError
    from cit_fast.text import first_line

    api: Any = HfApi(library_name="cit-fast")
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by cit-fast")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise RunError(f"{folder}: written, and not pushed to {repository}: {first_line(error)}") from None
    return str(url)
