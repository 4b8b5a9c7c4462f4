"""Configurations with one or two values that nobody expects, at any key there is, through a whole tiny run."""

from __future__ import annotations

import copy
import dataclasses
import random
import typing
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from rich.console import Console
from transformers import TrainingArguments

from cit_fast import ContinualTrainer
from cit_fast.data import TaskSource
from cit_fast.methods.config import presets
from cit_fast.methods.registry import PARTS
from cit_fast.models.config import DataConfig, ModelConfig
from cit_fast.report import write_report
from cit_fast.run.config import EvaluationConfig, RunConfig, load_config
from tests.fuzz.values import plausible, value

# Slow, and right to be: a user may ask for them.
_SLOW_TRAINING = {"torch_compile", "torch_compile_backend", "torch_compile_mode", "num_train_epochs", "max_steps"}
_LENGTHS = (-1, 0, 1, 2, 0.5, float("nan"), float("inf"), -3, None, "x", "1", True, [1])


def base(model: Path) -> dict[str, Any]:
    """A configuration that runs in a second."""
    return {
        "version": 1,
        "name": "fuzz",
        "output": "runs",
        "seed": 0,
        "methods": ["sequential"],
        "model": {"name": str(model)},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "data": {
            "tasks": ["units", {"builtin": "records", "name": "r"}],
            "train": 4,
            "dev": 1,
            "test": 2,
            "max_length": 160,
        },
        "training": {"per_device_train_batch_size": 4, "use_cpu": True},
        "evaluation": {"max_new_tokens": 2},
    }


def _options(rng: random.Random) -> tuple[str, str, str, Any]:
    """A kind of part, one of its names, one of that part's options, and the option's annotation."""
    kind = rng.choice(list(PARTS))
    name = rng.choice(list(PARTS[kind]))
    module, _, attribute = PARTS[kind][name].rpartition(".")
    made = getattr(import_module(module), attribute)
    hints = typing.get_type_hints(made.__init__)
    hints.pop("return", None)
    option = rng.choice(list(hints) or ["x"])
    return kind, name, option, hints.get(option)


def mutate(config: dict[str, Any], rng: random.Random) -> str:
    """Put one value somewhere, as often one that may be meant; says where."""
    where = rng.randrange(10)

    def given(hint: Any = None) -> Any:
        return value(rng) if hint is None or rng.random() < 0.5 else plausible(hint, rng)

    if where == 0:
        key = rng.choice([*RunConfig.model_fields, "extra", "prest"])
        config[key] = given()
        return key
    if where in (1, 2):
        hints = typing.get_type_hints(TrainingArguments)
        key = rng.choice([field.name for field in dataclasses.fields(TrainingArguments) if field.init])
        odd = rng.choice(_LENGTHS) if key in _SLOW_TRAINING else given(hints[key])
        return _put(config, "training", key, odd)
    if where == 3:
        hints = typing.get_type_hints(LoraConfig)
        key = rng.choice([field.name for field in dataclasses.fields(LoraConfig)])
        return _put(config, "adapter", key, given(hints.get(key)))
    if where in (4, 5):
        section, kind = rng.choice([("data", DataConfig), ("evaluation", EvaluationConfig), ("model", ModelConfig)])
        key = rng.choice(list(kind.model_fields))
        return _put(config, section, key, given(kind.model_fields[key].annotation))
    if where == 6:
        hints = typing.get_type_hints(TaskSource)
        key = rng.choice([field.name for field in dataclasses.fields(TaskSource)])
        source = {"builtin": "units", key: given(hints[key])}
        if key in ("path", "dataset"):
            del source["builtin"]
        return _put(config, "data", "tasks", [source])
    if where == 7:
        odd = given()
        named = [{key: odd} for key in ("preset", "name")]
        config["methods"] = [rng.choice([odd, *named, {"preset": "sequential", "replay": odd}])]
        return "methods"
    if where == 8:
        part, name, option, hint = _options(rng)
        config["methods"] = [{"preset": "sequential", "name": "own", part: {"name": name, option: given(hint)}}]
        return f"{part}.{name}.{option}"
    config["methods"] = [rng.choice(list(presets()))]
    return "preset"


def _put(config: dict[str, Any], section: str, key: str, given: Any) -> str:
    if not isinstance(config.get(section), dict):
        config[section] = {}
    config[section][key] = given
    return f"{section}.{key}"


def maker(model: Path) -> Callable[[random.Random], tuple[str, Callable[[], str | None]]]:
    def make(rng: random.Random) -> tuple[str, Callable[[], str | None]]:
        config = copy.deepcopy(base(model))
        places = [mutate(config, rng) for _ in range(rng.choice([1, 1, 2]))]
        try:
            text = yaml.safe_dump(config, default_flow_style=None)
        except RecursionError:
            text = "data: " + "[" * 5000
        if rng.random() < 0.1:
            cut = rng.randrange(len(text))
            text = (
                text[:cut]
                + rng.choice(["", "\t", "&a *a ", "!!python/object:os.system {}\n", "\x00", "{", "- "])
                + text[cut:]
            )

        def attempt() -> None:
            path = Path("run.yaml")
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            settings = load_config(path)
            folders = ContinualTrainer(settings, console=Console(quiet=True)).run()
            write_report(folders, Path("report.html"))

        return f"{', '.join(places)}\n{text[:3000]}", attempt

    return make
