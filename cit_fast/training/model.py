"""A language model with its adapter sets: made for training, saved with a stage, taken up again, and used."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError

from cit_fast.data.example import Example
from cit_fast.data.prompts import PromptEncoder
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.generation import generate
from cit_fast.evaluation.record import read_run, read_stages
from cit_fast.files import link_tree, write_json
from cit_fast.training.config import RunConfig, describe
from cit_fast.training.pretrained import load_model, load_tokenizer, resolve_model


def prompt_encoder(tokenizer: Any, config: RunConfig) -> PromptEncoder:
    """The encoder that ``config.data`` describes."""
    return PromptEncoder(
        tokenizer,
        max_length=config.data.max_length,
        system_prompt=config.data.system_prompt,
        on_overflow=config.data.on_overflow,
    )


def train_adapter(model: Any, config: RunConfig, name: str, seed: int) -> Any:
    """``model`` ready to train adapter set ``name``: made when new, the only one with gradients.

    Without an adapter configuration the model itself is trained.
    """
    if config.adapter is None:
        return model
    from peft import get_peft_config, get_peft_model
    from transformers import set_seed

    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "default":
        raise ConfigError(
            f"router: {name!r} cannot name an adapter set; use letters, digits, '_' and '-' ('default' is PEFT's own)"
        )
    if isinstance(model, PeftModel) and name in model.peft_config:
        model.set_adapter(name)
        return model
    set_seed(seed)  # a new set starts from the same numbers in a resumed run
    try:
        adapter = get_peft_config({"task_type": "CAUSAL_LM", **config.adapter})
        if not isinstance(model, PeftModel):
            return get_peft_model(model, adapter, adapter_name=name)
        model.add_adapter(name, adapter)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"adapter: {str(error).splitlines()[0]}") from None
    model.set_adapter(name)
    return model


def save_weights(
    model: Any,
    folder: Path,
    base_name: str,
    state_dict: dict[str, Any] | None = None,
    *,
    before: Path | None = None,
    trained: str | None = None,
) -> None:
    """Write what training changed: ``adapters/<name>`` as plain PEFT folders, or the whole model as ``model``.

    Args:
        state_dict: the model's weights, where the model itself holds only shards of them.
        before: the folder of an earlier stage whose adapter sets, all but ``trained``, have not changed: they are the
            same files under another name (copies where the file system has no hard links), so a family of a hundred
            adapters costs a stage the time and the space of one.
        trained: the adapter set that has changed.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder / "model", state_dict=state_dict)
        return
    names = list(model.peft_config)
    same = [name for name in names if before is not None and name != trained and (before / "adapters" / name).is_dir()]
    written = [name for name in names if name not in same]
    model.save_pretrained(folder / "adapters", selected_adapters=written, state_dict=state_dict)
    for name in written:
        path = folder / "adapters" / name / "adapter_config.json"
        # The folder the base was loaded from means nothing on another machine; its name does. Modules are a set.
        config = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": base_name}
        if isinstance(config.get("target_modules"), list):
            config["target_modules"] = sorted(config["target_modules"])
        write_json(path, config)
    for name in same:
        link_tree(typing.cast("Path", before) / "adapters" / name, folder / "adapters" / name)


def load_weights(base: Any, folder: Path, trainable: bool = False) -> Any:
    """``base`` with the weights that :func:`save_weights` left in a stage folder.

    Raises:
        RunError: a missing or damaged file, or an adapter of another base model.
    """
    whole = folder / "model"
    if whole.is_dir():
        try:
            return type(base).from_pretrained(
                whole, dtype=base.dtype, attn_implementation=base.config._attn_implementation
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(f"{whole}: cannot be loaded: {str(error).splitlines()[0]}") from None
    model: Any = base
    adapters = sorted((folder / "adapters").glob("*/adapter_config.json"))
    if not adapters:
        raise RunError(f"{folder}: holds neither adapters nor a model; the stage is damaged")
    for path in adapters:
        name = path.parent.name
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(str(path.parent), name, is_trainable=trainable)
            else:
                model = PeftModel.from_pretrained(model, str(path.parent), adapter_name=name, is_trainable=trainable)
        except Exception as error:  # PEFT and safetensors raise half a dozen kinds for a damaged or foreign file
            raise RunError(f"{path.parent}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return model


class ContinualModel:
    """A finished (or running) run as a model that answers prompts.

    Example::

        model = ContinualModel.from_run("runs/quickstart/random-replay")
        model.generate(["Write the number in words.\\n\\n42"])
    """

    def __init__(self, model: Any, encoder: PromptEncoder) -> None:
        self.model, self.encoder = model, encoder

    @classmethod
    def from_run(cls, run: str | Path, device: str | None = None, trust_remote_code: bool = False) -> ContinualModel:
        """Load the base model and the weights of the last committed stage.

        Args:
            run: a run folder.
            device: where to put it; the GPU where there is one.
            trust_remote_code: run code that comes with the base model; what the run's own record says does not count.

        Raises:
            RunError: no run there, or no stage trained yet.
        """
        run = Path(run)
        record, stages = read_run(run), read_stages(run)
        if not stages or stages[-1].index == 0:
            raise RunError(f"{run}: no stage has been trained yet")
        try:
            config = RunConfig.model_validate({k: v for k, v in record.config.items() if k in RunConfig.model_fields})
        except ValidationError as error:
            raise RunError(describe(error, f"{run / 'run.json'}: config")) from None
        base = config.model.model_copy(update={"trust_remote_code": trust_remote_code})
        folder = resolve_model(base)
        tokenizer = load_tokenizer(folder, trust_remote_code)
        model = load_weights(load_model(folder, base), run / "stages" / f"{stages[-1].index:02d}")
        if isinstance(model, PeftModel):
            model.set_adapter(stages[-1].adapter)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, prompt_encoder(tokenizer, config))

    def generate(self, prompts: Sequence[str | Example], max_new_tokens: int = 64, batch_size: int = 16) -> list[str]:
        """Greedy answers.

        Args:
            prompts: texts (instruction and input together) or examples.
            max_new_tokens: longest answer; ``batch_size``: prompts at a time.
        """
        examples = [Example(p, references=("-",)) if isinstance(p, str) else p for p in prompts]
        return generate(
            self.model,
            [self.encoder.prompt(example) for example in examples],
            tokenizer=self.encoder.tokenizer,
            pad_token_id=self.encoder.pad_token_id,
            eos_token_ids=self.encoder.stop_token_ids,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
