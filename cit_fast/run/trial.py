"""Set-ups tried before a run's folder is made: what PEFT and transformers refuse only when a stage is built.

The model is a skeleton without memory (device "meta"), so a trial costs a fraction of a second and changes nothing.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cit_fast.data.example import Example, Task
from cit_fast.errors import ConfigError
from cit_fast.models.config import ModelConfig
from cit_fast.models.loading import auto_class, known_loading, try_quantization
from cit_fast.models.osf import is_osf
from cit_fast.models.prompts import PromptEncoder
from cit_fast.models.rewritten_base import rewrites_base
from cit_fast.models.seeing_adapters import adapter_fields
from cit_fast.run.config import RunConfig
from cit_fast.text import first_line

_AROUND_A_TURN = 16  # tokens of a chat template
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")


def skeleton(folder: Path, model: ModelConfig) -> Any:
    """The model of a folder without its weights; ``None`` where it cannot be made without them."""
    _, config = known_loading(folder, model.kwargs, model.trust_remote_code)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return auto_class(config).from_config(config, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError):
        return None  # loaded whole, the model says what is wrong itself


def try_base(folder: Path, model: ModelConfig, adapters: Sequence[Mapping[str, Any] | None]) -> None:
    """See that the base can be loaded as it is asked for, and that what trains is no part of a quantised one.

    Args:
        folder: of the model. ``adapters``: of the methods.

    Raises:
        ConfigError: it cannot, or is.
    """
    _, config = known_loading(folder, model.kwargs, model.trust_remote_code)
    if not try_quantization(model.quantization, config):
        return
    for adapter in adapters:
        if adapter is None or is_osf(adapter) or rewrites_base(adapter):
            what = "a model without an adapter" if adapter is None else "this adapter"
            raise ConfigError(
                f"model.quantization: {what} trains the base's own weights, and quantised ones cannot be trained; "
                "give a LoRA adapter with its plain initialisation, or leave the base as it is"
            )


def try_adapter(bare: Any, adapter: Mapping[str, Any]) -> None:
    """See that PEFT can put the adapter on the model, and that this machine has the memory for it.

    Args:
        bare: a :func:`skeleton`, which is used up.
        adapter: keys of a PEFT configuration.

    Raises:
        ConfigError: it cannot; the cause is chained.
    """
    from peft import get_peft_config, get_peft_model

    for key in _PATTERNS:
        _try_pattern(key, adapter.get(key))
    dropout = adapter.get("lora_dropout", 0.0)
    if not 0 <= dropout < 1:
        raise ConfigError(f"adapter.lora_dropout: {dropout}; expected a probability below 1")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(bare, get_peft_config(adapter_fields(bare, adapter)), adapter_name="trial")
    except Exception as error:  # whatever PEFT thinks of the options, in a dozen kinds
        if "meta" in str(error).lower():  # it looks at the weights' values, which are not there
            return
        raise ConfigError(f"adapter: {first_line(error)}") from error
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * trained > here and not torch.cuda.is_available():
        raise ConfigError(
            f"adapter: {trained:,} parameters need {4 * trained / 2**30:,.0f} GiB, and this machine has "
            f"{here / 2**30:,.0f}; is its rank meant?"
        )
    if trained == 0:
        raise ConfigError("adapter: leaves nothing to train in this model")


def _try_pattern(key: str, pattern: Any) -> None:
    """See that what PEFT takes for a regular expression is one; in a list, they are names."""
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"adapter.{key}: {pattern!r} is no regular expression: {error}") from None


def try_arguments(arguments: Any) -> None:
    """See that the optimizer, the schedule, the trackers and the kernels that TrainingArguments name can be had.

    Raises:
        ConfigError: a package is missing, or a name or an argument unknown; the cause is chained.
    """
    from transformers import Trainer
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.optimization import get_scheduler
    from transformers.utils import is_liger_kernel_available

    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    trials: dict[str, Callable[[], Any]] = {
        "log_level": arguments.get_process_log_level,
        "report_to": lambda: [kind() for kind in get_reporting_integration_callbacks(arguments.report_to)],
        "optim": lambda: _try_optimizer(Trainer.get_optimizer_cls_and_kwargs(arguments, model), model),
        "lr_scheduler_type": lambda: get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD(model.parameters(), lr=1.0),
            num_warmup_steps=arguments.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        ),
    }
    for key, trial in trials.items():
        if key == "optim" and arguments.optim_target_modules is not None:
            continue  # chosen from the model's own modules
        try:
            trial()
        except Exception as error:  # whatever a package that is missing or an argument that is unknown raises
            raise ConfigError(f"training.{key}: {first_line(error)}") from error
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError("training.use_liger_kernel: the package liger-kernel is not installed")


def _try_optimizer(made: tuple[Any, dict[str, Any]], model: torch.nn.Module) -> None:
    kind: Any = made[0]
    if isinstance(kind, type) and kind.__module__.startswith("torch."):  # others may want more than parameters
        kind(model.parameters(), **made[1])


def try_batches(arguments: Any, tasks: Sequence[Task]) -> None:
    """See that no task loses all its examples where incomplete batches are dropped, and that every process has some.

    Raises:
        ConfigError: one does.
    """
    for task in tasks:
        if len(task.train) < arguments.world_size:
            raise ConfigError(
                f"task {task.name!r} has {len(task.train)} training examples for {arguments.world_size} processes; "
                "each needs one"
            )
    if not arguments.dataloader_drop_last:
        return
    size = arguments.per_device_train_batch_size * max(arguments.world_size, 1)
    for task in tasks:
        if len(task.train) < size:
            raise ConfigError(
                f"training.dataloader_drop_last: task {task.name!r} has {len(task.train)} training examples, a batch "
                f"{size}: nothing would be trained"
            )


def try_lengths(encoder: PromptEncoder, tasks: Sequence[Task], held_out: Sequence[Task], config: RunConfig) -> None:
    """See that every example fits or can be shortened, where one that cannot be is an error.

    A text has no more tokens than bytes, so few need to be looked at.

    Raises:
        ExampleTooLongError: the first that does not fit.
    """
    if encoder.on_overflow == "skip" or encoder.max_length is None:
        return
    whole = encoder.on_overflow == "error"
    around = len(encoder.example(Example("a", "", ("a",))).input_ids)

    def long(examples: Sequence[Example], room: int, answers: bool) -> list[Example]:
        some = [example for example in examples if around + _bytes(example, whole, answers) > room]
        seen = [example for example in examples if example.images] if encoder.images is not None else []
        # Its images' tokens are known when they have been read: of those with most of them, the longest text stands in.
        most = max(seen, key=lambda one: (len(one.images), _bytes(one, whole, answers)), default=None)
        return some if most is None or most in some else [*some, most]

    for task in tasks:
        encoder.encode_all(long(task.train, encoder.max_length, True))
    for task in (*tasks, *held_out):
        reserve = config.evaluation.max_new_tokens
        for split in {config.evaluation.split, (config.gate and config.gate.on) or config.evaluation.split}:
            some = long(getattr(task, split), encoder.max_length - reserve, False)
            encoder.encode_prompts(some, reserve=reserve)


def _bytes(example: Example, whole: bool, answers: bool) -> int:
    """Of what has to fit of an example."""
    turns = [f"{role}{content}{' ' * _AROUND_A_TURN}" for role, content in example.messages[:-1]]
    texts = [
        *(turns or [example.instruction]),
        *([example.input] if whole else []),
        *example.references[: int(answers)],
    ]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
