"""A run's weights in the formats of PEFT and transformers, for use without this package."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from cit_fast.embeddings.weights import read_input_embeddings
from cit_fast.errors import ConfigError, LeftOutWarning, RunError
from cit_fast.evaluation.records import RunRecord
from cit_fast.evaluation.run_files import check_files, stage_folder
from cit_fast.files import new_folder, write_json
from cit_fast.inference import route
from cit_fast.inference.continual_model import adapter_folders, damaged_sets, read_trained, router_of
from cit_fast.inference.model_card import UNKNOWN, adapter_card, merged_card, sets_card
from cit_fast.methods.routing import SwitchTokensRouter
from cit_fast.models.adapter_bank import (
    MOST_SERVED_RANK,
    AdapterBank,
    NotPlainLoraError,
    read_adapter_config,
    read_adapter_weights,
    served_elsewhere,
)
from cit_fast.models.adapters import load_adapter, load_weights
from cit_fast.models.config import ModelConfig
from cit_fast.models.encoder_decoder import few_tokens
from cit_fast.models.loading import full_precision
from cit_fast.models.pretrained import load_model, load_tokenizer, resolve_model
from cit_fast.text import first_line


def export_adapters(
    run: str | Path,
    out: str | Path,
    stage: int | None = None,
    engine: Literal["vllm"] | None = None,
    license_: str = UNKNOWN,
    router: bool = False,
) -> list[str]:
    """Write each adapter set of a run's stage, by default the last, as the PEFT folder ``out/<set>``.

    ``PeftModel.from_pretrained(base, "out/<set>")`` loads it, which is tried before anything appears: one set of each
    kind must give the logits that it gives here. A set that cannot be read is left out with a warning.

    Args:
        run: a run folder.
        out: a folder that does not exist yet, or is empty; it appears whole or not at all.
        stage: its number, from 1.
        engine: that will serve them: ``out/start-vllm.sh`` starts it with all sets.
        license_: the hub's identifier of the weights' licence, for the model cards.
        router: write the router, too, as ``out/router.safetensors``, with the base model's token embeddings in it, from
            which it reads a prompt; and ``out/route.py``, which routes with it by numpy alone.

    Returns:
        Names of the sets written.

    Raises:
        RunError: no trained stage, not one readable set, a run that trained the whole model, a set that the engine
            cannot serve, a router that reads something else than token means, or ``out`` is in use.
    """
    run, out = Path(run), Path(out)
    record, config, stages = read_trained(run, stage)
    weights = stage_folder(run, stages[-1])
    if (weights / "model").is_dir():
        raise RunError(f"{run}: trained the whole model, so it has no adapters; {weights / 'model'} is the model")
    folders, unusable = adapter_folders(run, stages), damaged_sets(run, stages)
    for name, folder in folders.items():
        if name in unusable:
            continue
        try:
            read_adapter_config(folder)
            read_adapter_weights(folder)
        except RunError as error:
            unusable[name] = str(error)
    names = [name for name in folders if name not in unusable]
    if not names:
        raise RunError(f"{run}: no adapter set can be exported: {next(iter(unusable.values()))}")
    # A folder's name must find it from anywhere; a hub's name does already.
    base = str(Path(config.model.name).resolve()) if Path(config.model.name).is_dir() else config.model.name
    script = ""
    if engine == "vllm":
        script = start_vllm(base, config.model.revision, {name: read_adapter_config(folders[name]) for name in names})
        for key in ("quantization", "kwargs"):
            if getattr(config.model, key):
                warnings.warn(
                    f"model.{key} is the run's own: {out}/start-vllm.sh loads the base without, and answers otherwise",
                    LeftOutWarning,
                    stacklevel=2,
                )

    routing = None
    if router and unusable:
        raise RunError(f"{run}: a router without all of its sets cannot be exported: {next(iter(unusable.values()))}")
    if router:
        check_files(weights, stages[-1], "router/")
        routing = _router_tensors(run, record, weights, config.model.model_copy(update={"trust_remote_code": False}))

    def fill(target: Path) -> None:
        if routing is not None:
            save_file(routing[0], target / "router.safetensors", {"router": routing[1]})
            shutil.copyfile(route.__file__, target / "route.py")
        if script:
            (target / "start-vllm.sh").write_text(script, encoding="utf-8")
            (target / "start-vllm.sh").chmod(0o755)
        for name in names:
            shutil.copytree(folders[name], target / name)
            path = target / name / "adapter_config.json"
            settings = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {**settings, "base_model_name_or_path": base, "revision": config.model.revision})
            _write_card(target / name, adapter_card(record, config, stages, name, license_))
        _write_card(target, sets_card(record, config, names, license_))

        _check_exported(target, folders, names, config.model.model_copy(update={"trust_remote_code": False}))

    _write(out, fill)
    for reason in unusable.values():
        warnings.warn(f"left out: {reason}", LeftOutWarning, stacklevel=2)
    return names


def _router_tensors(run: Path, record: RunRecord, weights: Path, base: ModelConfig) -> tuple[dict[str, Tensor], str]:
    """What :mod:`cit_fast.inference.route` routes with: matrices, and the rest as JSON.

    Raises:
        RunError: a router that reads something else than token means.
    """
    router = router_of(record, weights)
    if not isinstance(router, SwitchTokensRouter):
        name = record.method.get("router", {}).get("name")
        raise RunError(f"{run}: its router is {name}; switch-tokens alone can be exported")
    folder = resolve_model(base)
    try:
        embeddings = read_input_embeddings(folder)
    except ConfigError:
        embeddings = load_model(folder, base).get_input_embeddings().weight.detach()
    if base.dtype != "auto":
        embeddings = embeddings.to(getattr(torch, base.dtype))
    tensors, told = router.as_tensors(embeddings)
    return {name: each.contiguous() for name, each in tensors.items()}, json.dumps(told)


_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be
_VLLM_PORT = 8001
_SETS_A_BATCH = 8  # each takes memory of the GPU


def start_vllm(base: str, revision: str | None, adapters: Mapping[str, Any]) -> str:
    """A shell script, to lie beside the sets' folders, that serves them with vLLM.

    Args:
        base: folder or hub name of the base model. ``adapters``: each set's PEFT configuration.

    Raises:
        RunError: a set that vLLM refuses, or would serve otherwise than it was trained.
    """
    for name, adapter in adapters.items():
        if not served_elsewhere(adapter):
            raise RunError(
                f"adapter set {name!r}: vLLM serves LoRA of a causal model, of one rank up to {MOST_SERVED_RANK} and "
                f"one alpha, without biases; merge it instead: cit-fast export RUN OUT --merge {name}"
            )
    rank = next(rank for rank in _VLLM_RANKS if rank >= max(adapter.r for adapter in adapters.values()))
    words = ["vllm", "serve", base, *(["--revision", revision] if revision else []), "--served-model-name", "base"]
    words += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(min(len(adapters), _SETS_A_BATCH))]
    words += ["--max-cpu-loras", str(len(adapters)), "--lora-modules", *(f"{name}=./{name}" for name in adapters)]
    return (
        "#!/bin/sh\n"
        f"# Then, anywhere: cit-fast serve RUN --upstream http://HOST:{_VLLM_PORT}/v1\n"
        'cd "$(dirname "$0")" || exit\n'
        f'exec {shlex.join(words)} --port "${{PORT:-{_VLLM_PORT}}}" "$@"\n'
    )


def export_merged(
    run: str | Path,
    out: str | Path,
    name: str,
    trust_remote_code: bool = False,
    stage: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    license_: str = UNKNOWN,
) -> None:
    """Write the base model with adapter set ``name`` merged into its weights, and the tokenizer, as ``out``.

    The sum is made in float32, which takes four bytes a weight of memory, and rounded once. Quantised weights are
    merged into as what they stand for, so the result is no longer quantised. That it answers as the
    adapter does is tried before anything appears, and that ``AutoModelForCausalLM.from_pretrained("out")`` does.
    An adapter's update is often smaller than a weight's last bit in half precision: where rounding has moved the
    logits by more than a twentieth of their size, a warning says so. Where the adapter is on one of two embeddings that
    share their weights, they no longer do (``tie_word_embeddings: false``).

    Args:
        run, out, stage: as in :func:`export_adapters`.
        name: one of the run's sets; of a run that trained the whole model, anything.
        trust_remote_code: run code that comes with the base model.
        dtype: of the weights; ``"auto"``: the base model's.
        license_: as in :func:`export_adapters`.

    Raises:
        RunError: as :func:`export_adapters`, no such set, a damaged one, or a kind that cannot be merged.
    """
    run, out = Path(run), Path(out)
    _check_free(out)
    record, config, stages = read_trained(run, stage)
    weights = stage_folder(run, stages[-1])
    base = config.model.model_copy(update={"trust_remote_code": trust_remote_code})
    whole = (weights / "model").is_dir()
    if not whole:
        folders = adapter_folders(run, stages)
        if name not in folders:
            raise RunError(f"{run}: has no adapter set {name!r}; there are {', '.join(folders)}")
        if (damaged := damaged_sets(run, stages).get(name)) is not None:
            raise RunError(damaged)
        read_adapter_config(folders[name])
    else:
        check_files(weights, stages[-1], "model/")
    folder = resolve_model(base)
    tokenizer, model = load_tokenizer(folder, trust_remote_code), load_model(folder, base)
    own = model.dtype if dtype == "auto" else getattr(torch, dtype)
    # Some tensors are kept in float32 whatever the model's dtype is.
    apart = {name: tensor.dtype for name, tensor in _floats(model) if tensor.dtype != model.dtype}
    if whole:
        model = load_weights(model, weights / "model")
        expected = _few_logits(model)
    else:
        try:
            model = full_precision(model)
        except ConfigError as error:
            raise RunError(f"{folder}: cannot be merged into: {error}") from None
        _untie(model, read_adapter_weights(folders[name]))
        adapted = load_adapter(model, folders[name])
        expected = _few_logits(adapted)
        if not hasattr(adapted, "merge_and_unload"):  # prompt and prefix tuning: tokens, not weights
            kind = adapted.peft_config[name].peft_type.value
            raise RunError(f"{folders[name]}: cannot be merged: {kind} has no weights to merge")
        try:
            model = adapted.merge_and_unload(safe_merge=True)
        except (NotImplementedError, ValueError) as error:  # a layer that PEFT cannot merge, or not without NaN
            raise RunError(f"{folders[name]}: cannot be merged: {first_line(error)}") from error
        _check_alike(expected, _few_logits(model), f"{folders[name]}: the merged model")
    for tensor_name, tensor in _floats(model):
        tensor.data = tensor.data.to(apart.get(tensor_name, own))
    rounded = _few_logits(model)

    def fill(target: Path) -> None:
        try:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            for path in folder.glob("*processor_config.json"):  # of images
                shutil.copyfile(path, target / path.name)
        except ValueError as error:  # a generation configuration that transformers itself refuses to write
            raise ConfigError(f"{folder}: cannot be saved again: {first_line(error)}") from None
        _write_card(target, merged_card(record, config, stages, "" if whole else name, license_))
        plain: dict[str, Any] = {"dtype": str(own).removeprefix("torch."), "quantization": None, "kwargs": {}}
        again = load_model(target, base.model_copy(update=plain))
        _check_alike(rounded, _few_logits(again), f"{out}: the merged model, loaded again")

    _write(out, fill)
    size, moved = expected.abs().amax().float(), (expected.float() - rounded.float()).abs().amax()
    if moved > size / 20:
        warnings.warn(
            f"{out}: rounded to {str(own).removeprefix('torch.')}, logits of up to {size:.3g} differ by up to "
            f"{moved:.3g} from the adapter's; dtype float32 keeps them",
            LeftOutWarning,
            stacklevel=2,
        )


def _floats(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, x) for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_floating_point()]


def _untie(model: Any, adapter: Mapping[str, Tensor]) -> None:
    """Give the output projection weights of its own where it shares the embeddings' and an adapter is on either."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None or head.weight is not embeddings.weight:
        return
    paths = [path for path, module in model.named_modules() if module is head or module is embeddings]
    if not any(f".{path}." in f".{key}" for path in paths for key in adapter):
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # what save_pretrained leaves out


_TOKENS = 16
_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2}


@torch.no_grad()
def _few_logits(model: Any) -> Tensor:
    """[16, V] for tokens from all over the vocabulary."""
    tokens = torch.linspace(0, model.get_input_embeddings().weight.shape[0] - 1, _TOKENS).long()[None]
    logits: Tensor = model.eval()(**few_tokens(model, tokens.to(model.device)), use_cache=False).logits[0]
    return logits.cpu()


def _check_alike(expected: Tensor, found: Tensor, what: str) -> None:
    """Check that two models give the same logits, up to the rounding of merged weights.

    Raises:
        RunError: they do not.
    """
    size, apart = expected.float().abs().amax(), (expected.float() - found.float()).abs().amax()
    if not apart <= _ROUNDING.get(expected.dtype, 5e-2) * size:
        raise RunError(
            f"{what}, does not answer as the adapter does here (logits of up to {size:.3g} differ by {apart:.3g}); "
            "nothing was written"
        )


def _check_exported(target: Path, folders: Mapping[str, Path], names: Sequence[str], base: ModelConfig) -> None:
    """Check that the folders in ``target``, loaded by PEFT, answer as here; of sets alike but for their weights, one.

    Raises:
        RunError: it does not.
    """
    try:
        model = load_model(resolve_model(base), base)
    except ConfigError as error:  # adapters can be taken elsewhere without their base model
        warnings.warn(f"not tried with the base model: {error}", LeftOutWarning, stacklevel=4)
        return
    kinds = {(target / name / "adapter_config.json").read_text(encoding="utf-8"): name for name in reversed(names)}
    expected: dict[str, Tensor] = {}
    for name in kinds.values():
        bank = AdapterBank()
        with contextlib.suppress(NotPlainLoraError):
            bank.read(model, name, folders[name])
            with bank.answering([name]):
                expected[name] = _few_logits(model)
    for name in kinds.values():
        model = load_adapter(model, target / name)
        model.set_adapter(name)
        logits = _few_logits(model)
        _check_alike(expected.get(name, logits), logits, f"{target / name}: the adapter, loaded by PEFT")


def _write_card(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(text, encoding="utf-8")


def _check_free(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RunError(f"{out}: there is something already; choose another folder")


def _write(out: Path, fill: Callable[[Path], None]) -> None:
    _check_free(out)
    try:
        with new_folder(out) as temporary:
            fill(temporary)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error})") from error
